//! The instance metadata service at 169.254.169.254 in the network namespaces of pods, for programs
//! in whose environment nothing is set.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::signal::Signal;

use super::*;
use crate::harness::counterparts::process::{Output, behind, run};
use crate::harness::counterparts::python;

mod attacks;
mod handover;
mod user_namespace;

const METADATA_V4: &str = "169.254.169.254:80";
const METADATA_V6: &str = "[fd00:ec2::254]:80";
const OPT_IN: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
const NAMESPACES: &str = "awsvid_imds_namespaces";

/// A shell script that knows the metadata service alone, as many programs do. It prints what it
/// got from the URL in its first argument, and exits with the status of the first error. Like an
/// SDK it retries a 503.
const SCRIPT: &str = r#"
ttl='X-aws-ec2-metadata-token-ttl-seconds: 300'
token=$(curl --silent --fail -X PUT -H "$ttl" "$1/latest/api/token") || exit
fetch() { curl --silent --fail --retry 30 --retry-max-time 60 -H "X-aws-ec2-metadata-token: $token" "$1"; }
role=$(fetch "$1/latest/meta-data/iam/security-credentials/") || exit
fetch "$1/latest/meta-data/iam/security-credentials/$role"
"#;

/// Prints the credentials of boto3's default chain, and where they are from.
const BOTO3: &str = "import boto3
found = boto3.Session().get_credentials()
print(found.method, found.get_frozen_credentials().access_key)";

/// Returns the tables of a daemon that serves metadata in this way, with its key in `folder`.
fn serving(mode: &str, folder: &Path, node: &NetnsNode) -> String {
    let key = folder.join("imds-key");
    let imds = format!("[imds]\nmode = {mode:?}\nkey_file = {key:?}\n");
    node.listen() + &imds
}

fn start(before: impl FnOnce(&NetnsNode)) -> Option<PodsStage> {
    PodsStage::set_with(before, |folder, node| serving("address", folder, node))
}

/// Adds a pod's namespace with a device, addresses and default routes. `set_up` runs before the
/// namespace is mounted.
fn add_pod(node: &NetnsNode, name: &str, set_up: impl FnOnce() + Send) {
    node.add_with(name, |_| {
        ip(&[
            "link", "add", "eth0", "type", "veth", "peer", "name", "eth1",
        ]);
        ip(&["link", "set", "eth1", "up"]);
        connect_device(1);
        set_up();
    });
}

/// Sets up the device `eth0` with the address of this host in a network of two.
fn connect_device(host: u8) {
    let (v4, v6) = (format!("10.9.0.{host}/24"), format!("2001:db8::{host}/64"));
    let other = 3 - host;
    ip(&["link", "set", "eth0", "up"]);
    ip(&["address", "add", &v4, "dev", "eth0"]);
    ip(&["address", "add", &v6, "dev", "eth0", "nodad"]);
    let (v4, v6) = (format!("10.9.0.{other}"), format!("2001:db8::{other}"));
    ip(&["route", "add", "default", "via", &v4]);
    ip(&["-6", "route", "add", "default", "via", &v6]);
}

/// Opts in, as a runtime does with the sysctls of a pod.
fn opt_in() {
    fs::write(OPT_IN, "974").unwrap();
}

/// Runs a command as a process of this pod, with only a path and a home in its environment.
fn run_in_pod(node: &NetnsNode, name: &str, cgroup: &Cgroup, words: &[&str]) -> Output {
    let enter = node.enter_pod(name, cgroup);
    let enter: Vec<&str> = enter.iter().map(String::as_str).collect();
    let mut command = behind(&enter, Path::new(words[0]));
    command
        .args(&words[1..])
        .env_clear()
        .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
        .env("HOME", "/nonexistent");
    run(command, b"", Duration::from_secs(60))
}

/// Returns whether the script gets credentials in this pod.
fn script_gets_credentials(node: &NetnsNode, name: &str, cgroup: &Cgroup, address: &str) -> bool {
    let url = format!("http://{}", address.trim_end_matches(":80"));
    let output = run_in_pod(node, name, cgroup, &["sh", "-c", SCRIPT, "sh", &url]);
    output.status.success() && output.stdout.contains("\"SecretAccessKey\"")
}

/// Returns whether the loopback device of this pod has the metadata address of IPv4, and of IPv6.
fn addresses(node: &NetnsNode, name: &str) -> [bool; 2] {
    let shown = node.inside(name, || {
        Command::new("ip")
            .args(["address", "show", "dev", "lo"])
            .output()
            .unwrap()
    });
    let shown = String::from_utf8(shown.stdout).unwrap();
    ["169.254.169.254", "fd00:ec2::254"].map(|address| shown.contains(address))
}

/// Returns whether it has both, or none of them.
fn has_address(node: &NetnsNode, name: &str) -> bool {
    let [v4, v6] = addresses(node, name);
    assert_eq!(v4, v6);
    v4
}

fn await_served(daemon: &Daemon, count: u64) {
    await_some(&format!("{count} pods are served"), TIMEOUT, || {
        (daemon.metric(NAMESPACES) == count).then_some(())
    });
}

fn failures(daemon: &Daemon, reason: &str) -> u64 {
    daemon.metric(&format!(
        "awsvid_pod_listener_failures_total{{reason=\"{reason}\"}}"
    ))
}

#[test]
fn pod_that_opts_in_is_served_with_nothing_set() {
    let Some(stage) = start(|node| {
        add_pod(node, "early", opt_in);
        add_pod(node, "other", || {});
    }) else {
        return;
    };
    let (node, daemon) = (&stage.site.node, &stage.daemon);
    // Those that are there at the start come before it is ready.
    assert_eq!(daemon.metric(NAMESPACES), 1);
    // The runtime sets the sysctl some time after the mount.
    add_pod(node, "late", || {});
    await_namespaces(daemon, 3);
    node.inside("late", opt_in);
    await_served(daemon, 2);
    let cgroups = [60, 61].map(Cgroup::of_pod);
    for (name, cgroup) in ["early", "late"].into_iter().zip(&cgroups) {
        for address in [METADATA_V4, METADATA_V6] {
            assert!(
                script_gets_credentials(node, name, cgroup, address),
                "{name}, {address}"
            );
        }
    }
    assert!(!has_address(node, "other"));
    assert!(node.connect("other", METADATA_V4.parse().unwrap()).is_err());
    let records = daemon.audit();
    let of_pods = records.iter().filter(|record| record["listener"] == "pod");
    assert!(of_pods.clone().count() > 0, "{records:#?}");
    for record in of_pods {
        assert_eq!(record["protocol"], "imds", "{record}");
    }
    // Only metadata is there.
    let answer = node.fetch("early", &cgroups[0], METADATA_V4.parse().unwrap());
    assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
    if let Some(python) = python("client-boto3") {
        let words = [python.to_str().unwrap(), "-c", BOTO3];
        let output = run_in_pod(node, "early", &cgroups[0], &words).success("boto3");
        assert!(output.starts_with("iam-role "), "{output}");
    }
}

/// This mode serves metadata at the ports of the endpoint, and adds no address to any pod.
#[test]
fn endpoint_mode_serves_the_pods_port_alone() {
    let Some(stage) = PodsStage::set_with(
        |node| add_pod(node, "a", opt_in),
        |folder, node| serving("endpoint", folder, node),
    ) else {
        return;
    };
    let (node, daemon) = (&stage.site.node, &stage.daemon);
    let cgroup = Cgroup::of_pod(67);
    assert!(script_gets_credentials(node, "a", &cgroup, V4));
    // An attempt would precede readiness. It would fail without the capability, and be counted.
    assert!(!has_address(node, "a"));
    assert_eq!(daemon.metric(NAMESPACES), 0);
    assert_eq!(failures(daemon, "imds_denied"), 0);
}

/// A router may announce the pod's IPv6 network at any time.
#[test]
fn ipv6_address_follows_that_of_the_pod() {
    let own = "2001:db8::1/64";
    let Some(stage) = start(|node| {
        add_pod(node, "a", || {
            ip(&["address", "delete", own, "dev", "eth0"]);
            opt_in();
        });
    }) else {
        return;
    };
    let (node, daemon) = (&stage.site.node, &stage.daemon);
    let cgroup = Cgroup::of_pod(65);
    assert!(script_gets_credentials(node, "a", &cgroup, METADATA_V4));
    assert_eq!(addresses(node, "a"), [true, false]);
    node.inside("a", || ip(&["address", "add", own, "dev", "eth0", "nodad"]));
    await_some("the address of IPv6 is there", TIMEOUT, || {
        addresses(node, "a")[1].then_some(())
    });
    for address in [METADATA_V4, METADATA_V6] {
        let served = script_gets_credentials(node, "a", &cgroup, address);
        assert!(served, "{address}");
    }
    assert_eq!(daemon.metric(NAMESPACES), 1);
    assert_eq!(failures(daemon, "imds_removed"), 0);
}

#[test]
fn address_is_removed_when_the_daemon_ends() {
    let Some(stage) = start(|node| add_pod(node, "a", opt_in)) else {
        return;
    };
    let PodsStage {
        daemon: mut first,
        site,
    } = stage;
    assert!(has_address(&site.node, "a"));
    // SIGKILL: the address stays, and its port is closed, so that SDKs go on at once.
    first.process().owned().end();
    assert!(has_address(&site.node, "a"));
    let connected = site.node.connect("a", METADATA_V4.parse().unwrap());
    assert_eq!(connected.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    let folder = folder();
    let mut second = site.start(
        folder.path(),
        &serving("address", folder.path(), &site.node),
    );
    assert_eq!(second.metric(NAMESPACES), 1, "{}", second.log());
    assert!(script_gets_credentials(
        &site.node,
        "a",
        &Cgroup::of_pod(62),
        METADATA_V4
    ));
    second.process().signal(Signal::SIGTERM);
    let ended = second.process().owned().wait(TIMEOUT).expect("it ends");
    assert!(ended.success(), "{ended}");
    assert!(!has_address(&site.node, "a"));
}

/// Answers each connection with one word, and counts them.
fn serve_word(listener: TcpListener) -> Arc<AtomicUsize> {
    let count = Arc::<AtomicUsize>::default();
    let counted = count.clone();
    std::thread::spawn(move || {
        for mut client in listener.incoming().map_while(Result::ok) {
            counted.fetch_add(1, Ordering::Relaxed);
            // A probe of awsvid has closed it.
            drop(client.write_all(b"pod"));
        }
    });
    count
}

#[test]
fn pods_own_server_on_port_80_keeps_it() {
    let mut server = None;
    let Some(stage) = start(|node| {
        let listen = || {
            opt_in();
            server = Some(TcpListener::bind("0.0.0.0:80").unwrap());
        };
        add_pod(node, "a", listen);
        // This one listens on the address of the pod alone.
        add_pod(node, "b", || {
            opt_in();
            drop(serve_word(TcpListener::bind("10.9.0.1:80").unwrap()));
        });
    }) else {
        return;
    };
    let (node, daemon) = (&stage.site.node, &stage.daemon);
    daemon.await_line(&[
        "opted in to 169.254.169.254, but port 80 is in use",
        "/netns/a",
    ]);
    assert_eq!(failures(daemon, "imds_port_taken"), 1);
    assert!(
        !has_address(node, "a"),
        "the server would answer as the metadata service"
    );
    assert!(script_gets_credentials(
        node,
        "b",
        &Cgroup::of_pod(63),
        METADATA_V4
    ));
    let mut own = TcpStream::from(node.connect("b", "10.9.0.1:80".parse().unwrap()).unwrap());
    let mut word = String::new();
    own.read_to_string(&mut word).unwrap();
    assert_eq!(word, "pod");
    drop(server);
    await_served(daemon, 2);
    assert!(script_gets_credentials(
        node,
        "a",
        &Cgroup::of_pod(64),
        METADATA_V4
    ));
    assert_eq!(failures(daemon, "imds_port_taken"), 1, "it is counted once");
    // In a pod that is served the port is taken for others.
    let bound = node.inside("a", || TcpListener::bind("0.0.0.0:80"));
    assert_eq!(bound.unwrap_err().kind(), ErrorKind::AddrInUse);
}

#[test]
fn route_or_service_at_the_address_is_respected() {
    let mut service = None;
    let Some(stage) = start(|node| {
        add_pod(node, "routed", || {
            opt_in();
            ip(&["route", "add", "169.254.169.254/32", "via", "10.9.0.2"]);
        });
        // A cloud's metadata service behind the default route.
        node.add_with("cloud", |_| {});
        let cloud = node.path("cloud");
        node.add_with("on-cloud", |_| {
            let cloud = cloud.to_str().unwrap();
            let peer = ["peer", "name", "eth0", "netns", cloud];
            ip(&[&["link", "add", "eth0", "type", "veth"][..], &peer].concat());
            connect_device(1);
            opt_in();
        });
        service = Some(node.inside("cloud", || {
            connect_device(2);
            ip(&["address", "add", "169.254.169.254/32", "dev", "lo"]);
            TcpListener::bind("169.254.169.254:80").unwrap()
        }));
    }) else {
        return;
    };
    let (node, daemon) = (&stage.site.node, &stage.daemon);
    let line = daemon.await_line(&["but a route leads there", "/netns/routed"]);
    assert!(line.contains("169.254.169.254/32 via 10.9.0.2"), "{line}");
    daemon.await_line(&["but another service answers there", "/netns/on-cloud"]);
    for reason in ["imds_routed", "imds_answered"] {
        assert_eq!(failures(daemon, reason), 1, "{reason}");
    }
    assert_eq!(daemon.metric(NAMESPACES), 0);
    assert!(!has_address(node, "routed") && !has_address(node, "on-cloud"));
    // The service is still that of the pod.
    assert!(
        node.connect("on-cloud", METADATA_V4.parse().unwrap())
            .is_ok()
    );
    assert!(service.is_some());
}

#[test]
fn capability_to_set_addresses_is_kept_in_this_mode_alone() {
    const NET_ADMIN: u64 = 1 << 12;
    for (mode, kept) in [("address", true), ("endpoint", false), ("off", false)] {
        let Some(stage) = PodsStage::set_with(|_| {}, |folder, node| serving(mode, folder, node))
        else {
            return;
        };
        let status = format!("/proc/{}/status", stage.daemon.pid());
        let status = fs::read_to_string(status).unwrap();
        for set in ["CapEff:\t", "CapPrm:\t"] {
            let value = status
                .lines()
                .find_map(|line| line.strip_prefix(set))
                .unwrap();
            let value = u64::from_str_radix(value, 16).unwrap();
            assert_eq!(value & NET_ADMIN != 0, kept, "{mode}, {set}{value:x}");
        }
    }
}

#[test]
fn missing_capability_is_logged_with_its_fix() {
    if !root() {
        return;
    }
    let folder = folder();
    let node = NetnsNode::start(folder.path());
    add_pod(&node, "a", opt_in);
    let upstream = Upstream::start(&[(0, "pod")]);
    let mut words = node.enter();
    words.extend(["setpriv", "--bounding-set", "-net_admin"].map(str::to_owned));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let listen = serving("address", folder.path(), &node);
    let configuration = upstream.configuration() + RULE;
    let daemon = Daemon::start_behind(&words, folder.path(), &listen, &configuration).ready();
    daemon.await_line(&["a capability is missing", "CAP_NET_ADMIN"]);
    daemon.await_line(&[
        "cannot be set up in pods: CAP_NET_ADMIN is missing",
        "add NET_ADMIN",
    ]);
    assert_eq!(failures(&daemon, "imds_denied"), 1);
    assert!(!has_address(&node, "a"));
    // The endpoint is served all the same.
    assert!(listens(&node, "a", V4));
}

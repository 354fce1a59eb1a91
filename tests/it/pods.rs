//! Listeners inside pods' network namespaces. They exist as long as the files on which a runtime
//! mounts those.

use std::fs;
use std::io::{ErrorKind, Read};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::harness::cgroup::Cgroup;
use crate::harness::client::fetch;
use crate::harness::counterparts::process::await_some;
use crate::harness::counterparts::{folder, http_get, root, skip};
use crate::harness::daemon::Daemon;
use crate::harness::is_slow;
use crate::harness::namespaces::{NetnsNode, Peer, ip};
use crate::harness::upstream::Upstream;

mod directory;
mod handover;
mod metadata;

/// Bounds steps that take milliseconds, on a machine that is busy with other tests.
const TIMEOUT: Duration = Duration::from_secs(30);
const V4: &str = "127.0.0.1:974";
const V6: &str = "[::1]:974";

const RULE: &str =
    "\n[[workload]]\nspiffe_id = \"spiffe://example.org/user/pod\"\ncgroup = \"/kubepods/**\"\n";

/// A daemon that serves every pod, by a rule that names all of their cgroups.
struct PodsStage {
    daemon: Daemon,
    site: PodSite,
}

/// The parts that daemons of one node share.
struct PodSite {
    node: NetnsNode,
    upstream: Upstream,
    folder: tempfile::TempDir,
}

impl PodsStage {
    /// Starts it, or returns `None` if the test is not root. `before` prepares the node before the
    /// daemon starts.
    fn set(before: impl FnOnce(&NetnsNode)) -> Option<Self> {
        Self::set_with(before, |_, node| node.listen())
    }

    /// Starts it with the configuration that `listen` makes of the folder and the node.
    fn set_with(
        before: impl FnOnce(&NetnsNode),
        listen: impl FnOnce(&Path, &NetnsNode) -> String,
    ) -> Option<Self> {
        if !root() {
            return None;
        }
        let folder = folder();
        let node = NetnsNode::start(folder.path());
        before(&node);
        let upstream = Upstream::start(&[(0, "pod")]);
        let site = PodSite {
            node,
            upstream,
            folder,
        };
        let daemon = site.start(site.folder.path(), &listen(site.folder.path(), &site.node));
        Some(Self { daemon, site })
    }

    /// Waits until the daemon listens in this number of namespaces.
    fn await_namespaces(&self, count: u64) {
        await_namespaces(&self.daemon, count);
    }
}

impl PodSite {
    /// Starts a daemon with its files in `folder`.
    fn start(&self, folder: &Path, listen: &str) -> Daemon {
        self.start_behind(&[], folder, listen).ready()
    }

    /// Starts one behind these words, and does not wait until it is ready.
    fn start_behind(&self, words: &[&str], folder: &Path, listen: &str) -> Daemon {
        let enter = self.node.enter();
        let enter = enter.iter().map(String::as_str);
        let words: Vec<&str> = enter.chain(words.iter().copied()).collect();
        let configuration = self.upstream.configuration() + RULE;
        Daemon::start_behind(&words, folder, listen, &configuration)
    }

    /// Starts a daemon that takes over from another.
    fn next(&self, folder: &Path) -> Daemon {
        self.start(
            folder,
            &handover::handing_over(self.folder.path(), &self.node),
        )
    }

    /// Returns whether a process of a pod is answered here, as its first act.
    fn serves(&self, name: &str, cgroup: &Cgroup, address: &str) -> bool {
        let answer = self.node.fetch(name, cgroup, address.parse().unwrap());
        answer.starts_with("HTTP/1.1 200") && answer.contains("AccessKeyId")
    }
}

fn await_namespaces(daemon: &Daemon, count: u64) {
    await_some(
        &format!("{count} namespaces are listened in"),
        TIMEOUT,
        || (daemon.metric("awsvid_pod_listeners") == count).then_some(()),
    );
}

/// Returns whether a process listens there.
fn listens(node: &NetnsNode, name: &str, address: &str) -> bool {
    node.connect(name, address.parse().unwrap()).is_ok()
}

#[test]
fn pod_is_served_from_first_act_and_leaves_nothing() {
    let Some(stage) = PodsStage::set(|node| node.add("early")) else {
        return;
    };
    let peers = [Peer::new(1), Peer::new(2)];
    assert_eq!(
        stage.daemon.metric("awsvid_pod_listeners"),
        1,
        "those that are there at the start come before it is ready"
    );
    for (i, peer) in peers.iter().enumerate() {
        stage
            .site
            .node
            .add_with(&format!("cni-{i}"), |_| peer.make());
    }
    stage.await_namespaces(3);
    for (i, name) in ["early", "cni-0", "cni-1"].into_iter().enumerate() {
        let cgroup = Cgroup::of_pod(u16::try_from(i).unwrap());
        for address in [V4, V6] {
            assert!(
                stage.site.serves(name, &cgroup, address),
                "{name}, {address}"
            );
        }
    }
    let requests = stage.daemon.audit();
    let by_pods = requests
        .iter()
        .filter(|record| record["listener"] == "pod")
        .collect::<Vec<_>>();
    assert_eq!(by_pods.len(), 6, "{requests:?}");
    assert!(
        by_pods
            .iter()
            .all(|record| record["spiffe_id"] == "spiffe://example.org/user/pod"),
        "{by_pods:?}"
    );
    // The daemon keeps an answered caller for the next refresh, but not its namespace.
    for (i, peer) in peers.iter().enumerate() {
        assert!(peer.exists());
        stage.site.node.remove(&format!("cni-{i}"));
        await_some("the namespace is freed", TIMEOUT, || {
            (!peer.exists()).then_some(())
        });
    }
    stage.await_namespaces(1);
    stage.site.node.remove("early");
    stage.await_namespaces(0);
}

#[test]
fn connections_are_cut_when_namespace_file_is_removed() {
    let Some(stage) = PodsStage::set(|_| {}) else {
        return;
    };
    stage.site.node.add("a");
    stage.await_namespaces(1);
    let mut open = TcpStream::from(stage.site.node.connect("a", V4.parse().unwrap()).unwrap());
    open.set_read_timeout(Some(TIMEOUT)).unwrap();
    // Only unmounted, which for inotify is not an event.
    stage.site.node.unmount("a");
    match open.read(&mut [0]) {
        Ok(count) => assert_eq!(count, 0),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    // Not because the daemon gave up waiting for a request.
    let gave_up = "awsvid_connections_dropped_total{reason=\"slow_head\"}";
    assert_eq!(stage.daemon.metric(gave_up), 0);
    stage.await_namespaces(0);
}

#[test]
fn namespace_is_entered_once_and_own_never() {
    let Some(stage) = PodsStage::set(|node| node.add_own("host")) else {
        return;
    };
    let peer = Peer::new(3);
    stage.site.node.add_own("host-too");
    stage.site.node.add_with("a", |_| peer.make());
    stage.site.node.add_again("a", "b");
    // The daemon sees this one after those before it.
    stage.site.node.add("last");
    stage.await_namespaces(2);
    let log = stage.daemon.log();
    assert!(!log.contains("is in use"), "{log}");
    // Either name may be the one by which it was entered.
    for name in ["a", "b"] {
        assert!(listens(&stage.site.node, name, V4), "{name}");
    }
    stage.site.node.remove("a");
    stage.site.node.remove("last");
    stage.await_namespaces(1);
    // A listener that is killed is bound again by the file that is left.
    kill(&stage.site.node, "b");
    await_some("the listener is back", TIMEOUT, || {
        listens(&stage.site.node, "b", V4).then_some(())
    });
    assert!(peer.exists());
    stage.site.node.remove("b");
    await_some("the namespace is freed", TIMEOUT, || {
        (!peer.exists()).then_some(())
    });
}

/// In a DaemonSet the daemon has a network of its own. The node's network serves all processes on
/// it (T5), even if it is mounted among those of pods.
#[test]
fn node_network_is_not_a_pod() {
    if !root() || !is_in_the_machines_network() {
        return;
    }
    let folder = folder();
    let node = NetnsNode::start(folder.path());
    node.add_own("node");
    ["daemon", "a"].into_iter().for_each(|name| node.add(name));
    let network = format!("--net={}", node.path("daemon").display());
    let mut words = node.enter();
    words.extend(["nsenter", &network, "--"].map(str::to_owned));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let upstream = Upstream::start(&[(0, "pod")]);
    let daemon = Daemon::start_behind(
        &words,
        folder.path(),
        &node.listen(),
        &(upstream.configuration() + RULE),
    );
    daemon.await_line(&["/netns/node", "is the machine's own network"]);
    daemon.await_line(&["serving workloads in pods"]);
    assert!(listens(&node, "a", V4));
    let log = daemon.log();
    assert_eq!(
        log.matches("serving a pod's network namespace").count(),
        1,
        "{log}"
    );
    // Once, whatever follows it.
    node.add("b");
    await_some("the next one is listened in", TIMEOUT, || {
        listens(&node, "b", V4).then_some(())
    });
    assert_eq!(
        daemon.log().matches("is the machine's own network").count(),
        1
    );
}

/// Returns whether a setting exists that no other network has, on any kernel.
fn is_in_the_machines_network() -> bool {
    let is = Path::new("/proc/sys/net/core/netdev_max_backlog").exists();
    if !is {
        skip("the tests are not in the network namespace in which the machine has started");
    }
    is
}

/// Kills a pod's listeners, as a pod with CAP_NET_ADMIN can.
fn kill(node: &NetnsNode, name: &str) {
    let killed = node.inside(name, || {
        Command::new("ss")
            .args(["-K", "-lnt", "sport = :974"])
            .output()
            .unwrap()
    });
    let message = String::from_utf8_lossy(&killed.stdout).into_owned();
    assert!(message.contains(":974"), "{message}");
}

#[test]
fn listener_killed_by_pod_is_rebound() {
    let Some(stage) = PodsStage::set(|node| node.add("a")) else {
        return;
    };
    let cgroup = Cgroup::of_pod(10);
    kill(&stage.site.node, "a");
    for address in [V4, V6] {
        await_some("the listener is back", TIMEOUT, || {
            listens(&stage.site.node, "a", address).then_some(())
        });
        assert!(stage.site.serves("a", &cgroup, address), "{address}");
    }
    let log = stage.daemon.log();
    assert_eq!(
        log.matches("listener was killed; rebinding").count(),
        2,
        "{log}"
    );
}

#[test]
fn occupied_pod_port_is_bound_once_free() {
    let Some(stage) = PodsStage::set(|_| {}) else {
        return;
    };
    let mut taken: Option<TcpListener> = None;
    stage
        .site
        .node
        .add_with("taken", |_| taken = Some(TcpListener::bind(V4).unwrap()));
    stage.site.node.add("other");
    stage.await_namespaces(2);
    let (cgroup, other) = (Cgroup::of_pod(11), Cgroup::of_pod(12));
    assert!(stage.site.serves("other", &other, V4) && stage.site.serves("taken", &cgroup, V6));
    let pod = cgroup
        .path()
        .parent()
        .unwrap()
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .trim_start_matches("pod");
    stage
        .daemon
        .await_line(&["/netns/taken", "a network namespace of this pod", pod]);
    stage
        .daemon
        .await_line(&["port 974 is in use: the pod is not served", "/netns/taken"]);
    drop(taken);
    stage.daemon.await_line(&["/netns/taken", "is free now"]);
    assert!(stage.site.serves("taken", &cgroup, V4));
    assert_eq!(
        stage
            .daemon
            .log()
            .matches("port 974 is in use: the pod is not served")
            .count(),
        1,
        "it is logged once, whatever is tried"
    );
    assert_eq!(
        stage
            .daemon
            .metric("awsvid_pod_listener_failures_total{reason=\"port_taken\"}"),
        1
    );
}

#[test]
fn pod_with_one_address_family_is_served() {
    let Some(stage) = PodsStage::set(|_| {}) else {
        return;
    };
    stage.site.node.add_with("v4", |_| {
        fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap()
    });
    stage.site.node.add("v6");
    stage.site.node.inside("v6", || {
        ip(&["address", "delete", "127.0.0.1/8", "dev", "lo"])
    });
    stage.await_namespaces(2);
    let (v4, v6) = (Cgroup::of_pod(13), Cgroup::of_pod(14));
    assert!(stage.site.serves("v4", &v4, V4) && stage.site.serves("v6", &v6, V6));
    let log = stage.daemon.log();
    assert!(!log.contains("port 974"), "{log}");
}

#[test]
fn netns_directory_may_appear_later_and_be_replaced() {
    let Some(stage) = PodsStage::set(|node| fs::remove_dir(node.directory()).unwrap()) else {
        return;
    };
    stage
        .daemon
        .await_line(&["netns_dir", "does not exist yet"]);
    fs::create_dir(stage.site.node.directory()).unwrap();
    stage.site.node.add("a");
    stage.await_namespaces(1);
    let aside = stage.site.folder.path().join("aside");
    fs::rename(stage.site.node.directory(), &aside).unwrap();
    stage.await_namespaces(0);
    fs::create_dir(stage.site.node.directory()).unwrap();
    stage.site.node.add("b");
    stage.await_namespaces(1);
    assert!(listens(&stage.site.node, "b", V4));
    // Over the directory another one is mounted, as `ip netns add` does.
    stage.site.node.within(|| {
        let directory = Some(stage.site.node.directory());
        nix::mount::mount(
            directory,
            stage.site.node.directory(),
            None::<&str>,
            nix::mount::MsFlags::MS_BIND,
            None::<&str>,
        )
        .unwrap();
    });
    stage.site.node.add("c");
    await_some("the new one is listened in", TIMEOUT, || {
        listens(&stage.site.node, "c", V4).then_some(())
    });
}

#[test]
fn missing_mount_or_privilege_is_logged_with_manifest_field() {
    let Some(stage) = PodsStage::set(|_| {}) else {
        return;
    };
    // A daemon without the host's mounts sees files without namespaces.
    for name in ["x", "y"] {
        fs::File::create_new(stage.site.node.path(name)).unwrap();
    }
    stage
        .daemon
        .await_line(&["mountPropagation: HostToContainer"]);
    await_some("both are counted", TIMEOUT, || {
        let counted = stage
            .daemon
            .metric("awsvid_pod_listener_failures_total{reason=\"not_mounted\"}");
        (counted == 2).then_some(())
    });
    assert_eq!(
        stage.daemon.log().matches("mountPropagation").count(),
        1,
        "for all of them together"
    );

    let folder = folder();
    let words = ["setpriv", "--bounding-set", "-sys_admin"];
    let configuration = stage.site.upstream.configuration() + RULE;
    let (status, log) = Daemon::run_to_exit_with(
        &words,
        folder.path(),
        &stage.site.node.listen(),
        &configuration,
    );
    assert_eq!(status, Some(78), "{log}");
    assert!(
        log.contains("add SYS_ADMIN to the container's securityContext.capabilities.add"),
        "{log}"
    );
}

#[test]
fn daemon_that_can_serve_no_pod_is_not_ready() {
    let Some(stage) = PodsStage::set(|node| node.add("a")) else {
        return;
    };
    let (folder, words) = (folder(), ["setpriv", "--bounding-set", "-net_bind_service"]);
    let listen = stage.site.node.listen();
    let daemon = stage.site.start_behind(&words, folder.path(), &listen);
    daemon.await_line(&[
        "not ready",
        "none of the 1 network namespaces of pods can be served",
    ]);
    let (status, body) = http_get(daemon.admin(), "/readyz").expect("an answer");
    assert_eq!(status, 503, "{body}");
}

/// containerd sets it with the pod's first container, long after the namespace is mounted.
#[test]
fn unprivileged_pod_ports_are_logged_at_bounded_rate() {
    let Some(stage) = PodsStage::set(|node| node.add("guarded")) else {
        return;
    };
    for name in ["open", "open-too"] {
        stage.site.node.add(name);
        stage.site.node.inside(name, || {
            fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "974").unwrap()
        });
    }
    let line = stage.daemon.await_line(&[
        "any user of a pod can bind port 974",
        "enable_unprivileged_ports = false",
    ]);
    assert!(
        line.contains("ip_unprivileged_port_start=974") && line.contains("/open"),
        "{line}"
    );
    stage.site.node.add("last");
    stage.await_namespaces(4);
    assert_eq!(
        stage
            .daemon
            .log()
            .matches("any user of a pod can bind port 974")
            .count(),
        1
    );
}

/// Measures the time from the start of the process, and from the mount, until the daemon listens in
/// each of this number of namespaces.
#[test]
fn many_namespaces_are_served_soon() {
    let slow = is_slow();
    // A loop that waits takes nothing that the others need.
    let count = if slow { 250 } else { 40 };
    let names = (0..count).map(|i| format!("cni-{i}")).collect::<Vec<_>>();
    let mut peers = Vec::new();
    let Some(stage) = PodsStage::set(|node| {
        for (i, name) in names.iter().enumerate() {
            let peer = (i % 10 == 0).then(|| Peer::new(100 + i));
            node.add_with(name, |_| peer.iter().for_each(Peer::make));
            peers.extend(peer);
        }
    }) else {
        return;
    };
    assert_eq!(stage.daemon.metric("awsvid_pod_listeners"), count);
    let took = stage.daemon.listening_in_pods_after();
    eprintln!("{count} namespaces: all listened in {took:?} after the start of the process");
    let mut longest = Duration::ZERO;
    for i in 0..10 {
        let name = format!("new-{i}");
        let listening = stage.site.node.add_and(&name, || {
            let mounted = Instant::now();
            while TcpStream::connect(V4).is_err() {
                assert!(mounted.elapsed() < TIMEOUT);
            }
            mounted.elapsed()
        });
        longest = longest.max(listening);
    }
    eprintln!("one more: listened in at most {longest:?} after the mount");
    // Each loop accepts, however many others wait: the test's own process is not in a pod, and gets
    // that error.
    for (name, address) in names.iter().flat_map(|name| [(name, V4), (name, V6)]) {
        let mut stream = TcpStream::from(
            stage
                .site
                .node
                .connect(name, address.parse().unwrap())
                .unwrap(),
        );
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        assert_eq!(fetch(&mut stream).0, 403, "{name}, {address}");
    }
    let last = names.last().unwrap();
    assert!(stage.site.serves(last, &Cgroup::of_pod(15), V4));
    let before = stage.daemon.descriptors();
    names.iter().for_each(|name| stage.site.node.remove(name));
    stage.await_namespaces(10);
    let removed = await_some("all are freed", TIMEOUT, || {
        peers
            .iter()
            .all(|peer| !peer.exists())
            .then(|| stage.daemon.descriptors())
    });
    assert!(
        removed + 3 * names.len() <= before + 8,
        "{before} descriptors, then {removed}"
    );
}

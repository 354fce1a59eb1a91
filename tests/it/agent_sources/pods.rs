//! Pods, referenced at the real SPIRE agent by their UIDs. awsvid lives in a pid namespace of its
//! own. It may neither read other processes nor open cgroups by their ids, as in a DaemonSet
//! without these privileges.

use std::path::Path;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;

use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::process::{await_some, behind, run};
use crate::harness::counterparts::spire::{Broker, Spire, SpireSetting};
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::{Daemon, PROGRAM};
use crate::harness::env::{AWSVID, awsvid_selectors, id};
use crate::harness::kubelet::FakeKubelet;
use crate::harness::namespaces::NetnsNode;
use crate::harness::sts::{AUDIENCE, OneRoleSts};
use crate::roles_anywhere::server::{Trust, VerifyingServer};

const V4: &str = "127.0.0.1:974";
const TIMEOUT: Duration = Duration::from_secs(60);
const LEAST: [&str; 9] = [
    "setpriv",
    "--bounding-set=-dac_read_search,-sys_ptrace,-perfmon",
    "--inh-caps=-dac_read_search,-sys_ptrace,-perfmon",
    "unshare",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    // As `mountPropagation: HostToContainer`.
    "--propagation=slave",
];

fn uid(pod: &Cgroup) -> String {
    pod.path()
        .parent()
        .unwrap()
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .replacen("pod", "", 1)
}

const NAMES: [&str; 3] = ["billing", "orders", "late"];

/// The pods of a node, all but the last one known to the kubelet, and the real agent.
struct PodNode {
    /// The daemon's own pod, which gets no identity.
    own: Cgroup,
    pods: [Cgroup; 3],
    node: NetnsNode,
    spire: Spire,
    kubelet: FakeKubelet,
}

impl PodNode {
    /// Starts it with the pods of these numbers, the daemon's the last.
    fn start(folder: &Path, [numbers @ .., own]: [u16; 4]) -> Option<Self> {
        let kubelet = FakeKubelet::start();
        let brokers = vec![Broker {
            id: AWSVID.to_owned(),
            reference_types: vec![Broker::BY_OBJECT],
        }];
        let setting = SpireSetting {
            brokers,
            attestor: kubelet.attestor(AWSVID),
            ..SpireSetting::default()
        };
        let spire = Spire::start_with(folder, setting)?;
        let selectors = awsvid_selectors(Path::new(PROGRAM));
        spire.register(AWSVID, &selectors.each_ref().map(String::as_str));
        for account in NAMES {
            spire.register(&id(account), &["k8s:ns:shop", &format!("k8s:sa:{account}")]);
        }
        let node = NetnsNode::start(folder);
        let pods = numbers.map(Cgroup::of_pod);
        for (pod, name) in pods.iter().zip(NAMES) {
            node.add(name);
            if name != "late" {
                kubelet.add_pod(&uid(pod), name);
            }
        }
        let own = Cgroup::of_pod(own);
        kubelet.add_pod(&uid(&own), "awsvid");
        Some(Self {
            own,
            pods,
            node,
            spire,
            kubelet,
        })
    }

    /// Returns words in front of a command that make it run in the daemon's pod.
    fn enter_own(&self) -> Vec<String> {
        let mut words = self.node.enter();
        words.extend(self.own.enter().map(str::to_owned));
        words.extend(LEAST.map(str::to_owned));
        words
    }

    /// Starts the daemon in its pod, and waits until it listens in all others.
    fn daemon(&self, folder: &Path, upstream: &str) -> Daemon {
        let words = self.enter_own();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let configuration = format!(
            "[identity]\nsource = \"spiffe-broker\"\nworkload_api_socket = \"unix://{}\"\nbroker_socket = \"unix://{}\"\naudience = \"{AUDIENCE}\"\n{upstream}",
            self.spire.agent_socket().display(),
            self.spire.broker_socket().display(),
        );
        let daemon =
            Daemon::start_behind(&words, folder, &self.node.listen(), &configuration).ready();
        await_some("all are listened in", TIMEOUT, || {
            (daemon.metric("awsvid_pod_listeners") == 3).then_some(())
        });
        daemon
    }

    /// Sends a request in the network namespace of this name. Returns its record.
    fn fetch(&self, daemon: &Daemon, name: &str, cgroup: &Cgroup) -> Value {
        let before = daemon.audit().len();
        let answer = self.node.fetch(name, cgroup, V4.parse().unwrap());
        assert!(answer.starts_with("HTTP/1.1 "), "{answer}");
        daemon.audit_after(before).pop().unwrap()
    }
}

/// Checks that the record is that of credentials for this pod, without a process.
fn assert_own(record: &Value, pod: &Cgroup, name: &str) {
    assert_eq!(
        (&record["reason"], &record["spiffe_id"]),
        (&Value::from("ok"), &Value::from(id(name))),
        "{record}"
    );
    assert_eq!(
        (&record["pod_uid"], record.get("pid")),
        (&Value::from(uid(pod)), None),
        "{record}"
    );
}

/// Returns the SPIFFE ID of the certificate that a request was signed with.
fn certified_name(canonical_request: &str) -> Option<&str> {
    let certificate = canonical_request
        .lines()
        .find_map(|line| line.strip_prefix("x-amz-x509:"))
        .expect("the header of the certificate");
    let der = BASE64.decode(certificate).expect("base64");
    NAMES.into_iter().find(|name| {
        let id = id(name);
        der.windows(id.len()).any(|part| part == id.as_bytes())
    })
}

/// X.509-SVIDs of pods, by references to them. An agent without its server has no tokens for a new
/// pod.
#[test]
fn each_pod_uses_its_own_certificate_with_spiffe_broker() {
    if !root() {
        return;
    }
    let folder = folder();
    let Some(mut node) = PodNode::start(folder.path(), [244, 245, 246, 247]) else {
        return;
    };
    let server = VerifyingServer::start(Trust::of(&node.spire.bundle()));
    let role = server.configuration("exchange = \"roles-anywhere\"");
    let daemon = node.daemon(folder.path(), &role);
    for (pod, name) in node.pods[..2].iter().zip(NAMES) {
        assert_own(&node.fetch(&daemon, name, pod), pod, name);
    }
    let other = node.fetch(&daemon, "billing", &node.pods[1]);
    assert_eq!(other["reason"], "other_pod");

    node.spire.stop_server();
    node.kubelet.add_pod(&uid(&node.pods[2]), "late");
    assert_own(
        &node.fetch(&daemon, "late", &node.pods[2]),
        &node.pods[2],
        "late",
    );
    let requests = server.sts.accepted_requests();
    let names: Vec<_> = requests
        .iter()
        .map(|request| certified_name(request))
        .collect();
    assert_eq!(names, NAMES.map(Some));
}

#[test]
fn each_pod_uses_its_own_entry_without_pids_with_spiffe_broker() {
    if !root() {
        return;
    }
    let folder = folder();
    let Some(node) = PodNode::start(folder.path(), [240, 241, 242, 243]) else {
        return;
    };
    let PodNode {
        pods,
        spire,
        kubelet,
        ..
    } = &node;
    let sts = OneRoleSts::start(&spire.issuer_url());
    let daemon = node.daemon(folder.path(), &sts.configuration());
    let words = node.enter_own();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let fetch = |name: &str, cgroup: &Cgroup| node.fetch(&daemon, name, cgroup);
    for (pod, name) in pods[..2].iter().zip(["billing", "orders"]) {
        assert_own(&fetch(name, pod), pod, name);
    }
    assert_eq!(fetch("billing", &pods[1])["reason"], "other_pod");

    // The kubelet does not know the pod yet at its first request, and the agent queries it at most
    // twice a second.
    let late = std::thread::scope(|scope| {
        let pending_fetch = scope.spawn(|| fetch("late", &pods[2]));
        await_some(
            "the agent has answered that it does not know it",
            TIMEOUT,
            || {
                spire
                    .agent_log()
                    .contains(&format!("pod with UID {} not found", uid(&pods[2])))
                    .then_some(())
            },
        );
        kubelet.add_pod(&uid(&pods[2]), "late");
        pending_fetch.join().unwrap()
    });
    assert_own(&late, &pods[2], "late");

    // The same by `check`, from the daemon's namespaces. Without a pod there is nothing to name.
    let check = |arguments: &[&str], status: i32| {
        let mut command = behind(&words, Path::new(PROGRAM));
        command
            .args(["check", "--output", "json", "--config"])
            .arg(folder.path().join("awsvid.toml"))
            .args(arguments);
        let output = run(command, b"", TIMEOUT);
        let findings = serde_json::from_str::<Value>(&output.stdout).unwrap()["findings"].clone();
        let ours = findings
            .as_array()
            .unwrap()
            .iter()
            .filter(|finding| finding["step"] != "machine");
        let ours: Vec<String> = ours.map(Value::to_string).collect();
        (ours.join("\n"), output.status.code() == Some(status))
    };
    // It has fewer privileges than awsvid on a plain node needs, which is a failure of its own.
    let exchanged = sts.exchanged();
    let (message, failed) = check(&["--pod", &uid(&pods[0])], 1);
    assert!(
        failed && message.contains(&format!("covers {}", id("billing"))),
        "{message}"
    );
    assert_eq!(sts.exchanged(), exchanged, "{message}");
    let (message, failed) = check(&["--pod", &uid(&pods[0]), "--exchange"], 1);
    assert!(
        failed && message.contains(&format!("assumed by {}", id("billing"))),
        "{message}"
    );
    assert_eq!(sts.exchanged(), exchanged + 1, "{message}");
    let (message, failed) = check(&[], 1);
    assert!(
        failed && message.contains("awsvid check --pod UID") && !message.contains("\"failed\""),
        "{message}"
    );

    // A cached pod is still served after its entry has been deleted, until the agent has denied it
    // twice.
    kubelet.remove_pods();
    let removed_at = Instant::now();
    assert_own(&fetch("orders", &pods[1]), &pods[1], "orders");
    await_some("its credentials end", Duration::from_secs(90), || {
        (fetch("orders", &pods[1])["outcome"] == "refused").then_some(())
    });
    assert!(
        removed_at.elapsed() < Duration::from_secs(60),
        "{:?}",
        removed_at.elapsed()
    );
}

//! Pods, referenced at the real SPIRE agent by their UIDs. awsvid lives in a pid namespace of its
//! own. It may neither read other processes nor open cgroups by their ids, as in a DaemonSet
//! without these privileges.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

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

#[test]
fn each_pod_uses_its_own_entry_without_pids_with_spiffe_broker() {
    if !root() {
        return;
    }
    let (folder, kubelet) = (folder(), FakeKubelet::start());
    let brokers = vec![Broker {
        id: AWSVID.to_owned(),
        reference_types: vec![Broker::BY_OBJECT],
    }];
    let setting = SpireSetting {
        brokers,
        attestor: kubelet.attestor(AWSVID),
        ..SpireSetting::default()
    };
    let Some(spire) = Spire::start_with(folder.path(), setting) else {
        return;
    };
    spire.register(
        AWSVID,
        &awsvid_selectors(std::path::Path::new(PROGRAM))
            .each_ref()
            .map(String::as_str),
    );
    for account in ["billing", "orders", "late"] {
        spire.register(&id(account), &["k8s:ns:shop", &format!("k8s:sa:{account}")]);
    }
    let sts = OneRoleSts::start(&spire.issuer_url());
    let node = NetnsNode::start(folder.path());
    let pods = [240, 241, 242].map(Cgroup::of_pod);
    for (pod, name) in pods.iter().zip(["billing", "orders", "late"]) {
        node.add(name);
        if name != "late" {
            kubelet.add_pod(&uid(pod), name);
        }
    }
    // The daemon's own pod, which gets no identity.
    let own = Cgroup::of_pod(243);
    kubelet.add_pod(&uid(&own), "awsvid");
    let mut words = node.enter();
    words.extend(own.enter().map(str::to_owned));
    words.extend(LEAST.map(str::to_owned));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let configuration = format!(
        "[identity]\nsource = \"spiffe-broker\"\nworkload_api_socket = \"unix://{}\"\nbroker_socket = \"unix://{}\"\naudience = \"{AUDIENCE}\"\n{}",
        spire.agent_socket().display(),
        spire.broker_socket().display(),
        sts.configuration()
    );
    let daemon =
        Daemon::start_behind(&words, folder.path(), &node.listen(), &configuration).ready();
    await_some("all are listened in", TIMEOUT, || {
        (daemon.metric("awsvid_pod_listeners") == 3).then_some(())
    });

    let fetch = |name: &str, cgroup: &Cgroup| {
        let before = daemon.audit().len();
        let answer = node.fetch(name, cgroup, V4.parse::<SocketAddr>().unwrap());
        assert!(answer.starts_with("HTTP/1.1 "), "{answer}");
        daemon.audit_after(before).pop().unwrap()
    };
    let is_own = |record: &Value, pod: &Cgroup, name: &str| {
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
    };
    for (pod, name) in pods[..2].iter().zip(["billing", "orders"]) {
        is_own(&fetch(name, pod), pod, name);
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
    is_own(&late, &pods[2], "late");

    // The same by `check`, from the daemon's namespaces. Without a pod there is nothing to name.
    let check = |arguments: &[&str], status: i32| {
        let mut command = behind(&words, std::path::Path::new(PROGRAM));
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
    is_own(&fetch("orders", &pods[1]), &pods[1], "orders");
    await_some("its credentials end", Duration::from_secs(90), || {
        (fetch("orders", &pods[1])["outcome"] == "refused").then_some(())
    });
    assert!(
        removed_at.elapsed() < Duration::from_secs(60),
        "{:?}",
        removed_at.elapsed()
    );
}

//! Features that the machine gets or loses while the daemon runs.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::{WITHOUT_CGROUP_V2, status};
use crate::harness::actor;
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::process::{await_some, run};
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::{Daemon, PROGRAM};
use crate::harness::namespaces::NetnsNode;
use crate::harness::upstream::Upstream;

const TIMEOUT: Duration = Duration::from_secs(60);
const ALICE: u32 = 61_001;

/// Returns a configuration with a rule for Alice in this cgroup.
fn configuration(upstream: &Upstream) -> String {
    let rule = "\n[[workload]]\nspiffe_id = \"spiffe://example.org/user/me\"\nuid = 61001\ncgroup = \"/awsvid-test-*.slice/**\"\n";
    upstream.configuration() + rule
}

/// Sends requests over this listener until the response has these words.
fn await_answer(daemon: &Daemon, listener: &str, cgroup: &Cgroup, words: &str) {
    await_some(&format!("{words} over {listener}"), TIMEOUT, || {
        let answer = daemon.curl(listener, (ALICE, ALICE), cgroup);
        answer.contains(words).then_some(())
    });
}

/// Runs a command in the daemon's mount namespace.
fn in_mounts_of(daemon: &Daemon, words: &[&str]) {
    let mut command = Command::new("nsenter");
    command.args(["--mount", "--target", &daemon.pid().to_string()]);
    command.args(words);
    run(command, b"", TIMEOUT).success(&words.join(" "));
}

#[test]
fn cgroup_tree_that_is_mounted_later_is_found() {
    if !root() {
        return;
    }
    let (folder, upstream) = (folder(), Upstream::start(&[(ALICE, "me")]));
    let daemon = Daemon::start_behind(
        &WITHOUT_CGROUP_V2,
        folder.path(),
        "",
        &configuration(&upstream),
    );
    let missing = daemon.await_line(&["callers over TCP are rejected", "no cgroup v2 tree"]);
    assert!(!missing.contains("restart"), "{missing}");
    let cgroup = Cgroup::new("restored.service");
    await_answer(&daemon, "unix", &cgroup, "no_identity");
    for listener in ["tcp", "tcp6"] {
        let answer = daemon.curl(listener, (ALICE, ALICE), &cgroup);
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer["code"], "unsupported_kernel", "{answer}");
        let text = answer["message"].as_str().unwrap();
        assert!(text.contains("no cgroup v2 tree is mounted"), "{text}");
    }

    let mount = folder.path().join("tree");
    fs::create_dir(&mount).unwrap();
    let mount = mount.to_str().unwrap();
    in_mounts_of(&daemon, &["mount", "-t", "cgroup2", "none", mount]);
    for listener in ["unix", "tcp", "tcp6"] {
        await_answer(&daemon, listener, &cgroup, "AccessKeyId");
    }
    daemon.await_line(&["callers over TCP are attested again"]);
    assert_eq!(
        status(&daemon)["unsupported_kernel"],
        Value::from(Vec::<Value>::new())
    );

    in_mounts_of(&daemon, &["umount", mount]);
    await_answer(&daemon, "tcp", &cgroup, "unsupported_kernel");
    let lines = daemon.log();
    let lines = lines.matches("callers over TCP are rejected (unsupported_kernel)");
    assert_eq!(lines.count(), 2, "one line each time that it is missing");
}

/// Without the module `tcp_diag` the kernel replies with ENOENT to each query about a TCP socket,
/// as it does for a socket that does not exist.
#[test]
fn sock_diag_is_used_again_when_its_module_is_loaded() {
    if !root() {
        return;
    }
    let (folder, upstream) = (folder(), Upstream::start(&[(ALICE, "me")]));
    let lost = folder.path().join("tcp_diag-is-not-loaded");
    fs::write(&lost, "").unwrap();
    let actor = actor::program();
    let words = [&actor, Path::new("without-sock-diag"), &lost].map(|word| word.to_str().unwrap());
    let daemon = Daemon::start_behind(&words, folder.path(), "", &configuration(&upstream));
    let line = daemon.await_line(&["callers over TCP are rejected (unsupported_kernel)"]);
    for words in [
        "it does not find a socket that exists",
        "load the kernel modules inet_diag and tcp_diag",
        "or use the unix socket only",
    ] {
        assert!(line.contains(words), "{words}: {line}");
    }
    let cgroup = Cgroup::new("restored-module.service");
    await_answer(&daemon, "unix", &cgroup, "AccessKeyId");
    for listener in ["tcp", "tcp6"] {
        let answer = daemon.curl(listener, (ALICE, ALICE), &cgroup);
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer["code"], "unsupported_kernel", "{answer}");
        let text = answer["message"].as_str().unwrap();
        assert!(text.contains("tcp_diag"), "{text}");
    }
    let reported = status(&daemon)["unsupported_kernel"][0].to_string();
    assert!(reported.contains("tcp_diag"), "{reported}");
    let mut check = Command::new(words[0]);
    check
        .args(&words[1..])
        .arg(PROGRAM)
        .args(["check", "--config"]);
    check.arg(folder.path().join("awsvid.toml"));
    let checked = run(check, b"", TIMEOUT);
    assert_ne!(checked.status.code(), Some(0));
    assert!(checked.stdout.contains("tcp_diag"), "{checked:?}");

    for (is_lost, words) in [
        (false, "AccessKeyId"),
        (true, "unsupported_kernel"),
        (false, "AccessKeyId"),
    ] {
        if is_lost {
            fs::write(&lost, "").unwrap();
        } else {
            fs::remove_file(&lost).unwrap();
        }
        for listener in ["tcp", "tcp6"] {
            await_answer(&daemon, listener, &cgroup, words);
        }
    }
    let log = daemon.log();
    let count = |words: &str| log.matches(words).count();
    assert_eq!(
        count("callers over TCP are rejected (unsupported_kernel)"),
        2
    );
    assert_eq!(count("callers over TCP are attested again"), 2);
}

/// Namespaces that could not be served at first are served without an event of their own.
#[test]
fn pods_are_served_when_a_cgroup_tree_is_mounted_later() {
    if !root() {
        return;
    }
    let (folder, upstream) = (folder(), Upstream::start(&[(0, "pod")]));
    let node = NetnsNode::start(folder.path());
    node.add("cni-1");
    let rule = "\n[[workload]]\nspiffe_id = \"spiffe://example.org/user/pod\"\ncgroup = \"/kubepods/**\"\n";
    let words = node.enter();
    let words: Vec<&str> = words
        .iter()
        .map(String::as_str)
        .chain(WITHOUT_CGROUP_V2)
        .collect();
    let configuration = upstream.configuration() + rule;
    let daemon = Daemon::start_behind(&words, folder.path(), &node.listen(), &configuration);
    daemon.await_line(&["pods cannot be identified"]);
    daemon.await_line(&["not ready", "this kernel cannot attest the callers in pods"]);
    let failed = "awsvid_pod_listener_failures_total{reason=\"unsupported_kernel\"}";
    await_some("the namespace is not served", TIMEOUT, || {
        (daemon.metric(failed) == 1).then_some(())
    });
    assert_eq!(daemon.metric("awsvid_pod_listeners"), 0);

    let mount = folder.path().join("tree");
    fs::create_dir(&mount).unwrap();
    let mount = mount.to_str().unwrap();
    in_mounts_of(&daemon, &["mount", "-t", "cgroup2", "none", mount]);
    await_some("the namespace is served", TIMEOUT, || {
        (daemon.metric("awsvid_pod_listeners") == 1).then_some(())
    });
    let pod = Cgroup::of_pod(78);
    let answer = node.fetch("cni-1", &pod, "127.0.0.1:974".parse().unwrap());
    assert!(answer.contains("AccessKeyId"), "{answer}");
    assert_eq!(daemon.metric(failed), 1, "one failure for each namespace");
    node.remove("cni-1");
}

//! From one pod of the DaemonSet to the next.

use std::time::{Duration, Instant, SystemTime};

use super::request_pod::PollingPod;
use super::{TIMEOUT, process, signal, ticks};
use crate::harness::counterparts::process::await_some;
use crate::harness::is_slow;
use crate::kubernetes::cluster::Cluster;

pub(in crate::kubernetes) fn update_rejects_no_request(cluster: &Cluster) {
    run_updates(cluster, vec![PollingPod::start(cluster, "during-updates")]);
}

/// Replaces awsvid's pod several times, while these pods send requests, of which none may fail.
pub(in crate::kubernetes) fn run_updates(cluster: &Cluster, askers: Vec<PollingPod<'_>>) {
    let (updates, start) = (if is_slow() { 10 } else { 2 }, Instant::now());
    for _ in 0..updates {
        let before = process(&cluster.node, "awsvid");
        let restart = [
            "rollout",
            "restart",
            "--namespace",
            "awsvid",
            "daemonset/awsvid",
        ];
        cluster.node.kubectl(&restart).success("a rolling update");
        cluster.node.rolled_out("awsvid", "daemonset/awsvid");
        assert_ne!(process(&cluster.node, "awsvid"), before);
    }
    let took = start.elapsed() / updates;
    for asker in askers {
        let name = asker.name();
        let (answered, failed, longest) = asker.stop();
        eprintln!(
            "{updates} updates of {took:.1?}: {name} was answered {answered} times, at most {longest:.2} s apart, failed: {failed:?}"
        );
        assert!(failed.is_empty() && answered > 100, "{name}: {failed:?}");
    }
}

pub(in crate::kubernetes) fn successor_of_killed_daemon_listens(cluster: &Cluster) {
    let asker = PollingPod::start(cluster, "during-a-kill");
    let before = process(&cluster.node, "awsvid");
    signal(&cluster.node, "KILL", before);
    let after = await_some("another process", TIMEOUT, || {
        let found = process(&cluster.node, "awsvid");
        (found != before).then_some(found)
    });
    let listening = listening_after(cluster, after);
    cluster.node.rolled_out("awsvid", "daemonset/awsvid");
    asker.await_more();
    let (_, failed, longest) = asker.stop();
    eprintln!(
        "after a kill: listening {listening:?} after the start of the next process, answers {longest:.2} s apart"
    );
    assert!(!failed.is_empty(), "no process was killed");
}

/// Returns the time from a process's start until it listened in all pods.
pub(super) fn listening_after(cluster: &Cluster, process: u32) -> Duration {
    let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
    let uptime: f64 = uptime.split(' ').next().unwrap().parse().unwrap();
    let boot = SystemTime::now() - Duration::from_secs_f64(uptime);
    let started = boot + Duration::from_millis(ticks(&cluster.node, process, 22) * 10);
    await_some("it listens in pods", TIMEOUT, || {
        let log = cluster.node.pod_log("awsvid", "awsvid");
        let lines = log
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let listening = lines.filter(|line| line["message"] == "serving workloads in pods");
        let times =
            listening.filter_map(|line| humantime::parse_rfc3339(line["time"].as_str()?).ok());
        times
            .filter_map(|at| at.duration_since(started).ok())
            .next()
    })
}

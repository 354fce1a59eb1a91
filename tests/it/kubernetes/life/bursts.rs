//! Pods that start by the dozen.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use super::{TIMEOUT, process, request_pod, signal, status, ticks, updates};
use crate::harness::counterparts::process::await_some;
use crate::harness::{is_slow, slow_only};
use crate::kubernetes::cluster::{Cluster, READER};

/// The traces that a pod must not leave on the node.
#[derive(Debug, Clone, PartialEq, Eq)]
struct PodTraces {
    files: usize,
    namespaces: usize,
    descriptors: usize,
}

impl PodTraces {
    fn of(cluster: &Cluster) -> Self {
        let awsvid = process(&cluster.node, "awsvid");
        let count = |directory: &str| {
            fs::read_dir(cluster.node.path(directory))
                .into_iter()
                .flatten()
                .count()
        };
        let namespaces =
            cluster
                .node
                .run(&["lsns", "--type", "net", "--noheadings", "--output", "NS"]);
        Self {
            files: count("/run/netns"),
            namespaces: namespaces
                .success("lsns")
                .lines()
                .collect::<BTreeSet<_>>()
                .len(),
            descriptors: count(&format!("/proc/{awsvid}/fd")),
        }
    }

    /// Returns whether nothing is left that did not exist before. A connection of awsvid's to its
    /// counterparts may have ended meanwhile.
    fn are_back_to(&self, before: &Self) -> bool {
        let descriptors = self.descriptors.min(before.descriptors);
        Self {
            descriptors,
            ..before.clone()
        } == *self
    }

    /// Counts until two counts in a row are equal.
    fn settled(cluster: &Cluster) -> Self {
        let mut before = Self::of(cluster);
        await_some("nothing comes or goes", TIMEOUT, || {
            std::thread::sleep(Duration::from_millis(500));
            let now = Self::of(cluster);
            (std::mem::replace(&mut before, now) == before).then_some(())
        });
        before
    }
}

/// Creates pods that send a request as their first act and stay. Waits until each has a response,
/// and returns their UIDs.
fn create(cluster: &Cluster, burst: usize, count: usize) -> BTreeSet<String> {
    let prefix = format!("burst-{burst}-");
    let pods: Vec<Value> = (0..count)
        .map(|i| {
            // As often as SDKs do: on a machine with too much load, a response may be that it takes
            // longer.
            let script = "again() { busybox sleep 1; fetch 127.0.0.1; }
                fetch 127.0.0.1 || again || again; echo answered; exec busybox sleep 36000";
            let mut pod = request_pod::pod(READER, &format!("{prefix}{i}"), script);
            pod["metadata"]["labels"] = json!({ "burst": burst.to_string() });
            pod
        })
        .collect();
    cluster
        .node
        .apply(&json!({ "apiVersion": "v1", "kind": "List", "items": pods }));
    await_some("all are answered", 4 * TIMEOUT, || {
        std::thread::sleep(Duration::from_millis(200));
        let log = cluster.node.pod_log(READER.namespace, &prefix);
        let answered = log.lines().filter(|line| *line == "answered").count();
        let rejected = log.lines().count() - answered;
        (answered == count)
            .then(|| eprintln!("burst {burst}: {count} answered, {rejected} times not at once"))
    });
    let pods = cluster.node.get(&[
        "pods",
        "--namespace",
        READER.namespace,
        "--selector",
        &format!("burst={burst}"),
    ]);
    let uids = pods["items"].as_array().expect("pods").iter();
    uids.map(|pod| pod["metadata"]["uid"].as_str().expect("a UID").to_owned())
        .collect()
}

/// Deletes them, and returns how long it took until they were gone.
fn delete(cluster: &Cluster, burst: usize) -> Duration {
    let start = Instant::now();
    let selector = format!("burst={burst}");
    let which = [
        "pods",
        "--namespace",
        READER.namespace,
        "--selector",
        &selector,
    ];
    cluster
        .node
        .kubectl(&[&["delete", "--wait=false"], &which[..]].concat())
        .success("pods are deleted");
    await_some("all are gone", 4 * TIMEOUT, || {
        std::thread::sleep(Duration::from_millis(200));
        let left = cluster
            .node
            .kubectl(&[&["get", "--output", "name"], &which[..]].concat())
            .success("pods");
        left.is_empty().then_some(())
    });
    start.elapsed()
}

pub(in crate::kubernetes) fn pods_start_and_end(cluster: &Cluster) {
    let (bursts, size) = if is_slow() { (20, 25) } else { (2, 10) };
    let before = PodTraces::settled(cluster);
    let (mut uids, mut longest) = (BTreeSet::new(), Duration::ZERO);
    let start = Instant::now();
    for burst in 0..bursts {
        uids.extend(create(cluster, burst, size));
        longest = longest.max(delete(cluster, burst));
    }
    let took = start.elapsed();
    let mut after = None;
    await_some("as much is left as there was before", TIMEOUT, || {
        let now = PodTraces::of(cluster);
        let back = now.are_back_to(&before);
        after = Some(now);
        back.then_some(())
    });
    eprintln!(
        "{} pods in {took:.1?}, {size} deleted in at most {longest:.1?}: {before:?}, then {after:?}",
        uids.len()
    );
    assert_eq!(uids.len(), bursts * size);
    let audit = cluster.audit();
    let of_these = || {
        audit.iter().filter(|record| {
            record["pod_uid"]
                .as_str()
                .is_some_and(|uid| uids.contains(uid))
        })
    };
    let issued = of_these().filter(|record| record["outcome"] == "issued");
    let issued: BTreeSet<String> = issued
        .filter_map(|record| Some(record["pod_uid"].as_str()?.to_owned()))
        .collect();
    assert_eq!(issued, uids);
    let mut rejections = BTreeMap::new();
    for record in of_these().filter(|record| record["outcome"] != "issued") {
        *rejections.entry(record["reason"].to_string()).or_insert(0) += 1;
    }
    eprintln!("not answered at once, by reason: {rejections:?}");
    let events = cluster
        .node
        .kubectl(&["get", "events", "--namespace", READER.namespace])
        .success("events");
    assert!(!events.contains("FailedKillPod"), "{events}");
}

/// Returns the time from each pod's network namespace to its listener, by the name of the
/// namespace's file.
fn listening(cluster: &Cluster) -> Vec<(String, Duration)> {
    let log = cluster.node.pod_log("awsvid", "awsvid");
    let lines = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let times = lines
        .filter(|line| line["message"] == "serving a pod's network namespace")
        .filter_map(|line| {
            let path = line["namespace"].as_str()?;
            let file = fs::metadata(cluster.node.path(path)).ok()?;
            let created_at = SystemTime::UNIX_EPOCH
                + Duration::new(
                    file.ctime().try_into().ok()?,
                    file.ctime_nsec().try_into().ok()?,
                );
            let at = humantime::parse_rfc3339(line["time"].as_str()?).ok()?;
            Some((
                path.to_owned(),
                at.duration_since(created_at).unwrap_or_default(),
            ))
        });
    times.collect()
}

/// Measures the time for one more pod, and the daemon's use of resources, with few pods and with
/// many.
pub(in crate::kubernetes) fn many_pods_are_served_soon(cluster: &Cluster) {
    if !slow_only() {
        return;
    }
    let count = 250;
    let awsvid = process(&cluster.node, "awsvid");
    let used = || ticks(&cluster.node, awsvid, 14) + ticks(&cluster.node, awsvid, 15);
    let mut all = BTreeSet::new();
    let known = |all: &mut BTreeSet<String>| {
        let new: Vec<_> = listening(cluster)
            .into_iter()
            .filter(|(path, _)| all.insert(path.clone()))
            .collect();
        let mut times: Vec<_> = new.into_iter().map(|(_, time)| time).collect();
        times.sort();
        times
    };
    known(&mut all);
    create(cluster, 1000, 1);
    eprintln!("one pod: from namespace to listening {:?}", known(&mut all));
    let (before, start, memory) = (
        used(),
        Instant::now(),
        status(&cluster.node, awsvid, "VmRSS"),
    );
    create(cluster, 1001, count - 1);
    let (cpu, took) = ((used() - before) * 10, start.elapsed());
    let times = known(&mut all);
    let [resident, own, peak] =
        ["VmRSS", "RssAnon", "VmHWM"].map(|field| status(&cluster.node, awsvid, field));
    eprintln!(
        "{count} pods in {took:.1?}: from namespace to listening {:?} in the middle, {:?} at most",
        times[times.len() / 2],
        times.last()
    );
    eprintln!(
        "awsvid: {memory} KiB, then {resident} KiB, {own} of them its own, at most {peak} KiB; {cpu} ms of CPU"
    );
    create(cluster, 1002, 1);
    eprintln!(
        "one more pod: from namespace to listening {:?}",
        known(&mut all)
    );
    let idle = (used(), Instant::now());
    std::thread::sleep(Duration::from_secs(20));
    eprintln!(
        "awsvid when nothing comes: {} ms of CPU in {:.1?}",
        (used() - idle.0) * 10,
        idle.1.elapsed()
    );
    signal(&cluster.node, "KILL", awsvid);
    let next = await_some("another process", TIMEOUT, || {
        let found = process(&cluster.node, "awsvid");
        (found != awsvid).then_some(found)
    });
    let listening = updates::listening_after(cluster, next);
    eprintln!(
        "after a kill with {} pods: listening {listening:?} after the start of the next process",
        count + 1
    );
    cluster.node.rolled_out("awsvid", "daemonset/awsvid");
    for burst in 1000..1003 {
        delete(cluster, burst);
    }
}

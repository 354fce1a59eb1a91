//! A DaemonSet without something that awsvid needs logs the field of the manifest to correct.

use serde_json::{Value, json};

use super::TIMEOUT;
use crate::harness::counterparts::process::await_some;
use crate::kubernetes::cluster::Cluster;

/// The parts that are removed from the container, and the resulting texts.
struct MissingParts<'a> {
    capabilities: &'a [&'a str],
    mounts: &'a [&'a str],
    lines: &'a [&'a str],
    /// Reasons for which awsvid is not ready.
    reasons: &'a [&'a str],
}

const OF_PODS: [MissingParts<'_>; 2] = [
    // Without this, awsvid does not start.
    MissingParts {
        capabilities: &["SYS_ADMIN"],
        mounts: &[],
        lines: &["add SYS_ADMIN to the container's securityContext.capabilities.add"],
        reasons: &[],
    },
    MissingParts {
        capabilities: &["NET_BIND_SERVICE"],
        mounts: &["/run/netns", "/host/cgroup", "/run/spire/broker"],
        lines: &[
            "ports below 1024, such as 974 in pods, may not be bound",
            "in Kubernetes add NET_BIND_SERVICE to the container's securityContext.capabilities.add",
            "[pods] netns_dir does not exist yet; in Kubernetes mount the host's directory by a hostPath volume",
        ],
        reasons: &[
            // The container's own mounts have no cgroup v2 tree, or one without the kubelet's.
            "in Kubernetes mount the host's /sys/fs/cgroup by a hostPath volume, with its volumeMount at /host/cgroup",
            "correct `broker_socket` in [identity]; in Kubernetes mount the agent's directory with a hostPath volume",
        ],
    },
];

const OF_PROCESSES: MissingParts<'_> = MissingParts {
    capabilities: &["SYS_PTRACE", "DAC_READ_SEARCH"],
    mounts: &[],
    lines: &[
        "in Kubernetes add SYS_PTRACE to the container's securityContext.capabilities.add",
        "in Kubernetes add DAC_READ_SEARCH to the container's securityContext.capabilities.add",
    ],
    reasons: &[],
};

pub(in crate::kubernetes) fn missing_part_is_named(cluster: &Cluster, source: &str) {
    let before = template(cluster);
    match source {
        "spiffe-broker" => {
            OF_PODS
                .iter()
                .for_each(|missing| names(cluster, &before, missing));
            wrong_mount_of_namespaces_is_named(cluster, &before);
        }
        _ => {
            names(cluster, &before, &OF_PROCESSES);
            let mut own_pids = before.clone();
            own_pids["spec"]["hostPID"] = json!(false);
            await_log(cluster, &own_pids, &["hostPID: true"], &[]);
        }
    }
    replace(cluster, &before);
    cluster.node.rolled_out("awsvid", "daemonset/awsvid");
}

/// Checks that awsvid is not ready without the runtime's directory, or without its later mounts.
fn wrong_mount_of_namespaces_is_named(cluster: &Cluster, before: &Value) {
    let entry = |list: &Value| {
        let list = list.as_array().expect("a list");
        let is_netns = |entry: &Value| entry["name"] == "netns";
        list.iter().position(is_netns).expect("the namespaces")
    };
    let mounts = &before["spec"]["containers"][0]["volumeMounts"];
    let (mount, volume) = (entry(mounts), entry(&before["spec"]["volumes"]));
    let mut template = before.clone();
    template["spec"]["containers"][0]["volumeMounts"][mount]["mountPropagation"] = json!("None");
    let reason = "netns_dir /run/netns does not receive the mounts of new pods";
    await_log(cluster, &template, &[], &[reason]);
    assert_newest_pod_is_not_ready(cluster);
    let mut template = before.clone();
    template["spec"]["volumes"][volume]["hostPath"]["path"] = json!("/run/other-netns");
    let reason = "not even that of awsvid's own pod";
    await_log(cluster, &template, &[], &[reason]);
    assert_newest_pod_is_not_ready(cluster);
}

fn names(cluster: &Cluster, before: &Value, missing: &MissingParts<'_>) {
    let mut template = before.clone();
    let container = &mut template["spec"]["containers"][0];
    let take = |list: &mut Value, is: &dyn Fn(&Value) -> bool, count: usize| {
        let list = list.as_array_mut().expect("a list");
        let all = list.len();
        list.retain(|one| !is(one));
        assert_eq!(list.len() + count, all, "the manifest has each of them");
    };
    let is_one =
        |names: &[&str], value: &Value| value.as_str().is_some_and(|value| names.contains(&value));
    let granted = &mut container["securityContext"]["capabilities"]["add"];
    take(
        granted,
        &|one| is_one(missing.capabilities, one),
        missing.capabilities.len(),
    );
    let mounts = &mut container["volumeMounts"];
    take(
        mounts,
        &|one| is_one(missing.mounts, &one["mountPath"]),
        missing.mounts.len(),
    );
    await_log(cluster, &template, missing.lines, missing.reasons);
    if !missing.reasons.is_empty() {
        assert_newest_pod_is_not_ready(cluster);
    }
}

/// Waits until a daemon that is started so has written these lines, and these reasons for which it
/// is not ready. No earlier one wrote them.
fn await_log(cluster: &Cluster, template: &Value, lines: &[&str], reasons: &[&str]) {
    let log = || cluster.node.pod_log("awsvid", "awsvid");
    let has_reason = |log: &str, reason: &str| {
        log.lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|line| line["message"] == "not ready")
            .any(|line| {
                line["missing"]
                    .as_str()
                    .is_some_and(|missing| missing.contains(reason))
            })
    };
    let before = log();
    assert!(!lines.iter().any(|line| before.contains(line)), "{before}");
    assert!(
        !reasons.iter().any(|reason| has_reason(&before, reason)),
        "{before}"
    );
    replace(cluster, template);
    await_some(&format!("{lines:?}, {reasons:?}"), TIMEOUT, || {
        let log = log();
        let has_all = lines.iter().all(|line| log.contains(line))
            && reasons.iter().all(|reason| has_reason(&log, reason));
        has_all.then_some(())
    });
}

fn assert_newest_pod_is_not_ready(cluster: &Cluster) {
    let pods = cluster.node.get(&["pods", "--namespace", "awsvid"]);
    let created_at = |pod: &&Value| {
        pod["metadata"]["creationTimestamp"]
            .as_str()
            .map(str::to_owned)
    };
    let pods = pods["items"].as_array().expect("pods").iter();
    let newest = pods.max_by_key(created_at).expect("a pod");
    let conditions = newest["status"]["conditions"]
        .as_array()
        .expect("conditions");
    let ready = conditions.iter().find(|one| one["type"] == "Ready");
    assert_eq!(ready.expect("a condition")["status"], "False", "{newest}");
}

fn template(cluster: &Cluster) -> Value {
    cluster
        .node
        .get(&["daemonset", "--namespace", "awsvid", "awsvid"])["spec"]["template"]
        .clone()
}

fn replace(cluster: &Cluster, template: &Value) {
    let patch =
        json!([{ "op": "replace", "path": "/spec/template", "value": template }]).to_string();
    let words = [
        "patch",
        "daemonset",
        "awsvid",
        "--namespace",
        "awsvid",
        "--type",
        "json",
        "--patch",
        &patch,
    ];
    cluster.node.kubectl(&words).success("another template");
}

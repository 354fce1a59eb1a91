//! A node that has just come, whose pods wait for awsvid by a taint.

use std::os::unix::fs::symlink;
use std::path::Path;

use super::{PATIENCE, asker};
use crate::harness::counterparts::process::await_some;
use crate::harness::kubernetes::{Image, NAME, root_of};
use crate::kubernetes::cluster::{Cluster, READER};

/// Installs awsvid for the first time.
pub(in crate::kubernetes) fn pods_wait_until_awsvid_is_ready(cluster: &Cluster, folder: &Path) {
    let node = &cluster.node;
    let kubectl = root_of(&folder.join("images/kubectl"), &node.bin().join("kubectl"), "/bin/kubectl");
    let busybox = node.bin().join("pod-files/busybox");
    for name in ["sh", "sleep"] {
        symlink("/bin/busybox", kubectl.join("bin").join(name)).unwrap();
    }
    node.import(&Image { name: "docker.io/library/kubectl:test", layers: &[&busybox, &kubectl], entrypoint: &[] });
    // As `kubelet --register-with-taints` does.
    node.kubectl(&["taint", "node", NAME, "awsvid.io/not-ready=:NoSchedule"]).success("a taint");
    node.apply(&asker::pod(READER, "early", "ask 127.0.0.1; echo answered"));
    let waits = |reason: &str| {
        let pod = node.get(&["pod", "--namespace", READER.namespace, "early"]);
        pod["status"]["conditions"].as_array().into_iter().flatten().any(|one| one["reason"] == reason)
    };
    await_some("the pod waits", PATIENCE, || waits("Unschedulable").then_some(()));
    cluster.install_with("spiffe-broker", &["environment", "startup-taint"]);
    let ended = node.ended(READER.namespace, "early");
    assert!(ended.succeeded && ended.log == "answered\n", "{ended:?}");
    let remover = node.pod_log("awsvid", "startup-taint");
    assert!(remover.contains("untainted"), "{remover}");
    // What it may do with the node is that, and nothing else.
    let as_it = ["--as", "system:serviceaccount:awsvid:startup-taint"];
    let changes = ["taint other=:NoSchedule", "label other=1", "patch --patch={\"spec\":{\"unschedulable\":true}}"];
    for (verb, change) in changes.map(|change| change.split_once(' ').unwrap()) {
        let words = [verb, "node", NAME, change];
        let refused = node.kubectl(&[&words[..], &as_it[..]].concat());
        assert!(!refused.status.success() && refused.stderr.contains("startup-taint"), "{refused:?}");
    }
    node.kubectl(&["delete", "deployment", "startup-taint", "--namespace", "awsvid"]).success("its end");
}

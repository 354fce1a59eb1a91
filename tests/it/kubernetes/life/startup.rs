//! A node that has just joined. Its pods wait for awsvid by a taint.

use std::path::Path;

use super::{TIMEOUT, request_pod};
use crate::harness::counterparts::process::await_some;
use crate::harness::kubernetes::{Image, NAME, root_of};
use crate::kubernetes::cluster::{Cluster, READER};

/// Installs awsvid for the first time.
pub(in crate::kubernetes) fn pods_wait_until_awsvid_is_ready(cluster: &Cluster, folder: &Path) {
    let node = &cluster.node;
    // Kubernetes' own image has no shell either.
    let kubectl = root_of(
        &folder.join("images/kubectl"),
        &node.bin().join("kubectl"),
        "/bin/kubectl",
    );
    let name = "registry.k8s.io/kubectl:v1.36.3";
    node.import(&Image {
        name,
        layers: &[&kubectl],
        entrypoint: &["/bin/kubectl"],
    });
    let busybox = node.bin().join("pod-files/busybox");
    node.import(&Image {
        name: "docker.io/library/busybox:1.37.0-musl",
        layers: &[&busybox],
        entrypoint: &[],
    });
    // As `kubelet --register-with-taints` does.
    node.kubectl(&["taint", "node", NAME, "awsvid.io/not-ready=:NoSchedule"])
        .success("a taint");
    node.apply(&request_pod::pod(
        READER,
        "early",
        "fetch 127.0.0.1; echo answered",
    ));
    let waits = |reason: &str| {
        let pod = node.get(&["pod", "--namespace", READER.namespace, "early"]);
        pod["status"]["conditions"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|one| one["reason"] == reason)
    };
    await_some("the pod waits", TIMEOUT, || {
        waits("Unschedulable").then_some(())
    });
    cluster.install_with("spiffe-broker", &["environment", "startup-taint"]);
    let ended = node.ended(READER.namespace, "early");
    assert!(ended.succeeded && ended.log == "answered\n", "{ended:?}");
    let remover = node.pod_log("awsvid", "startup-taint");
    assert!(remover.contains("untainted"), "{remover}");
    // Its pod, too, has ended when this returns.
    let words = [
        "delete",
        "deployment",
        "startup-taint",
        "--namespace",
        "awsvid",
        "--cascade=foreground",
    ];
    node.kubectl(&words).success("its end");
}

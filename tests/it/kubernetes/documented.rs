//! The recipe of troubleshooting.md for a 403 in a pod, on a real node.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use super::cluster::{Cluster, READER};
use crate::harness::counterparts::process::await_some;
use crate::harness::documents::block;
use crate::harness::kubernetes::{Image, root_of};

/// Bounds several rounds of the first step. A pod counts as new for ten seconds.
const TIMEOUT: Duration = Duration::from_secs(180);
const CURL: &str = "docker.io/curlimages/curl:test";

/// Imports an image with curl and the shell, as the documented one has them.
fn import_curl(cluster: &Cluster, folder: &Path) {
    let curl = root_of(
        &folder.join("curl"),
        Path::new("/usr/bin/curl"),
        "/usr/bin/curl",
    );
    let busybox = cluster.node.bin().join("pod-files/busybox");
    let links = folder.join("links");
    fs::create_dir_all(links.join("bin")).unwrap();
    for name in ["sh", "grep"] {
        symlink("/bin/busybox", links.join("bin").join(name)).unwrap();
    }
    cluster.node.import(&Image {
        name: CURL,
        layers: &[&busybox, &links, &curl],
        entrypoint: &["/bin/busybox"],
    });
}

/// Runs the three steps for a pod without a registration entry.
pub(super) fn documented_recipe_explains_a_403(cluster: &Cluster, folder: &Path) {
    import_curl(cluster, folder);
    let mut pod = cluster.pod(READER, "billing-0", "busybox sleep 36000");
    pod["spec"]["serviceAccountName"] = "default".into();
    cluster.node.apply(&pod);
    let wait = ["wait", "--namespace", READER.namespace, "pod/billing-0"];
    let wait = [&wait[..], &["--for=condition=Ready", "--timeout=60s"]].concat();
    cluster.node.kubectl(&wait).success("the pod is ready");

    let recipe = |begin: &str| block("troubleshooting.md", "In a pod", begin);
    let reason = recipe("kubectl -n shop debug")
        .replace(" -it ", " -i ")
        .replace("docker.io/curlimages/curl", CURL);
    // kubectl detaches at the end of its input, and shows nothing if it attaches too late. The
    // agent may still learn about a new pod, so that it gets `source_unavailable` at first.
    let reason = format!("sleep 20 | {reason}");
    await_some("the reason", TIMEOUT, || {
        let output = cluster.node.shell(&reason).success(&reason);
        output.contains("\"code\":\"no_identity\"").then_some(())
    });

    let record = recipe("uid=$(kubectl");
    let output = cluster.node.shell(&record).success(&record);
    assert!(output.contains("\"reason\":\"no_identity\""), "{output}");

    // The variables are those of the step before.
    let check = format!(
        "{}\n{}",
        record.replace("tail -n 3", "tail -n 0"),
        recipe("kubectl -n awsvid exec")
    );
    let output = cluster.node.shell(&check);
    assert!(
        !output.status.success() && output.stdout.contains("spire-server entry"),
        "{output:?}"
    );
    cluster
        .node
        .kubectl(&["delete", "--namespace", READER.namespace, "pod/billing-0"])
        .success("delete the pod");
}

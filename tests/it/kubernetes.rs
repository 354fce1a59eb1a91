//! awsvid as a DaemonSet on a real Kubernetes node.

use serde_json::json;

use crate::harness::counterparts::folder;
use crate::harness::kubernetes::{BUSYBOX, Node};

#[test]
fn a_node_runs_pods() {
    let directory = folder();
    let Some(node) = Node::start(directory.path()) else { return };
    node.apply(&json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "first" },
        "spec": { "restartPolicy": "Never", "containers": [
            { "name": "c", "image": BUSYBOX, "command": ["/bin/busybox", "ip", "address"] }
        ]},
    }));
    let done = ["wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/first", "--timeout=60s"];
    node.kubectl(&done).success("the pod's end");
    let shown = node.kubectl(&["logs", "first"]).success("the pod's log");
    assert!(shown.contains("10.97.") && shown.contains("fd97::"), "{shown}");
}

//! awsvid during outages of the node's programs.

use serde_json::json;

use super::request_pod::{self, PollingPod};
use super::{TIMEOUT, process, processes, signal};
use crate::harness::counterparts::process::await_some;
use crate::kubernetes::cluster::{Cluster, READER};

pub(in crate::kubernetes) fn warm_pods_see_no_error(cluster: &Cluster) {
    let node = &cluster.node;
    let warm = PollingPod::start(cluster, "warm");
    // Stopped, they accept connections and never respond, which is worse than a rejection.
    for program in ["kubelet", "kube-apiserver"] {
        let stopped = process(node, program);
        signal(node, "STOP", stopped);
        warm.await_more();
        signal(node, "CONT", stopped);
    }
    let select_nodes_of_agent = |selector| {
        let patch =
            json!({ "spec": { "template": { "spec": { "nodeSelector": { "away": selector } } } } })
                .to_string();
        let words = [
            "patch",
            "daemonset",
            "spire-agent",
            "--namespace",
            "awsvid-spire",
            "--patch",
            &patch,
        ];
        await_some("the API server is back", TIMEOUT, || {
            node.kubectl(&words).status.success().then_some(())
        });
    };
    select_nodes_of_agent(json!("true"));
    await_some("the agent is unavailable", TIMEOUT, || {
        processes(node, "spire-agent").is_empty().then_some(())
    });
    warm.await_more();
    // Its standard input stays open until the response, else the client would be taken for gone.
    let raw = "printf 'GET /v1/credentials HTTP/1.1\\r\\nHost: localhost\\r\\nAuthorization: any\\r\\nConnection: close\\r\\n\\r\\n'";
    let script = format!(
        "{{ {raw}; busybox sleep 5; }} | busybox nc 127.0.0.1 974; echo; echo rejected; until fetch 127.0.0.1; do busybox sleep 1; done"
    );
    node.apply(&request_pod::pod(
        READER,
        "without-agent",
        &format!("{script}; echo answered"),
    ));
    let log = await_some("the new pod gets the reason", TIMEOUT, || {
        let log = node.pod_log(READER.namespace, "without-agent");
        log.contains("\nrejected\n").then_some(log)
    });
    assert!(
        log.starts_with("HTTP/1.1 503") && log.contains("start the SPIFFE agent"),
        "{log}"
    );
    select_nodes_of_agent(json!(null));
    node.rolled_out("awsvid-spire", "daemonset/spire-agent");
    let ended = node.ended(READER.namespace, "without-agent");
    assert!(
        ended.succeeded && ended.log.ends_with("answered\n"),
        "{ended:?}"
    );
    let (answered, failed, longest) = warm.stop();
    eprintln!("outages: a warm pod was answered {answered} times, at most {longest:.2} s apart");
    assert!(failed.is_empty(), "{failed:?}");
}

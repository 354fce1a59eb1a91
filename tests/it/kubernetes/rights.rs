//! T34 and T38: the powers of the manifests' service account tokens beyond their work.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::cluster::{Cluster, READER, ServiceAccount, overlay};
use crate::harness::counterparts::process::await_some;
use crate::harness::kubernetes::NAME;

const TIMEOUT: Duration = Duration::from_secs(60);
const STARTUP_TAINT: &str = "system:serviceaccount:awsvid:startup-taint";
const AGENT: ServiceAccount = ServiceAccount {
    namespace: "awsvid-spire",
    name: "spire-agent",
};
const MACHINE: &str = "aws:///eu-central-1a/i-0123456789abcdef0";
/// Another taint than awsvid's, which repels no pod.
const OTHER_TAINT: &str = "example.org/kept=:PreferNoSchedule";

/// Asserts that startup-taint's service account changes no field of a node but the one taint.
pub(super) fn startup_taint_removes_the_taint_alone(cluster: &Cluster) {
    let node = &cluster.node;
    let checked = await_some("the policy's types are checked", TIMEOUT, || {
        let policy = node.get(&["validatingadmissionpolicy", "awsvid-startup-taint"]);
        policy["status"]["observedGeneration"]
            .is_u64()
            .then(|| policy["status"]["typeChecking"].clone())
    });
    assert_eq!(checked["expressionWarnings"], Value::Null);
    node.kubectl(&["taint", "node", NAME, OTHER_TAINT])
        .success("a taint");
    node.kubectl(&[
        "taint",
        "node",
        NAME,
        "awsvid.io/not-ready=:PreferNoSchedule",
    ])
    .success("awsvid's taint");
    let before = constant_part(&node.get(&["node", NAME]));
    let own = json!({ "key": "awsvid.io/not-ready", "effect": "PreferNoSchedule" });
    let other = json!({ "key": "example.org/kept", "effect": "PreferNoSchedule" });
    let stricter = json!({ "key": "example.org/kept", "effect": "NoSchedule" });
    let owner = json!({ "apiVersion": "v1", "kind": "Namespace", "name": "gone", "uid": "0" });
    let spec = |change: Value| json!({ "spec": change });
    let metadata = |change: Value| json!({ "metadata": change });
    for (message, patch) in [
        ("of a node's spec", spec(json!({ "providerID": MACHINE }))),
        (
            "of a node's spec",
            spec(json!({ "podCIDR": "10.99.0.0/24", "podCIDRs": ["10.99.0.0/24"] })),
        ),
        ("of a node's spec", spec(json!({ "unschedulable": true }))),
        // Together with what is allowed.
        (
            "of a node's spec",
            spec(json!({ "providerID": MACHINE, "taints": [other] })),
        ),
        (
            "adds no taint",
            spec(
                json!({ "taints": [own, other, { "key": "more", "effect": "PreferNoSchedule" }] }),
            ),
        ),
        ("adds no taint", spec(json!({ "taints": [own, stricter] }))),
        ("removes no other", spec(json!({ "taints": [own] }))),
        ("removes no other", spec(json!({ "taints": null }))),
        (
            "of a node's metadata",
            metadata(json!({ "labels": { "topology.kubernetes.io/zone": "other" } })),
        ),
        ("of a node's metadata", metadata(json!({ "labels": null }))),
        (
            "of a node's metadata",
            metadata(json!({ "annotations": { "example.org/other": "value" } })),
        ),
        (
            "of a node's metadata",
            metadata(json!({ "finalizers": ["example.org/never"] })),
        ),
        (
            "of a node's metadata",
            metadata(json!({ "ownerReferences": [owner] })),
        ),
        (
            "of a node's metadata",
            metadata(json!({ "generateName": "other" })),
        ),
    ] {
        let answer = patched(cluster, &patch);
        let rejected = answer.contains("ValidatingAdmissionPolicy 'awsvid-startup-taint'")
            && answer.contains(message);
        assert!(rejected, "{patch}: {answer}");
    }
    // The API server protects these fields by itself, and RBAC the rest.
    let map = json!({ "name": "m", "namespace": "default", "uid": "0", "resourceVersion": "0", "kubeletConfigKey": "k" });
    patched(
        cluster,
        &spec(json!({ "configSource": { "configMap": map } })),
    );
    patched(cluster, &spec(json!({ "externalID": "other" })));
    let status = json!({ "status": { "capacity": { "example.org/device": "1" } } });
    patched(cluster, &status);
    let whole = |name: &str, more: Value| {
        let mut whole = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name } });
        whole
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        whole.to_string()
    };
    let apply = [
        "apply",
        "--server-side",
        "--validate=false",
        "--filename",
        "-",
        "--as",
        STARTUP_TAINT,
    ];
    let change_status = || {
        let apply = [&apply[..], &["--subresource=status"]].concat();
        node.kubectl_with(&apply, &whole(NAME, status.clone()))
    };
    let rejected = change_status();
    assert!(
        rejected
            .stderr
            .contains("cannot patch resource \"nodes/status\""),
        "{rejected:?}"
    );
    with_right_to_status(cluster, || {
        let rejected = change_status().stderr;
        assert!(rejected.contains("of a node's status"), "{rejected}");
    });
    let rejected = node.kubectl_with(&apply, &whole("another", json!({})));
    assert!(
        rejected.stderr.contains("cannot create resource \"nodes\""),
        "{rejected:?}"
    );
    assert_eq!(constant_part(&node.get(&["node", NAME])), before);

    node.kubectl(&[
        "taint",
        "node",
        NAME,
        "awsvid.io/not-ready-",
        "--as",
        STARTUP_TAINT,
    ])
    .success("its work");
    node.kubectl(&[
        "taint",
        "node",
        NAME,
        &format!("{}-", OTHER_TAINT.replace('=', "")),
    ])
    .success("the end");
}

/// Runs `act` while another role gives startup-taint's service account the right to the status of
/// nodes.
fn with_right_to_status(cluster: &Cluster, act: impl FnOnce()) {
    let node = &cluster.node;
    let role = [
        "clusterrole",
        "status",
        "--verb=patch",
        "--resource=nodes/status",
    ];
    let binding = ["clusterrolebinding", "status", "--clusterrole=status"];
    let account = ["--serviceaccount=awsvid:startup-taint"];
    node.kubectl(&[&["create"], &role[..]].concat())
        .success("a role");
    node.kubectl(&[&["create"], &binding[..], &account[..]].concat())
        .success("a binding");
    let words = ["auth", "can-i", "patch", "nodes", "--subresource=status"];
    await_some("the right is known", TIMEOUT, || {
        let may = node.kubectl(&[&words[..], &["--as", STARTUP_TAINT]].concat());
        may.status.success().then_some(())
    });
    act();
    for kind in ["clusterrolebinding", "clusterrole"] {
        node.kubectl(&["delete", kind, "status"]).success("its end");
    }
}

/// Returns kubectl's output about a patch of the node by startup-taint's service account.
fn patched(cluster: &Cluster, patch: &Value) -> String {
    let patch = format!("--patch={patch}");
    let output = cluster.node.kubectl(&[
        "patch",
        "node",
        NAME,
        "--type=merge",
        &patch,
        "--as",
        STARTUP_TAINT,
    ]);
    output.stdout + &output.stderr
}

/// Returns the constant part of a node, without the kubelet's reports and the API server's
/// counters.
fn constant_part(node: &Value) -> Value {
    let metadata = &node["metadata"];
    let metadata = [
        "labels",
        "annotations",
        "finalizers",
        "ownerReferences",
        "generateName",
    ]
    .map(|name| &metadata[name]);
    json!([node["spec"], metadata, node["status"]["capacity"]])
}

/// Carries out T34: the kubelet rejects the agent's token, and the right of the component for older
/// clusters is enough.
pub(super) fn agent_token_runs_nothing_in_pods(cluster: &Cluster, folder: &Path) {
    let node = &cluster.node;
    node.apply(&cluster.pod(READER, "entered", "exec busybox sleep 3600"));
    let timeout = node.kubectl_timeout();
    let ready = [
        "wait",
        "--for=condition=Ready",
        "pod/entered",
        "--namespace",
        READER.namespace,
        &timeout,
    ];
    node.kubectl(&ready).success("the pod");
    let agent = entered(cluster, AGENT);
    assert!(
        agent.contains("403 Forbidden") && !agent.contains("was here"),
        "{agent}"
    );

    let component = overlay(folder, "nodes-proxy-alone", &[], &["nodes-proxy"]);
    let component = component.to_str().unwrap();
    node.kubectl(&["apply", "--kustomize", component])
        .success("the component");
    let may = |account: &str| {
        let words = [
            "auth",
            "can-i",
            "get",
            "nodes",
            "--subresource=proxy",
            "--as",
            account,
        ];
        await_some("the right is known", TIMEOUT, || {
            node.kubectl(&words).status.success().then_some(())
        });
    };
    may("system:serviceaccount:awsvid-spire:spire-agent");
    // The kubelet caches that the agent may not, so another account shows what the right opens.
    let trial = ["clusterrolebinding", "trial"];
    let binding = [
        "--clusterrole=awsvid-spire-agent-nodes-proxy",
        "--serviceaccount=shop:reader",
    ];
    node.kubectl(&[&["create"], &trial[..], &binding[..]].concat())
        .success("a binding");
    may("system:serviceaccount:shop:reader");
    let opened = entered(cluster, READER);
    assert!(
        opened.contains("101 Switching Protocols") && opened.contains("was here"),
        "{opened}"
    );

    node.kubectl(&[&["delete"], &trial[..]].concat())
        .success("its end");
    node.kubectl(&["delete", "--kustomize", component])
        .success("the component's end");
    node.kubectl(&[
        "delete",
        "pod",
        "entered",
        "--namespace",
        READER.namespace,
        "--wait=false",
    ])
    .success("its end");
}

/// Requests from the kubelet to run a command in the pod with an account's token. Returns the head
/// of the response, and the command's output.
fn entered(cluster: &Cluster, account: ServiceAccount) -> String {
    let token = [
        "create",
        "token",
        account.name,
        "--namespace",
        account.namespace,
    ];
    let token = cluster.node.kubectl(&token).success("a token");
    let token = format!("Authorization: Bearer {}", token.trim());
    let url = "https://127.0.0.1:10250/exec/shop/entered/main?output=1&command=/bin/busybox&command=echo&command=was+here";
    let upgrade = [
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        "Sec-WebSocket-Protocol: v4.channel.k8s.io",
        &token,
    ];
    let headers: Vec<&str> = upgrade
        .iter()
        .flat_map(|header| ["--header", header])
        .collect();
    let curl = [
        "/usr/bin/env",
        "curl",
        "--silent",
        "--insecure",
        "--http1.1",
        "--include",
        "--max-time",
        "20",
        url,
    ];
    let output = cluster.node.run(&[&curl[..], &headers].concat());
    output.stdout + &output.stderr
}

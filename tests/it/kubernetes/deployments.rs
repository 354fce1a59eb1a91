//! Workloads as they are in production: a Deployment with a service account and an image with the
//! AWS CLI.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::cluster::{AWS, Cluster, READER, ServiceAccount, container, copy, overlay};
use crate::harness::counterparts::process::await_some;
use crate::harness::kubernetes::Node;

fn deployment(account: ServiceAccount, name: &str, script: &str, annotations: &Value) -> Value {
    let labels = json!({ "app": name });
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": { "name": name, "namespace": account.namespace },
        "spec": {
            "selector": { "matchLabels": labels },
            "template": {
                "metadata": { "labels": labels, "annotations": annotations },
                "spec": {
                    "serviceAccountName": account.name, "terminationGracePeriodSeconds": 1,
                    "containers": [container("main", script)],
                },
            },
        },
    })
}

/// Asserts that a pod of the Deployment has read the object.
fn has_read(cluster: &Cluster, account: ServiceAccount, name: &str) {
    let expected = format!("hello from the {}\n", account.namespace);
    await_some(
        &format!("{name} has read the object"),
        Duration::from_secs(60),
        || {
            cluster
                .node
                .pod_log(account.namespace, name)
                .contains(&expected)
                .then_some(())
        },
    );
}

/// Checks that no command assumes a role: the namespace's label and the service account's entry are
/// all that it takes.
pub(super) fn deployment_reads_its_object(cluster: &Cluster) {
    let script = format!("{}; exec busybox sleep 3600", copy(READER));
    cluster
        .node
        .apply(&deployment(READER, "by-policy", &script, &json!({})));
    has_read(cluster, READER, "by-policy");
}

/// Checks the same without the policy, by the component for older clusters.
pub(super) fn deployment_reads_its_object_by_component(cluster: &Cluster, folder: &Path) {
    let script = format!("env; {}; exec busybox sleep 3600", copy(READER));
    let out = json!({ "awsvid.io/environment": "false" });
    let directory = kustomization(folder);
    write(
        &directory,
        &deployment(READER, "by-component", &script, &out),
    );
    cluster
        .node
        .kubectl(&["apply", "--kustomize", directory.to_str().unwrap()])
        .success("kubectl apply -k");
    has_read(cluster, READER, "by-component");
    component_covers_each_kind_of_workload(&cluster.node, folder);
}

/// Writes a kustomization of workloads with the component, and returns its directory.
fn kustomization(folder: &Path) -> PathBuf {
    let directory = overlay(folder, "workloads", &[], &["environment-patch"]);
    let file = directory.join("kustomization.yaml");
    let mut kustomization: Value =
        serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    kustomization["namespace"] = READER.namespace.into();
    kustomization["resources"] = json!(["workloads.json"]);
    fs::write(file, kustomization.to_string()).unwrap();
    directory
}

/// Writes the workloads of that kustomization.
fn write(directory: &Path, workloads: &Value) {
    fs::write(directory.join("workloads.json"), workloads.to_string()).unwrap();
}

/// Returns a workload of each kind, with an init container and a container that sets a variable.
pub(super) fn workloads(annotations: &Value) -> Vec<Value> {
    let own = json!([{ "name": "AWS_EC2_METADATA_DISABLED", "value": "false" }]);
    let container = |name: &str, env: &Value| json!({ "name": name, "image": AWS, "env": env });
    let spec = json!({
        "restartPolicy": "Never", "automountServiceAccountToken": false,
        "containers": [container("main", &own)], "initContainers": [container("first", &json!([]))],
    });
    let mut always = spec.clone();
    always["restartPolicy"] = "Always".into();
    let labels = json!({ "app": "trial" });
    let template = |spec: &Value| json!({ "metadata": { "labels": labels }, "spec": spec });
    let selected =
        |spec: &Value| json!({ "selector": { "matchLabels": labels }, "template": template(spec) });
    let mut stateful = selected(&always);
    stateful["serviceName"] = "trial".into();
    let job = json!({ "template": template(&spec) });
    let cron = json!({ "schedule": "@daily", "jobTemplate": { "spec": job } });
    let kinds = [
        ("apps/v1", "Deployment", selected(&always)),
        ("apps/v1", "StatefulSet", stateful),
        ("apps/v1", "DaemonSet", selected(&always)),
        ("batch/v1", "Job", job.clone()),
        ("batch/v1", "CronJob", cron),
        ("v1", "Pod", spec.clone()),
    ];
    kinds
        .into_iter()
        .map(|(version, kind, spec)| {
            let name = format!("trial-{}", kind.to_lowercase());
            json!({ "apiVersion": version, "kind": kind,
                "metadata": { "name": name, "annotations": annotations }, "spec": spec })
        })
        .collect()
}

/// Returns the pod within a workload: its metadata and spec.
pub(super) fn pod_of(workload: &Value) -> &Value {
    let spec = &workload["spec"];
    match workload["kind"].as_str().unwrap() {
        "Pod" => workload,
        "CronJob" => &spec["jobTemplate"]["spec"]["template"],
        _ => &spec["template"],
    }
}

/// Applies a workload of each kind in a dry run, checks what the API server would store, and
/// returns that.
pub(super) fn component_covers_each_kind_of_workload(node: &Node, folder: &Path) -> Vec<Value> {
    let directory = kustomization(folder);
    // A policy of this cluster leaves the bare pod alone.
    let annotations =
        json!({ "awsvid.io/init-containers": "true", "awsvid.io/environment": "false" });
    let workloads = workloads(&annotations);
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": workloads });
    write(&directory, &list);
    let directory = directory.to_str().unwrap();
    let words = [
        "apply",
        "--dry-run=server",
        "--output",
        "json",
        "--kustomize",
        directory,
    ];
    let stored = node.kubectl(&words).success("each kind");
    let mut stored: Value = serde_json::from_str(&stored).unwrap();
    let mut stored = std::mem::take(stored["items"].as_array_mut().unwrap());
    stored.retain(|item| item["kind"] != "ConfigMap");
    assert_eq!(stored.len(), workloads.len());
    for workload in &stored {
        let spec = &pod_of(workload)["spec"];
        for containers in ["containers", "initContainers"] {
            let container = &spec[containers][0];
            assert_eq!(container["envFrom"][0]["prefix"], "AWS_", "{workload}");
            assert_eq!(container["volumeMounts"][0]["name"], "awsvid", "{workload}");
        }
        let own = &spec["containers"][0]["env"][0];
        assert_eq!(
            own["value"], "false",
            "a value of the workload's own stays: {workload}"
        );
    }
    stored
}

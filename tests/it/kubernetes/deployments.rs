//! Workloads as they are in production: a Deployment with a service account and an image with the
//! AWS CLI.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::cluster::{AWS, Cluster, READER, ServiceAccount, container, copy, overlay};
use crate::harness::counterparts::process::await_some;

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
    let directory = overlay(folder, "workloads", &[], &["environment-patch"]);
    let write = |deployment: &Value| {
        fs::write(directory.join("deployment.json"), deployment.to_string()).unwrap();
    };
    let file = directory.join("kustomization.yaml");
    let mut kustomization: Value =
        serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    kustomization["namespace"] = READER.namespace.into();
    kustomization["resources"] = json!(["deployment.json"]);
    fs::write(file, kustomization.to_string()).unwrap();
    let apply = || {
        cluster
            .node
            .kubectl(&["apply", "--kustomize", directory.to_str().unwrap()])
    };
    let good = deployment(READER, "by-component", &script, &out);
    write(&good);
    apply().success("kubectl apply -k");
    has_read(cluster, READER, "by-component");

    component_covers_each_kind_of_workload(cluster, &directory);
}

/// Returns a workload of each kind, with an init container and a container that sets a variable.
fn workloads() -> Vec<Value> {
    let own = json!([{ "name": "AWS_EC2_METADATA_DISABLED", "value": "false" }]);
    let container = |name: &str, env: &Value| json!({ "name": name, "image": AWS, "env": env });
    let spec = json!({
        "restartPolicy": "Never",
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
    // The policy of this cluster leaves the bare pod alone.
    let annotations =
        json!({ "awsvid.io/init-containers": "true", "awsvid.io/environment": "false" });
    kinds
        .into_iter()
        .map(|(version, kind, spec)| {
            let name = format!("trial-{}", kind.to_lowercase());
            json!({ "apiVersion": version, "kind": kind,
                "metadata": { "name": name, "annotations": annotations }, "spec": spec })
        })
        .collect()
}

/// Returns the pod's spec within a workload.
fn pod_spec(workload: &Value) -> &Value {
    let spec = &workload["spec"];
    match workload["kind"].as_str().unwrap() {
        "Pod" => spec,
        "CronJob" => &spec["jobTemplate"]["spec"]["template"]["spec"],
        _ => &spec["template"]["spec"],
    }
}

/// Applies a workload of each kind in a dry run, and checks what the API server would store.
fn component_covers_each_kind_of_workload(cluster: &Cluster, directory: &Path) {
    let workloads = workloads();
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": workloads });
    fs::write(directory.join("deployment.json"), list.to_string()).unwrap();
    let directory = directory.to_str().unwrap();
    let words = [
        "apply",
        "--dry-run=server",
        "--output",
        "json",
        "--kustomize",
        directory,
    ];
    let stored = cluster.node.kubectl(&words).success("each kind");
    let stored: Value = serde_json::from_str(&stored).unwrap();
    let stored = stored["items"].as_array().unwrap();
    let with_pods: Vec<&Value> = stored
        .iter()
        .filter(|item| item["kind"] != "ConfigMap")
        .collect();
    assert_eq!(with_pods.len(), workloads.len());
    for workload in with_pods {
        let spec = pod_spec(workload);
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
}

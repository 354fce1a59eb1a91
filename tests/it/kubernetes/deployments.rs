//! Workloads as they are in production: a Deployment with a service account and an image with the
//! AWS CLI.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::cluster::{Cluster, READER, ServiceAccount, container, copy, overlay};
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

    // A value of the workload's own is not replaced: it is an error that names the variable.
    let mut own = good;
    let variable = json!({ "name": "AWS_CONTAINER_CREDENTIALS_FULL_URI", "value": "http://127.0.0.1:974/v1/credentials/other" });
    own["spec"]["template"]["spec"]["containers"][0]["env"]
        .as_array_mut()
        .unwrap()
        .push(variable);
    write(&own);
    let refused = apply();
    assert!(
        !refused.status.success() && refused.stderr.contains("valueFrom"),
        "{refused:?}"
    );
}

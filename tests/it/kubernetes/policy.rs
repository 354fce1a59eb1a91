//! The changes that the environment's policy makes to pods.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::cluster::{Cluster, READER, manifests, overlay};
use crate::harness::counterparts::process::await_some;
use crate::harness::kubernetes::Node;

const URI: &str = "AWS_CONTAINER_CREDENTIALS_FULL_URI";
const TOKEN: &str = "AWS_CONTAINER_AUTHORIZATION_TOKEN";
const FILE: &str = "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE";
const METADATA: &str = "AWS_EC2_METADATA_DISABLED";
const METADATA_ENDPOINT: &str = "AWS_EC2_METADATA_SERVICE_ENDPOINT";
const METADATA_V1_DISABLED: &str = "AWS_EC2_METADATA_V1_DISABLED";

/// The number of containers of the largest pod that the policy has to change.
pub(super) const MAX_CONTAINERS: usize = 100;

/// Returns the object that the API server would store instead of this one.
pub(super) fn admitted(node: &Node, object: &Value) -> Value {
    let arguments = [
        "create",
        "--dry-run=server",
        "--output",
        "json",
        "--filename",
        "-",
    ];
    let stored = node
        .kubectl_with(&arguments, &object.to_string())
        .success("an object on trial");
    serde_json::from_str(&stored).unwrap()
}

pub(super) fn pod(namespace: &str, spec: Value) -> Value {
    json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "trial", "namespace": namespace }, "spec": spec })
}

pub(super) fn value<'a>(container: &'a Value, name: &str) -> Option<&'a str> {
    let all = container["env"].as_array()?;
    let found: Vec<_> = all.iter().filter(|one| one["name"] == name).collect();
    assert!(found.len() < 2, "{name} twice: {container}");
    found
        .first()
        .map(|one| one["value"].as_str().unwrap_or("from elsewhere"))
}

fn values(container: &Value) -> [Option<&str>; 4] {
    [URI, TOKEN, FILE, METADATA].map(|name| value(container, name))
}

const ALL: [Option<&str>; 4] = [
    Some("http://127.0.0.1:974/v1/credentials"),
    Some("shop"),
    Some("/run/secrets/awsvid/token"),
    Some("true"),
];

/// Returns a container without any setting.
fn plain() -> Value {
    json!({ "name": "plain", "image": "i" })
}

/// Returns a pod with containers of every kind, each without a different part.
pub(super) fn pod_of_every_container() -> Value {
    let own = json!([
        { "name": URI, "value": "http://127.0.0.1:974/v1/credentials/other" },
        { "name": TOKEN, "valueFrom": { "fieldRef": { "fieldPath": "metadata.name" } } },
        { "name": "SOMETHING", "value": "else" },
    ]);
    pod(
        READER.namespace,
        json!({
            "automountServiceAccountToken": false,
            "initContainers": [plain(), { "name": "sidecar", "image": "i", "restartPolicy": "Always" }],
            "containers": [
                { "name": "own", "image": "i", "env": own, "volumeMounts": [{ "name": "scratch", "mountPath": "/scratch" }] },
                { "name": "imds", "image": "i", "env": [{ "name": METADATA, "value": "false" }] },
            ],
            "volumes": [{ "name": "scratch", "emptyDir": {} }],
        }),
    )
}

/// Returns a pod with as many containers and variables as any pod may have.
pub(super) fn pod_of_size(containers: usize) -> Value {
    let environment: Vec<_> = (0..60)
        .map(|i| json!({ "name": format!("V{i}"), "value": "v" }))
        .collect();
    let many: Vec<_> = (0..containers)
        .map(|i| json!({ "name": format!("c{i}"), "image": "i", "env": environment }))
        .collect();
    pod(READER.namespace, json!({ "containers": many }))
}

/// Applies the policy as it is without the instance metadata service.
fn apply_policy(cluster: &Cluster) {
    let policy = manifests().join("components/environment/policy.yaml");
    cluster
        .node
        .kubectl(&["apply", "--filename", policy.to_str().unwrap()])
        .success("the policy");
}

/// Checks the variables with the component for the instance metadata service, and then without it.
pub(super) fn metadata_service_replaces_its_switch(cluster: &Cluster, folder: &Path) {
    let own = json!([{ "name": METADATA_ENDPOINT, "value": "http://own" }]);
    let containers = json!([
        { "name": "plain", "image": "i" },
        { "name": "own", "image": "i", "env": own },
    ]);
    let trial = pod(
        READER.namespace,
        json!({ "containers": containers, "initContainers": [{ "name": "first", "image": "i" }] }),
    );
    let of = |container: &Value| {
        [METADATA, METADATA_ENDPOINT, METADATA_V1_DISABLED]
            .map(|name| value(container, name).map(str::to_owned))
    };
    let await_values = |what: &str, expected: [Option<&str>; 3], own: [Option<&str>; 3]| {
        await_some(what, Duration::from_secs(30), || {
            let found = admitted(&cluster.node, &trial);
            let all = [
                "/spec/containers/0",
                "/spec/initContainers/0",
                "/spec/containers/1",
            ];
            let all = all.map(|path| of(found.pointer(path).unwrap()));
            let expected = [expected, expected, own].map(|each| each.map(|v| v.map(str::to_owned)));
            (all == expected).then_some(())
        });
    };
    let components = ["environment", "environment-imds"];
    let directory = overlay(folder, "instance-metadata", &[], &components);
    cluster
        .node
        .kubectl(&["apply", "--kustomize", directory.to_str().unwrap()])
        .success("the policy with the component");
    await_values(
        "the variables of the instance metadata service",
        [None, Some("http://127.0.0.1:974/"), Some("true")],
        [None, Some("http://own"), Some("true")],
    );
    apply_policy(cluster);
    await_values(
        "the variable without it",
        [Some("true"), None, None],
        [Some("true"), Some("http://own"), None],
    );
}

pub(super) fn missing_environment_is_set(cluster: &Cluster) {
    apply_policy(cluster);
    let simple = pod(READER.namespace, json!({ "containers": [plain()] }));
    let first = await_some("the policy is active", Duration::from_secs(30), || {
        let found = admitted(&cluster.node, &simple);
        value(&found["spec"]["containers"][0], URI)
            .is_some()
            .then_some(found)
    });
    assert_eq!(values(&first["spec"]["containers"][0]), ALL);

    let everything = pod_of_every_container();
    let found = admitted(&cluster.node, &everything);
    let spec = &found["spec"];
    for container in spec["initContainers"].as_array().unwrap() {
        assert_eq!(values(container), ALL, "{container}");
    }
    let [own, imds] = &spec["containers"].as_array().unwrap()[..] else {
        panic!("two containers: {found}")
    };
    // SDKs disagree on which of two tokens counts, so a token of the pod's own prevents ours.
    let unchanged_cases = [
        Some("http://127.0.0.1:974/v1/credentials/other"),
        Some("from elsewhere"),
        None,
        Some("true"),
    ];
    assert_eq!(values(own), unchanged_cases);
    assert_eq!(value(own, "SOMETHING"), Some("else"));
    assert_eq!(values(imds), [ALL[0], ALL[1], ALL[2], Some("false")]);
    let names: Vec<_> = spec["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|volume| &volume["name"])
        .collect();
    assert_eq!(names, ["scratch", "awsvid"]);
    // The file's content equals the variable.
    assert_eq!(
        spec["volumes"][1]["downwardAPI"]["items"][0]["fieldRef"]["fieldPath"],
        "metadata.namespace"
    );

    // Not in a pod that did not opt in.
    let mut out = simple.clone();
    out["metadata"]["annotations"] = json!({ "awsvid.io/environment": "false" });
    let host = pod(
        READER.namespace,
        json!({ "hostNetwork": true, "containers": [plain()] }),
    );
    let other_pod = pod("default", json!({ "containers": [plain()] }));
    for pod in [out, host, other_pod] {
        let found = admitted(&cluster.node, &pod);
        assert_eq!(
            values(&found["spec"]["containers"][0]),
            [None; 4],
            "{found}"
        );
        assert!(
            !found["spec"]["volumes"].to_string().contains("\"awsvid\""),
            "{found}"
        );
    }

    // Up to the largest number that any pod has.
    let found = admitted(&cluster.node, &pod_of_size(MAX_CONTAINERS));
    for container in found["spec"]["containers"].as_array().unwrap() {
        assert_eq!(
            (
                values(container),
                container["env"].as_array().unwrap().len()
            ),
            (ALL, 64)
        );
    }
}

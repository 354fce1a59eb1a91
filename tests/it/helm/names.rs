//! Names that could collide with those of others: objects of the cluster's scope, and images.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use super::rendered::{DEFAULTS, Objects, Renderer, VERSION, tree};
use crate::manifests::is_whole;

/// Everything that the chart can render at once.
const EVERYTHING: [&str; 11] = [
    "imds.mode=address",
    "resourceQuota.enabled=true",
    "host.enabled=true",
    "startupTaint.enabled=true",
    "metrics.podMonitor.enabled=true",
    "metrics.prometheusRule.enabled=true",
    "dashboards.enabled=true",
    "networkPolicy.enabled=true",
    "openshift.enabled=true",
    "spire.clusterSPIFFEID.create=true",
    "environment.extraVariables.AWS_REGION=eu-central-1",
];

fn kustomizations() -> Vec<PathBuf> {
    let mut found = vec![tree()];
    for folder in ["", "examples"] {
        for entry in fs::read_dir(tree().join(folder)).unwrap() {
            let path = entry.unwrap().path();
            let file = path.join("kustomization.yaml");
            if fs::read_to_string(file).is_ok_and(|text| text.contains("kind: Kustomization")) {
                found.push(path);
            }
        }
    }
    assert!(found.len() > 5, "{found:?}");
    found
}

fn everything(renderer: &Renderer) -> Vec<(String, Objects)> {
    let mut found = Vec::new();
    for source in ["spiffe-broker", "spire-delegated", "workload-api"] {
        for mode in ["policy-v1", "policy-v1beta1", "kyverno"] {
            let (source, mode) = (
                format!("source={source}"),
                format!("environment.mode={mode}"),
            );
            let mut values = DEFAULTS.to_vec();
            values.extend(EVERYTHING);
            values.extend([source.as_str(), mode.as_str()]);
            let name = format!("the chart with {source} and {mode}");
            found.push((name, renderer.chart(&values, &VERSION)));
        }
    }
    for directory in kustomizations() {
        let objects = renderer.kustomization(&directory);
        found.push((directory.display().to_string(), objects));
    }
    let components = [
        "environment",
        "startup-taint",
        "nodes-proxy",
        "network-policy",
    ];
    let objects = renderer.overlay("spiffe-broker", &components, |text| text);
    found.push(("the components".to_owned(), objects));
    found
}

/// SPIRE's own chart has a ClusterRole `spire-agent`, which a `kubectl delete` must not remove.
#[test]
fn names_of_the_cluster_scope_begin_with_awsvid() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    for (what, objects) in everything(&renderer) {
        for (kind, namespace, name) in objects.keys() {
            let is_own = name.starts_with("awsvid-") || (kind == "Namespace" && name == "awsvid");
            let is_namespaced = !namespace.is_empty();
            assert!(is_own || is_namespaced, "{what}: {kind} {name}");
        }
    }
}

/// A name of the default namespace would bind rights to an account that does not exist.
#[test]
fn chart_fits_another_namespace() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let options = [&VERSION[..], &["--namespace", "creds"]].concat();
    for source in ["spiffe-broker", "spire-delegated", "workload-api"] {
        let source = format!("source={source}");
        let values = [&DEFAULTS[..], &EVERYTHING, &[&source]].concat();
        let objects = renderer.chart(&values, &options);
        assert!(objects.len() > 15, "{:?}", objects.keys());
        for ((kind, namespace, name), object) in &objects {
            let what = format!("{source}: {kind} {name}");
            assert!(
                ["", "creds"].contains(&namespace.as_str()),
                "{what} in {namespace}"
            );
            assert!(kind != "Namespace" || name == "creds", "{what}");
            assert_namespaces(&what, "", object);
        }
    }
}

/// Asserts that no text of an object names the default namespace.
fn assert_namespaces(what: &str, field: &str, value: &Value) {
    match value {
        Value::Object(fields) => fields
            .iter()
            .for_each(|(name, value)| assert_namespaces(what, name, value)),
        Value::Array(items) => items
            .iter()
            .for_each(|item| assert_namespaces(what, field, item)),
        Value::String(text) => {
            assert!(field != "namespace" || text != "awsvid", "{what}: {field}");
            for words in ["/ns/awsvid", "serviceaccount:awsvid:", "--namespace awsvid"] {
                assert!(!text.contains(words), "{what}: {field}: {text}");
            }
        }
        _ => {}
    }
}

#[test]
fn every_container_has_resources_and_a_probe() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let mut seen = 0;
    for (what, objects) in everything(&renderer) {
        for ((kind, _, name), object) in &objects {
            let pod = &object["spec"]["template"]["spec"];
            for list in ["containers", "initContainers"] {
                for container in pod[list].as_array().into_iter().flatten() {
                    let what = format!("{what}: {kind} {name} {}", container["name"]);
                    assert!(container["resources"]["requests"].is_object(), "{what}");
                    assert!(container["resources"]["limits"].is_object(), "{what}");
                    let has_probe = container["livenessProbe"].is_object();
                    assert_eq!(has_probe, list == "containers", "{what}");
                    seen += 1;
                }
            }
        }
    }
    assert!(seen > 20, "{seen}");
}

#[test]
fn default_installs_awsvid_alone() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let roots = ["", "spiffe-broker", "spire-delegated", "base"];
    let trees = roots.map(|root| renderer.kustomization(&tree().join(root)));
    let chart = renderer.chart(&DEFAULTS, &VERSION);
    for objects in trees.iter().chain([&chart]) {
        for (kind, namespace, name) in objects.keys() {
            assert!(
                matches!(namespace.as_str(), "" | "awsvid"),
                "{kind} {name} in {namespace}"
            );
            assert!(kind != "DaemonSet" || name == "awsvid", "{name}");
        }
    }
}

#[test]
fn rendered_images_name_their_registry_and_version() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let mut seen = 0;
    for (what, objects) in everything(&renderer) {
        for object in objects.values() {
            let pod = &object["spec"]["template"]["spec"];
            for container in ["containers", "initContainers"]
                .iter()
                .filter_map(|list| pod[*list].as_array())
                .flatten()
            {
                let image = container["image"].as_str().unwrap();
                assert!(is_whole(image), "{what}: {image}");
                seen += 1;
            }
        }
    }
    assert!(seen > 20, "{seen}");
    let digest = format!("image.digest=sha256:{}", "0".repeat(64));
    let chart = renderer.chart(
        &["strict=false", &digest, "image.registry=r.example"],
        &VERSION,
    );
    let daemonset = &chart[&super::rendered::key("DaemonSet", "awsvid")];
    assert_eq!(
        daemonset["spec"]["template"]["spec"]["containers"][0]["image"],
        format!("r.example/awsvid/awsvid@sha256:{}", "0".repeat(64))
    );
}

/// GKE gives a system's priority class only to namespaces whose quota names it.
#[test]
fn quota_covers_every_priority_class() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let values = [&DEFAULTS[..], &EVERYTHING].concat();
    let objects = renderer.chart(&values, &VERSION);
    let quota = objects
        .iter()
        .find(|((kind, ..), _)| kind == "ResourceQuota");
    let (_, quota) = quota.expect("the quota");
    let covered = &quota["spec"]["scopeSelector"]["matchExpressions"][0]["values"];
    let mut count = 0;
    for ((kind, _, name), object) in &objects {
        let class = &object["spec"]["template"]["spec"]["priorityClassName"];
        if class.is_string() {
            let covered = covered.as_array().expect("a list");
            assert!(covered.contains(class), "{kind} {name}: {class}");
            count += 1;
        }
    }
    assert_eq!(count, 2, "the DaemonSet and the Deployment");
}

//! API servers without MutatingAdmissionPolicy v1: pods get the same variables there. The chart is
//! installed on each, and chooses by what that server has.

mod kyverno;
mod upgrade;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::cluster::{READER, manifests, overlay};
use super::deployments::{component_covers_each_kind_of_workload, pod_of, workloads};
use super::policy::{MAX_CONTAINERS, admitted, pod, pod_of_every_container, pod_of_size, value};
use crate::harness::counterparts::process::{Output, await_some};
use crate::harness::counterparts::{cached, folder, skip};
use crate::harness::kubernetes::Node;
use crate::harness::slow_only;

const CURRENT: &str = "kube-apiserver";
const OLDER: &str = "kube-apiserver-1.34";
/// The options with which an API server of 1.34 has the policy.
const GATE: &str = "--feature-gates=MutatingAdmissionPolicy=true";
const API: &str = "--runtime-config=admissionregistration.k8s.io/v1beta1=true";
const DEFAULTS: &str = "strict=false";
const FIRST: &str = "AWS_CONTAINER_CREDENTIALS_FULL_URI";
const LAST: &str = "AWS_REGION";

/// Settings of a comparison between two clusters.
struct Trial {
    /// The mode of the instance metadata service.
    imds: &'static str,
    /// The size of the largest pod.
    max_containers: usize,
}

/// Returns a counterpart's path. Returns `None` after a printed skip if it is missing.
fn slow_tool(name: &str) -> Option<PathBuf> {
    let path = cached("bin").join(name);
    if path.exists() {
        return Some(path);
    }
    let path = path.display();
    skip(&format!(
        "{path} is missing: run tests/counterparts/get slow"
    ));
    None
}

/// Starts an API server, with namespaces for pods.
fn start(folder: &Path, name: &str, options: &[&str]) -> Option<Node> {
    slow_tool(name)?;
    let node = Node::start_api_server(&folder.join(name), name, options)?;
    let labels = json!({ "awsvid.io/environment": "true", "awsvid.io/imds": "true" });
    let mut items = vec![json!({ "apiVersion": "v1", "kind": "Namespace",
        "metadata": { "name": READER.namespace, "labels": labels } })];
    // A pod needs one, which the controller manager would create.
    items.extend([READER.namespace, "default"].map(|namespace| {
        json!({ "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": { "name": "default", "namespace": namespace } })
    }));
    node.apply(&json!({ "apiVersion": "v1", "kind": "List", "items": items }));
    Some(node)
}

/// Installs the chart with these values, or changes them, and returns the notes.
fn install(node: &Node, values: &str) -> String {
    try_install(node, values).success("helm upgrade --install")
}

fn try_install(node: &Node, values: &str) -> Output {
    let chart = manifests().with_file_name("helm").join("awsvid");
    let arguments = [
        "upgrade",
        "--install",
        "--reset-values",
        "awsvid",
        chart.to_str().unwrap(),
        "--namespace",
        "awsvid",
        "--create-namespace",
        "--set",
        values,
    ];
    node.helm(&arguments)
}

/// Returns a list in the order of this field.
fn sorted(list: &Value, key: &str) -> Vec<Value> {
    let mut all = list.as_array().cloned().unwrap_or_default();
    all.sort_by_key(|one| one[key].as_str().map(str::to_owned));
    all
}

/// Returns a container's settings that a policy may change. The order of variables and mounts does
/// not count.
fn settings(container: &Value) -> Value {
    json!({
        "name": container["name"], "env": sorted(&container["env"], "name"),
        "envFrom": container["envFrom"],
        "volumeMounts": sorted(&container["volumeMounts"], "mountPath"),
    })
}

/// Returns the settings of all containers, and what the pod itself has.
fn pod_settings(pod: &Value) -> Value {
    let spec = &pod["spec"];
    let containers = ["containers", "initContainers"].map(|list| {
        let all = spec[list].as_array().into_iter().flatten();
        all.map(settings).collect::<Vec<_>>()
    });
    json!({
        "containers": containers, "volumes": sorted(&spec["volumes"], "name"),
        "security": spec["securityContext"],
    })
}

/// Returns the spec of a pod with one container without any setting.
fn plain() -> Value {
    json!({ "automountServiceAccountToken": false, "containers": [{ "name": "plain", "image": "i" }] })
}

/// Returns the pods on trial by name. Those of workloads are as their controllers create them.
fn pods(node: &Node, max_containers: usize) -> BTreeMap<String, Value> {
    let mut host = plain();
    host["hostNetwork"] = true.into();
    let mut out = pod(READER.namespace, plain());
    out["metadata"]["annotations"] =
        json!({ "awsvid.io/environment": "false", "awsvid.io/imds": "false" });
    let mut largest = pod_of_size(max_containers);
    largest["spec"]["automountServiceAccountToken"] = false.into();
    let single = [
        ("plain", pod(READER.namespace, plain())),
        ("every kind of container", pod_of_every_container()),
        ("the largest", largest),
        ("opted out", out.clone()),
        ("on the node's network", pod(READER.namespace, host)),
        ("of another namespace", pod("default", plain())),
    ];
    let mut all = BTreeMap::from(single.map(|(name, pod)| (name.to_owned(), pod)));
    for mut workload in workloads(&json!({})) {
        workload["metadata"]["namespace"] = READER.namespace.into();
        let kind = workload["kind"].as_str().unwrap().to_owned();
        let stored = admitted(node, &workload);
        let mut created = pod_of(&stored).clone();
        if kind != "Pod" {
            let [before, after] = [&workload, &stored].map(|one| pod_settings(pod_of(one)));
            assert_eq!(
                before["containers"], after["containers"],
                "only pods are changed: {kind}"
            );
            created["apiVersion"] = "v1".into();
            created["kind"] = "Pod".into();
            created["metadata"]["namespace"] = READER.namespace.into();
            created["metadata"]["generateName"] = "trial-".into();
        } else {
            created = workload;
        }
        let mut opted_out = created.clone();
        opted_out["metadata"]["annotations"] = out["metadata"]["annotations"].clone();
        all.insert(format!("{kind}, opted out"), opted_out);
        all.insert(kind, created);
    }
    all
}

/// Returns what the API server would store of each pod on trial, once a plain pod is changed so.
fn stored(
    node: &Node,
    trial: &Trial,
    is_changed: impl Fn(&Value) -> bool,
) -> BTreeMap<String, Value> {
    let trials = pods(node, trial.max_containers);
    await_some("the policy is active", Duration::from_secs(60), || {
        is_changed(&admitted(node, &trials["plain"])["spec"]).then_some(())
    });
    let found: BTreeMap<_, _> = trials
        .iter()
        .map(|(name, trial)| (name.clone(), pod_settings(&admitted(node, trial))))
        .collect();
    // Else the comparison with another cluster would be one of nothing.
    assert_ne!(found["Deployment"], found["Deployment, opted out"]);
    found
}

/// Returns the pods with the chart's defaults, and with all variables and this mode of the instance
/// metadata service. The notes have `line`.
fn stored_with_both(node: &Node, trial: &Trial, line: &str) -> [BTreeMap<String, Value>; 2] {
    let imds = trial.imds;
    let install = |values: &str| {
        let notes = install(node, values);
        assert!(notes.contains(line), "{notes}");
    };
    install(DEFAULTS);
    let defaults = stored(node, trial, |spec| {
        value(&spec["containers"][0], FIRST).is_some()
    });
    let more = "environment.extraVariables.AWS_REGION=eu-central-1,\
                environment.extraVariables.NO_PROXY='a\"b\\\\c";
    install(&format!("{DEFAULTS},imds.mode={imds},{more}"));
    let more = stored(node, trial, |spec| {
        let has_sysctl = spec["securityContext"]["sysctls"].is_array();
        value(&spec["containers"][0], LAST).is_some() && has_sysctl == (imds == "address")
    });
    [defaults, more]
}

fn assert_same(older: &BTreeMap<String, Value>, current: &BTreeMap<String, Value>) {
    assert_eq!(older.len(), current.len());
    for (name, expected) in current {
        assert_eq!(&older[name], expected, "{name}");
    }
}

/// Returns the pods of the version that the other tests run.
fn stored_by_current(folder: &Path, trial: &Trial) -> Option<[BTreeMap<String, Value>; 2]> {
    let node = start(folder, CURRENT, &[])?;
    Some(stored_with_both(
        &node,
        trial,
        "MutatingAdmissionPolicy awsvid-environment, v1)",
    ))
}

#[test]
fn policy_v1beta1_injects_what_v1_injects() {
    const TRIAL: Trial = Trial {
        imds: "address",
        max_containers: MAX_CONTAINERS,
    };
    if !slow_only() {
        return;
    }
    let directory = folder();
    let Some(current) = stored_by_current(directory.path(), &TRIAL) else {
        return;
    };
    let Some(node) = start(directory.path(), OLDER, &[GATE, API]) else {
        return;
    };
    assert!(has_feature(&node, &install(&node, DEFAULTS)));
    let older = stored_with_both(
        &node,
        &TRIAL,
        "MutatingAdmissionPolicy awsvid-environment, v1beta1)",
    );
    for (older, current) in older.iter().zip(&current) {
        assert_same(older, current);
    }
    let components = [
        "environment",
        "environment-imds",
        "imds-address",
        "policies-v1beta1",
    ];
    let overlay = overlay(directory.path(), "v1beta1", &[], &components);
    let words = ["apply", "--dry-run=server", "--kustomize"];
    let words = [&words[..], &[overlay.to_str().unwrap()]].concat();
    node.kubectl(&words).success("kubectl apply -k");
}

/// The API may be served without the feature, for example by `api/beta=true`. The API server then
/// stores the policy and ignores it, which the chart cannot see.
#[test]
fn policy_without_its_feature_injects_nothing() {
    if !slow_only() {
        return;
    }
    let directory = folder();
    let Some(node) = start(directory.path(), OLDER, &[API]) else {
        return;
    };
    let notes = install(&node, DEFAULTS);
    assert!(!has_feature(&node, &notes));
    await_denial(&node);
    let found = admitted(&node, &pod(READER.namespace, plain()));
    assert_eq!(value(&found["spec"]["containers"][0], FIRST), None);
}

/// Runs the command of the notes that shows whether the API server has the feature.
fn has_feature(node: &Node, notes: &str) -> bool {
    let command = notes.lines().find(|line| line.contains("get --raw"));
    let command = command.unwrap_or_else(|| panic!("no command: {notes}"));
    let found = node.shell(command).success(command);
    assert_eq!(found.lines().count(), 1, "{found}");
    found.trim_end().ends_with(" 1")
}

/// Applies a policy that denies a pod, and waits until it does. Policies from before are then in
/// effect too.
fn await_denial(node: &Node) {
    let kind = "ValidatingAdmissionPolicy";
    let metadata = json!({ "name": "denial" });
    let (version, rule) = (
        "admissionregistration.k8s.io/v1",
        json!({ "apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"] }),
    );
    let policy = json!({ "apiVersion": version, "kind": kind, "metadata": metadata, "spec": {
        "matchConstraints": { "resourceRules": [rule] },
        "validations": [{ "expression": "object.metadata.name != 'denied'" }],
    } });
    let binding = json!({ "apiVersion": version, "kind": format!("{kind}Binding"),
        "metadata": metadata, "spec": { "policyName": "denial", "validationActions": ["Deny"] } });
    node.apply(&json!({ "apiVersion": "v1", "kind": "List", "items": [policy, binding] }));
    let mut denied = pod(READER.namespace, plain());
    denied["metadata"]["name"] = "denied".into();
    await_some("a pod is denied", Duration::from_secs(60), || {
        let arguments = ["create", "--dry-run=server", "--filename", "-"];
        let output = node.kubectl_with(&arguments, &denied.to_string());
        (!output.status.success()).then_some(())
    });
}

#[test]
fn component_changes_workloads_alike_on_an_older_cluster() {
    if !slow_only() {
        return;
    }
    let directory = folder();
    let stored = |name: &str| {
        let node = start(directory.path(), name, &[])?;
        let notes = install(&node, DEFAULTS);
        assert_eq!(
            notes.contains("NOTHING IS INJECTED"),
            name == OLDER,
            "{notes}"
        );
        let stored = component_covers_each_kind_of_workload(&node, directory.path());
        Some(
            stored
                .iter()
                .map(|one| pod_settings(pod_of(one)))
                .collect::<Vec<_>>(),
        )
    };
    if let (Some(older), Some(current)) = (stored(OLDER), stored(CURRENT)) {
        assert_eq!(older, current);
    }
}

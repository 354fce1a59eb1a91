//! Kyverno gives pods the variables that the API server gives them on newer clusters.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::{OLDER, Trial, assert_same, slow_tool, start, stored_by_current, stored_with_both};
use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::await_some;
use crate::harness::kubernetes::Node;
use crate::harness::slow_only;

const TIMEOUT: Duration = Duration::from_secs(60);

#[test]
fn kyverno_injects_what_the_policy_injects() {
    const TRIAL: Trial = Trial {
        // Kyverno's policy has the variables alone.
        imds: "endpoint",
        // Its time grows with the square of the pod's size.
        max_containers: 20,
    };
    if !slow_only() {
        return;
    }
    let directory = folder();
    // kubectl does not follow a link to a directory.
    let Some(kinds) = slow_tool("kyverno-kinds").map(|link| fs::canonicalize(link).unwrap()) else {
        return;
    };
    let Some(mut node) = start(directory.path(), OLDER, &[]) else {
        return;
    };
    start_kyverno(&mut node, &kinds);
    let kyverno = stored_with_both(&node, &TRIAL, "Kyverno (ClusterPolicy awsvid-environment)");
    let Some(current) = stored_by_current(directory.path(), &TRIAL) else {
        return;
    };
    for (kyverno, current) in kyverno.iter().zip(&current) {
        assert_same(kyverno, current);
    }
}

/// Starts Kyverno's admission controller outside of a pod, and waits until it is ready.
fn start_kyverno(node: &mut Node, kinds: &Path) {
    let arguments = [
        "create",
        "--recursive",
        "--filename",
        kinds.to_str().unwrap(),
    ];
    node.kubectl(&arguments).success("Kyverno's kinds");
    node.apply(
        &json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "kyverno" } }),
    );
    let all = ["wait", "--for=condition=Established", "crd", "--all"];
    // kubectl fails if one has no condition yet.
    await_some("Kyverno's kinds are served", TIMEOUT, || {
        node.kubectl(&all).status.success().then_some(())
    });
    let variables = [
        ("KYVERNO_NAMESPACE", "kyverno"),
        (
            "KYVERNO_SERVICEACCOUNT_NAME",
            "kyverno-admission-controller",
        ),
        ("KYVERNO_DEPLOYMENT", "kyverno-admission-controller"),
        ("KYVERNO_POD_NAME", "kyverno"),
        ("INIT_CONFIG", "kyverno"),
        ("METRICS_CONFIG", "kyverno-metrics"),
    ];
    let options = [
        "--kubeconfig=/etc/kubernetes/admin.conf",
        "--serverIP=127.0.0.1:9443",
        "--caSecretName=kyverno-ca",
        "--tlsSecretName=kyverno-tls",
        "--disableMetrics",
        "--controllerRuntimeMetricsAddress=0",
    ];
    node.start_program_with("kyverno", &variables, &options.map(str::to_owned));
    // It makes its certificate after it listens.
    let ready = ["curl", "-skf", "https://127.0.0.1:9443/health/readiness"];
    await_some("Kyverno is ready", TIMEOUT, || {
        node.run(&ready).status.success().then_some(())
    });
}

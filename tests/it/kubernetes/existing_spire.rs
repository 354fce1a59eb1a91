//! awsvid on a cluster with a SPIRE that has the names and paths of SPIRE's own Helm chart: it is
//! installed, upgraded and removed, and SPIRE's agent attests pods all the while.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::cluster::{Cluster, READER, copy, manifests};
use super::life::PollingPod;
use crate::harness::counterparts::process::await_some;
use crate::harness::documents::block;

/// The objects of SPIRE's chart 0.30 that awsvid could collide with, with `spire-values.yaml`.
const SPIRE: &str = include_str!("existing_spire/spire.yaml");
const AGENT_SOCKETS: &str = "/run/spire/agent-sockets";
const BROKER: &str = "/run/spire/agent/sockets/csi.spiffe.io/broker";
const TIMEOUT: Duration = Duration::from_secs(120);

/// SPIRE's objects without the fields that controllers write: they must stay as they are.
#[derive(Debug, PartialEq)]
pub(super) struct SpireObjects(Vec<Value>);

impl SpireObjects {
    fn read(cluster: &Cluster) -> Self {
        let namespaced = ["--namespace", "spire-system"];
        let object = |words: &[&str]| {
            let mut object = cluster.node.get(&[words, &namespaced].concat());
            object["status"] = Value::Null;
            object["metadata"]["managedFields"] = Value::Null;
            object
        };
        let pods = cluster.node.get(&[&["pods"], &namespaced[..]].concat());
        let pods = pods["items"].as_array().unwrap().iter();
        let pods = pods.map(|pod| {
            let restarts = &pod["status"]["containerStatuses"][0]["restartCount"];
            json!([pod["metadata"]["uid"], restarts])
        });
        let mut found: Vec<Value> = pods.collect();
        found.extend([
            object(&["clusterrole", "spire-agent"]),
            object(&["clusterrolebinding", "spire-agent"]),
            object(&["namespace", "spire-system"]),
            object(&["serviceaccount", "spire-agent"]),
            object(&["configmap", "spire-agent"]),
            object(&["daemonset", "spire-agent"])["metadata"]["generation"].clone(),
        ]);
        Self(found)
    }
}

/// Installs SPIRE's agent as its chart does.
pub(super) fn install(cluster: &Cluster) -> SpireObjects {
    let node = &cluster.node;
    node.kubectl_with(&["apply", "--filename", "-"], SPIRE)
        .success("SPIRE");
    node.apply(&json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": "spire-bundle", "namespace": "spire-system" },
        "data": { "bundle.crt": cluster.spire.bundle() },
    }));
    node.rolled_out("spire-system", "daemonset/spire-agent");
    attests(cluster, "before");
    SpireObjects::read(cluster)
}

/// Asserts that the agent gives a pod its identity.
fn attests(cluster: &Cluster, when: &str) {
    let name = format!("attested-{when}");
    let socket = format!("{AGENT_SOCKETS}/spire-agent.sock");
    let words = [
        "/opt/spire/bin/spire-agent",
        "api",
        "fetch",
        "jwt",
        "-audience",
        "trial",
        "-timeout",
        "60s",
        "-socketPath",
        &socket,
    ];
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": READER.namespace },
        "spec": {
            "serviceAccountName": READER.name, "restartPolicy": "Never",
            "containers": [{
                "name": "fetch", "image": "ghcr.io/spiffe/spire-agent:1.15.3", "command": words,
                "volumeMounts": [{ "name": "agent", "mountPath": AGENT_SOCKETS, "readOnly": true }],
            }],
            "volumes": [{ "name": "agent", "hostPath": { "path": AGENT_SOCKETS } }],
        },
    });
    let ended = cluster.node.run_pod(&pod);
    assert!(
        ended.succeeded && ended.log.contains(&READER.id()),
        "{when}: {ended:?}"
    );
}

/// Asserts that a pod reads its object by awsvid's credentials.
fn reads(cluster: &Cluster, when: &str) {
    let ended = cluster
        .node
        .run_pod(&cluster.pod(READER, &format!("reads-{when}"), &copy(READER)));
    assert!(
        ended.succeeded && ended.log.contains("hello from the shop\n"),
        "{when}: {ended:?}"
    );
}

/// Waits until the API server has no object of awsvid's, and asserts that SPIRE is as it was.
fn is_removed(cluster: &Cluster, spire: &SpireObjects, when: &str) {
    await_some("awsvid is removed", TIMEOUT, || {
        let kinds = "clusterroles,clusterrolebindings,mutatingadmissionpolicies,\
                     mutatingadmissionpolicybindings,validatingadmissionpolicies,namespaces";
        let listed = cluster.node.kubectl(&["get", kinds, "--output", "name"]);
        let listed = listed.success("the names");
        let is_own = |line: &str| line.contains("awsvid") && line != "namespace/awsvid-spire";
        (!listed.lines().any(is_own)).then_some(())
    });
    assert_node_is_clean(cluster);
    attests(cluster, when);
    assert_eq!(&SpireObjects::read(cluster), spire, "{when}");
}

/// Asserts that the node has no process, file or listener of awsvid's.
fn assert_node_is_clean(cluster: &Cluster) {
    await_some("awsvid has ended", TIMEOUT, || {
        let found = cluster.node.run(&["pgrep", "--exact", "awsvid"]);
        found.stdout.is_empty().then_some(())
    });
    let left = cluster
        .node
        .run(&["find", "/run/awsvid-handover", "-not", "-type", "d"]);
    assert_eq!(left.success("find"), "");
}

/// Runs the commands of a block, with these words replaced.
fn run_documented(cluster: &Cluster, block: &str, replaced: &[(&str, &str)]) {
    for line in block.lines() {
        let line = replaced
            .iter()
            .fold(line.to_owned(), |line, (from, to)| line.replace(from, to));
        let words: Vec<&str> = line.split_whitespace().collect();
        let output = match words[0] {
            "kubectl" => cluster.node.kubectl(&words[1..]),
            "helm" => cluster.node.helm(&words[1..]),
            other => panic!("{other}: {line}"),
        };
        output.success(&line);
    }
}

pub(super) fn helm_installs_and_removes_awsvid(
    cluster: &Cluster,
    spire: &SpireObjects,
    folder: &Path,
) {
    let chart = manifests().with_file_name("helm").join("awsvid");
    cluster.install_seccomp_profile();
    let values = folder.join("values.json");
    fs::write(&values, cluster.chart_values().to_string()).unwrap();
    let files = format!(
        "{} --values {}",
        chart.join("examples/awsvid-values.yaml").display(),
        values.display()
    );
    let chart = chart.to_str().unwrap();
    let replaced = [
        ("deploy/helm/awsvid", chart),
        ("awsvid-values.yaml", files.as_str()),
    ];
    let install = block(
        "kubernetes-with-spire.md",
        "2. Install awsvid",
        "kubectl create namespace",
    );
    // The chart's own page has the same commands.
    let of_chart = block(
        "deploy/helm/awsvid/README.md",
        "Install",
        "kubectl create namespace",
    );
    assert_eq!(
        of_chart.replace("values.yaml", "awsvid-values.yaml"),
        install
    );
    run_documented(cluster, &install, &replaced);
    let check = block(
        "kubernetes-with-spire.md",
        "3. Check it",
        "kubectl --namespace",
    );
    run_documented(cluster, &check, &[]);
    attests(cluster, "with-helm");
    reads(cluster, "with-helm");

    let upgrade = [
        "upgrade",
        "awsvid",
        chart,
        "--namespace",
        "awsvid",
        "--reuse-values",
        "--set",
        "config.sts.max_concurrent=8,podAnnotations.trial=upgraded",
    ];
    let asker = PollingPod::start(cluster, "during-helm-upgrade");
    cluster.node.helm(&upgrade).success("helm upgrade");
    cluster.node.rolled_out("awsvid", "daemonset/awsvid");
    asker.await_more();
    let (answered, failed, _) = asker.stop();
    assert!(failed.is_empty() && answered > 40, "{answered}: {failed:?}");
    attests(cluster, "after-upgrade");
    reads(cluster, "after-upgrade");

    let remove = block(
        "kubernetes-with-spire.md",
        "Remove awsvid",
        "helm uninstall",
    );
    let of_chart = block(
        "deploy/helm/awsvid/README.md",
        "Uninstall",
        "helm uninstall",
    );
    assert_eq!(of_chart, remove);
    run_documented(cluster, &remove, &[]);
    is_removed(cluster, spire, "after-helm");
}

pub(super) fn kustomize_installs_and_removes_awsvid(cluster: &Cluster, spire: &SpireObjects) {
    let socket = format!("{BROKER}/broker.sock");
    let with_socket = |text: String| text.replace("/run/spire/broker/api.sock", &socket);
    let directory = cluster.overlay_of("spiffe-broker", "spiffe-broker", &[], with_socket);
    // The page's own kustomization, with the paths and the trust domain of this test.
    let file = directory.join("kustomization.yaml");
    let own: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    let base = own["resources"][0].as_str().unwrap();
    let base = base.strip_suffix("/spiffe-broker").unwrap();
    let documented = block(
        "kubernetes-with-spire.md",
        "With Kustomize instead",
        "apiVersion: kustomize",
    )
    .replace("awsvid/deploy/kubernetes", base)
    .replace("[awsvid.toml]", "[awsvid.toml, ca.crt]")
    .replace("prod.example.com", "example.org");
    fs::write(file, documented).unwrap();
    let directory = directory.to_str().unwrap();
    cluster
        .node
        .kubectl(&["apply", "--kustomize", directory])
        .success("kubectl apply -k");
    cluster.node.rolled_out("awsvid", "daemonset/awsvid");
    attests(cluster, "with-kustomize");
    reads(cluster, "with-kustomize");
    cluster
        .node
        .kubectl(&["delete", "--kustomize", directory])
        .success("kubectl delete -k");
    is_removed(cluster, spire, "after-kustomize");
}

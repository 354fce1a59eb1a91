//! awsvid on a cluster with a SPIRE that has the names and paths of SPIRE's own Helm chart: it is
//! installed, upgraded and removed, and SPIRE's agent attests pods all the while.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::cluster::{Cluster, READER, copy, manifests};
use super::life::{PollingPod, process};
use super::{attacks, first_act_is_answered};
use crate::harness::counterparts::process::await_some;
use crate::harness::documents::block;
use crate::harness::kubernetes::{Image, root_of};

/// The objects of SPIRE's chart 0.30 that awsvid could collide with, with `spire-values.yaml`.
const SPIRE: &str = include_str!("existing_spire/spire.yaml");
const AGENT_SOCKETS: &str = "/run/spire/agent-sockets";
const BROKER: &str = "/run/spire/agent/sockets/csi.spiffe.io/broker";
const HANDOVER: &str = "/run/awsvid-handover";
const README: &str = include_str!("../../../deploy/helm/awsvid/README.md");
/// One more patch of the page's kustomization, which replaces awsvid's pods.
const ANNOTATION: &str = "  - patch: |-
      apiVersion: apps/v1
      kind: DaemonSet
      metadata: { name: awsvid, namespace: awsvid }
      spec: { template: { metadata: { annotations: { trial: upgraded } } } }
";
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
    attests(cluster, when);
    assert_eq!(&SpireObjects::read(cluster), spire, "{when}");
}

/// Waits until the namespace has no object but those that each namespace has.
fn await_empty_namespace(cluster: &Cluster) {
    let kinds = "all,configmaps,secrets,serviceaccounts,roles,rolebindings,networkpolicies,\
                 resourcequotas,controllerrevisions,endpointslices";
    let words = ["get", kinds, "--namespace", "awsvid", "--output", "name"];
    await_some("the namespace is empty", TIMEOUT, || {
        let listed = cluster.node.kubectl(&words).success("the objects");
        let listed: Vec<&str> = listed.lines().collect();
        (listed == ["configmap/kube-root-ca.crt", "serviceaccount/default"]).then_some(())
    });
}

/// A pod that is on the node before awsvid is removed.
struct KeptPod<'a> {
    cluster: &'a Cluster,
    name: &'a str,
}

impl<'a> KeptPod<'a> {
    fn start(cluster: &'a Cluster, name: &'a str) -> Self {
        cluster
            .node
            .apply(&cluster.pod(READER, name, "exec busybox sleep 36000"));
        let kept = Self { cluster, name };
        await_some("the pod is answered", TIMEOUT, || {
            kept.request().contains("403").then_some(())
        });
        kept
    }

    /// Sends a request without a token, and returns the error.
    fn request(&self) -> String {
        let words = ["exec", "--namespace", READER.namespace, self.name, "--"];
        let fetch = ["/bin/busybox", "wget", "-q", "-O", "-"];
        let url = ["http://127.0.0.1:974/v1/credentials"];
        let words = [&words[..], &fetch, &url].concat();
        self.cluster.node.kubectl(&words).stderr
    }

    /// Asserts that the node has no process and no listener of awsvid's, and no other file than
    /// these.
    fn assert_node_is_clean(&self, files: &str) {
        let node = &self.cluster.node;
        await_some("awsvid has ended", TIMEOUT, || {
            let found = node.run(&["pgrep", "--exact", "awsvid"]);
            found.stdout.is_empty().then_some(())
        });
        let answer = self.request();
        assert!(answer.contains("Connection refused"), "{answer}");
        let left = node.run(&["find", HANDOVER, "-not", "-type", "d"]);
        assert_eq!(left.success("find"), files);
    }
}

/// Replaces awsvid's pods by `upgrade` while several pods send requests, of which none may fail.
fn upgrade_under_load(cluster: &Cluster, names: [&'static str; 3], upgrade: impl FnOnce()) {
    let askers = names.map(|name| PollingPod::start(cluster, name));
    let before = process(&cluster.node, "awsvid");
    upgrade();
    cluster.node.rolled_out("awsvid", "daemonset/awsvid");
    assert_ne!(process(&cluster.node, "awsvid"), before, "the same pod");
    for asker in askers {
        asker.await_more();
        let (answered, failed, _) = asker.stop();
        assert!(failed.is_empty() && answered > 40, "{answered}: {failed:?}");
    }
}

/// Starts a pod to which the agent gives its identity again and again.
pub(super) fn poll_agent<'a>(cluster: &'a Cluster, folder: &Path) -> PollingPod<'a> {
    let node = &cluster.node;
    let program = "/opt/spire/bin/spire-agent";
    let agent = root_of(
        &folder.join("images/polled-agent"),
        &node.bin().join("spire-agent"),
        program,
    );
    let image = "docker.io/library/spire-agent-with-shell:test";
    node.import(&Image {
        name: image,
        layers: &[&node.bin().join("pod-files/busybox"), &agent],
        entrypoint: &["/bin/busybox"],
    });
    let name = "attested-always";
    let fetch = format!(
        "fetch() {{
            busybox sleep 1
            found=$({program} api fetch jwt -audience trial -timeout 60s -socketPath {AGENT_SOCKETS}/spire-agent.sock 2>&1)
            case $found in *{}*) ;; *) echo \"$found\"; return 1 ;; esac
        }}",
        READER.id()
    );
    let mut pod = cluster.pod(READER, name, &format!("{fetch}\n{}", PollingPod::LOOP));
    let container = &mut pod["spec"]["containers"][0];
    container["image"] = image.into();
    container["volumeMounts"] =
        json!([{ "name": "agent", "mountPath": AGENT_SOCKETS, "readOnly": true }]);
    pod["spec"]["volumes"] = json!([{ "name": "agent", "hostPath": { "path": AGENT_SOCKETS } }]);
    PollingPod::run(cluster, name, &pod)
}

/// Gives a team a role by a file of its own, in the ConfigMap that the chart's values mount.
fn role_of_team_is_served(cluster: &Cluster) {
    let before = process(&cluster.node, "awsvid");
    let role = format!(
        "[[role]]\nname = \"team\"\nspiffe_id = {:?}\nrole_arn = {:?}\n",
        READER.id(),
        cluster.minio.role_arn()
    );
    cluster.node.apply(&json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": "shop-roles", "namespace": "awsvid" },
        "data": { "shop.toml": role },
    }));
    let script = "until busybox wget -q -O /dev/null --header 'Authorization: any' http://127.0.0.1:974/v1/credentials/team
            do busybox sleep 1; done; echo answered";
    let ended = cluster
        .node
        .run_pod(&cluster.pod(READER, "role-of-team", script));
    assert!(
        ended.succeeded && ended.log.contains("answered"),
        "{ended:?}"
    );
    let after = process(&cluster.node, "awsvid");
    assert_eq!(after, before, "no process was replaced");
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
    let mut values = cluster.chart_values();
    values["imds"] = json!({ "mode": "endpoint" });
    let teams = block(
        "deploy/helm/awsvid/README.md",
        "Configuration",
        "config:\n  include:",
    );
    let files = [("values.json", values.to_string()), ("teams.yaml", teams)];
    let files = files.map(|(name, text)| {
        let path = folder.join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    });
    let files = format!(
        "{} --values {} --values {}",
        chart.join("examples/awsvid-values.yaml").display(),
        files[0],
        files[1]
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
    first_act_is_answered(cluster, "spiffe-broker");
    attacks::pod_listeners_attest_each_pod(cluster, "spiffe-broker");
    role_of_team_is_served(cluster);

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
    upgrade_under_load(cluster, ["helm-a", "helm-b", "helm-c"], || {
        cluster.node.helm(&upgrade).success("helm upgrade");
    });
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
    let kept = KeptPod::start(cluster, "kept-with-helm");
    let (uninstall, delete) = remove.trim_end().split_once('\n').expect("two commands");
    run_documented(cluster, uninstall, &[]);
    // A ConfigMap of the team, and not of the release.
    let teams = ["delete", "configmap", "shop-roles", "--namespace", "awsvid"];
    cluster.node.kubectl(&teams).success("the team's ConfigMap");
    await_empty_namespace(cluster);
    run_documented(cluster, delete, &[]);
    is_removed(cluster, spire, "after-helm");
    kept.assert_node_is_clean(&format!("{HANDOVER}/own/imds-key\n"));
    // As the chart's page describes it.
    let clean = ["rm", "-r", HANDOVER];
    assert!(README.contains(&format!("`{}`", clean.join(" "))));
    cluster.node.run(&clean).success("rm");
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
    fs::write(&file, &documented).unwrap();
    let directory = directory.to_str().unwrap();
    let apply = || {
        let words = ["apply", "--kustomize", directory];
        cluster.node.kubectl(&words).success("kubectl apply -k");
    };
    apply();
    cluster.node.rolled_out("awsvid", "daemonset/awsvid");
    attests(cluster, "with-kustomize");
    reads(cluster, "with-kustomize");
    upgrade_under_load(
        cluster,
        ["kustomize-a", "kustomize-b", "kustomize-c"],
        || {
            fs::write(&file, format!("{documented}{ANNOTATION}")).unwrap();
            apply();
        },
    );
    attests(cluster, "after-apply");
    let kept = KeptPod::start(cluster, "kept-with-kustomize");
    cluster
        .node
        .kubectl(&["delete", "--kustomize", directory])
        .success("kubectl delete -k");
    is_removed(cluster, spire, "after-kustomize");
    kept.assert_node_is_clean("");
}

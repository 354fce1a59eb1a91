//! awsvid as a DaemonSet on a real Kubernetes node.

mod attacks;
mod cluster;
mod deployments;
mod existing_spire;
mod life;
mod policy;
mod rights;

use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::harness::counterparts::folder;
use crate::harness::documents;
use cluster::{Cluster, OTHER, READER, container, copy, manifests, overlay};

/// One node for all scenes, which takes longer to start than most of them take.
#[test]
fn pods_have_their_own_credentials() {
    let directory = folder();
    let start = Instant::now();
    let done = |what: &str| eprintln!("{what} after {:.1} s", start.elapsed().as_secs_f32());
    let Some(cluster) = Cluster::start(directory.path()) else {
        return;
    };
    done("all but awsvid is there");
    policy::the_environment_is_set_where_it_is_missing(&cluster);
    done("the policy");
    life::pods_wait_until_awsvid_is_ready(&cluster, directory.path());
    done("the start-up taint");
    rights::startup_taint_removes_the_taint_alone(&cluster);
    rights::the_agent_runs_nothing_in_pods(&cluster, directory.path());
    done("rights");
    for source in ["spiffe-broker", "spire-delegated"] {
        cluster.install(source);
        done(source);
        each_reads_its_own(&cluster, source);
        done("each reads its own");
        the_first_act_is_answered(&cluster, source);
        done("first acts");
        attacks::no_pod_is_taken_for_another(&cluster, source);
        done("attacks");
        life::what_is_missing_is_named(&cluster, source);
        done("what is missing");
        if source == "spiffe-broker" {
            lives(&cluster, &done);
        }
    }
    deployments::a_deployment_reads_its_object(&cluster);
    deployments::a_deployment_reads_its_object_by_the_component(&cluster, directory.path());
    done("deployments");
    every_manifest_is_accepted(&cluster, directory.path());
    documented_commands_work(&cluster);
    done("every manifest");
    for source in ["spire-delegated", "spiffe-broker"] {
        attacks::on_the_node_everybody_is_himself(&cluster, source);
        done("on the node");
    }
}

/// awsvid on a cluster that SPIRE's own Helm chart has installed SPIRE on: by Helm and by Kustomize.
#[test]
fn awsvid_leaves_an_existing_spire_alone() {
    let directory = folder();
    let Some(cluster) = Cluster::start(directory.path()) else {
        return;
    };
    let spire = existing_spire::install(&cluster);
    existing_spire::helm_installs_and_removes_awsvid(&cluster, &spire, directory.path());
    existing_spire::kustomize_installs_and_removes_awsvid(&cluster, &spire);
}

/// What happens to a node in its life.
fn lives(cluster: &Cluster, done: &impl Fn(&str)) {
    life::pods_have_the_families_that_they_have(cluster);
    done("families");
    life::an_update_refuses_nobody(cluster);
    life::the_one_after_a_killed_one_listens_again(cluster);
    done("updates");
    life::pods_come_and_go(cluster);
    done("pods that come and go");
    life::many_pods_are_listened_in_soon(cluster);
    done("many pods");
    life::warm_pods_notice_nothing(cluster);
    done("outages");
}

/// Two pods, of two namespaces and service accounts, whose containers differ in nothing that awsvid is told.
fn each_reads_its_own(cluster: &Cluster, source: &str) {
    let name = format!("reads-{source}");
    for (own, others) in [(READER, OTHER), (OTHER, READER)] {
        cluster
            .node
            .apply(&cluster.pod(own, &name, &format!("{}; ! {}", copy(own), copy(others))));
    }
    for own in [READER, OTHER] {
        let ended = cluster.node.ended(own.namespace, &name);
        assert!(
            ended.succeeded
                && ended
                    .log
                    .contains(&format!("hello from the {}\n", own.namespace)),
            "{ended:?}"
        );
        assert!(ended.log.contains("403"), "{ended:?}");
        let pod = cluster
            .node
            .get(&["pod", "--namespace", own.namespace, &name]);
        let record = cluster.audited("the pod's record", |record| {
            record["pod_uid"] == pod["metadata"]["uid"]
        });
        assert_eq!(
            (&record["spiffe_id"], &record["outcome"]),
            (&own.id().into(), &"issued".into()),
            "{record}"
        );
    }
}

/// A pod whose every container asks before it does anything else, one of them while the kubelet still waits for its hook.
fn the_first_act_is_answered(cluster: &Cluster, source: &str) {
    let name = format!("asks-{source}");
    let ask = "busybox wget -q -O /dev/null --header 'Authorization: any' \"$AWS_CONTAINER_CREDENTIALS_FULL_URI\" && echo answered";
    let mut pod = cluster.pod(READER, &name, ask);
    let mut hooked = container("hooked", ask);
    hooked["lifecycle"] =
        json!({ "postStart": { "exec": { "command": ["/bin/busybox", "sleep", "3"] } } });
    pod["spec"]["initContainers"] = json!([container("first", ask)]);
    pod["spec"]["containers"]
        .as_array_mut()
        .unwrap()
        .push(hooked);
    let ended = cluster.node.run_pod(&pod);
    assert!(
        ended.succeeded && ended.log.matches("answered").count() == 3,
        "{ended:?}"
    );
    let uid = cluster
        .node
        .get(&["pod", "--namespace", READER.namespace, &name])["metadata"]["uid"]
        .clone();
    let records: Vec<Value> = cluster
        .audit()
        .into_iter()
        .filter(|record| record["pod_uid"] == uid)
        .collect();
    assert!(
        records.len() == 3 && records.iter().all(|record| record["outcome"] == "issued"),
        "{records:?}"
    );
}

/// Runs the commands of install-kubernetes.md. It applies on trial only, because the example's role
/// is one of AWS.
fn documented_commands_work(cluster: &Cluster) {
    for begin in ["kubectl apply", "kubectl --namespace awsvid rollout"] {
        let commands = documents::block("install-kubernetes.md", "4. Install", begin);
        for line in commands.lines() {
            let here = manifests();
            let line = line.replace(
                "apply -k deploy/kubernetes",
                "apply --dry-run=server -k MANIFESTS",
            );
            let words: Vec<&str> = line
                .split_whitespace()
                .map(|word| {
                    if word == "MANIFESTS" {
                        here.to_str().unwrap()
                    } else {
                        word
                    }
                })
                .collect();
            assert_eq!(words[0], "kubectl");
            cluster.node.kubectl(&words[1..]).success(&line);
        }
    }
}

/// All that can be applied is, on trial, as it stands.
fn every_manifest_is_accepted(cluster: &Cluster, folder: &Path) {
    // Of the Prometheus Operator, as far as the API server looks at it.
    let (kind, plural) = ("PodMonitor", "podmonitors");
    let schema = json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true });
    cluster.node.apply(&json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": { "name": format!("{plural}.monitoring.coreos.com") },
        "spec": {
            "group": "monitoring.coreos.com", "scope": "Namespaced", "names": { "kind": kind, "plural": plural },
            "versions": [{ "name": "v1", "served": true, "storage": true, "schema": { "openAPIV3Schema": schema } }],
        },
    }));
    let established = [
        "wait",
        "--for=condition=Established",
        "crd/podmonitors.monitoring.coreos.com",
    ];
    cluster
        .node
        .kubectl(&established)
        .success("the PodMonitor's definition");
    let accepted = |directory: &Path| {
        let arguments = [
            "apply",
            "--dry-run=server",
            "--kustomize",
            directory.to_str().unwrap(),
        ];
        cluster
            .node
            .kubectl(&arguments)
            .success(&format!("kubectl apply -k {}", directory.display()));
    };
    for directory in [
        "",
        "spiffe-broker",
        "spire-delegated",
        "examples/spiffe-broker",
        "examples/spire-delegated",
    ] {
        accepted(&manifests().join(directory));
    }
    for component in [
        "environment",
        "environment-patch",
        "network-policy",
        "nodes-proxy",
        "pod-monitor",
        "startup-taint",
    ] {
        accepted(&overlay(folder, component, &[], &[component]));
    }
}

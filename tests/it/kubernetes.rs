//! awsvid as a DaemonSet on a real Kubernetes node.

mod attacks;
mod cluster;
mod cri_o;
mod deployments;
mod documented;
mod existing_spire;
mod imds;
mod life;
mod machine;
mod older_clusters;
mod policy;
mod rights;

use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::harness::counterparts::folder;
use cluster::{Cluster, OTHER, READER, container, copy, manifests, overlay};
pub(crate) use machine::serve_pods_on_machine;

/// Runs all scenes on one node, since its start takes longer than most of them.
#[test]
fn pods_get_their_own_credentials() {
    let directory = folder();
    let start = Instant::now();
    let done = |what: &str| eprintln!("{what} after {:.1} s", start.elapsed().as_secs_f32());
    let Some(cluster) = Cluster::start(directory.path()) else {
        return;
    };
    done("all but awsvid is there");
    policy::missing_environment_is_set(&cluster);
    policy::metadata_service_replaces_its_switch(&cluster, directory.path());
    done("the policy");
    life::pods_wait_until_awsvid_is_ready(&cluster, directory.path());
    done("the start-up taint");
    rights::startup_taint_removes_the_taint_alone(&cluster);
    rights::agent_token_runs_nothing_in_pods(&cluster, directory.path());
    done("rights");
    documented::import_curl(&cluster, directory.path());
    for source in ["spiffe-broker", "spire-delegated"] {
        cluster.install(source);
        done(source);
        pods_read_their_own_objects(&cluster, source);
        done("each reads its own");
        first_act_is_answered(&cluster, source);
        done("first acts");
        attacks::pod_listeners_attest_each_pod(&cluster, source);
        done("attacks");
        documented::documented_recipe_explains_a_403(&cluster);
        done("the recipe for a 403");
        life::missing_part_is_named(&cluster, source);
        done("what is missing");
        if source == "spiffe-broker" {
            run_life_scenes(&cluster, &done);
        }
    }
    deployments::deployment_reads_its_object(&cluster);
    deployments::deployment_reads_its_object_by_component(&cluster, directory.path());
    done("deployments");
    manifests_are_accepted(&cluster, directory.path());
    documented::documented_commands_work(&cluster, directory.path());
    done("every manifest");
    for source in ["spire-delegated", "spiffe-broker"] {
        attacks::node_listeners_attest_each_caller(&cluster, source);
        done("on the node");
    }
}

/// Installs awsvid by Helm and by Kustomize on a cluster with the objects of SPIRE's Helm chart.
#[test]
fn awsvid_leaves_an_existing_spire_alone() {
    let directory = folder();
    let Some(cluster) = Cluster::start(directory.path()) else {
        return;
    };
    let spire = existing_spire::install(&cluster);
    let attested = existing_spire::poll_agent(&cluster, directory.path());
    existing_spire::helm_installs_and_removes_awsvid(&cluster, &spire, directory.path());
    existing_spire::kustomize_installs_and_removes_awsvid(&cluster, &spire);
    attested.await_more();
    let (answered, failed, longest) = attested.stop();
    eprintln!("SPIRE gave a pod its identity {answered} times, at most {longest:.1} s apart");
    assert!(failed.is_empty(), "{failed:?}");
}

/// Runs programs that know EC2's instance metadata service alone, at its usual address.
#[test]
fn programs_in_pods_find_the_metadata_service() {
    let directory = folder();
    if let Some(cluster) = Cluster::start(directory.path()) {
        imds::programs_need_no_setting(&cluster);
    }
}

/// Plays the events in the life of a node.
fn run_life_scenes(cluster: &Cluster, done: &impl Fn(&str)) {
    life::pods_are_served_in_each_address_family(cluster);
    done("families");
    life::config_map_change_needs_no_other_pod(cluster);
    done("another ConfigMap");
    life::update_rejects_no_request(cluster);
    life::successor_of_killed_daemon_listens(cluster);
    done("updates");
    life::pods_start_and_end(cluster);
    done("pods that come and go");
    life::many_pods_are_served_soon(cluster);
    done("many pods");
    life::warm_pods_see_no_error(cluster);
    done("outages");
}

/// Runs two pods, of two namespaces and service accounts. Their containers differ in nothing that
/// the pod spec gives awsvid.
fn pods_read_their_own_objects(cluster: &Cluster, source: &str) {
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

/// Runs a pod in which each container's first act is a request, one of them while the kubelet still
/// waits for its hook.
fn first_act_is_answered(cluster: &Cluster, source: &str) {
    let name = format!("asks-{source}");
    let fetch = "busybox wget -q -O /dev/null --header 'Authorization: any' \"$AWS_CONTAINER_CREDENTIALS_FULL_URI\" && echo answered";
    let mut pod = cluster.pod(READER, &name, fetch);
    let mut hooked = container("hooked", fetch);
    hooked["lifecycle"] =
        json!({ "postStart": { "exec": { "command": ["/bin/busybox", "sleep", "3"] } } });
    pod["spec"]["initContainers"] = json!([container("first", fetch)]);
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

/// Defines the kinds of the Prometheus Operator, as far as the API server checks them.
fn define_monitoring(cluster: &Cluster) {
    let schema = json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true });
    for kind in ["PodMonitor", "PrometheusRule"] {
        let plural = format!("{}s", kind.to_lowercase());
        let name = format!("{plural}.monitoring.coreos.com");
        cluster.node.apply(&json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": { "name": name },
            "spec": {
                "group": "monitoring.coreos.com", "scope": "Namespaced", "names": { "kind": kind, "plural": plural },
                "versions": [{ "name": "v1", "served": true, "storage": true, "schema": { "openAPIV3Schema": schema } }],
            },
        }));
        let crd = format!("crd/{name}");
        let established = ["wait", "--for=condition=Established", &crd];
        cluster.node.kubectl(&established).success(kind);
    }
}

/// Applies all that can be applied, unchanged, in a dry run.
fn manifests_are_accepted(cluster: &Cluster, folder: &Path) {
    define_monitoring(cluster);
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
        "dashboard",
        "environment",
        "environment-patch",
        "imds-address",
        "network-policy",
        "nodes-proxy",
        "pod-monitor",
        "prometheus-rule",
        "startup-taint",
    ] {
        accepted(&overlay(folder, component, &[], &[component]));
    }
}

//! awsvid on a node that is a whole machine, with systemd's cgroups and AppArmor.

use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use super::cluster::{Cluster, OTHER, READER, ServiceAccount, copy};
use super::{attacks, pods_read_their_own_objects};
use crate::harness::kubernetes::Node;

/// A service account that SPIRE has no entry for.
const UNKNOWN: ServiceAccount = ServiceAccount {
    namespace: "shop",
    name: "default",
};
/// Prints the AppArmor profile of a process.
const PROFILE: &str = "cat /proc/self/attr/apparmor/current";

/// Serves pods with each source, and with `spire-delegated` processes of the node too. awsvid's
/// image is in the archive.
pub(crate) fn serve_pods_on_machine(folder: &Path, image: &Path) {
    let start = Instant::now();
    let done = |what: &str| eprintln!("{what} after {:.0} s", start.elapsed().as_secs_f32());
    let Some(node) = Node::start_on_machine(folder) else {
        return;
    };
    done("the node");
    let Some(cluster) = Cluster::start_on(node, folder, image) else {
        return;
    };
    done("all but awsvid is there");
    cluster.install("spiffe-broker");
    done("spiffe-broker");
    pods_read_their_own_objects(&cluster, "spiffe-broker");
    done("each reads its own");
    pod_without_entry_is_rejected(&cluster);
    unconfined_pod_reads_its_object(&cluster, "spiffe-broker");
    done("the other pods");
    attacks::node_listeners_attest_each_caller(&cluster, "spire-delegated");
    done("spire-delegated, and processes of the node");
    unconfined_pod_reads_its_object(&cluster, "spire-delegated");
    done("an unconfined pod");
}

fn pod_without_entry_is_rejected(cluster: &Cluster) {
    let script = format!("! {}", copy(READER));
    let ended = cluster
        .node
        .run_pod(&cluster.pod(UNKNOWN, "unknown", &script));
    assert!(
        ended.succeeded && !ended.log.contains("hello from"),
        "{ended:?}"
    );
    let record = record_of(cluster, UNKNOWN, "unknown");
    assert_eq!(record["reason"], "no_identity", "{record}");
}

/// AppArmor hides such a pod's processes from the pods with the runtime's own profile.
fn unconfined_pod_reads_its_object(cluster: &Cluster, source: &str) {
    let [confined, unconfined] = ["confined", "unconfined"].map(|kind| format!("{kind}-{source}"));
    let script = |account| format!("{PROFILE}; {}", copy(account));
    let mut pod = cluster.pod(READER, &unconfined, &script(READER));
    pod["spec"]["securityContext"] = json!({ "appArmorProfile": { "type": "Unconfined" } });
    cluster.node.apply(&pod);
    cluster
        .node
        .apply(&cluster.pod(OTHER, &confined, &script(OTHER)));
    for (account, name, profile) in [
        (READER, &unconfined, "unconfined\n"),
        (OTHER, &confined, "cri-containerd.apparmor.d (enforce)\n"),
    ] {
        let ended = cluster.node.ended(account.namespace, name);
        let object = format!("hello from the {}\n", account.namespace);
        assert!(
            ended.succeeded && ended.log.contains(&object) && ended.log.contains(profile),
            "{ended:?}"
        );
        let record = record_of(cluster, account, name);
        assert_eq!(record["spiffe_id"], account.id(), "{record}");
        // The driver that names cgroups as systemd does.
        let cgroup = record["cgroup"].as_str().unwrap_or_default();
        assert!(cgroup.starts_with("/kubepods.slice/"), "{record}");
    }
}

/// Returns the last audit record of a pod that has requested credentials.
fn record_of(cluster: &Cluster, account: ServiceAccount, name: &str) -> Value {
    let pod = cluster
        .node
        .get(&["pod", "--namespace", account.namespace, name]);
    let uid = &pod["metadata"]["uid"];
    cluster.audited(name, |record| {
        record["pod_uid"] == *uid && record["outcome"] != "failed"
    })
}

//! awsvid as a DaemonSet on a real Kubernetes node.

mod cluster;

use crate::harness::counterparts::folder;
use cluster::{Cluster, OTHER, READER, copy};

#[test]
fn pods_have_their_own_credentials_by_pod_references() {
    let directory = folder();
    let Some(cluster) = Cluster::start(directory.path()) else { return };
    cluster.install("", "spiffe-broker");
    each_reads_its_own(&cluster);
}

#[test]
fn pods_have_their_own_credentials_by_process() {
    let directory = folder();
    let Some(cluster) = Cluster::start(directory.path()) else { return };
    cluster.install("spire-delegated", "spire-delegated");
    each_reads_its_own(&cluster);
}

/// Two pods, of two namespaces and service accounts, whose containers differ in nothing that awsvid is told.
fn each_reads_its_own(cluster: &Cluster) {
    for (own, others) in [(READER, OTHER), (OTHER, READER)] {
        let script = format!("{}; ! {}", copy(own), copy(others));
        let ended = cluster.node.run_pod(&cluster.pod(own, "reads", &script));
        assert!(ended.succeeded && ended.log.contains(&format!("hello from the {}\n", own.namespace)), "{ended:?}");
        assert!(ended.log.contains("403"), "{ended:?}");
        let pod = cluster.node.get(&["pod", "--namespace", own.namespace, "reads"]);
        let record = cluster.audited("the pod's record", |record| record["pod_uid"] == pod["metadata"]["uid"]);
        assert_eq!((&record["spiffe_id"], &record["outcome"]), (&own.id().into(), &"issued".into()), "{record}");
    }
}

//! awsvid on a node whose container runtime is CRI-O. It names cgroups otherwise than containerd,
//! and has a program of its own that pins network namespaces.

use super::cluster::{Cluster, READER};
use super::{attacks, first_act_is_answered, pods_read_their_own_objects};
use crate::harness::counterparts::folder;
use crate::harness::slow_only;

#[test]
fn pods_are_served_where_cri_o_runs_them() {
    if !slow_only() {
        return;
    }
    let directory = folder();
    let Some(cluster) = Cluster::start_with_cri_o(directory.path()) else {
        return;
    };
    // The first pod that has a network makes the directory of namespaces.
    let first = cluster
        .node
        .run_pod(&cluster.pod(READER, "first", "exit 0"));
    assert!(first.succeeded, "{first:?}");
    for source in ["spiffe-broker", "spire-delegated"] {
        cluster.install(source);
        pods_read_their_own_objects(&cluster, source);
        first_act_is_answered(&cluster, source);
        attacks::pod_listeners_attest_each_pod(&cluster, source);
        attacks::node_listeners_attest_each_caller(&cluster, source);
        let record = cluster.audited("a container's cgroup", |record| {
            let cgroup = record["cgroup"].as_str();
            cgroup.is_some_and(|cgroup| cgroup.contains("/crio-"))
        });
        assert_eq!(record["outcome"], "issued", "{record}");
    }
}

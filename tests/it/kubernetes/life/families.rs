//! Pods in an IPv4 network, an IPv6 network, or both.

use std::net::IpAddr;

use serde_json::Value;

use super::request_pod;
use crate::harness::kubernetes::Families;
use crate::kubernetes::cluster::{Cluster, READER};

pub(in crate::kubernetes) fn pods_are_served_in_each_address_family(cluster: &Cluster) {
    for (families, expected) in [
        (Families::Four, [1, 0]),
        (Families::Six, [0, 1]),
        (Families::Dual, [1, 1]),
    ] {
        cluster.node.use_families(families);
        // The container runtime reads its network's configuration at a notification that it has
        // changed.
        let found = (0..20).find(|attempt| {
            let name = format!("{families:?}-{attempt}").to_lowercase();
            let script = "fetch 127.0.0.1; fetch '[::1]'; echo answered twice";
            let ended = cluster
                .node
                .run_pod(&request_pod::pod(READER, &name, script));
            assert!(
                ended.succeeded && ended.log.contains("answered twice"),
                "{families:?}: {ended:?}"
            );
            let pod = cluster
                .node
                .get(&["pod", "--namespace", READER.namespace, &name]);
            addresses(&pod).map(|family| family.len()) == expected
        });
        assert!(found.is_some(), "{families:?}: {expected:?}");
    }
    // The kubelet's probes, and Prometheus, use whichever family the cluster prefers.
    let pod = &cluster.node.get(&[
        "pods",
        "--namespace",
        "awsvid",
        "--selector",
        "app.kubernetes.io/name=awsvid",
    ])["items"][0];
    for address in addresses(pod).into_iter().flatten() {
        let url = format!("http://{}/readyz", std::net::SocketAddr::new(address, 975));
        cluster
            .node
            .run(&[
                "/usr/bin/env",
                "curl",
                "--silent",
                "--show-error",
                "--fail",
                &url,
            ])
            .success(&url);
    }
}

/// Returns a pod's addresses: IPv4 and IPv6.
fn addresses(pod: &Value) -> [Vec<IpAddr>; 2] {
    let all = pod["status"]["podIPs"]
        .as_array()
        .expect("addresses")
        .iter();
    let all: Vec<IpAddr> = all
        .map(|one| one["ip"].as_str().expect("one").parse().expect("one"))
        .collect();
    let (four, six) = all.into_iter().partition(IpAddr::is_ipv4);
    [four, six]
}

//! A change of the ConfigMap, without another pod of awsvid.

use std::time::{Duration, Instant};

use serde_json::json;

use super::process;
use super::request_pod::{self, PollingPod};
use crate::harness::counterparts::process::await_some;
use crate::kubernetes::cluster::{Cluster, READER};

/// The kubelet brings a change to the node within a minute and its own delay.
const MAX_DELAY: Duration = Duration::from_secs(90);

fn configuration(cluster: &Cluster) -> String {
    let map = cluster
        .node
        .get(&["configmap", "--namespace", "awsvid", "awsvid"]);
    map["data"]["awsvid.toml"].as_str().unwrap().to_owned()
}

fn write(cluster: &Cluster, text: &str) {
    let patch = json!({ "data": { "awsvid.toml": text } }).to_string();
    let words = ["patch", "configmap", "awsvid", "--namespace", "awsvid"];
    let words = [&words[..], &["--type", "merge", "--patch", &patch]].concat();
    cluster.node.kubectl(&words).success("another ConfigMap");
}

/// Returns a metric of awsvid's pod, through the API server.
fn metric(cluster: &Cluster, name: &str) -> Option<String> {
    let node = &cluster.node;
    let pods = node.get(&["pods", "--namespace", "awsvid"]);
    let pod = pods["items"][0]["metadata"]["name"].as_str()?.to_owned();
    let path = format!("/api/v1/namespaces/awsvid/pods/{pod}:975/proxy/metrics");
    let metrics = node.kubectl(&["get", "--raw", &path]).success("metrics");
    let value = |line: &str| Some(line.strip_prefix(name)?.trim().to_owned());
    metrics.lines().find_map(value)
}

pub(in crate::kubernetes) fn config_map_change_needs_no_other_pod(cluster: &Cluster) {
    let node = &cluster.node;
    let warm = PollingPod::start(cluster, "during-a-reload");
    let (before, original) = (process(node, "awsvid"), configuration(cluster));
    let role = format!(
        "\n[[role]]\nname = \"added\"\nspiffe_id = {:?}\nrole_arn = {:?}\n",
        READER.id(),
        cluster.minio.role_arn()
    );
    let script = "until busybox wget -q -O /dev/null --header 'Authorization: any' http://127.0.0.1:974/v1/credentials/added
            do echo not yet; busybox sleep 1; done; echo answered";
    let start = Instant::now();
    write(cluster, &(original.clone() + &role));
    let ended = node.run_pod(&request_pod::pod(READER, "added-role", script));
    let took = start.elapsed();
    eprintln!("a role of the ConfigMap is served after {took:.1?}");
    assert!(ended.succeeded && took < MAX_DELAY, "{took:?}: {ended:?}");
    let last = "awsvid_config_last_reload_successful ";
    assert_eq!(metric(cluster, last).as_deref(), Some("1"));

    write(cluster, &(original.clone() + "[[role]]\nname = 1\n"));
    await_some("the mistake shows in the metric", MAX_DELAY, || {
        (metric(cluster, last)? == "0").then_some(())
    });
    let script = "busybox wget -q -O /dev/null --header 'Authorization: any' http://127.0.0.1:974/v1/credentials/added; echo answered";
    let ended = node.run_pod(&request_pod::pod(READER, "still-added", script));
    assert!(ended.succeeded && ended.log == "answered\n", "{ended:?}");
    warm.await_more();
    write(cluster, &original);

    let (answered, failed, _) = warm.stop();
    assert!(failed.is_empty() && answered > 100, "{failed:?}");
    assert_eq!(process(node, "awsvid"), before, "no process was replaced");
}

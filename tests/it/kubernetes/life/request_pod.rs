//! A pod that sends requests.

use serde_json::{Value, json};

use super::TIMEOUT;
use crate::harness::counterparts::process::await_some;

use crate::harness::kubernetes::BUSYBOX;
use crate::kubernetes::cluster::{Cluster, READER, ServiceAccount};

/// A shell function that sends a request to an address of the pod's own, on a new connection.
const FETCH: &str = "fetch() { busybox wget -q -O /dev/null --header 'Authorization: any' \"http://$1:974/v1/credentials\" 2>&1; }";

/// Returns a pod that runs a script which can `fetch` from an address. It is light, so that many
/// can run.
pub(super) fn pod(account: ServiceAccount, name: &str, script: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": account.namespace, "labels": {} },
        "spec": {
            "serviceAccountName": account.name, "restartPolicy": "Never", "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": false,
            "containers": [{
                "name": "main", "image": BUSYBOX, "command": ["/bin/busybox", "sh", "-ec", format!("{FETCH}\n{script}")],
            }],
        },
    })
}

/// A pod that sends requests repeatedly until the test stops it.
pub(in crate::kubernetes) struct PollingPod<'a> {
    cluster: &'a Cluster,
    name: &'static str,
}

impl<'a> PollingPod<'a> {
    /// The loop of its script. It calls the function `fetch` with an address.
    pub(in crate::kubernetes) const LOOP: &'static str = "while [ ! -e /enough ]; do
            if why=$(fetch 127.0.0.1); then echo answered; else echo \"failed: $why\"; fi
            read now rest </proc/uptime; echo \"at $now\"
            busybox usleep 20000
        done";

    /// Starts it, and waits for its first response.
    pub(in crate::kubernetes) fn start(cluster: &'a Cluster, name: &'static str) -> Self {
        Self::run(cluster, name, &pod(READER, name, Self::LOOP))
    }

    /// Does the same with the pod of this name that a manifest describes.
    pub(in crate::kubernetes) fn run(
        cluster: &'a Cluster,
        name: &'static str,
        manifest: &Value,
    ) -> Self {
        cluster.node.apply(manifest);
        let asker = Self { cluster, name };
        asker.await_more();
        asker
    }

    pub(in crate::kubernetes) fn name(&self) -> &'static str {
        self.name
    }

    fn log(&self) -> String {
        self.cluster.node.pod_log(READER.namespace, self.name)
    }

    fn answered(&self) -> usize {
        self.log()
            .lines()
            .filter(|line| *line == "answered")
            .count()
    }

    /// Waits until it has got some more responses.
    pub(in crate::kubernetes) fn await_more(&self) {
        let before = self.answered();
        await_some(&format!("{} is answered", self.name), TIMEOUT, || {
            (self.answered() >= before + 20).then_some(())
        });
    }

    /// Stops it. Returns the number of responses, each failure, and the longest time from one
    /// response to the next in seconds.
    pub(in crate::kubernetes) fn stop(self) -> (usize, Vec<String>, f64) {
        let words = [
            "exec",
            "--namespace",
            READER.namespace,
            self.name,
            "--",
            "/bin/busybox",
            "touch",
            "/enough",
        ];
        self.cluster.node.kubectl(&words).success("it is enough");
        let log = self.cluster.node.ended(READER.namespace, self.name).log;
        let (mut failed, mut times, mut good) = (Vec::new(), Vec::new(), false);
        for line in log.lines() {
            match line.strip_prefix("at ") {
                Some(at) if good => times.push(at.parse::<f64>().expect("seconds")),
                Some(_) => {}
                None => good = line == "answered",
            }
            if line.starts_with("failed") {
                failed.push(line.to_owned());
            }
        }
        let longest = times
            .windows(2)
            .map(|pair| pair[1] - pair[0])
            .fold(0.0, f64::max);
        (times.len(), failed, longest)
    }
}

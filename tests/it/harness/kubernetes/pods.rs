//! Runs pods on the node and reads their output.

use std::fs;

use serde_json::Value;

use super::super::counterparts::process::{await_some, patience};
use super::{Node, TIMEOUT};

/// The result of a pod that has ended.
#[derive(Debug)]
pub(crate) struct PodResult {
    /// Whether every container has ended with success.
    pub(crate) succeeded: bool,
    /// The output of all of its containers.
    pub(crate) log: String,
}

impl Node {
    /// Runs a pod to its end.
    pub(crate) fn run_pod(&self, manifest: &Value) -> PodResult {
        self.apply(manifest);
        let metadata = &manifest["metadata"];
        let name = metadata["name"].as_str().expect("a name");
        self.ended(metadata["namespace"].as_str().unwrap_or("default"), name)
    }

    /// Waits for the end of a pod.
    pub(crate) fn ended(&self, namespace: &str, name: &str) -> PodResult {
        let phase = await_some(&format!("the end of {namespace}/{name}"), TIMEOUT, || {
            let pod = self.get(&["pod", "--namespace", namespace, name]);
            let phase = pod["status"]["phase"]
                .as_str()
                .unwrap_or_default()
                .to_owned();
            ["Succeeded", "Failed"].contains(&&*phase).then_some(phase)
        });
        PodResult {
            succeeded: phase == "Succeeded",
            log: self.pod_log(namespace, name),
        }
    }

    /// Returns the output of the containers of the pods with this prefix, the last one's last.
    pub(crate) fn pod_log(&self, namespace: &str, name: &str) -> String {
        let mut files = Vec::new();
        for pod in fs::read_dir(self.path("/var/log/pods"))
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
        {
            if pod
                .file_name()
                .to_string_lossy()
                .starts_with(&format!("{namespace}_{name}"))
            {
                let containers = fs::read_dir(pod.path())
                    .into_iter()
                    .flatten()
                    .filter_map(Result::ok);
                let runs = containers
                    .flat_map(|container| fs::read_dir(container.path()).into_iter().flatten());
                files.extend(runs.filter_map(Result::ok).map(|run| run.path()));
            }
        }
        // A file that is written to meanwhile keeps its position.
        files.sort_by_cached_key(|file| fs::metadata(file).and_then(|found| found.modified()).ok());
        let texts: Vec<String> = files
            .iter()
            .map(|file| String::from_utf8_lossy(&fs::read(file).unwrap_or_default()).into_owned())
            .collect();
        texts
            .iter()
            .flat_map(|text| text.lines())
            .fold(String::new(), |mut log, line| {
                // Time, stream, and F for a whole line or P for a part of one.
                let mut fields = line.splitn(4, ' ').skip(2);
                let (whole, text) = (
                    fields.next() != Some("P"),
                    fields.next().unwrap_or_default(),
                );
                log.push_str(text);
                log.push_str(if whole { "\n" } else { "" });
                log
            })
    }

    /// Waits until all pods of a Deployment or DaemonSet are ready.
    pub(crate) fn rolled_out(&self, namespace: &str, what: &str) {
        let mut arguments = vec!["rollout", "status", "--namespace", namespace, what];
        let timeout = self.kubectl_timeout();
        arguments.push(&timeout);
        self.kubectl(&arguments).success(what);
    }

    /// Returns kubectl's option with the time that it may wait. Its own limit is a little longer.
    pub(crate) fn kubectl_timeout(&self) -> String {
        format!("--timeout={}s", 110 * patience())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let shown = self.kubectl(&["get", "pods", "--all-namespaces", "--output", "wide"]);
        eprintln!("--- pods\n{}{}", shown.stdout, shown.stderr);
        let events = self.kubectl(&["get", "events", "--all-namespaces"]);
        let warnings = events
            .stdout
            .lines()
            .filter(|line| line.contains("Warning"))
            .collect::<Vec<_>>();
        eprintln!("--- warnings\n{}", warnings.join("\n"));
        for (namespace, name) in [
            ("awsvid", "awsvid"),
            ("awsvid", "startup-taint"),
            ("awsvid-spire", "spire-agent"),
        ] {
            let log = self.pod_log(namespace, name);
            let lines: Vec<_> = log.lines().collect();
            eprintln!(
                "--- {name}\n{}",
                lines[lines.len().saturating_sub(30)..].join("\n")
            );
        }
    }
}

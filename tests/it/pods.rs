//! Listeners inside pods' network namespaces: they come and go with the files on which a runtime mounts those.

use std::fs;
use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::process::{await_some, run};
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::{Daemon, PROGRAM};
use crate::harness::namespaces::{Node, Peer, ip};
use crate::harness::upstream::Upstream;

/// For what takes milliseconds, on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(30);
const V4: &str = "127.0.0.1:974";
const V6: &str = "[::1]:974";

/// A daemon that serves every pod, by a rule that names all of their cgroups.
struct Stage {
    daemon: Daemon,
    node: Node,
    upstream: Upstream,
    folder: tempfile::TempDir,
}

impl Stage {
    /// `None` for who is not root. `before` is there when the daemon starts.
    fn set(before: impl FnOnce(&Node)) -> Option<Self> {
        if !root() {
            return None;
        }
        let folder = folder();
        let node = Node::start(folder.path());
        before(&node);
        let upstream = Upstream::start(&[(0, "pod")]);
        let daemon = daemon(&node, &upstream, folder.path());
        Some(Self { daemon, node, upstream, folder })
    }

    /// Waits until so many namespaces are listened in.
    fn await_namespaces(&self, count: u64) {
        await_namespaces(&self.daemon, count);
    }

    /// Whether a process of a pod is answered here, as its first act.
    fn serves(&self, name: &str, cgroup: &Cgroup, address: &str) -> bool {
        let answer = self.node.ask(name, cgroup, address.parse().unwrap());
        answer.starts_with("HTTP/1.1 200") && answer.contains("AccessKeyId")
    }
}

fn daemon(node: &Node, upstream: &Upstream, folder: &Path) -> Daemon {
    let rule = "\n[[workload]]\nspiffe_id = \"spiffe://example.org/user/pod\"\ncgroup = \"/kubepods/**\"\n";
    let words = node.enter();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    Daemon::start_behind(&words, folder, &node.listen(), &(upstream.configuration() + rule)).ready()
}

fn await_namespaces(daemon: &Daemon, count: u64) {
    await_some(&format!("{count} namespaces are listened in"), PATIENCE, || {
        (daemon.metric("awsvid_pod_namespaces") == count).then_some(())
    });
}

/// Whether anybody listens there.
fn listens(node: &Node, name: &str, address: &str) -> bool {
    node.connect(name, address.parse().unwrap()).is_ok()
}

#[test]
fn a_pod_is_served_from_its_first_act_and_leaves_nothing_behind() {
    let Some(stage) = Stage::set(|node| node.add("early")) else { return };
    let peers = [Peer::new(1), Peer::new(2)];
    assert_eq!(
        stage.daemon.metric("awsvid_pod_namespaces"),
        1,
        "those that are there at the start come before it is ready"
    );
    for (i, peer) in peers.iter().enumerate() {
        stage.node.add_with(&format!("cni-{i}"), |_| peer.make());
    }
    stage.await_namespaces(3);
    for (i, name) in ["early", "cni-0", "cni-1"].into_iter().enumerate() {
        let cgroup = Cgroup::of_pod(u16::try_from(i).unwrap());
        for address in [V4, V6] {
            assert!(stage.serves(name, &cgroup, address), "{name}, {address}");
        }
    }
    let asked = stage.daemon.audit();
    let by_pods = asked.iter().filter(|record| record["listener"] == "pod").collect::<Vec<_>>();
    assert_eq!(by_pods.len(), 6, "{asked:?}");
    assert!(by_pods.iter().all(|record| record["spiffe_id"] == "spiffe://example.org/user/pod"), "{by_pods:?}");
    // A caller who was answered is remembered, for the next refresh. The namespace is not.
    for (i, peer) in peers.iter().enumerate() {
        assert!(peer.is_there());
        stage.node.remove(&format!("cni-{i}"));
        await_some("the namespace is freed", PATIENCE, || (!peer.is_there()).then_some(()));
    }
    stage.await_namespaces(1);
    stage.node.remove("early");
    stage.await_namespaces(0);
}

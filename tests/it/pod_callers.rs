//! The pod of a caller over every listener, on real network namespaces and a real cgroup tree: T2,
//! T5 and the facts behind them. They also run as in a DaemonSet. Its daemon may not open cgroups
//! by their ids, and lives in a cgroup namespace.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::chown;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::harness::actor::{self, Repeater};
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::process::{await_some, behind, run};
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::Daemon;
use crate::harness::namespaces::NetnsNode;
use crate::harness::upstream::Upstream;

const V4: &str = "127.0.0.1:974";
const TIMEOUT: Duration = Duration::from_secs(60);
const RULE: &str =
    "\n[[workload]]\nspiffe_id = \"spiffe://example.org/user/pod\"\ncgroup = \"/kubepods/**\"\n";
/// A container without that capability has it like this.
const NO_HANDLES: [&str; 3] = [
    "setpriv",
    "--bounding-set=-dac_read_search",
    "--inh-caps=-dac_read_search",
];
/// Enters a cgroup namespace with the root `$0`, and mounts that on the directory `$1`.
const IN_A_CONTAINER: &str = r#"echo 0 >"$0/cgroup.procs" && own="$1" && shift && exec unshare --cgroup -- \
    sh -c 'mount -t cgroup2 -o ro cgroup2 "$0" && exec "$@"' "$own" "$@""#;

/// The environment of the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    OnTheHost,
    WithoutHandles,
    InAContainer,
}

/// A daemon and two pods, `a` and `b`, each with a container and a network.
struct PodCallersStage {
    daemon: Daemon,
    node: NetnsNode,
    pods: [Cgroup; 2],
    kind: Kind,
    _upstream: Upstream,
    _own: Cgroup,
    _folder: tempfile::TempDir,
}

impl PodCallersStage {
    /// Starts it with `limits` in `[listen]`.
    fn set(kind: Kind, first_pod: u16, limits: &str) -> Self {
        let folder = folder();
        let node = NetnsNode::start(folder.path());
        let own = Cgroup::of_pod(first_pod + 2);
        let mount = folder.path().join("own-cgroup");
        fs::create_dir(&mount).unwrap();
        let mut words = node.enter();
        if kind != Kind::OnTheHost {
            words.extend(NO_HANDLES.map(str::to_owned));
        }
        if kind == Kind::InAContainer {
            node.add_own("own");
            let (own, mount) = (own.path().to_str().unwrap(), mount.to_str().unwrap());
            words.extend(["sh", "-c", IN_A_CONTAINER, own, mount].map(str::to_owned));
        }
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let upstream = Upstream::start(&[(0, "pod")]);
        let configuration = upstream.configuration() + RULE;
        let listen = format!("{limits}\n{}", node.listen());
        let daemon = Daemon::start_behind(&words, folder.path(), &listen, &configuration).ready();
        for name in ["a", "b"] {
            node.add(name);
        }
        await_some("both are listened in", TIMEOUT, || {
            (daemon.metric("awsvid_pod_listeners") == 2).then_some(())
        });
        let pods = [Cgroup::of_pod(first_pod), Cgroup::of_pod(first_pod + 1)];
        Self {
            daemon,
            node,
            pods,
            kind,
            _upstream: upstream,
            _own: own,
            _folder: folder,
        }
    }

    /// Returns the audit record of a process of this cgroup that sends a request in this network.
    fn fetch(&self, name: &str, cgroup: &Cgroup) -> Value {
        let before = self.daemon.audit().len();
        let answer = self
            .node
            .fetch(name, cgroup, V4.parse::<SocketAddr>().unwrap());
        self.record(before, &answer)
    }

    /// Returns the audit record of such a request over the unix socket.
    fn fetch_by_file(&self, cgroup: &Cgroup) -> Value {
        let before = self.daemon.audit().len();
        let mut command = behind(&cgroup.enter(), &actor::program());
        command.args(["fetch", "unix", self.daemon.unix().to_str().unwrap()]);
        let answer = run(command, b"", TIMEOUT).stdout;
        self.record(before, &answer)
    }

    fn record(&self, before: usize, answer: &str) -> Value {
        let [record] = &self.daemon.audit_after(before)[..] else {
            panic!("not one record of {answer}")
        };
        let status = if record["outcome"] == "issued" {
            "HTTP/1.1 200"
        } else {
            "HTTP/1.1 403"
        };
        assert!(answer.starts_with(status), "{answer} for {record}");
        record.clone()
    }

    #[track_caller]
    fn assert_record(&self, record: &Value, reason: &str, pod: Option<&Cgroup>) {
        let found = (
            record["reason"].as_str().unwrap(),
            record["pod_uid"].as_str(),
            record["container_id"].as_str(),
        );
        let pod = pod.map(|pod| pod.path());
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        let uid = pod.map(|pod| name(pod.parent().unwrap()).replacen("pod", "", 1));
        let container = pod.map(name);
        assert_eq!(
            found,
            (reason, uid.as_deref(), container.as_deref()),
            "{:?}: {record}",
            self.kind
        );
    }
}

fn check(kind: Kind, first_pod: u16) {
    if !root() {
        return;
    }
    let stage = PodCallersStage::set(kind, first_pod, "");
    let [a, b] = &stage.pods;
    // A process of the host that enters before the pod itself is not taken for the pod.
    let host = Cgroup::new(&format!("host-{first_pod}"));
    stage.assert_record(&stage.fetch("a", &host), "not_a_pod", None);
    let own = stage.fetch("a", a);
    stage.assert_record(&own, "ok", Some(a));
    assert_eq!(own["listener"], "pod");
    assert!(
        own["network_namespace"].is_u64() && own.get("pid").is_none(),
        "{own}"
    );
    stage.assert_record(&stage.fetch("b", b), "ok", Some(b));

    let stranger = stage.fetch("a", b);
    stage.assert_record(&stranger, "other_pod", Some(b));
    assert_eq!(
        (&stranger["network_namespace"], &stranger["uid"]),
        (&own["network_namespace"], &Value::from(0))
    );
    let intruder = stage.fetch("a", &host);
    stage.assert_record(&intruder, "not_a_pod", None);
    assert_eq!(intruder["network_namespace"], own["network_namespace"]);
    stage.assert_record(&stage.fetch("a", a), "ok", Some(a));

    // A process that entered first keeps the pod from its own network while it lives, and no
    // longer.
    stage.node.add("c");
    await_some("it is listened in", TIMEOUT, || {
        (stage.daemon.metric("awsvid_pod_listeners") == 3).then_some(())
    });
    let first = Cgroup::of_pod(first_pod + 3);
    stage.assert_record(&stage.fetch("c", &first), "ok", Some(&first));
    stage.assert_record(&stage.fetch("c", a), "other_pod", Some(a));
    drop(first);
    stage.assert_record(&stage.fetch("c", &host), "not_a_pod", None);
    stage.assert_record(&stage.fetch("c", a), "ok", Some(a));
    stage.assert_record(&stage.fetch("c", b), "other_pod", Some(b));

    // Names below the pod's own container decide nothing, not even those of another pod.
    let [pod, container] = [b.path().parent().unwrap(), b.path()]
        .map(|path| path.file_name().unwrap().to_str().unwrap());
    let named = |outer: &Cgroup| {
        let nested_path = format!("kubepods/besteffort/{pod}");
        fs::create_dir_all(outer.path().join(&nested_path)).unwrap();
        outer.below(&format!("{nested_path}/{container}"))
    };
    let nested = named(a);
    stage.assert_record(&stage.fetch("a", &nested), "ok", Some(a));
    stage.assert_record(&stage.fetch("b", &nested), "other_pod", Some(a));

    // Nor does a cgroup of such a name outside the pods' root.
    let other_cgroup = Cgroup::new(&format!("elsewhere-{first_pod}"));
    let misplaced = named(&other_cgroup);
    let rejected = stage.fetch_by_file(&misplaced);
    stage.assert_record(&rejected, "misplaced_pod", None);
    assert!(
        rejected["cgroup"]
            .as_str()
            .unwrap()
            .ends_with(&format!("{pod}/{container}")),
        "{rejected}"
    );
    chown(other_cgroup.path(), Some(61001), None).unwrap();
    stage.assert_record(&stage.fetch_by_file(&misplaced), "delegated_cgroup", None);
    let reason = match kind == Kind::OnTheHost || pidfds_have_cgroups() {
        true => "delegated_cgroup",
        false => "not_a_pod",
    };
    stage.assert_record(&stage.fetch("b", &misplaced), reason, None);

    // Over the unix socket a pod is known by its process.
    let by_file = stage.fetch_by_file(b);
    stage.assert_record(&by_file, "ok", Some(b));
    assert!(
        by_file["pid"].is_u64() && by_file.get("network_namespace").is_none(),
        "{by_file}"
    );
}

/// A connection that gets no permit claims nothing: the namespace belongs to its own pod later.
#[test]
fn pod_at_its_limit_claims_no_namespace() {
    if !root() {
        return;
    }
    let stage = PodCallersStage::set(Kind::OnTheHost, 230, "max_connections_per_workload = 2");
    let [a, b] = &stage.pods;
    let socket = stage.daemon.unix().display().to_string();
    let held = Repeater::start("hold", "unix", &socket, &[0, 2], b.path()).wait_started();
    await_some("its connections are open", TIMEOUT, || {
        (stage.daemon.metric("awsvid_connections") >= 2).then_some(())
    });
    let before = stage.daemon.audit().len();
    let answer = stage.node.fetch("a", b, V4.parse::<SocketAddr>().unwrap());
    assert_eq!(
        (answer.as_str(), stage.daemon.audit().len()),
        ("", before),
        "it is reset"
    );
    held.stop();
    stage.assert_record(&stage.fetch("a", a), "ok", Some(a));
    stage.assert_record(&stage.fetch("a", b), "other_pod", Some(b));
}

/// Returns whether the kernel reports a process's cgroup by its id (Linux 6.13). By that of the
/// request over the unix socket the daemon then knows the cgroup. Otherwise, where it cannot open a
/// cgroup by its id, it knows only those of pods.
fn pidfds_have_cgroups() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse::<u32>().unwrap_or_default());
    (numbers.next(), numbers.next()) >= (Some(6), Some(13))
}

#[test]
fn pod_callers_are_attested_as_their_pod() {
    check(Kind::OnTheHost, 200);
}

#[test]
fn pod_callers_are_attested_without_cgroup_handles() {
    check(Kind::WithoutHandles, 210);
}

#[test]
fn pod_callers_are_attested_in_a_container() {
    check(Kind::InAContainer, 220);
}

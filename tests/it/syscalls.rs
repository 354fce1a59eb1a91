//! The daemon's system calls, and those that the shipped unit allows: traced over all of its
//! features.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::harness::agent::{Entry, FakeAgent};
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::process::await_some;
use crate::harness::counterparts::{folder, http_get, root, skip};
use crate::harness::daemon::Daemon;
use crate::harness::env::id;
use crate::harness::namespaces::NetnsNode;
use crate::harness::upstream::Upstream;

mod tls;

const TIMEOUT: Duration = Duration::from_secs(60);
const ALICE: u32 = 61_001;

/// Checks for the programs of this computer that the test needs. Returns false after a printed skip
/// without them.
fn tools() -> bool {
    let is_missing = |name: &&str| run_quietly(Command::new(name).arg("--version")).is_none();
    let missing: Vec<&str> = ["strace", "systemd-analyze"]
        .into_iter()
        .filter(is_missing)
        .collect();
    if !missing.is_empty() {
        skip(&format!("missing: {missing:?}"));
    }
    missing.is_empty()
}

fn run_quietly(command: &mut Command) -> Option<String> {
    let output = command
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()
}

/// A daemon under a tracer of its system calls, with its threads.
struct TracedDaemon {
    daemon: Daemon,
    trace: PathBuf,
}

impl TracedDaemon {
    fn start(words: &[&str], folder: &Path, listen: &str, configuration: &str) -> Self {
        let trace = folder.join("trace");
        let strace = [
            "strace",
            "-D",
            "-f",
            "-q",
            "-e",
            "signal=none",
            "-o",
            trace.to_str().expect("a path in UTF-8"),
        ];
        let daemon =
            Daemon::start_behind(&[words, &strace].concat(), folder, listen, configuration).ready();
        Self { daemon, trace }
    }

    /// Returns the names of the calls, once the daemon has ended normally.
    fn end(mut self) -> BTreeSet<String> {
        self.daemon.process().signal(Signal::SIGTERM);
        assert_eq!(
            self.daemon
                .process()
                .owned()
                .wait(TIMEOUT)
                .expect("it ends")
                .code(),
            Some(0)
        );
        let pid = self.daemon.pid().to_string();
        // The tracer writes the end of its process last.
        let text = await_some("the end of the trace", TIMEOUT, || {
            let text = fs::read_to_string(&self.trace).ok()?;
            text.lines()
                .last()
                .is_some_and(|line| line.starts_with(&pid) && line.contains("+++ exited"))
                .then_some(text)
        });
        let call = |line: &str| {
            let (_, call) = line.trim_start().split_once(' ')?;
            let (name, _) = call.trim_start().split_once('(')?;
            name.bytes()
                .all(|c| c.is_ascii_alphanumeric() || c == b'_')
                .then(|| name.to_owned())
        };
        text.lines().filter_map(call).collect()
    }
}

const LISTENERS: [&str; 3] = ["unix", "tcp", "tcp6"];

/// Rules by user (with the name service), unit, group and executable; reload, metrics, status,
/// audit.
fn by_rules() -> BTreeSet<String> {
    let (folder, upstream) = (folder(), Upstream::start(&[(ALICE, "me")]));
    let rule = |keys: &str| {
        format!("\n[[workload]]\nspiffe_id = \"spiffe://example.org/user/me\"\n{keys}\n")
    };
    let curl_file = fs::canonicalize("/usr/bin/curl").unwrap();
    let rules = [
        rule("user = \"of-another-node\""),
        rule("systemd_unit = \"syscalls-unit.service\""),
        rule(&format!("uid = {ALICE}\nexe = {curl_file:?}")),
        rule("gid = 61009"),
    ];
    let configuration = upstream.configuration() + &rules.concat();
    let traced = TracedDaemon::start(
        &[],
        folder.path(),
        "authorization = \"token\"",
        &configuration,
    );
    let (unit, other) = (
        Cgroup::new("syscalls-unit.service"),
        Cgroup::new("syscalls-other.service"),
    );
    for _ in 0..2 {
        // The responses are not checked here: other tests do that.
        for listener in LISTENERS {
            traced.daemon.curl(listener, (7, 7), &unit);
            traced.daemon.curl(listener, (ALICE, 7), &other);
            traced.daemon.curl(listener, (61_002, 61_009), &other);
            traced.daemon.curl(listener, (61_003, 7), &other);
        }
        http_get(traced.daemon.admin(), "/metrics").expect("metrics");
        traced.daemon.status("spiffe://example.org/user/me");
        assert!(traced.daemon.reload(
            "authorization = \"token\"",
            &(configuration.clone() + &rule("uid = 61004"))
        ));
        drop(UnixStream::connect(traced.daemon.unix()));
    }
    traced.end()
}

/// Traces an agent that attests the caller's process, with the event that shows an exec.
fn by_agent() -> BTreeSet<String> {
    let folder = folder();
    let agent = FakeAgent::start(
        folder.path(),
        vec![Entry::new(&id("alice"), &[&format!("unix:uid:{ALICE}")])],
    );
    let traced = TracedDaemon::start(&[], folder.path(), "", &agent.configuration());
    let cgroup = Cgroup::new("syscalls-agent.service");
    for listener in LISTENERS {
        let answer = traced.daemon.curl(listener, (ALICE, 7), &cgroup);
        assert!(answer.contains("AccessKeyId"), "{listener}: {answer}");
    }
    traced.end()
}

/// Listeners in pods, which pass to the next daemon.
fn in_pods() -> BTreeSet<String> {
    let (folder, upstream) = (folder(), Upstream::start(&[(0, "pod")]));
    let node = NetnsNode::start(folder.path());
    node.add("cni-1");
    let rule = "\n[[workload]]\nspiffe_id = \"spiffe://example.org/user/pod\"\ncgroup = \"/kubepods/**\"\n";
    let words = node.enter();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let handover = folder.path().join("handover/awsvid.sock");
    let listen = node.listen().replace(
        "handover_socket = \"\"",
        &format!("handover_socket = {handover:?}"),
    );
    let start = |name: &str| {
        let own = folder.path().join(name);
        fs::create_dir(&own).unwrap();
        TracedDaemon::start(&words, &own, &listen, &(upstream.configuration() + rule))
    };
    let first = start("first");
    let pod = Cgroup::of_pod(77);
    let answer = node.fetch("cni-1", &pod, "127.0.0.1:974".parse().unwrap());
    assert!(answer.contains("AccessKeyId"), "{answer}");
    let second = start("second");
    node.add("cni-2");
    await_some("the second daemon listens", TIMEOUT, || {
        (second.daemon.metric("awsvid_pod_listeners") == 2).then_some(())
    });
    let calls = first.end();
    node.remove("cni-1");
    calls.into_iter().chain(second.end()).collect()
}

/// Returns all system call groups of systemd, with their members.
fn groups() -> BTreeMap<String, Vec<String>> {
    let mut command = Command::new("systemd-analyze");
    let text = run_quietly(command.arg("syscall-filter").env("SYSTEMD_COLORS", "0"))
        .expect("systemd-analyze syscall-filter");
    let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut current = String::new();
    for line in text
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'))
    {
        match line.trim() {
            "" => current.clear(),
            name if !line.starts_with(' ') => name.clone_into(&mut current),
            name => groups
                .entry(current.clone())
                .or_default()
                .push(name.to_owned()),
        }
    }
    groups
}

fn expand(name: &str, groups: &BTreeMap<String, Vec<String>>, into: &mut BTreeSet<String>) {
    match groups.get(name) {
        Some(members) => members
            .iter()
            .for_each(|member| expand(member, groups, into)),
        None => drop(into.insert(name.to_owned())),
    }
}

/// Returns the calls that the unit allows. By systemd.exec(5), the first line makes it an allow
/// list.
fn allowed(unit: &str) -> BTreeSet<String> {
    let groups = groups();
    let mut allowed = BTreeSet::new();
    expand("@default", &groups, &mut allowed);
    for line in unit
        .lines()
        .filter_map(|line| line.strip_prefix("SystemCallFilter="))
    {
        let mut named = BTreeSet::new();
        let names = line.trim_start_matches('~');
        names
            .split_whitespace()
            .for_each(|name| expand(name, &groups, &mut named));
        match line.starts_with('~') {
            true => allowed.retain(|name| !named.contains(name)),
            false => allowed.extend(named),
        }
    }
    allowed
}

/// Returns those of these calls that the unit does not allow.
fn blocked<'c>(unit: &str, called: &'c BTreeSet<String>) -> Vec<&'c str> {
    let allowed = allowed(unit);
    called
        .iter()
        .filter(|name| !allowed.contains(*name))
        .map(String::as_str)
        .collect()
}

/// Returns the unit without this name in its filter.
fn without(unit: &str, name: &str) -> String {
    let line = |line: &str| match line.strip_prefix("SystemCallFilter=") {
        Some(names) => {
            let names = names.split(' ').filter(|other| *other != name);
            format!("SystemCallFilter={}\n", names.collect::<Vec<_>>().join(" "))
        }
        None => format!("{line}\n"),
    };
    unit.lines().map(line).collect()
}

/// The calls that a container's default profile allows because of `CAP_SYS_ADMIN`, without those
/// that awsvid uses.
const OF_SYS_ADMIN: [&str; 17] = [
    "fanotify_init",
    "fsconfig",
    "fsmount",
    "fsopen",
    "lookup_dcookie",
    "mount",
    "mount_setattr",
    "move_mount",
    "open_tree",
    "perf_event_open",
    "quotactl",
    "setdomainname",
    "sethostname",
    "syslog",
    "umount",
    "umount2",
    "unshare",
];

/// Asserts that the seccomp profile for Kubernetes names these calls, and allows less than a
/// container's default profile does.
fn assert_profile_allows(called: &BTreeSet<String>) {
    let profile = include_str!("../../deploy/kubernetes/seccomp.json");
    let profile: serde_json::Value = serde_json::from_str(profile).unwrap();
    let rules = profile["syscalls"].as_array().unwrap();
    let named: BTreeSet<&str> = rules
        .iter()
        .flat_map(|rule| rule["names"].as_array().unwrap())
        .map(|name| name.as_str().unwrap())
        .collect();
    let missing: Vec<_> = called
        .iter()
        .filter(|name| !named.contains(name.as_str()))
        .collect();
    assert!(
        missing.is_empty(),
        "what the seccomp profile lacks: {missing:?}"
    );
    assert!(OF_SYS_ADMIN.iter().all(|name| !named.contains(name)));
}

#[test]
fn unit_allows_all_system_calls_of_daemon() {
    if !root() || !tools() {
        return;
    }
    let unit = include_str!("../../deploy/systemd/awsvid.service");
    let allowed = allowed(unit);
    assert!(
        allowed.len() > 100 && allowed.contains("accept4") && !allowed.contains("mount"),
        "{allowed:?}"
    );
    let Some(broker) = tls::by_broker() else {
        return;
    };
    let (rules, agent) = (by_rules(), by_agent());
    let called: BTreeSet<String> = [&rules, &agent, &in_pods(), &broker]
        .into_iter()
        .flatten()
        .cloned()
        .collect();
    assert!(
        called.len() > 60 && called.contains("accept4") && called.contains("setns"),
        "{called:?}"
    );
    assert_eq!(
        blocked(unit, &called),
        [] as [&str; 0],
        "what the unit's SystemCallFilter= lacks"
    );
    assert_profile_allows(&called);
    // Each privileged call is allowed for a use that exists, and would be missed.
    for (name, calls) in [
        ("capset", [&rules, &broker]),
        ("open_by_handle_at", [&rules, &broker]),
        ("bpf", [&agent, &broker]),
    ] {
        assert!(calls.iter().all(|calls| calls.contains(name)), "{name}");
        assert_eq!(blocked(&without(unit, name), &called), [name]);
    }
    // So would a call of the group that has all others.
    let lacking = format!("{unit}SystemCallFilter=~connect accept4\n");
    assert_eq!(blocked(&lacking, &called), ["accept4", "connect"]);
}

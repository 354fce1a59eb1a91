use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

use nix::unistd::geteuid;

use super::*;
use crate::attest::cgroup_mounts::CgroupMounts;
use crate::skip::skip;

/// Returns a monitor where this process has the privileges for one.
fn monitor(count_by: CountBy) -> Option<Arc<ExecMonitor>> {
    match ExecMonitor::attached_to(TRACEPOINT, count_by) {
        Ok(monitor) => Some(Arc::new(monitor)),
        Err(error) => {
            assert!(!geteuid().is_root(), "{error}");
            skip(&format!("no monitor of executions: {error}"));
            None
        }
    }
}

/// Starts a shell that executes a program when it reads a line, and prints a line before and after.
fn shell() -> (Child, impl FnMut(&str)) {
    let mut child = Command::new("sh")
        .args([
            "-c",
            "echo ready; read line; exec sh -c 'echo executed; read line'",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut input, mut output) = (
        child.stdin.take().unwrap(),
        BufReader::new(child.stdout.take().unwrap()),
    );
    // `spawn` returns before the execution of the shell itself is counted.
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line.trim(), "ready");
    let step = move |expected: &str| {
        writeln!(input).unwrap();
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert_eq!(line.trim(), expected);
    };
    (child, step)
}

#[test]
fn monitor_detects_exec_of_the_watched_process_only() {
    let Some(monitor) = monitor(CountBy::Pid) else {
        return;
    };
    let ((mut one, mut execute), (mut other, _waiting)) = (shell(), shell());
    let key = |pid| monitor.key(pid, || Err(())).unwrap();
    let [watch, of_other] = [one.id(), other.id()].map(|pid| monitor.watch(key(pid)));
    assert!(watch.no_exec_seen() && of_other.no_exec_seen());
    execute("executed");
    assert!(!watch.no_exec_seen());
    // The two may have one counter by chance, which shows in the table.
    assert!(of_other.no_exec_seen() || watch.index == of_other.index);
    assert!(
        monitor.watch(key(one.id())).no_exec_seen(),
        "a new watch begins"
    );
    for child in [&mut one, &mut other] {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn monitor_counts_by_every_ancestor_cgroup() {
    let Some(monitor) = monitor(CountBy::Cgroup) else {
        return;
    };
    let hierarchies = CgroupMounts::find(&fs::read_to_string("/proc/self/mountinfo").unwrap());
    let Some((mount, _)) = hierarchies.unified() else {
        return skip("no cgroup v2 tree is mounted");
    };
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = own
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .unwrap();
    let id = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
    let (root, own) = (id(mount), id(&mount.join(own)));
    let key = |id: u64| monitor.key(0, || Ok::<_, Infallible>(id)).unwrap();
    let (of_root, of_own) = (monitor.watch(key(root)), monitor.watch(key(own)));
    let (mut child, mut execute) = shell();
    execute("executed");
    assert!(!of_root.no_exec_seen() && !of_own.no_exec_seen());
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn index_spreads_keys_over_the_whole_table() {
    let Some(monitor) = monitor(CountBy::Pid) else {
        return;
    };
    let indexes: std::collections::HashSet<u32> =
        (1..=4096).map(|pid| monitor.index(pid)).collect();
    assert!(indexes.iter().all(|index| *index < COUNTERS));
    assert!(indexes.len() > 3500, "{}", indexes.len());
}

#[test]
fn monitor_starts_where_executions_are_counted() {
    for count_by in [CountBy::Pid, CountBy::Cgroup] {
        if monitor(count_by).is_some() {
            ExecMonitor::start_at(TRACEPOINT, count_by).unwrap();
        }
    }
}

/// A program that is attached and never runs would let each execution pass.
#[test]
fn monitor_does_not_start_where_nothing_is_counted() {
    for count_by in [CountBy::Pid, CountBy::Cgroup] {
        if monitor(count_by).is_none() {
            return;
        }
        // The kernel reaches it if a process hangs for minutes.
        let started = ExecMonitor::start_at(c"sched_process_hang", count_by);
        assert!(
            matches!(started, Err(ExecMonitorError::NotCounted)),
            "{started:?}"
        );
    }
}

#[test]
fn monitor_does_not_start_where_nothing_can_be_executed() {
    let Some(monitor) = monitor(CountBy::Pid) else {
        return;
    };
    let tested = monitor.verify_counts(&mut Command::new("/nonexistent"));
    assert!(
        matches!(tested, Err(ExecMonitorError::NotTested { .. })),
        "{tested:?}"
    );
}

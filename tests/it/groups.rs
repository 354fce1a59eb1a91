//! Callers with very many supplementary groups, which any local user can have that may make a user
//! namespace (T27). attacks/README.md has the table of attacks.

use crate::harness::actor::{self, Counts, Repeater};
use crate::harness::agent::{Entry, FakeAgent};
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::Daemon;
use crate::harness::env::id;
use crate::harness::upstream::Upstream;

const LISTENERS: [&str; 3] = ["unix", "tcp", "tcp6"];
const ALICE: u32 = 61001;
const BOB: u32 = 61002;
/// The actor's processes have the groups from 100,000 on, so all of them have this one.
const GROUP: u32 = 100_000;
/// The documented bound of groups per caller.
const MAX_GROUPS: usize = 1024;
/// The most groups that a process can have.
const NGROUPS_MAX: usize = 65_536;
/// The growth of the daemon's memory that hundreds of callers may cause. Three copies of the groups
/// of 300 were 230 MiB.
const MEMORY: u64 = 24 * 1024;

/// Sends requests from this number of processes of a user, each with this number of groups, and
/// returns the outcomes.
fn fetch(
    daemon: &Daemon,
    cgroup: &Cgroup,
    listener: &str,
    uid: u32,
    groups: usize,
    processes: usize,
) -> Counts {
    let numbers = [usize::try_from(uid).unwrap(), groups, processes];
    Repeater::start(
        "grouped",
        listener,
        &daemon.listener(listener),
        &numbers,
        cgroup.path(),
    )
    .stop()
}

fn all(code: &str, count: usize) -> Counts {
    Counts::from([(code.to_owned(), count)])
}

/// Checks the growth of the daemon's memory while `act` runs.
#[track_caller]
fn assert_memory_is_bounded(daemon: &Daemon, act: impl FnOnce()) {
    let before = daemon.memory();
    act();
    let after = daemon.memory();
    eprintln!("{before} KiB before, {after} KiB after");
    assert!(
        after < before + MEMORY,
        "{before} KiB before, {after} KiB after"
    );
}

#[test]
fn groups_count_only_for_group_rules_with_rules() {
    if !root() {
        return;
    }
    let folder = folder();
    let upstream = Upstream::start(&[(ALICE, "alice"), (BOB, "bob")]);
    let rule = |name: &str, key: &str| {
        format!("[[workload]]\nspiffe_id = \"spiffe://example.org/user/{name}\"\n{key}\n")
    };
    let alice = rule(
        "alice",
        &format!("uid = {ALICE}\nsupplementary_group = {GROUP}"),
    );
    let configuration = format!(
        "{}\n{alice}{}",
        upstream.configuration(),
        rule("bob", &format!("uid = {BOB}"))
    );
    let daemon = Daemon::start(folder.path(), "", &configuration).ready();
    let cgroup = Cgroup::new(&format!(
        "groups-{}",
        folder.path().file_name().unwrap().display()
    ));
    assert_memory_is_bounded(&daemon, || {
        for listener in LISTENERS {
            let fetch = |uid, groups, count| fetch(&daemon, &cgroup, listener, uid, groups, count);
            assert_eq!(fetch(ALICE, 0, 1), all("no_identity", 1), "over {listener}");
            assert_eq!(
                fetch(ALICE, MAX_GROUPS, 2),
                all("Success", 2),
                "over {listener}"
            );
            assert_eq!(
                fetch(ALICE, MAX_GROUPS + 1, 2),
                all("too_many_groups", 2),
                "over {listener}"
            );
            assert_eq!(
                fetch(ALICE, NGROUPS_MAX, 50),
                all("too_many_groups", 50),
                "over {listener}"
            );
            assert_eq!(
                fetch(BOB, NGROUPS_MAX, 50),
                all("Success", 50),
                "over {listener}: no rule of that user names a group"
            );
        }
    });
}

/// Without `PIDFD_GET_INFO` the ids of a caller on the unix socket are in a file that lists its
/// groups. Over TCP the socket has its user.
#[test]
fn groups_always_count_on_the_unix_socket_without_pidfd_info() {
    if !root() {
        return;
    }
    let folder = folder();
    let upstream = Upstream::start(&[(BOB, "bob")]);
    let actor = actor::program();
    let words = [actor.to_str().unwrap(), "without-pidfd-info"];
    let text = format!(
        "{}\n[[workload]]\nspiffe_id = \"spiffe://example.org/user/bob\"\nuid = {BOB}\n",
        upstream.configuration()
    );
    let daemon = Daemon::start_behind(&words, folder.path(), "", &text).ready();
    let cgroup = Cgroup::new(&format!(
        "groups-{}",
        folder.path().file_name().unwrap().display()
    ));
    assert_memory_is_bounded(&daemon, || {
        for (listener, code) in [("unix", "too_many_groups"), ("tcp", "Success")] {
            let fetch = |groups, count| fetch(&daemon, &cgroup, listener, BOB, groups, count);
            assert_eq!(fetch(MAX_GROUPS, 2), all("Success", 2), "over {listener}");
            assert_eq!(fetch(NGROUPS_MAX, 50), all(code, 50), "over {listener}");
        }
    });
}

#[test]
fn groups_always_count_and_take_little_memory_with_agent() {
    if !root() {
        return;
    }
    let folder = folder();
    let agent = FakeAgent::start(
        folder.path(),
        vec![Entry::new(&id("alice"), &["unix:uid:61001"])],
    );
    let daemon = Daemon::start(folder.path(), "", &agent.configuration()).ready();
    let cgroup = Cgroup::new(&format!(
        "groups-{}",
        folder.path().file_name().unwrap().display()
    ));
    assert_memory_is_bounded(&daemon, || {
        for listener in LISTENERS {
            let fetch = |groups, count| fetch(&daemon, &cgroup, listener, ALICE, groups, count);
            assert_eq!(
                fetch(MAX_GROUPS, 300),
                all("Success", 300),
                "over {listener}"
            );
            let outcomes = agent.queries_except(daemon.pid());
            assert_eq!(
                fetch(NGROUPS_MAX, 100),
                all("too_many_groups", 100),
                "over {listener}"
            );
            assert_eq!(
                agent.queries_except(daemon.pid()),
                outcomes,
                "over {listener}: the agent would hold them, too"
            );
        }
    });
}

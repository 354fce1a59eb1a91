//! Users and groups by name: names that exist later, names that never exist, and a directory that
//! does not respond.

use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::process::await_some;
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::Daemon;
use crate::harness::directory::{Account, Directory};

const TIMEOUT: Duration = Duration::from_secs(60);
const LISTENERS: [&str; 3] = ["unix", "tcp", "tcp6"];

/// Starts a daemon without an agent. The audit shows a caller's identity.
fn start(folder: &Path, directory: &Directory, rules: &str) -> Daemon {
    let rest = "[identity]\nworkload_api_socket = \"unix:///nonexistent/agent.sock\"\n[sts]\nregion = \"eu-central-1\"\n\
        [[role]]\nname = \"all\"\nspiffe_id = \"spiffe://example.org/**\"\nrole_arn = \"arn:aws:iam::123456789012:role/all\"\n";
    Daemon::start_behind(&directory.words(), folder, "", &format!("{rest}{rules}"))
}

fn rule(path: &str, keys: &str) -> String {
    format!("[[workload]]\nspiffe_id = \"spiffe://example.org/{path}\"\n{keys}\n")
}

/// Returns the path of the SPIFFE ID that this user and group have over the listener, or the reason
/// why they have none.
fn identity(daemon: &Daemon, listener: &str, (uid, gid): (u32, u32), cgroup: &Cgroup) -> String {
    let before = daemon.audit().len();
    daemon.curl(listener, (uid, gid), cgroup);
    // The daemon's own readiness probes, as root, are in the audit too.
    let is_its = |record: &Value| {
        let path = record["cgroup"]
            .as_str()
            .map(|path| path.trim_start_matches('/'));
        record["uid"] == uid && path.is_some_and(|path| cgroup.path().ends_with(path))
    };
    let record = await_some("its record", TIMEOUT, || {
        daemon
            .audit_where(|number, _| number >= before)
            .into_iter()
            .find(is_its)
    });
    let id = record["spiffe_id"]
        .as_str()
        .and_then(|id| id.strip_prefix("spiffe://example.org/"));
    id.or(record["reason"].as_str())
        .expect("an identity or a reason")
        .to_owned()
}

#[test]
fn unknown_name_among_fifty_blocks_no_caller() {
    if !root() {
        return;
    }
    let folder = folder();
    let Some(directory) = Directory::start(folder.path()) else {
        return;
    };
    directory.add_local("alice:x:51001:51001::/:/bin/sh");
    let good: String = (1..48)
        .map(|i| rule(&format!("u{i}"), &format!("uid = {}", 52_000 + i)))
        .collect();
    let rules = [
        rule("ghost", "user = \"ghost\""),
        rule("ghosts", "group = \"ghosts\""),
        rule("alice", "user = \"alice\""),
        good,
    ];
    let daemon = start(folder.path(), &directory, &rules.concat());
    let cgroup = Cgroup::new("accounts-fifty.service");
    for listener in LISTENERS {
        for (uid, expected) in [
            (51_001, "alice"),
            (52_001, "u1"),
            (52_047, "u47"),
            (52_050, "no_identity"),
        ] {
            assert_eq!(
                identity(&daemon, listener, (uid, 7), &cgroup),
                expected,
                "{listener}"
            );
        }
    }
    assert_eq!(daemon.metric("awsvid_unknown_accounts"), 2);
    let log = daemon.log();
    let line = 1 + daemon
        .text()
        .lines()
        .position(|line| line.contains("\"ghost\""))
        .unwrap();
    let lines: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("the account does not exist on this node"))
        .collect();
    assert_eq!(lines.len(), 2, "not each once:\n{log}");
    let has = |words: &[&str]| {
        lines
            .iter()
            .any(|found| words.iter().all(|word| found.contains(word)))
    };
    assert!(
        has(&["user \\\"ghost\\\"", &format!("\"lines\":\"[{line}]\"")]),
        "{lines:?}"
    );
    assert!(
        has(&[
            "group \\\"ghosts\\\"",
            &format!("\"lines\":\"[{}]\"", line + 3)
        ]),
        "{lines:?}"
    );
}

#[test]
fn user_or_group_is_found_by_first_request_after_its_creation() {
    if !root() {
        return;
    }
    let folder = folder();
    let Some(directory) = Directory::start(folder.path()) else {
        return;
    };
    let rules = [
        rule("local", "user = \"local\""),
        rule("late", "user = \"late\""),
        rule("crew", "group = \"crew\""),
    ];
    let daemon = start(folder.path(), &directory, &rules.concat());
    let cgroup = Cgroup::new("accounts-late.service");
    let callers = [
        ("local", (51_001, 7)),
        ("late", (51_002, 7)),
        ("crew", (51_003, 51_009)),
    ];
    for (listener, (_, ids)) in LISTENERS.into_iter().zip(callers) {
        assert_eq!(identity(&daemon, listener, ids, &cgroup), "no_identity");
    }
    // Like useradd, and like a directory that starts after the daemon.
    directory.add_local("local:x:51001:51001::/:/bin/sh");
    directory.set("late", Account::Id(51_002));
    directory.set("crew", Account::Id(51_009));
    for listener in LISTENERS {
        for (name, ids) in callers {
            // The previous request's lookup may be less than a second old.
            await_some(name, TIMEOUT, || {
                (identity(&daemon, listener, ids, &cgroup) == name).then_some(())
            });
        }
    }
    // Another number takes effect with a reload, if not before.
    directory.set("late", Account::Id(51_012));
    assert!(daemon.reload_text(&daemon.text()));
    await_some("the new number", TIMEOUT, || {
        let ids = [51_002, 51_012].map(|uid| identity(&daemon, "tcp", (uid, 7), &cgroup));
        (ids == ["no_identity", "late"]).then_some(())
    });
    // The name keeps its number after the directory has dropped it: some directories deny every
    // name while they restart.
    directory.set("late", Account::Fails);
    assert!(daemon.reload_text(&daemon.text()));
    assert_eq!(identity(&daemon, "unix", (51_012, 7), &cgroup), "late");
}

#[test]
fn hanging_directory_neither_delays_nor_misleads_other_callers() {
    if !root() {
        return;
    }
    let folder = folder();
    let Some(directory) = Directory::start(folder.path()) else {
        return;
    };
    directory.add_local("alice:x:51001:51001::/:/bin/sh");
    for name in ["restricted", "fellows"] {
        directory.set(name, Account::Hangs);
    }
    let unit = "systemd_unit = \"accounts-silent.service\"";
    let rules = [
        rule("alice", "user = \"alice\""),
        rule("restricted", &format!("user = \"restricted\"\n{unit}")),
        rule("fellow", &format!("group = \"fellows\"\n{unit}")),
        rule("default", unit),
    ];
    let mut daemon = start(folder.path(), &directory, &rules.concat());
    let cgroup = Cgroup::new("accounts-silent.service");
    for listener in LISTENERS {
        // Local users are served, by their own rule and by the later one.
        assert_eq!(identity(&daemon, listener, (51_001, 0), &cgroup), "alice");
        assert_eq!(identity(&daemon, listener, (0, 0), &cgroup), "default");
        // A caller that could be the restricted user, or one of the group, does not get the rule
        // for all others.
        assert_eq!(
            identity(&daemon, listener, (51_002, 0), &cgroup),
            "unknown_account",
            "{listener}"
        );
        assert_eq!(
            identity(&daemon, listener, (0, 51_009), &cgroup),
            "unknown_account",
            "{listener}"
        );
    }
    let log = daemon.log();
    assert_eq!(
        log.matches("the name service does not answer").count(),
        2,
        "{log}"
    );
    directory.set("restricted", Account::Id(51_002));
    await_some("an answer", TIMEOUT, || {
        (identity(&daemon, "tcp", (51_002, 0), &cgroup) == "restricted").then_some(())
    });
    assert_eq!(identity(&daemon, "tcp", (51_003, 0), &cgroup), "default");
    assert_eq!(
        identity(&daemon, "tcp", (0, 51_009), &cgroup),
        "unknown_account"
    );
    // A lookup that fails has the same effect as one without a response.
    directory.set("fellows", Account::Fails);
    assert!(daemon.reload_text(&daemon.text()));
    assert_eq!(
        identity(&daemon, "unix", (0, 51_009), &cgroup),
        "unknown_account"
    );
    directory.set("fellows", Account::Id(51_009));
    await_some("an answer", TIMEOUT, || {
        (identity(&daemon, "unix", (0, 51_009), &cgroup) == "fellow").then_some(())
    });
    // A lookup that does not end delays nothing else.
    directory.set("restricted", Account::Hangs);
    assert!(daemon.reload_text(&daemon.text()));
    daemon.process().signal(Signal::SIGTERM);
    assert_eq!(
        daemon
            .process()
            .owned()
            .wait(TIMEOUT)
            .expect("it ends")
            .code(),
        Some(0)
    );
}

//! One workload sends masses of requests, and another is answered meanwhile (T9, T20, T21, T23).
//! These tests check only the numbers of responses. The bench measures their latency.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::Value;

use crate::harness::actor::{Counts, Repeater, fetch};
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::process::await_some;
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::{Daemon, imds_table};
use crate::harness::upstream::Upstream;

const TIMEOUT: Duration = Duration::from_secs(60);
const ALICE: u32 = 61001;
const BOB: u32 = 61002;
/// A user without a rule.
const MALLORY: u32 = 61003;

struct LoadStage {
    daemon: Daemon,
    _upstream: Upstream,
    alice: Cgroup,
    bob: Cgroup,
    _folder: tempfile::TempDir,
}

impl LoadStage {
    /// Starts it with `rule` in each rule and `listen` in `[listen]`.
    fn set(listen: &str, rule: &str) -> Self {
        Self::set_with(listen, rule, |_| String::new())
    }

    /// Starts it with the tables that `more` returns for its folder.
    fn set_with(listen: &str, rule: &str, more: impl Fn(&Path) -> String) -> Self {
        let folder = folder();
        let upstream = Upstream::start(&[(ALICE, "alice"), (BOB, "bob")]);
        let rules = [("alice", ALICE), ("bob", BOB)].map(|(name, uid)| {
            let rule = rule.replace("UID", &uid.to_string());
            format!("\n[[workload]]\nspiffe_id = \"spiffe://example.org/user/{name}\"\nuid = {uid}\n{rule}\n")
        });
        let configuration = [
            more(folder.path()),
            upstream.configuration(),
            rules.concat(),
        ];
        let configuration = configuration.join("\n");
        let daemon = Daemon::start(folder.path(), listen, &configuration).ready();
        let name = folder.path().file_name().unwrap().display().to_string();
        let [alice, bob] =
            ["alice", "bob"].map(|user| Cgroup::new(&format!("{user}-{name}.service")));
        Self {
            daemon,
            _upstream: upstream,
            alice,
            bob,
            _folder: folder,
        }
    }

    fn alice(&self, act: &str, listener: &str, numbers: &[usize]) -> Repeater {
        let numbers = [&[usize::try_from(ALICE).unwrap()], numbers].concat();
        Repeater::start(
            act,
            listener,
            &self.daemon.listener(listener),
            &numbers,
            self.alice.path(),
        )
        .wait_started()
    }

    /// Sends this number of requests as Bob, each of which must be answered.
    fn bob_is_answered(&self, listener: &str, count: usize) {
        let answers = fetch(
            listener,
            &self.daemon.listener(listener),
            BOB,
            count,
            self.bob.path(),
        );
        assert_eq!(answers, counts(&[("Success", count)]), "over {listener}");
    }

    fn metric(&self, name: &str) -> u64 {
        let metrics = self.daemon.metrics();
        metrics
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
            .unwrap_or(0)
    }
}

fn counts(counts: &[(&str, usize)]) -> Counts {
    counts
        .iter()
        .map(|(code, count)| ((*code).to_owned(), *count))
        .collect()
}

const LISTENERS: [&str; 3] = ["unix", "tcp", "tcp6"];
const DROPPED: &str = "awsvid_connections_dropped_total{reason=\"too_many_of_one\"}";

/// T20: twice as many idle connections as all callers together may have. Alice gets one workload's
/// share, and the rest is reset.
#[test]
fn idle_connections_leave_room_for_other_workloads() {
    if !root() {
        return;
    }
    let stage = LoadStage::set(
        "max_connections = 1000\nmax_connections_per_workload = 400",
        "",
    );
    for listener in LISTENERS {
        let before = stage.metric(DROPPED);
        let connections = stage.alice("hold", listener, &[2000]);
        // Alice's own requests are rejected meanwhile: first, since a connection that sends nothing
        // ends after 5 s.
        let more = fetch(
            listener,
            &stage.daemon.listener(listener),
            ALICE,
            5,
            stage.alice.path(),
        );
        assert_eq!(more, counts(&[("nothing", 5)]), "over {listener}");
        stage.bob_is_answered(listener, 50);
        await_some("what is too much is counted", TIMEOUT, || {
            (stage.metric(DROPPED) >= before + 1605).then_some(())
        });
        let ended = connections.stop();
        let how = if listener == "unix" {
            "closed"
        } else {
            "reset"
        };
        assert_eq!(ended.get(how), Some(&1600), "over {listener}: {ended:?}");
        // Alice's permits are free again once the daemon has seen that the connections are closed.
        // First it has to search for Alice's process, one connection at a time because that has so
        // many descriptors. The one that is left is the request for the metrics.
        await_some("Alice's connections are over", TIMEOUT, || {
            (stage.metric("awsvid_connections") == 1).then_some(())
        });
        await_some("Alice is answered again", TIMEOUT, || {
            let answers = fetch(
                listener,
                &stage.daemon.listener(listener),
                ALICE,
                1,
                stage.alice.path(),
            );
            (answers == counts(&[("Success", 1)])).then_some(())
        });
    }
}

/// T29: sessions, and ids that a person may use in addition to its own, are not workloads of their
/// own.
#[test]
fn sessions_and_ids_of_one_person_share_one_limit() {
    if !root() {
        return;
    }
    let stage = LoadStage::set(
        "max_connections = 200\nmax_connections_per_workload = 40",
        "",
    );
    for listener in LISTENERS {
        let address = stage.daemon.listener(listener);
        let sessions: Vec<_> = (0..9)
            .map(|number| Cgroup::of_session(MALLORY, number))
            .collect();
        let hold = |(number, session): (usize, &Cgroup)| {
            // Root in a container of its own has the person's id outside, and its users have
            // subordinate ones.
            let uid = if number == 0 {
                usize::try_from(MALLORY).unwrap()
            } else {
                165_536 + number
            };
            Repeater::start("hold", listener, &address, &[uid, 30], session.path()).wait_started()
        };
        let connections: Vec<_> = sessions.iter().enumerate().map(hold).collect();
        stage.bob_is_answered(listener, 50);
        let mut open = 0;
        for one in connections {
            open += one.stop().get("open").copied().unwrap_or_default();
        }
        assert!(open <= 40, "{open} over {listener}");
    }
    for reason in ["too_many", "evicted"] {
        let dropped = stage.metric(&format!(
            "awsvid_connections_dropped_total{{reason=\"{reason}\"}}"
        ));
        assert_eq!(dropped, 0, "{reason}: there was always room");
    }
}

/// T29: where no connection is left for any caller, the workload with the most gives one up.
#[test]
fn workload_with_most_connections_is_evicted_first() {
    if !root() {
        return;
    }
    let stage = LoadStage::set(
        "max_connections = 100\nmax_connections_per_workload = 40",
        "",
    );
    for listener in LISTENERS {
        let address = stage.daemon.listener(listener);
        let name = stage
            .bob
            .path()
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        let units: Vec<_> = (0..6)
            .map(|number| Cgroup::new(&format!("greedy-{number}-{name}")))
            .collect();
        let numbers = [usize::try_from(MALLORY).unwrap(), 40];
        let connections: Vec<_> = units
            .iter()
            .map(|unit| {
                Repeater::start("hold", listener, &address, &numbers, unit.path()).wait_started()
            })
            .collect();
        stage.bob_is_answered(listener, 50);
        stage.bob_is_answered("unix", 50);
        let mut open = 0;
        for one in connections {
            open += one.stop().get("open").copied().unwrap_or_default();
        }
        assert!(open <= 100, "{open} over {listener}");
    }
    assert!(stage.metric("awsvid_connections_dropped_total{reason=\"evicted\"}") > 0);
}

/// T38: callers that are not attested have limits of their own, by what their sockets show.
#[test]
fn rejected_callers_do_not_share_one_limit() {
    if !root() {
        return;
    }
    let stage = LoadStage::set(
        "max_connections = 1000\nmax_connections_per_workload = 40",
        "",
    );
    let alice = stage.alice.path().file_stem().unwrap().to_str().unwrap();
    // The service manager's sockets, so that no caller here is attested.
    let [flooding, other] =
        ["flooding", "other"].map(|unit| Cgroup::new(&format!("{unit}-{alice}.socket")));
    for listener in ["tcp", "tcp6"] {
        let address = stage.daemon.listener(listener);
        let numbers = [usize::try_from(ALICE).unwrap(), 200];
        let connections =
            Repeater::start("hold", listener, &address, &numbers, flooding.path()).wait_started();
        let rejected = fetch(listener, &address, BOB, 20, other.path());
        assert_eq!(
            rejected,
            counts(&[("manager_socket", 20)]),
            "over {listener}"
        );
        assert!(stage.metric(DROPPED) > 0, "the flood has reached its limit");
        connections.stop();
    }
}

/// T20: a caller that does not read its response keeps no other from its own.
#[test]
fn unread_responses_delay_no_other_caller() {
    if !root() {
        return;
    }
    let stage = LoadStage::set("", "");
    for listener in LISTENERS {
        let connections = stage.alice("mute", listener, &[300]);
        // The open one is the request for the metrics.
        await_some("all are over for the daemon", TIMEOUT, || {
            (stage.metric("awsvid_connections") == 1).then_some(())
        });
        stage.bob_is_answered(listener, 20);
        let ended = connections.stop();
        assert_eq!(ended, counts(&[("answered", 300)]), "over {listener}");
    }
}

/// T21: the caller makes the search for its process long, but not longer than its budget.
#[test]
fn many_descriptors_delay_only_their_owner() {
    if !root() {
        return;
    }
    let stage = LoadStage::set("", "gid = UID");
    for listener in ["tcp", "tcp6"] {
        let storm = stage.alice("storm", listener, &[8, 10_000]);
        stage.bob_is_answered(listener, 100);
        stage.bob_is_answered("unix", 100);
        let rejected = storm.stop();
        assert_eq!(
            rejected.keys().collect::<Vec<_>>(),
            ["too_many_descriptors"],
            "{rejected:?}"
        );
        // So is Alice herself, without that many descriptors.
        let answers = fetch(
            listener,
            &stage.daemon.listener(listener),
            ALICE,
            5,
            stage.alice.path(),
        );
        assert_eq!(answers, counts(&[("Success", 5)]));
    }
}

/// T45: metadata tokens have no state in the daemon, so a flood of PUTs delays only its workload.
/// One exchange starts for all of them.
#[test]
fn flood_of_puts_delays_no_other_workload() {
    const PUTS: &str = "awsvid_requests_total{listener=\"tcp\",protocol=\"imds\",outcome=\"answered\",reason=\"token\"}";
    const EXCHANGES: &str = "awsvid_exchanges_total{result=\"ok\"}";
    if !root() {
        return;
    }
    let stage = LoadStage::set_with("", "", imds_table);
    let begin = Instant::now();
    let flood = stage.alice("puts", "tcp", &[8]);
    await_some("the flood has begun", TIMEOUT, || {
        (stage.metric(PUTS) > 500).then_some(())
    });
    let memory = stage.daemon.memory();
    stage.bob_is_answered("tcp", 100);
    stage.bob_is_answered("unix", 100);
    await_some("the flood goes on", TIMEOUT, || {
        (stage.metric(PUTS) > 10_000).then_some(())
    });
    let (puts, seconds) = (stage.metric(PUTS), begin.elapsed().as_secs_f64());
    eprintln!("{puts} PUTs in {seconds:.1} s; the bench measures the rate and the delay");
    let grown = stage.daemon.memory().saturating_sub(memory);
    let answers = flood.stop();
    assert_eq!(answers.keys().collect::<Vec<_>>(), ["200"], "{answers:?}");
    assert_eq!(stage.metric(EXCHANGES), 2, "one for Alice, and one for Bob");
    assert!(grown < 4096, "{grown} KiB more");
    // Ten records a second, and one with the count of the others.
    let records = stage.daemon.audit();
    let of_flood = records.iter().filter(|record| record["reason"] == "token");
    let (of_flood, all) = (of_flood.count(), stage.metric(PUTS));
    assert!(of_flood as u64 * 5 < all, "{of_flood} records of {all}");
}

/// Sets how many descriptors the process may have from now on: `None` for its hard limit.
#[allow(unsafe_code, reason = "nix has no prlimit")]
fn set_limit(pid: Pid, expected: Option<u64>) {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    let null = std::ptr::null_mut();
    // SAFETY: the kernel writes one struct, which lives; none is read.
    let result = unsafe { libc::prlimit(pid.as_raw(), libc::RLIMIT_NOFILE, null, &raw mut limit) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    limit.rlim_cur = expected.unwrap_or(limit.rlim_max);
    // SAFETY: the kernel reads one struct, which lives; none is written.
    let result = unsafe {
        libc::prlimit(
            pid.as_raw(),
            libc::RLIMIT_NOFILE,
            &raw const limit,
            std::ptr::null_mut(),
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// T9: without descriptors the daemon accepts no connections, but it lives, and accepts them again
/// once it has some.
#[test]
fn daemon_recovers_from_descriptor_exhaustion() {
    if !root() {
        return;
    }
    let mut stage = LoadStage::set("", "");
    let pid = stage.daemon.process().owned().id();
    let limit = |expected: Option<u64>| set_limit(pid, expected);
    let open = || {
        std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .count()
    };
    let short = || {
        stage
            .daemon
            .log()
            .matches("cannot accept connections; backing off")
            .count()
    };
    for (round, listener) in LISTENERS.into_iter().enumerate() {
        // Since unix sockets take three each, a few of these are left for the next.
        limit(Some(u64::try_from(open() + 20).unwrap()));
        let connections = stage.alice("hold", listener, &[100]);
        await_some("the daemon notices", TIMEOUT, || {
            (short() > round).then_some(())
        });
        connections.stop();
        // It recovers by itself, before there is more.
        await_some("Bob is answered", TIMEOUT, || {
            let answers = fetch(
                listener,
                &stage.daemon.listener(listener),
                BOB,
                1,
                stage.bob.path(),
            );
            (answers == counts(&[("Success", 1)])).then_some(())
        });
        limit(None);
        stage.bob_is_answered(listener, 20);
        assert!(
            short() <= 2 * (round + 1),
            "the log is not flooded: {}",
            stage.daemon.log()
        );
    }
}

/// Returns the audit records about a user, and the number of requests they stand for, by outcome.
fn audited(records: &[Value], uid: u32) -> (usize, BTreeMap<String, u64>) {
    let mut requests = BTreeMap::new();
    let these: Vec<_> = records
        .iter()
        .filter(|record| record["uid"] == uid)
        .collect();
    for record in &these {
        let outcome = record["outcome"].as_str().unwrap().to_owned();
        *requests.entry(outcome).or_default() += record["repeated"].as_u64().unwrap_or(1);
    }
    (these.len(), requests)
}

/// T23: a caller that is rejected very often fills neither the disk nor the log, and no record of
/// another caller is missing.
#[test]
fn rejections_are_aggregated_without_losing_issues() {
    if !root() {
        return;
    }
    let mut stage = LoadStage::set("", "");
    let address = stage.daemon.listener("tcp");
    let one = |outcome: &str, count| BTreeMap::from([(outcome.to_owned(), count)]);
    let started = Instant::now();
    let numbers = [usize::try_from(MALLORY).unwrap(), 3000];
    let flood = Repeater::start("fetch", "tcp", &address, &numbers, stage.alice.path());
    stage.bob_is_answered("tcp", 100);
    assert_eq!(flood.stop(), counts(&[("no_identity", 3000)]));
    // The last of them is written without a further request.
    await_some("all rejections are accounted for", TIMEOUT, || {
        (audited(&stage.daemon.audit(), MALLORY).1 == one("refused", 3000)).then_some(())
    });
    let seconds = usize::try_from(started.elapsed().as_secs()).unwrap() + 1;
    let (records, _) = audited(&stage.daemon.audit(), MALLORY);
    assert!(records <= 11 * seconds, "{records} records in {seconds} s");
    assert_eq!(audited(&stage.daemon.audit(), BOB).1, one("issued", 100));

    // Requests that were only counted are written when the daemon ends.
    assert_eq!(
        fetch("tcp", &address, MALLORY, 50, stage.alice.path()),
        counts(&[("no_identity", 50)])
    );
    stage.daemon.process().signal(Signal::SIGTERM);
    assert!(
        stage
            .daemon
            .process()
            .owned()
            .wait(TIMEOUT)
            .expect("it ends")
            .success()
    );
    assert_eq!(
        audited(&stage.daemon.audit(), MALLORY).1,
        one("refused", 3050)
    );
}

/// T30: a caller that is answered very often does not fill the disk either. Its first hit of a key
/// has a record of its own.
#[test]
fn hits_are_aggregated_with_right_counts() {
    if !root() {
        return;
    }
    let stage = LoadStage::set("", "");
    for (round, listener) in LISTENERS.into_iter().enumerate() {
        let started = Instant::now();
        let before = stage.daemon.audit().len();
        let (address, alice) = (
            stage.daemon.listener(listener),
            usize::try_from(ALICE).unwrap(),
        );
        let flood = Repeater::start(
            "fetch",
            listener,
            &address,
            &[alice, 10_000],
            stage.alice.path(),
        );
        stage.bob_is_answered(listener, 1);
        assert_eq!(
            flood.stop(),
            counts(&[("Success", 10_000)]),
            "over {listener}"
        );
        let alice = || {
            let records: Vec<Value> = stage.daemon.audit().split_off(before);
            (audited(&records, ALICE), audited(&records, BOB), records)
        };
        let ((records, _), bob, all) = await_some("all hits are accounted for", TIMEOUT, || {
            let found = alice();
            (found.0.1 == BTreeMap::from([("issued".to_owned(), 10_000)])).then_some(found)
        });
        let seconds = usize::try_from(started.elapsed().as_secs()).unwrap() + 1;
        assert!(
            records <= 11 * seconds + 1,
            "{records} records in {seconds} s over {listener}"
        );
        assert_eq!(
            bob,
            (1, BTreeMap::from([("issued".to_owned(), 1)])),
            "Bob's is not lost among hers"
        );
        let first = all.iter().find(|record| record["uid"] == ALICE).unwrap();
        assert_eq!(first["cache"], if round == 0 { "miss" } else { "hit" });
        assert!(
            first["repeated"].is_null() && first["access_key_id"].is_string(),
            "{first}"
        );
    }
}

/// T33: sockets of removed cgroups, at a daemon that has to search for cgroups.
#[test]
fn callers_of_removed_cgroups_do_not_stop_others() {
    if !root() {
        return;
    }
    let folder = folder();
    let upstream = Upstream::start(&[(ALICE, "alice"), (BOB, "bob")]);
    let rules = [(ALICE, "alice"), (BOB, "bob")].map(|(uid, name)| {
        format!(
            "\n[[workload]]\nspiffe_id = \"spiffe://example.org/user/{name}\"\nuid = {uid}\n\
             cgroup = \"/awsvid-test-*.slice/**\"\n"
        )
    });
    let words = [
        "setpriv",
        "--bounding-set=-dac_read_search",
        "--inh-caps=-dac_read_search",
    ];
    let configuration = upstream.configuration() + &rules.concat();
    let daemon = Daemon::start_behind(&words, folder.path(), "", &configuration).ready();
    for listener in ["tcp", "tcp6"] {
        let address = daemon.listener(listener);
        let busy = || {
            daemon.metric(
                "awsvid_requests_total{listener=\"tcp\",protocol=\"container\",outcome=\"failed\",reason=\"search_busy\"}",
            )
        };
        let before = busy();
        let hostile_cgroup = Cgroup::new(&format!("orphaned-{listener}"));
        let hostile = Repeater::start(
            "orphaned",
            listener,
            &address,
            &[usize::try_from(ALICE).unwrap(), 200],
            hostile_cgroup.path(),
        )
        .wait_started();
        for number in 0..20 {
            // The daemon has not seen this cgroup before.
            let cgroup = Cgroup::new(&format!("new-{listener}-{number}"));
            let counts = fetch(listener, &address, BOB, 1, cgroup.path());
            assert_eq!(counts.get("Success"), Some(&1), "{listener}: {counts:?}");
        }
        hostile.stop();
        assert!(busy() > before, "{listener}: all of them wait for a scan");
    }
}

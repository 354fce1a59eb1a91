//! T29: four workloads hold all queries to the agent, and a fifth one is answered. A fake agent
//! holds the queries, or the real one hashes a program of 200 GB for each. ../attacks/README.md has
//! the table of attacks.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::actor::{Connector, Counts, ask, large_program};
use crate::harness::agent::{Entry, FakeAgent, HeldQuery};
use crate::harness::cgroup::Cgroup;
use crate::harness::client::{answer, ask as ask_over, send};
use crate::harness::counterparts::process::await_some;
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::Daemon;
use crate::harness::env::{Env, Setting, Source, id};
use crate::harness::is_slow;

const LISTENERS: [&str; 3] = ["unix", "tcp", "tcp6"];
const TIMEOUT: Duration = Duration::from_secs(60);
const ALICE: u32 = 61001;
const BOB: u32 = 61002;
const OWNERS: usize = 4;
/// The queries of one workload at a time. Four times as many are all that the daemon sends.
const QUERIES: usize = 8;

/// A process that waits for its answer, while the agent waits for the test.
struct Hanging<'a> {
    query: HeldQuery<'a>,
    connection: File,
    _process: Connector,
}

/// Sends the request of a process, and waits until the query is at the agent.
fn hang(process: Connector, agent: &FakeAgent) -> Hanging<'_> {
    let query = agent.hold(process.id().as_raw());
    let connection = send(File::from(process.connect_and_keep()));
    assert!(query.await_query(), "the query is at the agent");
    Hanging {
        query,
        connection,
        _process: process,
    }
}

#[test]
fn workload_is_answered_while_four_others_hold_all_queries() {
    if !root() {
        return;
    }
    let folder = folder();
    let entry = Entry::new(&id("bob"), &[&format!("unix:uid:{BOB}")]);
    let agent = FakeAgent::start(folder.path(), vec![entry]);
    let daemon = Daemon::start(folder.path(), "", &agent.configuration()).ready();
    let name = folder.path().file_name().unwrap().display().to_string();
    let unit = |unit: &str| Cgroup::new(&format!("{unit}-{name}.service"));
    let units: Vec<_> = (0..OWNERS)
        .map(|number| unit(&format!("hostile-{number}")))
        .collect();
    // A query ends after 35 s, so all processes start before the first one of them.
    let start = |number: usize| {
        let listener = LISTENERS[number % LISTENERS.len()];
        let unit = &units[number % OWNERS];
        Connector::start(ALICE, listener, &daemon.listener(listener), unit.path())
    };
    let processes: Vec<_> = (0..OWNERS * QUERIES).map(start).collect();
    let hanging: Vec<_> = processes
        .into_iter()
        .map(|process| hang(process, &agent))
        .collect();
    assert_eq!(agent.cancelled(), 0);
    let honest = unit("honest");
    // Each of these is a new process, so that the agent has to attest it.
    for listener in LISTENERS {
        let answers = ask(listener, &daemon.listener(listener), BOB, 5, honest.path());
        assert_eq!(
            answers,
            Counts::from([("Success".to_owned(), 5)]),
            "over {listener}"
        );
    }
    // One query gave way to the first of them, and made room for the rest. It ended at the agent.
    await_some("the query is cancelled", TIMEOUT, || {
        (agent.cancelled() == 1).then_some(())
    });
    let evicted = "awsvid_source_calls_total{result=\"source_busy\"} 1\n";
    assert!(daemon.metrics().contains(evicted));
    // All of them get an answer. That of the evicted one may have been given up before, since the
    // processes take their time to start.
    let mut codes = BTreeSet::new();
    for Hanging {
        query,
        mut connection,
        ..
    } in hanging
    {
        let (status, body) = answer(&mut connection);
        assert_eq!(status, 503, "{body}");
        codes.insert(body["code"].as_str().unwrap().to_owned());
        drop(query);
    }
    codes.remove("source_busy");
    assert_eq!(codes, BTreeSet::from(["source_unavailable".to_owned()]));
}

const PROGRAM: u64 = 200 << 30;

/// The agent hashes on after a query is cancelled, so it has less and less time for each program.
/// The fifth workload waits for that, but its query is at the agent: the daemon does not reject it
/// because of the others.
fn check_real_agent(source: Source) {
    if !is_slow() {
        return;
    }
    let folder = folder();
    let setting = Setting::of(source);
    let users = [(BOB, "bob"), (ALICE, "alice")];
    let Some(env) = Env::start(folder.path(), &users, &setting) else {
        return;
    };
    let large = large_program(folder.path(), PROGRAM);
    let name = folder.path().file_name().unwrap().display().to_string();
    let unit = |unit: &str| Cgroup::new(&format!("{unit}-{name}.service"));
    let units: Vec<_> = (0..OWNERS)
        .map(|number| unit(&format!("hashed-{number}")))
        .collect();
    let socket = env.daemon.unix().display().to_string();
    let start = |number: usize| {
        let unit = units[number % OWNERS].path();
        Connector::start_by(&large, ALICE, "unix", &socket, unit)
    };
    let processes: Vec<_> = (0..OWNERS * QUERIES).map(start).collect();
    let honest = unit("honest");
    let bob = Connector::start(BOB, "unix", &socket, honest.path());
    let hanging: Vec<_> = processes
        .iter()
        .map(|process| send(File::from(process.connect_and_keep())))
        .collect();
    let descriptors = format!("/proc/{}/fd", env.spire.agent_pid());
    let is_hashed = |entry: &fs::DirEntry| fs::read_link(entry.path()).is_ok_and(|to| to == large);
    await_some("the agent hashes all of them", TIMEOUT, || {
        let open = fs::read_dir(&descriptors).unwrap().flatten();
        (open.filter(is_hashed).count() == OWNERS * QUERIES).then_some(())
    });
    let (begin, mut codes) = (Instant::now(), BTreeSet::new());
    // The first request evicts one query of the crowd, and is at the agent from then on.
    loop {
        let (status, body) = ask_over(UnixStream::from(bob.connect_and_keep()));
        if status == 200 {
            break;
        }
        codes.insert(body["code"].as_str().unwrap().to_owned());
        assert!(begin.elapsed() < TIMEOUT * 3, "{codes:?}");
        thread::sleep(Duration::from_secs(1));
    }
    eprintln!(
        "answered after {:?}, with {codes:?} before",
        begin.elapsed()
    );
    assert!(!codes.contains("source_busy"), "{codes:?}");
    let evicted = "awsvid_source_calls_total{result=\"source_busy\"}";
    assert!(
        env.daemon.metric(evicted) > 0,
        "a query of the crowd gave way"
    );
    drop(hanging);
}

#[test]
fn workload_is_answered_while_spire_delegated_hashes_for_four_others() {
    check_real_agent(Source::Delegated);
}

#[test]
fn workload_is_answered_while_spiffe_broker_hashes_for_four_others() {
    check_real_agent(Source::Broker);
}

//! T28 against the real agent, which hashes the program of each process that it attests: a user's
//! program of 200 GB keeps it busy for minutes. ../attacks/README.md has the table of attacks.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::actor::{Connector, large_program, program};
use crate::harness::client::fetch;
use crate::harness::counterparts::folder;
use crate::harness::env::{Env, Setting, Source, id};
use crate::harness::slow_only;

const VICTIM: u32 = 51_001;
const NEIGHBOUR: u32 = 51_002;
const ATTACKER: u32 = 51_003;
/// More than four queries of 35 s in a minute.
const PROCESSES: usize = 12;
const PROGRAM: u64 = 200 << 30;
/// Two queries, half a minute and ten seconds after the previous reply, and the agent's time apart
/// from hashing.
const EXPECTED_DELAY: Duration = Duration::from_secs(90);

fn request(connector: &Connector) -> (u16, Value) {
    fetch(UnixStream::from(connector.connect()))
}

/// Returns how long the process is still answered.
fn time_served(connector: &Connector, since: Instant, most: Duration) -> (Duration, Value) {
    loop {
        let (status, body) = request(connector);
        if status != 200 {
            return (since.elapsed(), body);
        }
        assert!(
            since.elapsed() < most,
            "it is answered after {:?}",
            since.elapsed()
        );
        thread::sleep(Duration::from_secs(1));
    }
}

fn check_slow_processes(source: Source) {
    if !slow_only() {
        return;
    }
    let folder = folder();
    let users = [
        (VICTIM, "victim"),
        (NEIGHBOUR, "neighbour"),
        (ATTACKER, "attacker"),
    ];
    // Without hashes at first, so that all of them can be known.
    let setting = Setting {
        source,
        without_hashes: true,
        ..Setting::default()
    };
    let Some(mut env) = Env::start(folder.path(), &users, &setting) else {
        return;
    };
    let large = large_program(folder.path(), PROGRAM);
    let socket = env.daemon.unix().display().to_string();
    let connect = |uid, program: &Path| {
        Connector::start_by(program, uid, "unix", &socket, env.cgroup().path())
    };
    let [victim, neighbour] = [VICTIM, NEIGHBOUR].map(|uid| connect(uid, &program()));
    let attackers: Vec<_> = (0..PROCESSES).map(|_| connect(ATTACKER, &large)).collect();
    for cached in attackers.iter().chain([&victim, &neighbour]) {
        assert_eq!(request(cached).0, 200);
    }
    env.spire.stop_agent();
    env.spire.setting.without_hashes = false;
    env.start_agent();
    // Until the first of them are revalidated.
    thread::sleep(Duration::from_secs(35));
    let deleted = Instant::now();
    env.unregister(&id("victim"));
    env.unregister(&id("attacker"));
    let (served_for, rejection) = time_served(&victim, deleted, Duration::from_secs(600));
    eprintln!("the victim's deleted entry lasted {served_for:?}");
    assert_eq!(rejection["code"], "no_identity");
    assert!(served_for < EXPECTED_DELAY, "{served_for:?}");
    assert_eq!(request(&neighbour).0, 200);
    // Nor do they keep their own for ever: 10 minutes of the agent's time.
    for attacker in &attackers {
        let (served_for, rejection) = time_served(attacker, deleted, Duration::from_secs(1200));
        eprintln!("a slow process kept its own for {served_for:?}: {rejection}");
    }
    assert_eq!(request(&neighbour).0, 200);
}

#[test]
fn slow_processes_hide_no_deleted_entry_with_spire_delegated() {
    check_slow_processes(Source::Delegated);
}

#[test]
fn slow_processes_hide_no_deleted_entry_with_spiffe_broker() {
    check_slow_processes(Source::Broker);
}

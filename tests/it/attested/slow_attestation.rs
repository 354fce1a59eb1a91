//! T28 against the real agent, which hashes the program of each process that it attests: a user's
//! program of 200 GB keeps it busy for minutes. ../attacks/README.md has the table of attacks.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::actor::{Connector, program};
use crate::harness::client::ask;
use crate::harness::counterparts::folder;
use crate::harness::is_slow;
use crate::harness::world::{Setting, Source, World, id};

const VICTIM: u32 = 51_001;
const NEIGHBOUR: u32 = 51_002;
const ATTACKER: u32 = 51_003;
/// More than four queries of 35 s in a minute.
const PROCESSES: usize = 12;
const PROGRAM: u64 = 200 << 30;
/// Two queries, half a minute and ten seconds after the previous reply, and the agent's time apart
/// from hashing.
const USUAL: Duration = Duration::from_secs(90);

fn asked(connector: &Connector) -> (u16, Value) {
    ask(UnixStream::from(connector.connect()))
}

/// Returns how long the process is still answered.
fn lasts(connector: &Connector, since: Instant, most: Duration) -> (Duration, Value) {
    loop {
        let (status, body) = asked(connector);
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

fn slow_processes_hide_no_deleted_entry(source: Source) {
    if !is_slow() {
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
    let Some(mut world) = World::start(folder.path(), &users, &setting) else {
        return;
    };
    let large = folder.path().join("large");
    fs::copy(program(), &large).unwrap();
    // A hole at its end takes no space, and is hashed like zeros.
    File::options()
        .write(true)
        .open(&large)
        .unwrap()
        .set_len(PROGRAM)
        .unwrap();
    let socket = world.daemon.unix().display().to_string();
    let connect = |uid, program: &Path| {
        Connector::start_by(program, uid, "unix", &socket, world.cgroup().path())
    };
    let [victim, neighbour] = [VICTIM, NEIGHBOUR].map(|uid| connect(uid, &program()));
    let attackers: Vec<_> = (0..PROCESSES).map(|_| connect(ATTACKER, &large)).collect();
    for known in attackers.iter().chain([&victim, &neighbour]) {
        assert_eq!(asked(known).0, 200);
    }
    world.spire.stop_agent();
    world.spire.setting.without_hashes = false;
    world.start_agent();
    // Until the first of them are revalidated.
    thread::sleep(Duration::from_secs(35));
    let deleted = Instant::now();
    world.unregister(&id("victim"));
    world.unregister(&id("attacker"));
    let (lasted, refusal) = lasts(&victim, deleted, Duration::from_secs(600));
    eprintln!("the victim's deleted entry lasted {lasted:?}");
    assert_eq!(refusal["code"], "no_identity");
    assert!(lasted < USUAL, "{lasted:?}");
    assert_eq!(asked(&neighbour).0, 200);
    // Nor do they keep their own for ever: 10 minutes of the agent's time.
    for attacker in &attackers {
        let (lasted, refusal) = lasts(attacker, deleted, Duration::from_secs(1200));
        eprintln!("a slow process kept its own for {lasted:?}: {refusal}");
    }
    assert_eq!(asked(&neighbour).0, 200);
}

#[test]
fn slow_processes_hide_no_deleted_entry_with_spire_delegated() {
    slow_processes_hide_no_deleted_entry(Source::Delegated);
}

#[test]
fn slow_processes_hide_no_deleted_entry_with_spiffe_broker() {
    slow_processes_hide_no_deleted_entry(Source::Broker);
}

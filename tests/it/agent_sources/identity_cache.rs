//! The daemon caches SPIRE's identity of a process: through an outage of the agent, but not past
//! the deletion of an entry. It costs the agent one query for each process.

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::harness::actor::{Connector, program};
use crate::harness::client::ask;
use crate::harness::counterparts::process::{Process, await_some, behind};
use crate::harness::counterparts::{folder, minio};
use crate::harness::env::{Env, Setting, Source, id};
use crate::harness::is_slow;

const TIMEOUT: Duration = Duration::from_secs(60);
const READER: u32 = 51_001;
const OTHER: u32 = 51_002;
/// Sends one request, and then none for a long time.
const QUIET_USER: u32 = 51_003;
const USERS: [(u32, &str); 3] = [(READER, "reader"), (OTHER, "other"), (QUIET_USER, "quiet")];

/// A process that sends requests continuously, each on a new connection, until the test stops it.
struct PollingProcess {
    process: Process,
    name: String,
}

impl PollingProcess {
    /// Starts it as this user, over this listener, and returns when it has got credentials.
    fn start(env: &Env, folder: &Path, uid: u32, listener: &str) -> Self {
        let address = env.daemon.listener(listener);
        let name = format!("{uid} over {listener}");
        let mut command = behind(&env.cgroup().enter(), &program());
        command.env_clear().env("PATH", "/usr/bin:/bin").args([
            "soak",
            &uid.to_string(),
            listener,
            &address,
            "100",
        ]);
        let process = Process::start(
            &name,
            command,
            &folder.join(format!("asking-{uid}-{listener}.log")),
        );
        let asking = Self { process, name };
        asking.await_keys(1);
        asking
    }

    /// Returns the number of access key ids that it has got.
    fn keys(&self) -> usize {
        self.process
            .log()
            .lines()
            .filter(|line| line.contains("\"key\""))
            .count()
    }

    /// Waits until it has got this number of access key ids.
    fn await_keys(&self, count: usize) {
        let what = format!("{count} keys of {}", self.name);
        self.process
            .await_some(&what, Duration::from_secs(300), || {
                (self.keys() >= count).then_some(())
            });
    }

    /// Returns the number of responses, all of which had credentials.
    fn answers(mut self) -> u64 {
        self.process.signal(Signal::SIGTERM);
        self.process.owned().wait(TIMEOUT).expect("it ends");
        let log = self.process.log();
        let counted: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
        for what in ["errors", "expired", "empty"] {
            assert_eq!(counted[what], 0, "{}: {log}", self.name);
        }
        counted["answers"].as_u64().unwrap()
    }
}

/// Starts a process that sends a request when the test wants it.
fn connector(env: &Env, uid: u32) -> Connector {
    Connector::start(
        uid,
        "unix",
        env.daemon.unix().to_str().unwrap(),
        env.cgroup().path(),
    )
}

fn ask_by(connector: &Connector) -> (u16, Value) {
    ask(UnixStream::from(connector.connect()))
}

/// Checks that a new process gets a 503 with `Retry-After`.
fn assert_retry_later(env: &Env, uid: u32) {
    let (head, body) = env.curl(uid);
    assert!(
        head.starts_with("HTTP/1.1 503 Service Unavailable\r\n"),
        "{head}"
    );
    assert!(head.contains("\r\nretry-after: 1\r\n"), "{head}");
    assert!(body.contains("\"code\":\"source_unavailable\""), "{body}");
}

fn check_agent_outage(source: Source) {
    let slow = is_slow();
    // Each cached process is revalidated every 30 s. In ten minutes a session of a quarter of an
    // hour is also due for a refresh.
    let outage = Duration::from_secs(if slow { 600 } else { 38 });
    let folder = folder();
    let setting = Setting {
        source,
        role: "duration = \"15m\"",
        ..Setting::default()
    };
    let Some(mut env) = Env::start(folder.path(), &USERS, &setting) else {
        return;
    };
    let asking = [(READER, "unix"), (READER, "tcp"), (OTHER, "unix")]
        .map(|(uid, listener)| PollingProcess::start(&env, folder.path(), uid, listener));
    let quiet = connector(&env, QUIET_USER);
    let (status, first) = ask_by(&quiet);
    assert_eq!(status, 200, "{first}");
    assert_eq!(
        env.daemon.status(&id("quiet"))["latest_pid"],
        quiet.id().as_raw()
    );

    env.spire.stop_agent();
    let began = Instant::now();
    // A process of an identity that is warm, but only the agent could confirm that it is this
    // process's.
    assert_retry_later(&env, READER);
    thread::sleep(outage.saturating_sub(began.elapsed()));
    assert_retry_later(&env, OTHER);
    if !slow {
        assert_eq!(
            ask_by(&quiet),
            (200, first.clone()),
            "by a connection that is as new as the process is known"
        );
    }
    env.start_agent();
    for uid in [READER, OTHER] {
        let (head, body) = env.curl(uid);
        assert!(
            head.starts_with("HTTP/1.1 200 OK\r\n"),
            "one try: {head} {body}"
        );
    }
    if slow {
        // With a process that has closed its connection a quarter of an hour ago.
        let renewed = await_some(
            "the quiet one's credentials are renewed",
            Duration::from_secs(200),
            || {
                Some(env.daemon.status(&id("quiet"))["access_key_id"].clone())
                    .filter(|key| *key != first["AccessKeyId"])
            },
        );
        assert_eq!(ask_by(&quiet).1["AccessKeyId"], renewed);
        asking.iter().for_each(|asking| asking.await_keys(2));
    } else {
        assert!(
            asking.iter().all(|asking| asking.keys() == 1),
            "the same credentials throughout"
        );
    }
    let answers = asking.map(PollingProcess::answers);
    eprintln!("unavailable for {outage:?}: {answers:?} answers, all of them credentials");
    let least = u64::try_from(outage.as_millis()).unwrap() / 1000;
    assert!(
        answers.iter().all(|answers| *answers > least),
        "{answers:?}"
    );
}

fn check_deleted_entry(source: Source) {
    let folder = folder();
    let setting = Setting::of(source);
    let Some(mut env) = Env::start(folder.path(), &USERS, &setting) else {
        return;
    };
    let [busy, quiet] = [OTHER, QUIET_USER].map(|uid| connector(&env, uid));
    for cached in [&busy, &quiet] {
        assert_eq!(ask_by(cached).0, 200);
    }
    let began = Instant::now();
    env.unregister(&id("other"));
    env.unregister(&id("quiet"));
    assert_eq!(ask_by(&busy).0, 200, "it is known");
    let refused = loop {
        thread::sleep(Duration::from_secs(1));
        let (status, body) = ask_by(&busy);
        if status != 200 {
            break body;
        }
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "it is answered for longer than a minute"
        );
    };
    let took = began.elapsed();
    eprintln!(
        "an entry that was deleted had an effect after {took:?} for a process with a request each second"
    );
    assert_eq!(refused["code"], "no_identity");
    // By default the server and the agent take up to 10 s more to notice the deletion, half of that
    // each.
    assert!(took < Duration::from_secs(50), "{took:?}");
    // The other one has sent no request since, and never gets credentials again.
    thread::sleep(Duration::from_secs(60).saturating_sub(began.elapsed()));
    assert_eq!(ask_by(&quiet).1["code"], "no_identity");
    let (head, _) = env.curl(READER);
    assert!(
        head.starts_with("HTTP/1.1 200"),
        "a neighbour notices nothing: {head}"
    );
    // It is registered again, and may need one more request.
    env.register(&id("other"), &[&format!("unix:uid:{OTHER}")], &[]);
    await_some("it is answered again", TIMEOUT, || {
        (ask_by(&busy).0 == 200).then_some(())
    });
}

fn check_known_process(source: Source) {
    let folder = folder();
    let setting = Setting::of(source);
    let Some(env) = Env::start(folder.path(), &USERS, &setting) else {
        return;
    };
    let trace = env.minio.trace();
    let calls = || {
        ["source", "sts"].map(|to| {
            env.daemon
                .metric(&format!("awsvid_{to}_calls_total{{result=\"ok\"}}"))
        })
    };
    // Each command is a new process.
    for count in 1..=5 {
        assert_eq!(
            env.copy(READER).success("aws s3 cp"),
            "hello from the shop\n"
        );
        assert_eq!(calls(), [count, 1], "by awsvid's own count");
    }
    let issued = env.daemon.status(&id("reader"));
    let key = issued["access_key_id"].as_str().unwrap();
    // By the agent's own log. As a broker it does not log which process it has attested.
    let attested = || env.spire.attested(&format!("uid:{READER}"));
    let requests = || match source {
        Source::Broker => env.spire.jwt_svids_fetched(&id("reader")),
        Source::Delegated | Source::Rules => attested().len(),
    };
    assert_eq!(
        (requests(), trace.count(minio::ASSUME_ROLE, key)),
        (5, 1),
        "one question for each"
    );
    if source == Source::Delegated {
        assert_eq!(attested().into_iter().collect::<BTreeSet<_>>().len(), 5);
    }

    let cached = connector(&env, READER);
    let own = env.spire.attested("uid:0").len();
    for _ in 0..50 {
        assert_eq!(ask_by(&cached).1["AccessKeyId"], key);
    }
    assert_eq!(calls(), [6, 1]);
    assert_eq!((requests(), trace.count(minio::ASSUME_ROLE, key)), (6, 1));
    if source == Source::Delegated {
        assert_eq!(
            attested().iter().filter(|pid| **pid == cached.id()).count(),
            1
        );
    }
    // The agent also attests its clients: here for that one query, and for awsvid's own identity.
    let own = env.spire.attested("uid:0").len() - own;
    assert!(own <= 3, "{own} questions of awsvid's");
    drop(trace);
}

#[test]
fn known_process_is_served_during_agent_outage_with_spire_delegated() {
    check_agent_outage(Source::Delegated);
}

#[test]
fn deleted_entry_takes_effect_within_a_minute_with_spire_delegated() {
    check_deleted_entry(Source::Delegated);
}

#[test]
fn known_process_causes_no_agent_call_with_spire_delegated() {
    check_known_process(Source::Delegated);
}

#[test]
fn known_process_is_served_during_agent_outage_with_spiffe_broker() {
    check_agent_outage(Source::Broker);
}

#[test]
fn deleted_entry_takes_effect_within_a_minute_with_spiffe_broker() {
    check_deleted_entry(Source::Broker);
}

#[test]
fn known_process_causes_no_agent_call_with_spiffe_broker() {
    check_known_process(Source::Broker);
}

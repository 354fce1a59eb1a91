//! SPIRE's agent and STS become unavailable and recover. A workload with credentials notices
//! nothing; one without gets a 503 with `Retry-After`.

use std::cell::RefCell;
use std::fs;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::harness::client::{Poller, fetch};
use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::await_some;
use crate::harness::env::{Env, Setting, id};
use crate::harness::pausable_proxy::PausableProxy;

/// Bounds several calls of the AWS CLI on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(120);
/// The test itself is warm all the time. Each of the other users gets its first credentials in one
/// test.
const WARM: u32 = 0;
const USERS: [(u32, &str); 3] = [(1001, "reader"), (WARM, "warm"), (1002, "other")];
/// Workloads without any state in the daemon. At their request there is neither a flight nor a
/// cached failure.
const COLD: [u32; 2] = [1001, 1002];

/// Runs `act` on the environment while the warm workload sends requests without a break, and gets
/// the same key throughout.
fn while_warm(env: &mut Env, act: impl FnOnce(&mut Env)) {
    let socket = env.daemon.unix();
    let fetch = || fetch(UnixStream::connect(&socket).unwrap());
    let key = fetch().1["AccessKeyId"].clone();
    assert!(key.is_string());
    let asker = Poller::new(|| {
        let (status, body) = fetch();
        assert_eq!(body["AccessKeyId"], key, "{status} {body}");
        (status, body)
    });
    thread::scope(|scope| {
        let _end = asker.end_later();
        scope.spawn(|| asker.run());
        act(env);
        let before = asker.count();
        await_some("the warm one is answered", TIMEOUT, || {
            (asker.count() > before).then_some(())
        });
    });
}

/// Checks the response to a cold workload: over HTTP, and as the AWS CLI shows it.
fn assert_retry_later(env: &Env, reason: &str) {
    let (head, body) = env.curl(COLD[1]);
    assert!(
        head.starts_with("HTTP/1.1 503 Service Unavailable\r\n"),
        "{head}"
    );
    assert!(head.contains("\r\nretry-after: 1\r\n"), "{head}");
    assert_eq!(
        serde_json::from_str::<Value>(&body).unwrap()["code"],
        reason,
        "{body}"
    );
    // The CLI gives each try 2 s, which on a busy machine may be over before the exchange has
    // failed.
    let shown = format!(
        "Received non 200 response 503 from container metadata: {{\"code\":\"{reason}\",\"message\":\"awsvid: "
    );
    await_some("the CLI shows awsvid's message", TIMEOUT, || {
        let output = env.copy(COLD[0]);
        assert!(!output.status.success(), "{output:?}");
        output.stderr.contains(&shown).then_some(())
    });
}

/// Checks that the AWS CLI and curl are answered at their next try.
fn assert_answered(env: &Env) {
    assert_eq!(
        env.copy(COLD[0]).success("aws s3 cp on the next try"),
        "hello from the shop\n"
    );
    let (head, body) = env.curl(COLD[1]);
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head} {body}");
}

#[test]
fn workloads_survive_restart_of_agent() {
    let folder = folder();
    let Some(mut env) = Env::start(folder.path(), &USERS, &Setting::default()) else {
        return;
    };
    while_warm(&mut env, |env| {
        env.spire.stop_agent();
        assert_retry_later(env, "source_unavailable");
        env.start_agent();
        assert_answered(env);
    });
    // Readiness fetches the first user's. This one was signed once, for all of its requests.
    assert_eq!(env.spire.jwt_svids_signed(&id("other")), 1);
}

#[test]
fn workloads_survive_outage_of_sts() {
    let folder = folder();
    let Some(mut env) = Env::start(folder.path(), &USERS, &Setting::default()) else {
        return;
    };
    while_warm(&mut env, |env| {
        env.minio.stop();
        assert_retry_later(env, "sts_unreachable");
        env.minio.restart();
        assert_answered(env);
    });
}

#[test]
fn daemon_uses_replaced_agent_socket() {
    let folder = folder();
    let (path, new) = (
        folder.path().join("agent.sock"),
        folder.path().join("agent.sock.new"),
    );
    let gates = RefCell::new(Vec::new());
    let socket = |agent: &std::path::Path| {
        gates.borrow_mut().extend([
            PausableProxy::start(&path, agent),
            PausableProxy::start(&new, agent),
        ]);
        gates.borrow()[0].set_open(true);
        path.clone()
    };
    let setting = Setting {
        socket: Some(&socket),
        ..Setting::default()
    };
    let Some(mut env) = Env::start(folder.path(), &USERS, &setting) else {
        return;
    };
    let [old, replacement] = &gates.borrow()[..] else {
        panic!("two gates")
    };
    while_warm(&mut env, |env| {
        // A daemon that keeps the old connection waits in vain from now on.
        old.set_open(false);
        replacement.set_open(true);
        let arrivals = old.arrivals();
        fs::rename(&new, &path).unwrap();
        assert_answered(env);
        assert_eq!(
            (old.arrivals(), replacement.arrivals()),
            (arrivals, COLD.len())
        );
    });
}

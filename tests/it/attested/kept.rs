//! What SPIRE has said of a process holds while the agent is away, and no longer than a minute once it says otherwise.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::client::ask;
use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::await_some;
use crate::harness::world::{Setting, Source, World};
use crate::outages::while_warm;

/// This test itself is the warm one; the others are new processes each time.
const USERS: [(u32, &str); 2] = [(1001, "reader"), (0, "warm")];

/// Longer than a process is known without another question.
fn outage() -> Duration {
    let slow = std::env::var("AWSVID_TESTS").is_ok_and(|mode| mode == "slow");
    Duration::from_secs(if slow { 600 } else { 40 })
}

fn world(folder: &std::path::Path, source: Source) -> Option<World> {
    World::start(folder, &USERS, &Setting { source, ..Setting::default() })
}

fn an_agent_that_is_away_cuts_off_nobody_who_is_known(source: Source) {
    let folder = folder();
    let Some(mut world) = world(folder.path(), source) else { return };
    while_warm(&mut world, |world| {
        let gone = Instant::now();
        world.spire.stop_agent();
        let (head, body) = world.curl(1001);
        assert!(head.starts_with("HTTP/1.1 503") && head.contains("\r\nretry-after: 1\r\n"), "{head}");
        assert_eq!(serde_json::from_str::<Value>(&body).unwrap()["code"], "source_unavailable", "{body}");
        await_some("the outage is long enough", outage() * 2, || (gone.elapsed() > outage()).then_some(()));
        world.start_agent();
        let answered = || world.curl(1001).0.starts_with("HTTP/1.1 200").then_some(());
        await_some("a new process is answered", Duration::from_secs(30), answered);
    });
}

#[test]
fn a_delegated_agent_that_is_away_cuts_off_nobody_who_is_known() {
    an_agent_that_is_away_cuts_off_nobody_who_is_known(Source::Delegated);
}

#[test]
fn a_broker_that_is_away_cuts_off_nobody_who_is_known() {
    an_agent_that_is_away_cuts_off_nobody_who_is_known(Source::Broker);
}

/// Also for a process that is known, and asks all the time; its neighbour notices nothing.
fn a_deleted_entry_takes_effect_within_the_minute(source: Source) {
    let folder = folder();
    let Some(mut world) = world(folder.path(), source) else { return };
    let ask = |world: &World| ask(UnixStream::connect(world.daemon.unix()).unwrap());
    assert_eq!(ask(&world).0, 200);
    assert!(world.curl(1001).0.starts_with("HTTP/1.1 200"));
    let deleted = Instant::now();
    world.withdraw("warm");
    let refused = await_some("the process is refused", Duration::from_secs(90), || {
        let (status, body) = ask(&world);
        (status != 200).then_some((status, body, deleted.elapsed()))
    });
    eprintln!("{source:?}: refused {:?} after its entry was deleted", refused.2);
    assert_eq!((refused.0, &refused.1["code"]), (403, &Value::from("no_identity")), "{refused:?}");
    assert!(refused.2 < Duration::from_secs(60), "{refused:?}");
    assert!(world.curl(1001).0.starts_with("HTTP/1.1 200"));
}

#[test]
fn an_entry_deleted_for_a_delegate_takes_effect_within_the_minute() {
    a_deleted_entry_takes_effect_within_the_minute(Source::Delegated);
}

#[test]
fn an_entry_deleted_for_a_broker_takes_effect_within_the_minute() {
    a_deleted_entry_takes_effect_within_the_minute(Source::Broker);
}

/// Each command is a new process: one question to the agent, and no exchange.
#[test]
fn a_new_process_of_a_warm_identity_costs_one_question_and_a_known_one_none() {
    let folder = folder();
    let Some(world) = world(folder.path(), Source::Delegated) else { return };
    let metric = |name: &str| world.daemon.metric(name);
    let (questions, exchanges) =
        (r#"awsvid_source_calls_total{result="ok"}"#, r#"awsvid_sts_calls_total{result="ok"}"#);
    assert_eq!(world.copy(1001).success("aws s3 cp"), "hello from the shop\n");
    let before = (metric(questions), metric(exchanges));
    for _ in 0..5 {
        assert_eq!(world.copy(1001).success("aws s3 cp"), "hello from the shop\n");
    }
    assert_eq!((metric(questions), metric(exchanges)), (before.0 + 5, before.1));
    let ask = || ask(UnixStream::connect(world.daemon.unix()).unwrap());
    assert_eq!(ask().0, 200);
    let before = (metric(questions), metric(exchanges));
    for _ in 0..50 {
        assert_eq!(ask().0, 200);
    }
    assert_eq!((metric(questions), metric(exchanges)), before);
}

//! SPIRE attests the callers itself: the Delegated Identity API and the SPIFFE Broker API, with the
//! real agent.

mod examples;
mod groups;
mod identity_cache;
mod labels;
mod misconfigured;
mod multiple_identities;
mod pods;
mod programs;
mod query_limits;
mod query_races;
mod rates;
mod slow_attestation;
mod sockets;
mod spire;
mod token_lifetimes;

use serde_json::Value;

use crate::harness::counterparts::folder;
use crate::harness::counterparts::minio;
use crate::harness::env::{Env, Setting, Source, id};

/// Runs the demonstration without a single rule in awsvid's configuration.
fn check_entries_per_process(source: Source) {
    let folder = folder();
    let setting = Setting::of(source);
    let Some(env) = Env::start(
        folder.path(),
        &[(1001, "reader"), (1002, "other")],
        &setting,
    ) else {
        return;
    };
    let trace = env.minio.trace();

    assert_eq!(
        env.copy(1001).success("aws s3 cp as the reader"),
        "hello from the shop\n"
    );
    let [issued] = &env.daemon.audit_after(0)[..] else {
        panic!("one request, one audit record")
    };
    assert_eq!(
        (&issued["outcome"], &issued["spiffe_id"]),
        (&Value::from("issued"), &Value::from(id("reader")))
    );
    let key = issued["access_key_id"].as_str().unwrap();
    let (head, body) = env.curl(1001);
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert_eq!(
        serde_json::from_str::<Value>(&body).unwrap()["AccessKeyId"],
        key,
        "the same over the unix socket"
    );
    assert_eq!(trace.count(minio::ASSUME_ROLE, key), 1);

    let rejected = env.copy(1002);
    assert!(
        !rejected.status.success() && rejected.stderr.contains("403"),
        "{rejected:?}"
    );
    let others = env.daemon.audit_after(2);
    assert_eq!(
        (&others[0]["outcome"], &others[0]["spiffe_id"]),
        (&Value::from("issued"), &Value::from(id("other")))
    );

    let no_identity = env.copy(1003);
    assert!(
        !no_identity.status.success() && no_identity.stderr.contains("uid 1003"),
        "{no_identity:?}"
    );
    assert_eq!(env.daemon.audit_after(3)[0]["reason"], "no_identity");
    let (head, _) = env.curl(1003);
    assert!(head.starts_with("HTTP/1.1 403"), "{head}");
    assert!(!env.daemon.log().contains("eyJ"), "a token was written");
    drop(trace);
}

#[test]
fn each_process_uses_its_own_entry_with_spire_delegated() {
    check_entries_per_process(Source::Delegated);
}

#[test]
fn each_process_uses_its_own_entry_with_spiffe_broker() {
    check_entries_per_process(Source::Broker);
}

/// awsvid's own X.509-SVID changes continuously. The daemon queries each new process over a
/// connection with the latest.
#[test]
fn requests_succeed_during_renewal_of_own_svid() {
    let folder = folder();
    let setting = Setting {
        source: Source::Broker,
        x509_svid_ttl: Some("10s"),
        ..Setting::default()
    };
    let Some(env) = Env::start(folder.path(), &[(1001, "reader")], &setting) else {
        return;
    };
    let renewals = || {
        env.daemon
            .log()
            .matches("awsvid's own X.509-SVID is renewed")
            .count()
    };
    let (before, mut requests) = (renewals(), 0);
    while renewals() < before + 5 {
        let (head, _) = env.curl(1001);
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        requests += 1;
    }
    assert_eq!(env.daemon.issued(), requests);
    eprintln!(
        "{requests} processes during {} renewals",
        renewals() - before
    );
}

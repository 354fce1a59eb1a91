//! The whole path with nothing of ours in the place of the real thing: SPIRE, MinIO, the AWS CLI.

use serde_json::Value;

use crate::harness::counterparts::folder;
use crate::harness::counterparts::minio;
use crate::harness::world::{Setting, World};

const READER: &str = "spiffe://example.org/w/reader";
const OTHER: &str = "spiffe://example.org/w/other";

/// curl over the unix socket; the body.
fn curl(world: &World, uid: u32) -> Value {
    serde_json::from_str(&world.curl(uid).1).unwrap()
}

/// Fetches and exchanges for an identity, by the counterparts' own logs.
fn upstream(world: &World, trace: &minio::Trace, id: &str, access_key_id: &str) -> (usize, usize) {
    (
        world.spire.jwt_svids_fetched(id),
        trace.count(minio::ASSUME_ROLE, access_key_id),
    )
}

#[test]
fn each_process_gets_its_own_credentials() {
    let folder = folder();
    let users = [(1001, "reader"), (1002, "other")];
    let Some(world) = World::start(folder.path(), &users, &Setting::default()) else {
        return;
    };
    let trace = world.minio.trace();
    // Readiness asked the source for a token of the first [[workload]]; from here on only requests do.
    let fetched_before = world.spire.jwt_svids_fetched(READER);
    // Its questions to its own listeners are requests too, and audited.
    let probes = world.daemon.audit().len();

    let output = world.copy(1001);
    assert_eq!(
        output.success("aws s3 cp as the reader"),
        "hello from the shop\n"
    );
    let [issued] = &world.daemon.audit_after(probes)[..] else {
        panic!("one request, one audit record")
    };
    assert_eq!(issued["outcome"], "issued");
    assert_eq!(issued["uid"], 1001);
    assert_eq!(issued["spiffe_id"], READER);
    assert_eq!(issued["session_name"], "example.org=w=reader");
    assert_eq!(issued["role_arn"], world.minio.role_arn());
    assert_eq!(issued["cache"], "miss");
    let key = issued["access_key_id"].as_str().unwrap();
    let read = trace.await_record("the object is read", |record| {
        record.api() == "s3.GetObject"
    });
    assert_eq!(
        (read.status(), read.access_key_id().as_deref()),
        (200, Some(key))
    );

    // The same credentials over the unix socket: one flight for both.
    let answer = curl(&world, 1001);
    assert_eq!(answer["AccessKeyId"], key);
    let [again] = &world.daemon.audit_after(probes + 1)[..] else {
        panic!("one request, one audit record")
    };
    assert_eq!(
        (&again["cache"], &again["listener"]),
        (&Value::from("hit"), &Value::from("unix"))
    );
    assert_eq!(
        upstream(&world, &trace, READER, key),
        (fetched_before + 1, 1)
    );

    // The other identity has a role too, which may not read the object.
    let output = world.copy(1002);
    assert!(
        !output.status.success() && output.stderr.contains("403"),
        "{output:?}"
    );
    let [issued] = &world.daemon.audit_after(probes + 2)[..] else {
        panic!("one request, one audit record")
    };
    assert_eq!(
        (&issued["spiffe_id"], &issued["outcome"]),
        (&Value::from(OTHER), &Value::from("issued"))
    );
    let other_key = issued["access_key_id"].as_str().unwrap();
    assert_ne!(other_key, key);
    let refused = trace.await_record("the object is refused", |record| {
        record.access_key_id().as_deref() == Some(other_key) && record.api().starts_with("s3.")
    });
    assert_eq!(refused.status(), 403);
    assert_eq!(curl(&world, 1002)["AccessKeyId"], other_key);
    assert_eq!(upstream(&world, &trace, OTHER, other_key), (1, 1));

    // Nobody's: awsvid says so, and the CLI shows it.
    let output = world.copy(1003);
    assert!(!output.status.success());
    assert!(
        output
            .stderr
            .contains("no SPIFFE identity: this node has none for uid 1003"),
        "{output:?}"
    );
    assert_eq!(curl(&world, 1003)["code"], "no_identity");
    let refused = world.daemon.audit_after(probes + 4);
    assert!(
        refused
            .iter()
            .all(|record| record["reason"] == "no_identity" && record["access_key_id"].is_null()),
        "{refused:?}"
    );

    // Nothing secret is anywhere in what the daemon wrote.
    let secret = answer["SecretAccessKey"].as_str().unwrap();
    let token = answer["Token"].as_str().unwrap();
    let written = format!(
        "{}{}",
        world.daemon.log(),
        serde_json::to_string(&world.daemon.audit()).unwrap()
    );
    assert!(
        !written.contains(secret) && !written.contains(token) && !written.contains("eyJ"),
        "a secret was written"
    );
    drop(trace);
}

//! The whole path with real counterparts only: SPIRE, MinIO, the AWS CLI.

use serde_json::{Value, json};

use crate::harness::counterparts::folder;
use crate::harness::counterparts::minio;
use crate::harness::env::{Env, Setting};

const READER: &str = "spiffe://example.org/w/reader";
const OTHER: &str = "spiffe://example.org/w/other";

/// Runs curl over the unix socket, and returns the body.
fn curl(env: &Env, uid: u32) -> Value {
    serde_json::from_str(&env.curl(uid).1).unwrap()
}

/// Returns the numbers of fetches and exchanges for an identity, by the counterparts' own logs.
fn upstream(env: &Env, trace: &minio::Trace, id: &str, access_key_id: &str) -> (usize, usize) {
    (
        env.spire.jwt_svids_fetched(id),
        trace.count(minio::ASSUME_ROLE, access_key_id),
    )
}

#[test]
fn each_process_gets_its_own_credentials() {
    let folder = folder();
    let users = [(1001, "reader"), (1002, "other")];
    let Some(env) = Env::start(folder.path(), &users, &Setting::default()) else {
        return;
    };
    let trace = env.minio.trace();
    // The readiness probe fetched a token of the first [[workload]]. From here on only requests
    // fetch any.
    let fetched_before = env.spire.jwt_svids_fetched(READER);

    let output = env.copy(1001);
    assert_eq!(
        output.success("aws s3 cp as the reader"),
        "hello from the shop\n"
    );
    let [issued] = &env.daemon.audit_after(0)[..] else {
        panic!("one request, one audit record")
    };
    assert_eq!(issued["outcome"], "issued");
    assert_eq!(issued["uid"], 1001);
    assert_eq!(issued["spiffe_id"], READER);
    assert_eq!(issued["session_name"], "example.org=w=reader");
    assert_eq!(issued["role_arn"], env.minio.role_arn());
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
    let answer = curl(&env, 1001);
    assert_eq!(answer["AccessKeyId"], key);
    let [again] = &env.daemon.audit_after(1)[..] else {
        panic!("one request, one audit record")
    };
    assert_eq!(
        (&again["cache"], &again["listener"]),
        (&Value::from("hit"), &Value::from("unix"))
    );
    assert_eq!(upstream(&env, &trace, READER, key), (fetched_before + 1, 1));

    // The other identity has a role too, which may not read the object.
    let output = env.copy(1002);
    assert!(
        !output.status.success() && output.stderr.contains("403"),
        "{output:?}"
    );
    let [issued] = &env.daemon.audit_after(2)[..] else {
        panic!("one request, one audit record")
    };
    assert_eq!(
        (&issued["spiffe_id"], &issued["outcome"]),
        (&Value::from(OTHER), &Value::from("issued"))
    );
    let other_key = issued["access_key_id"].as_str().unwrap();
    assert_ne!(other_key, key);
    let rejected = trace.await_record("the object is rejected", |record| {
        record.access_key_id().as_deref() == Some(other_key) && record.api().starts_with("s3.")
    });
    assert_eq!(rejected.status(), 403);
    assert_eq!(curl(&env, 1002)["AccessKeyId"], other_key);
    assert_eq!(upstream(&env, &trace, OTHER, other_key), (1, 1));

    // A user without an identity: awsvid reports that, and the CLI shows it.
    let output = env.copy(1003);
    assert!(!output.status.success());
    assert!(
        output
            .stderr
            .contains("no SPIFFE identity: this node has none for uid 1003"),
        "{output:?}"
    );
    assert_eq!(curl(&env, 1003)["code"], "no_identity");
    let rejected = env.daemon.audit_after(4);
    assert!(
        rejected
            .iter()
            .all(|record| record["reason"] == "no_identity" && record["access_key_id"].is_null()),
        "{rejected:?}"
    );

    // Nothing that the daemon wrote has a secret in it.
    let secret = answer["SecretAccessKey"].as_str().unwrap();
    let token = answer["Token"].as_str().unwrap();
    let written = format!(
        "{}{}",
        env.daemon.log(),
        serde_json::to_string(&env.daemon.audit()).unwrap()
    );
    assert!(
        !written.contains(secret) && !written.contains(token) && !written.contains("eyJ"),
        "a secret was written"
    );
    drop(trace);
}

/// A template in the session policy of one role: MinIO evaluates it for each workload.
#[test]
fn session_policy_bounds_each_workload_to_its_prefix() {
    const POLICY: &str = r#"policy = '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"s3:GetObject","Resource":"arn:aws:s3:::shop/{path[1]}/*"}]}'"#;
    let folder = folder();
    let users = [(1001, "reader"), (1002, "other")];
    let setting = Setting {
        role: POLICY,
        permissions: Some(json!({ "Version": "2012-10-17", "Statement": [{
            "Effect": "Allow",
            "Action": "s3:GetObject",
            "Resource": "arn:aws:s3:::shop/*",
        }]})),
        ..Setting::default()
    };
    let Some(env) = Env::start(folder.path(), &users, &setting) else {
        return;
    };
    let key = |name: &str| format!("{name}/test.txt");
    for (_, name) in users {
        env.minio.put("shop", &key(name), name.as_bytes());
    }
    for (uid, own) in users {
        for (_, name) in users {
            let output = env.copy_of(uid, &key(name));
            match own == name {
                true => assert_eq!(output.success("aws s3 cp of its own object"), name),
                false => assert!(
                    !output.status.success() && output.stderr.contains("403"),
                    "{output:?}"
                ),
            }
        }
    }
    // The role itself permits both.
    let text = env.daemon.text();
    assert!(env.daemon.reload_text(&text.replace(POLICY, "")));
    for (uid, _) in users {
        for (_, name) in users {
            let output = env.copy_of(uid, &key(name));
            assert_eq!(output.success("aws s3 cp without the policy"), name);
        }
    }
}

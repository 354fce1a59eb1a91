//! An agent that selects by a process's executable selects by the caller's own: for two programs of
//! one user, and for awsvid's own identity.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::harness::counterparts::folder;
use crate::harness::env::{AWSVID, Env, Setting, Source, id};

const USER: u32 = 51_001;
const LISTENERS: [&str; 2] = ["unix", "tcp"];

/// Makes a copy of curl with a path, and an inode, of its own.
fn curl(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(format!("curl-{name}"));
    fs::copy("/usr/bin/curl", &path).unwrap();
    path
}

/// Returns the selectors of a user's program.
fn selectors(uid: u32, program: &Path) -> [String; 2] {
    [
        format!("unix:uid:{uid}"),
        format!("unix:path:{}", program.display()),
    ]
}

fn register(env: &mut Env, spiffe_id: &str, uid: u32, program: &Path) {
    env.register(
        spiffe_id,
        &selectors(uid, program).each_ref().map(String::as_str),
        &[],
    );
}

/// Returns the outcome of the last request by its audit record: the SPIFFE ID that it was answered
/// for, or the reason.
fn outcome(env: &Env, uid: u32, program: &Path, listener: &str) -> (String, String) {
    let before = env.daemon.audit().len();
    let (_, body) = env.curl_by(program, uid, listener, "");
    let body: Value = serde_json::from_str(&body).unwrap();
    let [record] = &env.daemon.audit_after(before)[..] else {
        panic!("one request, one record")
    };
    assert_eq!(
        (&record["uid"], &record["listener"]),
        (&Value::from(uid), &Value::from(listener))
    );
    assert_eq!(
        record["access_key_id"], body["AccessKeyId"],
        "{record} {body}"
    );
    let decided = record["spiffe_id"].as_str().unwrap_or("-");
    (
        record["reason"].as_str().unwrap().to_owned(),
        decided.to_owned(),
    )
}

fn check_programs_of_one_user(source: Source) {
    let folder = folder();
    let setting = Setting::of(source);
    let Some(mut env) = Env::start(folder.path(), &[(51_002, "reader")], &setting) else {
        return;
    };
    let [one, two, three] = ["one", "two", "three"].map(|name| curl(folder.path(), name));
    register(&mut env, &id("one"), USER, &one);
    register(&mut env, &id("two"), USER, &two);
    for listener in LISTENERS {
        assert_eq!(
            outcome(&env, USER, &one, listener),
            ("ok".to_owned(), id("one")),
            "over {listener}"
        );
        assert_eq!(
            outcome(&env, USER, &two, listener),
            ("ok".to_owned(), id("two")),
            "over {listener}"
        );
        let no_identity = ("no_identity".to_owned(), "-".to_owned());
        assert_eq!(
            outcome(&env, USER, &three, listener),
            no_identity,
            "a third program over {listener}"
        );
        assert_eq!(
            outcome(&env, 51_003, &one, listener),
            no_identity,
            "another user with the first over {listener}"
        );
    }
}

/// Checks that a process with awsvid's own SPIFFE ID gets nothing, whatever the roles are.
fn check_own_identity(source: Source) {
    let folder = folder();
    let setting = Setting::of(source);
    let Some(mut env) = Env::start(folder.path(), &[(51_002, "reader")], &setting) else {
        return;
    };
    let [own, roots] = ["own", "roots"].map(|name| curl(folder.path(), name));
    let role = format!(
        "{}\n[[role]]\nname = \"own\"\nspiffe_id = \"{AWSVID}\"\nrole_arn = \"{}\"\n",
        env.daemon.text(),
        env.minio.role_arn()
    );
    assert!(env.daemon.reload_text(&role));
    // An entry of the same SPIFFE ID for another program. That of awsvid itself stays.
    env.spire
        .register(AWSVID, &selectors(0, &own).each_ref().map(String::as_str));
    register(&mut env, &id("roots"), 0, &roots);
    for listener in LISTENERS {
        let no_identity = ("no_identity".to_owned(), "-".to_owned());
        assert_eq!(
            outcome(&env, 0, &own, listener),
            no_identity,
            "over {listener}"
        );
        assert_eq!(
            outcome(&env, 0, &roots, listener),
            ("ok".to_owned(), id("roots")),
            "over {listener}"
        );
    }
    let (head, _) = env.curl_by(&own, 0, "unix", "/own");
    assert!(head.starts_with("HTTP/1.1 403"), "{head}");
    env.daemon
        .await_line(&["a process has awsvid's own identity, which no workload gets"]);
    let keys = env
        .daemon
        .audit()
        .into_iter()
        .filter(|record| record["spiffe_id"] == AWSVID);
    assert_eq!(keys.collect::<Vec<_>>(), Vec::<Value>::new());
}

#[test]
fn programs_of_one_user_are_distinguished_with_spire_delegated() {
    check_programs_of_one_user(Source::Delegated);
}

#[test]
fn own_identity_is_never_served_with_spire_delegated() {
    check_own_identity(Source::Delegated);
}

#[test]
fn programs_of_one_user_are_distinguished_with_spiffe_broker() {
    check_programs_of_one_user(Source::Broker);
}

#[test]
fn own_identity_is_never_served_with_spiffe_broker() {
    check_own_identity(Source::Broker);
}

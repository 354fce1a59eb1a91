//! A process with several identities, and the one that a role takes, by the real agent's own
//! replies.

use std::time::Duration;

use serde_json::Value;

use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::await_some;
use crate::harness::env::{Env, Setting, Source, id};

const TIMEOUT: Duration = Duration::from_secs(60);
const TWO: u32 = 51_001;
const ADMIN: u32 = 51_003;

/// Returns the SPIFFE ID for which a user gets credentials by a role, or the code of the rejection.
/// Where no role was selected, the answer, the record and the log have the caller's SPIFFE IDs.
fn by_role(env: &Env, uid: u32, role: &str) -> String {
    let before = env.daemon.audit().len();
    let (_, body) = env.curl_by("/usr/bin/curl".as_ref(), uid, "unix", role);
    let body: Value = serde_json::from_str(&body).unwrap();
    let [record] = &env.daemon.audit_after(before)[..] else {
        panic!("one request, one record")
    };
    assert_eq!(
        record["access_key_id"], body["AccessKeyId"],
        "{record} {body}"
    );
    let request = record["request_id"].as_str().unwrap();
    if let Some(spiffe_ids) = record["spiffe_ids"].as_array() {
        let line = log_line(env, "request without credentials", request);
        let requested = role.trim_start_matches('/');
        if requested.is_empty() {
            assert!(record["requested_role"].is_null(), "{record}");
        } else {
            assert_eq!(record["requested_role"], requested);
            assert!(line.contains(requested), "{line}");
            let words = format!("and requested {requested}");
            assert!(body["message"].as_str().unwrap().contains(&words), "{body}");
        }
        for spiffe_id in spiffe_ids {
            let spiffe_id = spiffe_id.as_str().unwrap();
            assert!(
                body["message"].as_str().unwrap().contains(spiffe_id),
                "{body}"
            );
            assert_eq!(line.matches(spiffe_id).count(), 1, "{line}");
        }
        assert!(!spiffe_ids.is_empty());
    } else {
        let code = body["code"].as_str();
        assert!(
            !matches!(
                code,
                Some("several_identities" | "not_this_role" | "no_role")
            ),
            "{record}"
        );
    }
    let returned = record["spiffe_id"]
        .as_str()
        .filter(|_| record["outcome"] == "issued");
    returned.or(body["code"].as_str()).unwrap().to_owned()
}

/// Waits for the line of the log with this event and this request.
fn log_line(env: &Env, event: &str, request: &str) -> String {
    await_some("its line in the log", TIMEOUT, || {
        let log = env.daemon.log();
        let is_it = |line: &&str| line.contains(event) && line.contains(request);
        log.lines().find(is_it).map(str::to_owned)
    })
}

/// Adds roles after `shop`, which is first and is for all of `w/*`.
fn add_roles(env: &Env, roles: &[(&str, &str)]) {
    let roles = roles.iter().map(|(name, ids)| {
        format!(
            "[[role]]\nname = \"{name}\"\nspiffe_id = \"{ids}\"\nrole_arn = \"{}\"\n",
            env.minio.role_arn()
        )
    });
    let text = format!("{}\n{}", env.daemon.text(), roles.collect::<String>());
    assert!(env.daemon.reload_text(&text));
}

fn check_selection(source: Source) {
    let folder = folder();
    let setting = Setting::of(source);
    let Some(mut env) = Env::start(folder.path(), &[(51_002, "reader")], &setting) else {
        return;
    };
    let of_two = format!("unix:uid:{TWO}");
    for (name, options) in [
        ("first", &[][..]),
        ("second", &["-hint", "second-by-hint"]),
        ("third", &["-hint", "x"]),
    ] {
        env.register(&id(name), &[&of_two], options);
    }
    add_roles(
        &env,
        &[
            ("exact-first", &id("first")),
            ("exact-third", &id("third")),
            ("second-by-hint", &id("*")),
            ("of-others", "spiffe://example.org/others/*"),
            ("exact-reader", &id("reader")),
        ],
    );
    for (role, returned) in [
        ("/exact-first", &*id("first")),
        ("/exact-third", &*id("third")),
        ("/second-by-hint", &*id("second")),
        // A role for all three, without a hint: it takes none of them, also where the request names
        // no role.
        ("/shop", "several_identities"),
        ("", "several_identities"),
        ("/of-others", "not_this_role"),
        ("/exact-reader", "not_this_role"),
    ] {
        assert_eq!(by_role(&env, TWO, role), returned, "{role}");
    }
}

fn check_admin_entry(source: Source) {
    let folder = folder();
    let setting = Setting::of(source);
    let Some(mut env) = Env::start(folder.path(), &[(51_002, "reader")], &setting) else {
        return;
    };
    let of_admin = format!("unix:uid:{ADMIN}");
    let admin = "spiffe://example.org/tools/admin";
    env.register(admin, &[&of_admin], &["-admin"]);
    env.register(
        "spiffe://example.org/tools/downstream",
        &[&of_admin],
        &["-downstream"],
    );
    add_roles(
        &env,
        &[("named", admin), ("all", "spiffe://example.org/**")],
    );
    // The agents differ in which such identities they return. Without a role of their own these
    // give no process anything.
    let leaks = source == Source::Broker;
    let before = env.daemon.audit().len();
    assert_eq!(
        by_role(&env, ADMIN, ""),
        if leaks { admin } else { "no_identity" }
    );
    if !leaks {
        // The agent's reply belongs to the request for which the agent was queried.
        let record = &env.daemon.audit_after(before)[0];
        let line = log_line(
            &env,
            "agent has no identity for a workload",
            record["request_id"].as_str().unwrap(),
        );
        assert!(line.contains(&format!("\"uid\":{ADMIN}")), "{line}");
    }
    assert_eq!(
        by_role(&env, ADMIN, "/named"),
        if leaks { admin } else { "no_identity" }
    );
    assert_eq!(
        by_role(&env, ADMIN, "/all"),
        if leaks {
            "several_identities"
        } else {
            "no_identity"
        }
    );
    env.register(&id("plain"), &[&of_admin], &[]);
    assert_eq!(by_role(&env, ADMIN, "/shop"), id("plain"));
    assert_eq!(
        by_role(&env, ADMIN, "/all"),
        if leaks {
            "several_identities".to_owned()
        } else {
            id("plain")
        }
    );
}

/// Checks an identity with several registrations: the agent returns one token for each, with the
/// hint of that registration.
fn check_several_registrations(source: Source) {
    let folder = folder();
    let setting = Setting::of(source);
    let Some(mut env) = Env::start(folder.path(), &[(51_002, "reader")], &setting) else {
        return;
    };
    // With rules all are awsvid's own.
    let (uid, owner) = if source == Source::Rules {
        (51_002, 0)
    } else {
        (TWO, TWO)
    };
    let name = if source == Source::Rules {
        "reader"
    } else {
        "twice"
    };
    let [user, group] = ["uid", "gid"].map(|kind| format!("unix:{kind}:{owner}"));
    env.register(&id(name), &[&user, &group], &["-hint", "unused"]);
    env.spire
        .register_with(&id(name), &[&group], &["-hint", "by-hint"]);
    add_roles(&env, &[("exact", &id(name)), ("by-hint", &id("*"))]);
    assert_eq!(by_role(&env, uid, "/exact"), id(name));
    assert_eq!(by_role(&env, uid, "/shop"), id(name), "the only one");
    if source != Source::Rules {
        env.register(&id("other"), &[&user], &["-hint", "other"]);
        assert_eq!(by_role(&env, uid, "/shop"), "several_identities");
        assert_eq!(
            by_role(&env, uid, "/by-hint"),
            id(name),
            "by the hint of either"
        );
    }
}

#[test]
fn registrations_of_one_identity_count_as_one_with_rules() {
    check_several_registrations(Source::Rules);
}

#[test]
fn registrations_of_one_identity_count_as_one_with_spire_delegated() {
    check_several_registrations(Source::Delegated);
}

#[test]
fn registrations_of_one_identity_count_as_one_with_spiffe_broker() {
    check_several_registrations(Source::Broker);
}

#[test]
fn identity_is_selected_by_role_or_hint_with_spire_delegated() {
    check_selection(Source::Delegated);
}

#[test]
fn admin_entry_is_used_only_for_its_role_with_spire_delegated() {
    check_admin_entry(Source::Delegated);
}

#[test]
fn identity_is_selected_by_role_or_hint_with_spiffe_broker() {
    check_selection(Source::Broker);
}

#[test]
fn admin_entry_is_used_only_for_its_role_with_spiffe_broker() {
    check_admin_entry(Source::Broker);
}

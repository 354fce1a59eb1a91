//! Metadata tokens (T41), and the file of their key.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::await_some;

/// A token of 56 characters that awsvid has not issued.
const FORGED: &str = "AQAAAAB_____AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

#[test]
fn forged_truncated_and_expired_token_is_rejected() {
    let (folder, upstream) = (folder(), Upstream::start_for_me());
    let daemon = serve(folder.path(), &upstream, "");
    let (address, valid) = (daemon.tcp(), token(daemon.tcp()));
    assert_eq!(get(address, ROLES, &valid).status, 200);
    let mut flipped = valid.clone().into_bytes();
    flipped[30] = if flipped[30] == b'A' { b'B' } else { b'A' };
    let flipped = String::from_utf8(flipped).unwrap();
    let answers: Vec<_> = [FORGED, &flipped, &valid[..55], &valid[..40], "x", ""]
        .iter()
        .map(|token| get(address, ROLES, token))
        .collect();
    let text = |answer: &Metadata| answer.body.split(" (request").next().unwrap().to_owned();
    for answer in &answers {
        assert_eq!(answer.status, 401, "{answer:?}");
        assert_eq!(text(answer), text(&answers[0]), "one and the same answer");
    }
    let short = put(address, 1).body;
    await_some("the token expires", TIMEOUT, || {
        (get(address, ROLES, &short).status == 401).then_some(())
    });
    assert_eq!(get(address, ROLES, &valid).status, 200);
}

#[test]
fn token_stays_valid_over_a_crash() {
    let (keys, upstream) = (folder(), Upstream::start_for_me());
    let [first, second, third] = [folder(), folder(), folder()];
    let serve = |own: &tempfile::TempDir| serve_with_key_of(keys.path(), own.path(), &upstream);
    let daemon = serve(&first);
    let valid = token(daemon.tcp());
    let key = keys.path().join("imds-key");
    let stored = fs::read(&key).unwrap();
    let mode = fs::metadata(&key).unwrap().permissions().mode() & 0o7777;
    assert_eq!((stored.len(), mode), (32, 0o600));
    // Its drop kills it.
    drop(daemon);
    let daemon = serve(&second);
    assert_eq!(get(daemon.tcp(), ROLES, &valid).body, "dev");
    drop(daemon);
    // Other users could have read the key, so they could have made tokens.
    fs::set_permissions(&key, Permissions::from_mode(0o644)).unwrap();
    let daemon = serve(&third);
    assert_eq!(get(daemon.tcp(), ROLES, &valid).status, 401);
    assert_ne!(fs::read(&key).unwrap(), stored);
    daemon.await_line(&["replacing the key in [imds] key_file"]);
}

#[test]
fn key_file_that_cannot_be_written_is_written_later() {
    let (folder, upstream) = (folder(), Upstream::start_for_me());
    let blocked = folder.path().join("imds-key");
    fs::create_dir(&blocked).unwrap();
    let daemon = serve(folder.path(), &upstream, "");
    daemon.await_line(&["key_file cannot be written yet"]);
    let valid = token(daemon.tcp());
    fs::remove_dir(&blocked).unwrap();
    daemon.await_line(&["key file written"]);
    assert_eq!(fs::read(&blocked).unwrap().len(), 32);
    assert_eq!(get(daemon.tcp(), ROLES, &valid).status, 200);
}

/// Neither a token nor the key is in any output, whatever becomes of the request.
#[test]
fn token_and_key_are_secrets() {
    let (folder, upstream) = (folder(), Upstream::start_for_me());
    let daemon = serve(folder.path(), &upstream, "");
    let (address, valid) = (daemon.tcp(), token(daemon.tcp()));
    for path in [
        ROLES.to_owned(),
        format!("{ROLES}dev"),
        "/latest/none".to_owned(),
    ] {
        get(address, &path, &valid);
        get(address, &path, FORGED);
    }
    daemon.await_line(&["request without credentials", "imds_token"]);
    let (_, status) = daemon.query_status_socket("/status");
    let audit = fs::read_to_string(folder.path().join("audit.log")).unwrap();
    let key = fs::read(folder.path().join("imds-key")).unwrap();
    let outputs = [daemon.log(), daemon.metrics(), status, audit];
    for output in outputs {
        assert!(
            !output.contains(&valid[..20]) && !output.contains(&valid[36..]),
            "{output}"
        );
        assert!(!output.contains(&FORGED[..20]), "{output}");
        assert!(!output.as_bytes().windows(8).any(|part| part == &key[..8]));
    }
}

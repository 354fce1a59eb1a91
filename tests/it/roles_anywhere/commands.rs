//! The commands for operators.

use std::collections::HashMap;
use std::process::Command;
use std::sync::mpsc::channel;
use std::time::Duration;

use serde_json::Value;

use super::server::{ANCHOR, ROLE, Trust, VerifyingServer};
use super::spire::{KEY_TYPES, configuration, spire};
use crate::harness::counterparts::process::{Output, run};
use crate::harness::counterparts::{folder, root, tool};
use crate::harness::daemon::{self, PROGRAM};
use crate::harness::env::{Source, id};
use crate::harness::stub_http;

const TIMEOUT: Duration = Duration::from_secs(60);

pub(super) fn awsvid(arguments: &[&str], config: &std::path::Path) -> Output {
    let mut command = Command::new(PROGRAM);
    command
        .env_clear()
        .args(arguments)
        .arg("--config")
        .arg(config);
    run(command, b"", TIMEOUT)
}

#[test]
fn check_examines_certificate_and_cas_and_assumes_the_role() {
    if !root() {
        return;
    }
    let folder = folder();
    let Some(spire) = spire(folder.path(), KEY_TYPES[2]) else {
        return;
    };
    let config = folder.path().join("awsvid.toml");
    let check = |server: &VerifyingServer| {
        let text = configuration(&spire, Source::Rules, server);
        std::fs::write(&config, daemon::text(folder.path(), "", &text)).unwrap();
        awsvid(&["check"], &config).stdout
    };
    let server = VerifyingServer::start(Trust::of(&spire.bundle()));
    let report = check(&server);
    for words in [
        &format!("{} for role \"app\": a key of the kind P384", id("rules"))[..],
        "the trust domain has 1 CAs that are valid",
        "has no common name, so its sessions have no source identity",
        &format!("{ROLE} assumed by the certificate of {}", id("rules")),
    ] {
        assert!(report.contains(words), "{words}: {report}");
    }
    assert_eq!(server.sts.issued(), 1);

    let other = rcgen::generate_simple_self_signed(Vec::new()).unwrap();
    let report = check(&VerifyingServer::start(Trust::of(&other.cert.pem())));
    assert!(report.contains("Untrusted certificate"), "{report}");
    assert!(report.contains(ANCHOR), "{report}");
}

#[test]
fn trust_policy_creates_anchor_profile_and_role_of_the_live_bundle() {
    if !root() {
        return;
    }
    let folder = folder();
    let (Some(aws), Some(spire)) = (tool("aws"), spire(folder.path(), KEY_TYPES[1])) else {
        return;
    };
    let server = VerifyingServer::start(Trust::of(&spire.bundle()));
    let config = folder.path().join("awsvid.toml");
    let text = configuration(&spire, Source::Rules, &server);
    std::fs::write(&config, daemon::text(folder.path(), "", &text)).unwrap();
    // No role is assumed by a token, so neither an issuer nor a provider is needed.
    let script = awsvid(&["trust-policy"], &config).success("awsvid trust-policy");
    assert!(!script.contains("open-id-connect-provider"), "{script}");

    // The real CLI checks its input and sends it, here to an account that accepts everything.
    let (sender, requests) = channel();
    let account = stub_http::start(move |first, body| {
        // The test may have ended.
        let _ = sender.send((first.to_owned(), body.to_owned()));
        match first.contains("/trustanchors") || first.contains("/profiles") {
            true => stub_http::http("201 Created", "Content-Type: application/json\r\n", "{}"),
            false => {
                let xml = "<CreateRoleResponse><CreateRoleResult></CreateRoleResult></CreateRoleResponse>";
                stub_http::http("200 OK", "Content-Type: text/xml\r\n", xml)
            }
        }
    });
    let stub = format!(
        "aws() {{ '{}' --endpoint-url {account} \"$@\"; }}\n",
        aws.display()
    );
    let mut shell = Command::new("sh");
    shell
        .env("HOME", folder.path())
        .env("AWS_DEFAULT_REGION", "us-east-1")
        .env("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
        .env("AWS_SECRET_ACCESS_KEY", "example")
        .arg("-euc")
        .arg(format!("{stub}{script}"));
    run(shell, b"", TIMEOUT).success("the script");
    let sent: Vec<(String, String)> = requests.try_iter().collect();
    let [anchor, role, profile] = &sent[..] else {
        panic!("three calls: {sent:?}")
    };
    assert!(anchor.0.starts_with("POST /trustanchors"), "{anchor:?}");
    let anchor: Value = serde_json::from_str(&anchor.1).unwrap();
    let pem = anchor["source"]["sourceData"]["x509CertificateData"].as_str();
    assert_eq!(pem.unwrap().trim(), spire.bundle().trim());
    assert!(profile.0.starts_with("POST /profiles"), "{profile:?}");
    let profile: Value = serde_json::from_str(&profile.1).unwrap();
    assert_eq!(profile["roleArns"], serde_json::json!([ROLE]));
    assert_eq!(profile["acceptRoleSessionName"], true);
    let form: HashMap<String, String> = form_urlencoded::parse(role.1.as_bytes())
        .into_owned()
        .collect();
    let policy: Value = serde_json::from_str(&form["AssumeRolePolicyDocument"]).unwrap();
    let statement = &policy["Statement"][0];
    assert_eq!(
        statement["Principal"]["Service"],
        "rolesanywhere.amazonaws.com"
    );
    assert_eq!(statement["Condition"]["ArnEquals"]["aws:SourceArn"], ANCHOR);
    // The rule's pattern is one segment below `w`.
    let conditions = &statement["Condition"];
    assert_eq!(
        conditions["StringLike"]["aws:PrincipalTag/x509SAN/URI"],
        id("*")
    );
    assert!(conditions["StringNotLike"].is_object());
}

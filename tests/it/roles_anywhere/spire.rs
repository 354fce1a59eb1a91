//! awsvid against the verifying server, with the real SPIRE's certificates.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::server::{ANCHOR, PROFILE, ROLE, Trust, VerifyingServer};
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::process::{await_some, run};
use crate::harness::counterparts::spire::{Broker, Spire, SpireSetting};
use crate::harness::counterparts::{folder, root, tool};
use crate::harness::daemon::{Daemon, PROGRAM};
use crate::harness::env::{AWSVID, Source, awsvid_selectors, id};

const TIMEOUT: Duration = Duration::from_secs(60);
pub(super) const READER: u32 = 61001;
/// The keys of workloads, each with another kind for the CA, and whether a root outside SPIRE has
/// signed that CA.
pub(super) const KEY_TYPES: [(&str, &str, bool); 3] = [
    ("rsa-2048", "ec-p384", true),
    ("ec-p256", "rsa-2048", false),
    ("ec-p384", "ec-p256", true),
];

/// Starts SPIRE for all sources, with entries for awsvid's rules and for its callers.
pub(super) fn spire(
    folder: &Path,
    (key_type, ca_key_type, upstream_ca): (&'static str, &'static str, bool),
) -> Option<Spire> {
    let setting = SpireSetting {
        delegates: vec![AWSVID.to_owned()],
        // The default SVID of awsvid may be that of either entry.
        brokers: vec![Broker::by_pid(AWSVID), Broker::by_pid(&id("rules"))],
        without_hashes: true,
        workload_key_type: Some(key_type),
        ca_key_type: Some(ca_key_type),
        upstream_ca,
        ..SpireSetting::default()
    };
    let spire = Spire::start_with(folder, setting)?;
    let own = awsvid_selectors(Path::new(PROGRAM));
    spire.register(AWSVID, &own.each_ref().map(String::as_str));
    spire.register(&id("rules"), &["unix:uid:0"]);
    spire.register(&id("reader"), &[&format!("unix:uid:{READER}")]);
    Some(spire)
}

/// Returns the configuration of awsvid without `[listen]`.
pub(super) fn configuration(spire: &Spire, source: Source, server: &VerifyingServer) -> String {
    let rules = match source {
        Source::Rules => format!(
            "[[workload]]\nspiffe_id = \"{}\"\nuid = {READER}\n",
            id("rules")
        ),
        Source::Delegated | Source::Broker => String::new(),
    };
    format!(
        "[identity]\n{}\n{}{rules}",
        source.keys(spire, &spire.agent_socket()),
        server.configuration("exchange = \"roles-anywhere\""),
    )
}

fn daemon(folder: &Path, spire: &Spire, source: Source, server: &VerifyingServer) -> Daemon {
    Daemon::start(folder, "", &configuration(spire, source, server)).ready()
}

/// Requests credentials, and again while a slow machine has none yet, as SDKs do.
pub(super) fn fetch(daemon: &Daemon, workload: &Cgroup) -> Value {
    fetch_as(daemon, READER, workload)
}

/// Requests credentials as this user.
pub(super) fn fetch_as(daemon: &Daemon, uid: u32, workload: &Cgroup) -> Value {
    await_some("an answer other than pending", TIMEOUT, || {
        let answer = daemon.curl("unix", (uid, uid), workload);
        let answer: Value = serde_json::from_str(&answer).unwrap();
        (answer["code"] != "pending").then_some(answer)
    })
}

/// Returns a canonical request without the time of its signature.
fn undated(canonical_request: &str) -> String {
    let lines = canonical_request
        .lines()
        .filter(|line| !line.starts_with("x-amz-date:"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Runs AWS's client with the certificate that the agent gives this process, which is the one that
/// awsvid has by its rules.
fn run_aws_client(folder: &Path, spire: &Spire, server: &VerifyingServer) -> Option<()> {
    spire.write_x509(folder);
    let (certificate, intermediates) = (folder.join("svid.0.pem"), folder.join("between.pem"));
    let chain = std::fs::read_to_string(&certificate).unwrap();
    let (_, after_leaf) = chain.split_once("-----END CERTIFICATE-----\n").unwrap();
    std::fs::write(&intermediates, after_leaf).unwrap();
    let mut command = Command::new(tool("aws_signing_helper")?);
    command
        .env_clear()
        .args(["credential-process", "--endpoint", server.sts.url()])
        .arg("--certificate")
        .arg(&certificate)
        .arg("--private-key")
        .arg(folder.join("svid.0.key"))
        .args(["--role-arn", ROLE, "--profile-arn", PROFILE])
        .args(["--trust-anchor-arn", ANCHOR])
        .args(["--role-session-name", "example.org=w=rules"]);
    if !after_leaf.is_empty() {
        command.arg("--intermediates").arg(&intermediates);
    }
    run(command, b"", TIMEOUT).success("AWS's client");
    Some(())
}

#[test]
fn each_kind_of_key_and_each_source_is_accepted() {
    if !root() {
        return;
    }
    for key_types in KEY_TYPES {
        let folder = folder();
        let Some(spire) = spire(folder.path(), key_types) else {
            return;
        };
        let server = VerifyingServer::start(Trust::of(&spire.bundle()));
        let workload = Cgroup::new(&format!("anywhere-{}.service", std::process::id()));
        for source in [Source::Rules, Source::Delegated, Source::Broker] {
            let folder = folder.path().join(format!("{source:?}"));
            std::fs::create_dir(&folder).unwrap();
            let daemon = daemon(&folder, &spire, source, &server);
            let issued = server.sts.issued();
            let credentials = fetch(&daemon, &workload);
            let key = credentials["AccessKeyId"].as_str();
            let key = key.unwrap_or_else(|| panic!("{key_types:?} {source:?} {credentials}"));
            let expected = match source {
                Source::Rules => id("rules"),
                Source::Delegated | Source::Broker => id("reader"),
            };
            assert_eq!(daemon.first_issued_to(key), expected);
            assert_eq!(server.sts.issued(), issued + 1);
            if source == Source::Rules {
                // The same request as AWS's client sends with the same certificate, byte for byte.
                if run_aws_client(&folder, &spire, &server).is_none() {
                    return;
                }
                let requests = server.sts.accepted_requests();
                let [own, aws] = &requests[..] else {
                    panic!("{requests:?}")
                };
                assert_eq!(undated(own), undated(aws));
                assert!(own.contains("\nx-amz-date:") && own != &undated(own));
                let (.., upstream_ca) = key_types;
                assert_eq!(own.contains("\nx-amz-x509-chain:"), upstream_ca);
            }
            let log = daemon.log();
            assert!(!log.contains("PRIVATE KEY") && !log.contains("secretAccessKey"));
        }
    }
}

#[test]
fn daemon_rejects_what_the_server_does_not_trust() {
    if !root() {
        return;
    }
    let folder = folder();
    let Some(spire) = spire(folder.path(), KEY_TYPES[1]) else {
        return;
    };
    let other = rcgen::generate_simple_self_signed(Vec::new())
        .unwrap()
        .cert
        .pem();
    let server = VerifyingServer::start(Trust::of(&other));
    let daemon = daemon(folder.path(), &spire, Source::Rules, &server);
    let workload = Cgroup::new(&format!("anywhere-no-{}.service", std::process::id()));
    let answer = fetch(&daemon, &workload);
    assert_eq!(answer["code"], "sts_access_denied", "{answer}");
    let text = answer["message"].as_str().unwrap();
    assert!(
        text.contains("Untrusted certificate") && text.contains(ANCHOR),
        "{text}"
    );
}

#[test]
fn profile_without_names_is_learnt() {
    if !root() {
        return;
    }
    let folder = folder();
    let Some(spire) = spire(folder.path(), KEY_TYPES[1]) else {
        return;
    };
    let bundle = spire.bundle();
    let server = VerifyingServer::start(Trust {
        accepts_session_name: false,
        ..Trust::of(&bundle)
    });
    let daemon = daemon(folder.path(), &spire, Source::Rules, &server);
    let workload = Cgroup::new(&format!("anywhere-unnamed-{}.service", std::process::id()));
    let answer = fetch(&daemon, &workload);
    assert!(answer["AccessKeyId"].is_string(), "{answer}");
    daemon.await_line(&["profile of IAM Roles Anywhere accepts no session names"]);
    // The records have the name that AWS made.
    let key = answer["AccessKeyId"].as_str().unwrap();
    let arn = server.sts.session_arn(key).unwrap();
    let (_, name) = arn.rsplit_once('/').unwrap();
    assert_ne!(name, "example.org=w=rules");
    let audit = daemon.audit_where(|_, line| line.contains(key));
    assert_eq!(audit[0]["session_name"], name, "{audit:?}");
    assert_eq!(daemon.status(&id("rules"))["session_name"], name);
}

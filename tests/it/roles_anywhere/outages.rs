//! Outages of the services that each exchange needs.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::server::{Trust, VerifyingServer};
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::process::await_some;
use crate::harness::counterparts::spire::{Spire, SpireSetting};
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::Daemon;
use crate::harness::env::{Source, id};
use crate::harness::is_slow;
use crate::harness::sts::AUDIENCE;

/// Bounds one request on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Length of the outage of the slow form, and the time between its requests.
const OUTAGE: Duration = Duration::from_secs(3600);
const BETWEEN_ROUNDS: Duration = Duration::from_secs(10);
const FIRST: u32 = 61001;
const USERS: u32 = 8;

/// A node with identities for users by awsvid's rules.
struct OutageNode {
    daemon: Daemon,
    server: VerifyingServer,
    spire: Spire,
    workloads: Cgroup,
}

impl OutageNode {
    /// Starts a node whose STS lets these subjects assume the role by a token.
    fn start(folder: &Path, subjects: &[String]) -> Option<Self> {
        let spire = Spire::start_with(
            folder,
            SpireSetting {
                without_hashes: true,
                ..SpireSetting::default()
            },
        )?;
        let users: Vec<u32> = (FIRST..FIRST + USERS).collect();
        let ids: Vec<String> = users.iter().map(|uid| id(&uid.to_string())).collect();
        spire.register_all(&ids, &["unix:uid:0"]);
        let (bundle, issuer) = (spire.bundle(), spire.issuer_url());
        let server = VerifyingServer::start(Trust {
            tokens: Some((&issuer, subjects.to_vec())),
            ..Trust::of(&bundle)
        });
        let rules: String = users
            .iter()
            .zip(&ids)
            .map(|(uid, id)| format!("[[workload]]\nspiffe_id = \"{id}\"\nuid = {uid}\n"))
            .collect();
        let configuration = format!(
            "[identity]\n{}\naudience = \"{AUDIENCE}\"\n[sts]\nregion = \"us-east-1\"\nendpoint = \"{}\"\n{}{rules}",
            Source::Rules.keys(&spire, &spire.agent_socket()),
            server.sts.url(),
            server.configuration("exchange = \"both\"\nduration = \"15m\""),
        );
        let daemon = Daemon::start(folder, "", &configuration).ready();
        let name = folder.file_name().unwrap().to_str().unwrap();
        Some(Self {
            daemon,
            server,
            spire,
            workloads: Cgroup::new(&format!("anywhere-{name}.service")),
        })
    }

    /// Requests credentials, and again while a slow machine has none yet, as SDKs do.
    fn fetch(&self, uid: u32) -> Value {
        await_some("an answer other than pending", TIMEOUT, || {
            let answer = self.fetch_once(uid);
            (answer["code"] != "pending").then_some(answer)
        })
    }

    fn fetch_once(&self, uid: u32) -> Value {
        let answer = self.daemon.curl("unix", (uid, uid), &self.workloads);
        serde_json::from_str(&answer).unwrap()
    }

    /// Checks that each of these users gets credentials.
    fn assert_served(&self, users: impl Iterator<Item = u32>) {
        for uid in users {
            let answer = self.fetch(uid);
            assert!(answer["AccessKeyId"].is_string(), "{uid}: {answer}");
        }
    }

    /// Checks that each of these users, which have credentials, gets them at the first request.
    fn assert_warm(&self, users: impl Iterator<Item = u32>) {
        for uid in users {
            let answer = self.fetch_once(uid);
            assert!(answer["AccessKeyId"].is_string(), "{uid}: {answer}");
        }
    }

    /// Checks that all users get credentials for an hour, with the sessions of a certificate.
    fn assert_served_for_an_hour(&self) {
        let began = Instant::now();
        while began.elapsed() < OUTAGE {
            std::thread::sleep(BETWEEN_ROUNDS);
            self.assert_warm(FIRST..FIRST + USERS);
        }
        let issued = self.server.sts.issued();
        eprintln!("{issued} sessions, all but 2 by a certificate");
        assert!(issued >= u64::from(USERS) * 4, "{issued}");
    }

    /// Returns the number of sessions by a certificate.
    fn by_certificate(&self) -> usize {
        self.server.sts.accepted_requests().len()
    }
}

/// In the slow form the outage lasts an hour, in which each session of 15 minutes is renewed by a
/// certificate several times.
#[test]
fn issuer_outage_causes_no_error() {
    if !root() {
        return;
    }
    let folder = folder();
    let Some(mut node) = OutageNode::start(folder.path(), &[id("*")]) else {
        return;
    };
    node.assert_served(FIRST..FIRST + 2);
    assert_eq!((node.server.sts.issued(), node.by_certificate()), (2, 0));
    node.spire.stop_oidc();
    node.assert_warm(FIRST..FIRST + 2);
    node.assert_served(FIRST + 2..FIRST + USERS);
    assert_eq!((node.server.sts.issued(), node.by_certificate()), (8, 6));
    node.daemon
        .await_line(&["exchange of tokens is unavailable"]);
    if is_slow() {
        node.assert_served_for_an_hour();
    }
}

#[test]
fn rejection_by_sts_does_not_fall_over() {
    if !root() {
        return;
    }
    let folder = folder();
    let Some(node) = OutageNode::start(folder.path(), &[id("stranger")]) else {
        return;
    };
    let answer = node.fetch(FIRST);
    assert_eq!(answer["code"], "sts_access_denied", "{answer}");
    // The trust anchor would have accepted the certificate.
    assert_eq!(node.server.sts.issued(), 0);
}

#[test]
fn spire_server_outage_causes_no_error() {
    if !root() {
        return;
    }
    let folder = folder();
    let Some(mut node) = OutageNode::start(folder.path(), &[id("*")]) else {
        return;
    };
    node.assert_served(FIRST..FIRST + 1);
    node.spire.stop_server();
    // No token was signed for these, and the agent holds their certificates.
    node.assert_served(FIRST..FIRST + USERS);
    assert_eq!(node.by_certificate(), 7);
}

//! Chains whose first role is assumed by a certificate, and the others at STS.

use std::collections::HashSet;
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use awsvid::dev::sts::ChainedTrust;
use awsvid::identity::RoleArn;
use serde_json::{Value, json};

use super::commands::awsvid;
use super::server::{ROLE, Trust, VerifyingServer};
use super::spire::{KEY_TYPES, READER, configuration, fetch, fetch_as, spire};
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::spire::Spire;
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::{self, Daemon};
use crate::harness::env::{Source, id};
use crate::harness::forward::Network;
use crate::harness::tls::TlsFront;

const MIDDLE: &str = "arn:aws:iam::222222222222:role/middle";
const LAST: &str = "arn:aws:iam::333333333333:role/last";
/// The CA of the endpoints, for each of the two.
const CA_FILES: [&str; 2] = ["anywhere-ca.pem", "sts-ca.pem"];
const CHAIN: &str = "\
[[role.chain]]
role_arn = \"arn:aws:iam::222222222222:role/middle\"
external_id = \"shared-id\"
source_identity = \"{path[1]}\"
tags = { \"spiffe-id\" = \"{spiffe_id}\" }
transitive_tags = [\"spiffe-id\"]
[[role.chain]]
role_arn = \"arn:aws:iam::333333333333:role/last\"
";

/// Both services behind TLS with a private CA, as a network without a way to AWS may have them.
struct ChainNode {
    server: VerifyingServer,
    front: TlsFront,
    spire: Spire,
}

impl ChainNode {
    /// Starts the services with a middle role that requires this external ID.
    fn start(folder: &Path, external_id: &str) -> Option<Self> {
        let spire = spire(folder, KEY_TYPES[1])?;
        let trust = |arn: &str, principal: &str, external_id: Option<&str>| ChainedTrust {
            arn: RoleArn::parse(arn).unwrap(),
            principal: RoleArn::parse(principal).unwrap(),
            external_id: external_id.map(str::to_owned),
            tag_session: true,
            set_source_identity: true,
        };
        let server = VerifyingServer::start(Trust {
            chained: vec![
                trust(MIDDLE, ROLE, Some(external_id)),
                trust(LAST, MIDDLE, None),
            ],
            ..Trust::of(&spire.bundle())
        });
        let behind = server.sts.url().trim_start_matches("http://").parse();
        let front = TlsFront::start(
            Network::Own,
            (Ipv4Addr::LOCALHOST, 0).into(),
            behind.unwrap(),
        );
        for name in CA_FILES {
            fs::write(folder.join(name), front.certificate()).unwrap();
        }
        Some(Self {
            server,
            front,
            spire,
        })
    }

    fn configuration(&self, folder: &Path, source: Source) -> String {
        let [anywhere, sts] = CA_FILES.map(|name| format!("ca_file = {:?}\n", folder.join(name)));
        let url = self.front.url();
        let text = configuration(&self.spire, source, &self.server)
            .replace(self.server.sts.url(), &url)
            .replace("[[role]]", &format!("{anywhere}[[role]]"));
        format!("{text}{CHAIN}[sts]\nregion = \"us-east-1\"\nendpoint = \"{url}\"\n{sts}")
    }
}

#[test]
fn chain_behind_a_certificate_gives_the_last_role() {
    if !root() {
        return;
    }
    let folder = folder();
    let Some(node) = ChainNode::start(folder.path(), "shared-id") else {
        return;
    };
    let text = node.configuration(folder.path(), Source::Delegated);
    let daemon = Daemon::start(folder.path(), "", &text).ready();
    let workload = Cgroup::new(&format!("anywhere-chain-{}.service", std::process::id()));
    let keys: HashSet<String> = (0..3)
        .map(|_| {
            let body = fetch(&daemon, &workload);
            assert_eq!(body["RoleArn"], LAST, "{body}");
            body["AccessKeyId"].as_str().unwrap().to_owned()
        })
        .collect();
    // One session of each hop, and one request that a certificate has signed.
    let sessions = node.server.sts.issued();
    let certified = node.server.sts.accepted_requests().len();
    assert_eq!((keys.len(), sessions, certified), (1, 3, 1));
    let audit = fs::read_to_string(folder.path().join("audit.log")).unwrap();
    let record: Value = serde_json::from_str(audit.lines().last().unwrap()).unwrap();
    let name = "example.org=w=reader";
    let chain = json!([
        { "role_arn": ROLE, "session_name": name },
        {
            "role_arn": MIDDLE,
            "session_name": name,
            "source_identity": "reader",
            "tags": { "spiffe-id": id("reader") },
        },
        { "role_arn": LAST, "session_name": name },
    ]);
    assert_eq!((&record["uid"], &record["chain"]), (&READER.into(), &chain));
}

#[test]
fn common_name_is_the_source_identity_of_each_session() {
    if !root() {
        return;
    }
    let folder = folder();
    let Some(node) = ChainNode::start(folder.path(), "shared-id") else {
        return;
    };
    let named = READER + 1;
    let selector = format!("unix:uid:{named}");
    let options = ["-dns", "named.example.org"];
    node.spire
        .register_with(&id("named"), &[&selector], &options);
    let workload = Cgroup::new(&format!("anywhere-named-{}.service", std::process::id()));
    let answer = |name: &str, text: &str| {
        let folder = folder.path().join(name);
        fs::create_dir(&folder).unwrap();
        let daemon = Daemon::start(&folder, "", text).ready();
        fetch_as(&daemon, named, &workload)
    };
    let changing = node.configuration(folder.path(), Source::Delegated);
    let rejected = answer("changing", &changing);
    let message = rejected["message"].as_str().unwrap_or_default();
    assert!(
        message.contains("hop 2") && message.contains("cannot be changed"),
        "{rejected}"
    );
    let keeping = changing.replace("source_identity = \"{path[1]}\"\n", "");
    let body = answer("keeping", &keeping);
    assert_eq!(body["RoleArn"], LAST, "{body}");
}

#[test]
fn check_assumes_each_role_behind_a_certificate() {
    if !root() {
        return;
    }
    let folder = folder();
    let config = folder.path().join("awsvid.toml");
    let check = |external_id: &str| {
        let folder = folder.path().join(external_id);
        fs::create_dir(&folder).unwrap();
        let node = ChainNode::start(&folder, external_id)?;
        let text = node.configuration(&folder, Source::Rules);
        fs::write(&config, daemon::text(&folder, "", &text)).unwrap();
        Some((awsvid(&["check"], &config).stdout, node))
    };
    let Some((report, node)) = check("shared-id") else {
        return;
    };
    for (role_arn, hop) in [ROLE, MIDDLE, LAST].iter().zip(1..) {
        let line = format!(
            "hop {hop}: {role_arn} assumed by the certificate of {}",
            id("rules")
        );
        assert!(report.contains(&line), "{line}: {report}");
    }
    // The first role needs the one, and the others the other.
    for server in ["IAM Roles Anywhere", "STS"] {
        let url = node.front.url();
        let clock = format!("this node's clock and {server}'s agree, at {url}");
        assert_eq!(report.matches(&clock).count(), 1, "{clock}: {report}");
    }

    let (report, _node) = check("other-id").unwrap();
    let fix = format!("a policy of {ROLE} has to allow the same on {MIDDLE}");
    assert!(
        report.contains("hop 2: STS at ") && report.contains(&fix),
        "{report}"
    );
    assert!(!report.contains("hop 3"), "{report}");
}

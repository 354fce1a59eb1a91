//! An outage of the SPIRE server, from its begin to the end of the certificates.

use std::path::Path;
use std::time::{Duration, Instant};

use super::server::{Trust, VerifyingServer};
use super::spire::fetch_as;
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::process::await_some;
use crate::harness::counterparts::spire::{Broker, Spire, SpireSetting};
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::{Daemon, PROGRAM};
use crate::harness::env::{AWSVID, Source, awsvid_selectors, id};
use crate::harness::is_slow;

/// The user with credentials from before the outage.
const WARM: u32 = 61001;
/// The users that request their first ones at the begin of the outage, during it, and after the end
/// of the certificates.
const FIRST: u32 = 61002;
const MIDDLE: u32 = 61003;
const LAST: u32 = 61004;
const USERS: [u32; 4] = [WARM, FIRST, MIDDLE, LAST];
/// Time limit of the agent's next contact with its server: it waits longer after each failure.
const AGENT_RETRIES: Duration = Duration::from_secs(300);
const SOURCES: [Source; 3] = [Source::Rules, Source::Delegated, Source::Broker];

/// Life of a certificate, and the time of the second request. The agent renews a certificate after
/// half of its life, and awsvid uses none for the last 30 s.
fn times() -> (&'static str, Duration, Duration) {
    let (text, minutes, middle) = match is_slow() {
        true => ("10m", 10, 240),
        false => ("2m", 2, 15),
    };
    (
        text,
        Duration::from_secs(minutes * 60),
        Duration::from_secs(middle),
    )
}

/// The identity that awsvid's rules give a user.
fn by_rule(uid: u32) -> String {
    id(&format!("rule-{uid}"))
}

fn spire(folder: &Path, x509_svid_ttl: &'static str) -> Option<Spire> {
    let rules = USERS.map(by_rule);
    // The default SVID of awsvid may be that of any entry.
    let own = rules.iter().map(String::as_str).chain([AWSVID]);
    let spire = Spire::start_with(
        folder,
        SpireSetting {
            delegates: vec![AWSVID.to_owned()],
            brokers: own.map(Broker::by_pid).collect(),
            without_hashes: true,
            x509_svid_ttl: Some(x509_svid_ttl),
            ..SpireSetting::default()
        },
    )?;
    let own = awsvid_selectors(Path::new(PROGRAM));
    spire.register(AWSVID, &own.each_ref().map(String::as_str));
    spire.register_all(&rules, &["unix:uid:0"]);
    for uid in USERS {
        spire.register(&id(&uid.to_string()), &[&format!("unix:uid:{uid}")]);
    }
    Some(spire)
}

fn daemon(folder: &Path, spire: &Spire, source: Source, server: &VerifyingServer) -> Daemon {
    let folder = folder.join(format!("{source:?}"));
    std::fs::create_dir(&folder).unwrap();
    let rule = |uid| {
        let id = by_rule(uid);
        format!("[[workload]]\nspiffe_id = \"{id}\"\nuid = {uid}\n")
    };
    let rules: String = match source {
        Source::Rules => USERS.map(rule).concat(),
        Source::Delegated | Source::Broker => String::new(),
    };
    let configuration = format!(
        "[identity]\n{}\n{}{rules}",
        source.keys(spire, &spire.agent_socket()),
        server.configuration("exchange = \"roles-anywhere\""),
    );
    Daemon::start(&folder, "", &configuration).ready()
}

#[test]
fn certificates_outlive_the_spire_server_until_they_expire() {
    if !root() {
        return;
    }
    let folder = folder();
    let (x509_svid_ttl, life, middle) = times();
    let Some(mut spire) = spire(folder.path(), x509_svid_ttl) else {
        return;
    };
    let server = VerifyingServer::start(Trust::of(&spire.bundle()));
    let daemons = SOURCES.map(|source| daemon(folder.path(), &spire, source, &server));
    let workload = Cgroup::new(&format!("anywhere-expiry-{}.service", std::process::id()));
    let assert_served = |uid: u32| {
        for (daemon, source) in daemons.iter().zip(SOURCES) {
            let answer = fetch_as(daemon, uid, &workload);
            assert!(
                answer["AccessKeyId"].is_string(),
                "{source:?} {uid}: {answer}"
            );
        }
    };
    assert_served(WARM);
    spire.stop_server();
    let stopped = Instant::now();
    let wait_until = |time: Duration| {
        std::thread::sleep((stopped + time).saturating_duration_since(Instant::now()));
    };
    assert_served(FIRST);
    wait_until(middle);
    assert_served(MIDDLE);
    assert_eq!(server.sts.issued(), 9);

    wait_until(life);
    for (daemon, source) in daemons.iter().zip(SOURCES) {
        let answer = fetch_as(daemon, LAST, &workload);
        // The agent is queried for a token first where it attests callers.
        let (code, words) = match source {
            Source::Rules => ("bad_token", "its certificate expires in 0 s"),
            Source::Delegated | Source::Broker => ("source_unavailable", "JWT-SVID"),
        };
        assert_eq!(answer["code"], code, "{source:?}: {answer}");
        let message = answer["message"].as_str().unwrap();
        assert!(message.contains(words), "{source:?}: {answer}");
    }
    // The sessions themselves last for an hour.
    assert_served(WARM);
    assert_eq!(server.sts.issued(), 9);

    spire.start_server();
    for (daemon, source) in daemons.iter().zip(SOURCES) {
        await_some(&format!("{source:?} is served"), AGENT_RETRIES, || {
            let answer = fetch_as(daemon, LAST, &workload);
            answer["AccessKeyId"].as_str().map(drop)
        });
    }
}

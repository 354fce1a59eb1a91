//! A request that is held until its time is over, because the agent is slow.

use super::*;
use crate::harness::actor::Connector;
use crate::harness::agent::{Entry, FakeAgent};
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::process::await_some;
use crate::harness::counterparts::{folder, root};
use crate::harness::env::id;

const BOB: u32 = 61_002;
/// A second role of every caller, after that of the agent's STS.
const SECOND: &str = "\n[[role]]\nname = \"second\"\nspiffe_id = \"spiffe://example.org/w/*\"\n\
                      role_arn = \"arn:aws:iam::123456789012:role/app\"\nsession_name = \"second\"\n";

/// The next request finds the credentials of the role that the held one has named.
#[test]
fn exchange_of_the_named_role_starts_when_the_agent_has_answered() {
    if !root() {
        return;
    }
    let folder = folder();
    let entry = Entry::new(&id("bob"), &[&format!("unix:uid:{BOB}")]);
    let agent = FakeAgent::start(folder.path(), vec![entry]);
    let configuration = imds_table(folder.path()) + &agent.configuration() + SECOND;
    let daemon = Daemon::start(folder.path(), "", &configuration).ready();
    let valid = token(daemon.tcp());
    let name = folder.path().file_name().unwrap().display().to_string();
    let cgroup = Cgroup::new(&format!("held-{name}.service"));
    let process = Connector::start(BOB, "tcp", &daemon.listener("tcp"), cgroup.path());
    let query = agent.hold(process.id().as_raw());
    let stream = TcpStream::from(process.connect_and_keep());
    let header = format!("X-aws-ec2-metadata-token: {valid}\r\n");
    let line = format!("GET {ROLES}second");
    let answer = send_over(stream, &daemon.tcp().to_string(), &line, &header);
    assert_eq!(answer.status, 503, "{answer:?}");
    assert!(query.await_query());
    let records = daemon.audit_where(|_, line| line.contains("\"pending\""));
    assert_eq!(records.len(), 1, "{records:#?}");
    assert_eq!(records[0]["requested_role"], "second");
    drop(query);
    await_some("the credentials are there", TIMEOUT, || {
        let all = daemon.cached_credentials();
        let names: Vec<_> = all.iter().map(|entry| &entry["role"]).collect();
        assert!(names.iter().all(|name| *name == "second"), "{names:?}");
        all.first()?["access_key_id"].is_string().then_some(())
    });
}

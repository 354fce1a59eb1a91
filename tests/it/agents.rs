//! The clients of the agent's APIs for others' identities, against the real SPIRE: what it answers, and how it refuses.

use std::time::Duration;

use awsvid::svid::SourceError;
use awsvid::svid::agent::{Agent, Svid};
use awsvid::svid::delegated::Delegated;

use crate::harness::counterparts::process::{Owned, spawn};
use crate::harness::counterparts::spire::{Broker, Spire, SpireSetting};
use crate::harness::counterparts::workload::Workload;
use crate::harness::counterparts::{folder, root};

const AUDIENCE: &str = "sts.amazonaws.com";
const AWSVID: &str = "spiffe://example.org/awsvid";
const DEADLINE: Duration = Duration::from_secs(35);

/// A process of this user that does nothing until the value is dropped.
fn idle(workload: &Workload, program: &str, arguments: &[&str]) -> Owned {
    let mut command = workload.command(program);
    command.args(arguments);
    spawn(command).unwrap()
}

fn ids(answer: Result<Vec<Svid>, SourceError>) -> Vec<String> {
    answer.unwrap().into_iter().map(|svid| svid.spiffe_id).collect()
}

/// Asks about a process.
async fn of(agent: &dyn Agent, process: &Owned) -> Result<Vec<Svid>, SourceError> {
    agent.svids(u32::try_from(process.id().as_raw()).unwrap(), AUDIENCE).await
}

/// Two programs of one user have the identities of their own entries, and who has no entry has none.
async fn attests_others(agent: &dyn Agent) {
    let workload = Workload::new(51_001);
    let [sleep, tail] = [("/usr/bin/sleep", &["600"][..]), ("/usr/bin/tail", &["-f", "/dev/null"])]
        .map(|(program, arguments)| idle(&workload, program, arguments));
    let stranger = idle(&Workload::new(51_002), "/usr/bin/sleep", &["600"]);
    assert_eq!(ids(of(agent, &sleep).await), ["spiffe://example.org/sleep"]);
    assert_eq!(ids(of(agent, &tail).await), ["spiffe://example.org/tail"]);
    let denied = of(agent, &stranger).await.unwrap_err();
    assert!(matches!(&denied, SourceError::Denied(text) if text.contains("no registration entry")), "{denied:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_delegated_identity_api_attests_others() {
    if !root() {
        return;
    }
    let folder = folder();
    let setting = SpireSetting { delegates: vec![AWSVID.to_owned()], ..SpireSetting::default() };
    let Some(mut spire) = Spire::start_with(folder.path(), setting) else { return };
    spire.register(AWSVID, &["unix:uid:0"]);
    spire.register("spiffe://example.org/sleep", &["unix:uid:51001", "unix:path:/usr/bin/sleep"]);
    spire.register("spiffe://example.org/tail", &["unix:uid:51001", "unix:path:/usr/bin/tail"]);
    let agent = Delegated::new(&spire.admin_socket(), DEADLINE);
    attests_others(&agent).await;

    // The same agent, and nobody may ask it for others.
    spire.stop_agent();
    spire.setting = SpireSetting { brokers: vec![Broker::by_pid(AWSVID)], ..SpireSetting::default() };
    spire.start_agent();
    let refused = agent.svids(1, AUDIENCE).await.unwrap_err();
    assert!(
        matches!(&refused, SourceError::Misconfigured(text) if text.contains("`authorized_delegates`")),
        "{refused:?}"
    );
}

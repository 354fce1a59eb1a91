//! The clients of the agent's APIs for other processes' identities, against the real SPIRE: its
//! responses and its rejections.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use awsvid::identity::SpiffeIdPattern;
use awsvid::socket_endpoint::Endpoint;
use awsvid::svid::SourceError;
use awsvid::svid::agent::{AgentSvid, AttestingAgent};
use awsvid::svid::own_svid::OwnSvidSource;
use awsvid::svid::spiffe_broker::BrokerApi;
use awsvid::svid::spire_delegated::SpireDelegated;

use crate::harness::counterparts::process::{OwnedProcess, spawn};
use crate::harness::counterparts::spire::{Broker, Spire, SpireSetting};
use crate::harness::counterparts::workload::Workload;
use crate::harness::counterparts::{folder, root};

const AUDIENCE: &str = "sts.amazonaws.com";
const AWSVID: &str = "spiffe://example.org/awsvid";
const DEADLINE: Duration = Duration::from_secs(35);

/// Starts a process of this user that does nothing until the value is dropped.
fn idle(workload: &Workload, program: &str, arguments: &[&str]) -> OwnedProcess {
    let mut command = workload.command(program);
    command.args(arguments);
    spawn(command).unwrap()
}

fn ids(answer: Result<Vec<AgentSvid>, SourceError>) -> Vec<String> {
    answer
        .unwrap()
        .into_iter()
        .map(|svid| svid.spiffe_id)
        .collect()
}

/// Queries the agent about a process.
async fn of(
    agent: &dyn AttestingAgent,
    process: &OwnedProcess,
) -> Result<Vec<AgentSvid>, SourceError> {
    agent
        .fetch_for_pid(u32::try_from(process.id().as_raw()).unwrap(), AUDIENCE)
        .await
}

/// Checks that two programs of one user have the identities of their own entries, and that a
/// process without an entry has none.
async fn attests_others(agent: &dyn AttestingAgent) {
    let workload = Workload::new(51_001);
    let [sleep, tail] = [
        ("/usr/bin/sleep", &["600"][..]),
        ("/usr/bin/tail", &["-f", "/dev/null"]),
    ]
    .map(|(program, arguments)| idle(&workload, program, arguments));
    let stranger = idle(&Workload::new(51_002), "/usr/bin/sleep", &["600"]);
    assert_eq!(ids(of(agent, &sleep).await), ["spiffe://example.org/sleep"]);
    assert_eq!(ids(of(agent, &tail).await), ["spiffe://example.org/tail"]);
    let denied = of(agent, &stranger).await.unwrap_err();
    assert!(
        matches!(&denied, SourceError::Denied(text) if text.contains("no registration entry")),
        "{denied:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn delegated_identity_api_attests_other_processes() {
    if !root() {
        return;
    }
    let folder = folder();
    let setting = SpireSetting {
        delegates: vec![AWSVID.to_owned()],
        ..SpireSetting::default()
    };
    let Some(mut spire) = Spire::start_with(folder.path(), setting) else {
        return;
    };
    spire.register(AWSVID, &["unix:uid:0"]);
    spire.register(
        "spiffe://example.org/sleep",
        &["unix:uid:51001", "unix:path:/usr/bin/sleep"],
    );
    spire.register(
        "spiffe://example.org/tail",
        &["unix:uid:51001", "unix:path:/usr/bin/tail"],
    );
    let agent = SpireDelegated::new(&spire.admin_socket(), DEADLINE);
    attests_others(&agent).await;

    // The same agent, which now lets no client query others.
    spire.stop_agent();
    spire.setting = SpireSetting {
        brokers: vec![Broker::by_pid(AWSVID)],
        ..SpireSetting::default()
    };
    spire.start_agent();
    let rejected = agent.fetch_for_pid(1, AUDIENCE).await.unwrap_err();
    assert!(
        matches!(&rejected, SourceError::Misconfigured(text) if text.contains("`authorized_delegates`")),
        "{rejected:?}"
    );
}

/// Returns a client of the Broker API at `socket`, for an agent with an ID that `server` covers.
fn broker(spire: &Spire, socket: &Path, server: Option<&str>) -> BrokerApi {
    let own = OwnSvidSource::at(Endpoint::Unix(spire.agent_socket()));
    BrokerApi::new(
        socket,
        own,
        server.map(|server| SpiffeIdPattern::parse(server).unwrap()),
        DEADLINE,
    )
}

fn brokers(id: &str, reference_types: &[&'static str]) -> SpireSetting {
    let broker = Broker {
        id: id.to_owned(),
        reference_types: reference_types.to_vec(),
    };
    SpireSetting {
        brokers: vec![broker],
        ..SpireSetting::default()
    }
}

/// Repeats `fetch` until its error, if any, is not a temporary one.
async fn settled<T>(fetch: impl AsyncFn() -> Result<T, SourceError>) -> Result<T, SourceError> {
    let begun = Instant::now();
    loop {
        match fetch().await {
            Err(SourceError::Unavailable(text)) => assert!(begun.elapsed() < DEADLINE, "{text}"),
            answer => return answer,
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Returns why this agent rejects each query, an error that an operator has to fix.
async fn misconfigured(agent: &BrokerApi) -> String {
    match agent.connect().await {
        Err(SourceError::Misconfigured(text)) => text,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn broker_api_attests_other_processes() {
    if !root() {
        return;
    }
    let folder = folder();
    let Some(mut spire) = Spire::start_with(folder.path(), brokers(AWSVID, &[Broker::BY_PID]))
    else {
        return;
    };
    let awsvid = spire.register(AWSVID, &["unix:uid:0"]);
    spire.register(
        "spiffe://example.org/sleep",
        &["unix:uid:51001", "unix:path:/usr/bin/sleep"],
    );
    spire.register(
        "spiffe://example.org/tail",
        &["unix:uid:51001", "unix:path:/usr/bin/tail"],
    );
    let agent = broker(&spire, &spire.broker_socket(), None);
    agent.connect().await.unwrap();
    attests_others(&agent).await;

    // Another holder of a certificate of the trust domain is not accepted as the agent.
    let agent_id = spire.agent_id();
    broker(&spire, &spire.broker_socket(), Some(agent_id))
        .connect()
        .await
        .unwrap();
    let wrong = broker(
        &spire,
        &spire.broker_socket(),
        Some("spiffe://example.org/spire/server"),
    );
    let text = misconfigured(&wrong).await;
    assert!(
        text.contains(agent_id) && text.contains("`broker_server_id`"),
        "{text}"
    );

    // The agent's other sockets.
    for socket in [spire.agent_socket(), spire.admin_socket()] {
        let text = misconfigured(&broker(&spire, &socket, None)).await;
        assert!(
            text.contains("does not speak TLS") && text.contains("`broker_socket`"),
            "{text}"
        );
    }

    // The same client, and an agent that rejects in each way.
    let rejections = [
        (
            brokers("spiffe://example.org/other", &["*"]),
            [AWSVID, "`brokers`"],
        ),
        (
            brokers(
                AWSVID,
                &["type.googleapis.com/spiffe.broker.KubernetesObjectReference"],
            ),
            ["`allowed_reference_types`", Broker::BY_PID],
        ),
    ];
    for (setting, message) in rejections {
        spire.stop_agent();
        spire.setting = setting;
        spire.start_agent();
        spire.await_entry(&awsvid);
        // Until the new agent has sent awsvid its own identity, errors are temporary.
        let answer = settled(async || agent.fetch_for_pid(1, AUDIENCE).await).await;
        let Err(SourceError::Misconfigured(text)) = answer else {
            panic!("{answer:?}")
        };
        assert!(message.iter().all(|part| text.contains(part)), "{text}");
    }
    spire.stop_agent();
    spire.setting = brokers(AWSVID, &["*"]);
    spire.start_agent();
    spire.await_entry(&awsvid);
    settled(async || agent.connect().await).await.unwrap();
    attests_others(&agent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_succeed_during_certificate_renewal() {
    /// Tasks that send queries continuously.
    const TASKS: usize = 8;
    /// The number of renewals of the SVID meanwhile.
    const RENEWALS: u64 = 20;
    if !root() {
        return;
    }
    let folder = folder();
    let setting = SpireSetting {
        x509_svid_ttl: Some("10s"),
        ..brokers(AWSVID, &[Broker::BY_PID])
    };
    let Some(spire) = Spire::start_with(folder.path(), setting) else {
        return;
    };
    spire.register(AWSVID, &["unix:uid:0"]);
    spire.register(
        "spiffe://example.org/sleep",
        &["unix:uid:51001", "unix:path:/usr/bin/sleep"],
    );
    let agent = Arc::new(broker(&spire, &spire.broker_socket(), None));
    agent.connect().await.unwrap();
    let sleeps = idle(&Workload::new(51_001), "/usr/bin/sleep", &["600"]);
    let pid = u32::try_from(sleeps.id().as_raw()).unwrap();

    let (own, begun) = (
        OwnSvidSource::at(Endpoint::Unix(spire.agent_socket())),
        Instant::now(),
    );
    let done = Arc::new(AtomicBool::new(false));
    let fetch = |(agent, done): (Arc<BrokerApi>, Arc<AtomicBool>)| async move {
        let mut answers = 0;
        while !done.load(Relaxed) {
            assert_eq!(
                ids(agent.fetch_for_pid(pid, AUDIENCE).await),
                ["spiffe://example.org/sleep"]
            );
            answers += 1;
        }
        answers
    };
    let tasks: Vec<_> = (0..TASKS)
        .map(|_| tokio::spawn(fetch((agent.clone(), done.clone()))))
        .collect();
    let first = own.first(DEADLINE).await.unwrap().version;
    while own.latest().unwrap().version < first + RENEWALS {
        assert!(
            begun.elapsed() < Duration::from_secs(120),
            "renewed {} times",
            own.latest().unwrap().version - first
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    done.store(true, Relaxed);
    let mut answers = 0;
    for task in tasks {
        answers += task.await.unwrap();
    }
    eprintln!(
        "{answers} answers, {RENEWALS} renewals in {:?}",
        begun.elapsed()
    );
}

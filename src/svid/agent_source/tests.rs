mod certificates;
mod pods;
mod query_limits;
mod slow;

use std::collections::{BTreeSet, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};
use zeroize::Zeroizing;

use super::held_tokens::TOKEN_TTL;
use super::own_ids::OWN_ID_RECHECK;
use super::query::{EXEC_RETRY_PAUSES, NEW_POD_AGE, NEW_POD_RETRY, QUERY_WAIT};
use super::*;
use crate::caller::{
    AgentProcessRef, AttestError, ExecWatch, Executable, GroupDetail, Groups, ListenerKind,
    PeerFacts, PeerProof, Process, Program,
};
use crate::captured_log::CapturedLog;
use crate::socket_endpoint::Endpoint;
use crate::svid::CALL_TIMEOUT;
use crate::svid::ReceivedX509Svid;
use crate::svid::agent::AgentSvid;
use crate::svid::jwt::tests::{NOW, now, raw_token, token_for};
use crate::svid::own_svid::tests::fake::Authority;
use crate::svid::proto::workload::X509svid;

const AUDIENCE: &str = "sts.amazonaws.com";
const MAX_PROCESSES: usize = 100;

/// An agent that replies by the test's script, and counts its calls.
#[derive(Debug)]
struct AgentScript {
    /// The identities of each process by its number, the daemon's own included.
    reply: Mutex<Box<dyn FakeAgentReplies>>,
    /// One permit for each call that may be answered.
    gate: Semaphore,
    /// Processes for which it never answers.
    hangs: Mutex<HashSet<u32>>,
    /// The reply that replaces all others, if it is not empty.
    merged: Mutex<Vec<AgentSvid>>,
    /// Whether it has no tokens for other processes than the daemon.
    has_no_tokens: AtomicBool,
    /// The reply of certificates that replaces all others.
    certificates: Mutex<Option<Result<Vec<X509svid>, SourceError>>>,
    calls: AtomicUsize,
    /// One clone for each call in flight.
    active: Arc<()>,
    endpoint: Endpoint,
}

trait FakeAgentReplies: Fn(u32) -> Result<Vec<&'static str>, SourceError> + Send {}
impl<F: Fn(u32) -> Result<Vec<&'static str>, SourceError> + Send> FakeAgentReplies for F {}

impl fmt::Debug for dyn FakeAgentReplies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Answers")
    }
}

impl AgentScript {
    fn reply(reply: impl FakeAgentReplies + 'static) -> Arc<Self> {
        Arc::new(Self {
            reply: Mutex::new(Box::new(reply)),
            gate: Semaphore::new(Semaphore::MAX_PERMITS),
            hangs: Mutex::default(),
            merged: Mutex::default(),
            has_no_tokens: AtomicBool::new(false),
            certificates: Mutex::default(),
            calls: AtomicUsize::new(0),
            active: Arc::default(),
            endpoint: Endpoint::Unix(PathBuf::from("/agent")),
        })
    }

    fn set_reply(&self, reply: impl FakeAgentReplies + 'static) {
        *self.reply.lock().unwrap() = Box::new(reply);
    }

    /// Returns the number of calls in flight.
    fn active(&self) -> usize {
        Arc::strong_count(&self.active) - 1
    }

    /// Returns the number of calls for processes other than the daemon.
    fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl AttestingAgent for AgentScript {
    async fn fetch_for_pid(&self, pid: u32, audience: &str) -> Result<Vec<AgentSvid>, SourceError> {
        let _active = self.active.clone();
        if pid != std::process::id() {
            self.calls.fetch_add(1, Ordering::SeqCst);
            self.gate.acquire().await.unwrap().forget();
        }
        if self.hangs.lock().unwrap().contains(&pid) {
            sleep(CALL_TIMEOUT).await;
            return Err(SourceError::Unavailable(
                "no answer within the deadline".to_owned(),
            ));
        }
        if self.has_no_tokens.load(Ordering::SeqCst) && pid != std::process::id() {
            let text = "could not fetch JWT-SVID".to_owned();
            return Err(SourceError::Unavailable(text));
        }
        let merged = self.merged.lock().unwrap();
        if !merged.is_empty() {
            let copy = |svid: &AgentSvid| AgentSvid {
                spiffe_id: svid.spiffe_id.clone(),
                token: svid.token.clone(),
                hint: svid.hint.clone(),
            };
            return Ok(merged.iter().map(copy).collect());
        }
        let ids = (self.reply.lock().unwrap())(pid)?;
        Ok(ids.iter().map(|id| svid_of(id, audience)).collect())
    }

    async fn fetch_x509_for_pid(&self, pid: u32) -> Result<Vec<ReceivedX509Svid>, SourceError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        if let Some(reply) = self.certificates.lock().unwrap().clone() {
            return Ok(reply?.into_iter().map(Into::into).collect());
        }
        let authority = Authority::new();
        let ids = (self.reply.lock().unwrap())(pid)?;
        Ok(ids.iter().map(|id| authority.svid(id).into()).collect())
    }

    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    async fn connect(&self) -> Result<(), SourceError> {
        Ok(())
    }
}

fn svid_of(id: &str, audience: &str) -> AgentSvid {
    let claims = format!(
        r#"{{"sub":"{id}","aud":["{audience}"],"iat":{NOW},"exp":{}}}"#,
        NOW + 300
    );
    let token = raw_token(r#"{"alg":"ES256","typ":"JWT"}"#, &claims);
    AgentSvid {
        spiffe_id: id.to_owned(),
        token: Zeroizing::new(token),
        hint: None,
    }
}

const AWSVID: &str = "spiffe://example.org/awsvid";
const SHOP: &str = "spiffe://example.org/shop";

/// Replies with the daemon's own identity, and the shop's for all other processes.
fn shop(pid: u32) -> Result<Vec<&'static str>, SourceError> {
    Ok(vec![if pid == std::process::id() {
        AWSVID
    } else {
        SHOP
    }])
}

fn denied() -> SourceError {
    SourceError::Denied("no identity issued".to_owned())
}

fn own_alone(pid: u32) -> Result<Vec<&'static str>, SourceError> {
    if pid == std::process::id() {
        Ok(vec![AWSVID])
    } else {
        Err(denied())
    }
}

/// The facts of `process` by the number of reads so far. From this read on it is another process.
#[derive(Debug)]
struct ScriptedProof {
    pid: u32,
    reads: Arc<AtomicU32>,
    changes_at: Option<u32>,
    error: Option<AttestError>,
    /// Number of further watches during which a program is executed.
    executions: AtomicU32,
}

#[derive(Debug)]
struct ScriptedExecWatch {
    no_exec: bool,
}

impl ExecWatch for ScriptedExecWatch {
    fn no_exec_seen(&self) -> bool {
        self.no_exec
    }
}

#[async_trait::async_trait]
impl PeerProof for ScriptedProof {
    async fn verify_unchanged(&self) -> Result<(), AttestError> {
        Ok(())
    }

    async fn for_agent(&self) -> Result<AgentProcessRef, AttestError> {
        let read = self.reads.fetch_add(1, Ordering::SeqCst);
        match (&self.error, self.changes_at) {
            (Some(error), None) => Err(error.clone()),
            (Some(error), Some(at)) if read >= at => Err(error.clone()),
            (None, Some(at)) if read >= at => Ok(AgentProcessRef {
                pid: self.pid,
                cgroups: "0::/moved\n".to_owned(),
            }),
            _ => Ok(AgentProcessRef {
                pid: self.pid,
                cgroups: "0::/\n".to_owned(),
            }),
        }
    }

    fn watch_exec(&self) -> Result<Box<dyn ExecWatch>, AttestError> {
        let remaining =
            self.executions
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |remaining| {
                    remaining.checked_sub(1)
                });
        Ok(Box::new(ScriptedExecWatch {
            no_exec: remaining.is_err(),
        }))
    }
}

fn caller_with(
    uid: u32,
    pid: u32,
    changes_at: Option<u32>,
    error: Option<AttestError>,
) -> Arc<Caller> {
    let executions = AtomicU32::new(0);
    caller_by(
        uid,
        ScriptedProof {
            pid,
            reads: Arc::default(),
            changes_at,
            error,
            executions,
        },
    )
}

/// Returns a caller for which a program is executed during this many queries, by it or a neighbour.
fn executing_caller(pid: u32, times: u32) -> Arc<Caller> {
    let executions = AtomicU32::new(times);
    caller_by(
        1001,
        ScriptedProof {
            pid,
            reads: Arc::default(),
            changes_at: None,
            error: None,
            executions,
        },
    )
}

fn caller_by(uid: u32, evidence: ScriptedProof) -> Arc<Caller> {
    let pid = evidence.pid;
    let exe = Executable {
        device: 1,
        inode: 7,
        changed: (0, 0),
        path: PathBuf::from("/bin/shop").into(),
    };
    let program = Some(Program { exe: Some(exe) });
    let groups = Some(Groups::new(Vec::new(), GroupDetail::Digest).unwrap());
    let process = Process {
        pid,
        gid: uid,
        groups,
        in_container: false,
        program,
        started: Some(1),
    };
    Arc::new(Caller {
        listener: ListenerKind::Unix,
        peer: PeerFacts::of_user(uid),
        process: Some(process),
        proof: Box::new(evidence),
    })
}

fn caller(pid: u32) -> Arc<Caller> {
    caller_with(1001, pid, None, None)
}

fn source(agent: &Arc<AgentScript>) -> AgentSource {
    source_with(agent, false)
}

fn source_with(agent: &Arc<AgentScript>, uses_certificates: bool) -> AgentSource {
    AgentSource::new(
        agent.clone(),
        AUDIENCE.to_owned(),
        uses_certificates,
        MAX_PROCESSES,
        Clock::starting_at(now()),
        Metrics::default(),
    )
}

fn ids(identities: Result<Vec<Identity>, SourceError>) -> Vec<String> {
    identities
        .unwrap()
        .into_iter()
        .map(|identity| identity.spiffe_id.to_string())
        .collect()
}

fn shop_id() -> SpiffeId {
    SpiffeId::parse(SHOP).unwrap()
}

#[tokio::test]
async fn identity_comes_from_a_registration_entry() {
    let fix = source(&AgentScript::reply(shop)).identity_fix();
    assert!(fix.contains("registration entry"), "{fix}");
}

#[tokio::test(start_paused = true)]
async fn new_process_costs_one_call_and_a_known_one_none() {
    let agent = AgentScript::reply(shop);
    let source = source(&agent);
    for _ in 0..3 {
        assert_eq!(ids(source.identify(&caller(1)).await), [SHOP]);
    }
    // The reply had a token, which is held for one exchange.
    let token = source
        .token(&caller(1), &shop_id(), AUDIENCE)
        .await
        .unwrap();
    assert_eq!(
        (token.spiffe_id(), token.audience(), agent.calls()),
        (&shop_id(), AUDIENCE, 1)
    );
    source
        .token(&caller(1), &shop_id(), AUDIENCE)
        .await
        .unwrap();
    assert_eq!(agent.calls(), 2);
    let other = source.token(&caller(1), &shop_id(), "minio").await.unwrap();
    assert_eq!((other.audience(), agent.calls()), ("minio", 3));
    assert_eq!(ids(source.identify(&caller(2)).await), [SHOP]);
    assert_eq!((agent.calls(), source.0.cache().len()), (4, 2));
    let metrics = source.0.metrics.encode();
    assert!(
        metrics.contains("awsvid_source_calls_total{result=\"ok\"} 4\n"),
        "{metrics}"
    );
}

#[tokio::test(start_paused = true)]
async fn held_token_expires_and_is_for_one_process() {
    let agent = AgentScript::reply(shop);
    let source = source(&agent);
    source.identify(&caller(1)).await.unwrap();
    source
        .token(&caller(2), &shop_id(), AUDIENCE)
        .await
        .unwrap();
    assert_eq!(agent.calls(), 2, "another process's token is not taken");
    tokio::time::advance(TOKEN_TTL).await;
    source
        .token(&caller(1), &shop_id(), AUDIENCE)
        .await
        .unwrap();
    assert_eq!(agent.calls(), 3);
}

#[tokio::test(start_paused = true)]
async fn concurrent_requests_share_one_query() {
    let agent = AgentScript::reply(shop);
    let source = Arc::new(source(&agent));
    let requests: Vec<_> = (0..100)
        .map(|_| {
            let source = source.clone();
            tokio::spawn(async move { source.identify(&caller(1)).await })
        })
        .collect();
    for requests in requests {
        assert_eq!(ids(requests.await.unwrap()), [SHOP]);
    }
    assert_eq!(agent.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn agent_is_not_queried_about_a_misreadable_process() {
    let agent = AgentScript::reply(shop);
    let source = source(&agent);
    for error in [
        AttestError::DelegatedCgroup,
        AttestError::NestedContainer,
        AttestError::CallerGone,
    ] {
        let caller = caller_with(1001, 1, None, Some(error.clone()));
        assert_eq!(source.identify(&caller).await, Err(error.clone().into()));
        assert_eq!(
            source
                .token(&caller, &shop_id(), AUDIENCE)
                .await
                .unwrap_err(),
            error.into()
        );
    }
    assert_eq!((agent.calls(), source.0.cache().len()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn reply_is_discarded_if_the_process_changed() {
    let agent = AgentScript::reply(shop);
    let source = source(&agent);
    for (error, expected) in [
        (None, AttestError::IdentityChanged),
        (Some(AttestError::CallerGone), AttestError::CallerGone),
    ] {
        // The first read is before the call.
        let changed = || caller_with(1001, 1, Some(1), error.clone());
        assert_eq!(
            source.identify(&changed()).await,
            Err(expected.clone().into())
        );
        assert_eq!(
            source
                .token(&changed(), &shop_id(), AUDIENCE)
                .await
                .unwrap_err(),
            expected.into()
        );
    }
    assert_eq!((agent.calls(), source.0.cache().len()), (4, 0));
    assert_eq!(
        ids(source.identify(&caller(1)).await),
        [SHOP],
        "no part of it is remembered"
    );
    assert_eq!(agent.calls(), 5);
}

#[tokio::test(start_paused = true)]
async fn x509_svid_is_for_the_process_that_was_there_before_and_after() {
    let agent = AgentScript::reply(shop);
    let source = source(&agent);
    let svid = source.x509_svid(&caller(1), &shop_id()).await.unwrap();
    assert_eq!(svid.spiffe_id(), &shop_id());
    let changed = caller_with(1001, 1, Some(1), None);
    let error = source.x509_svid(&changed, &shop_id()).await.unwrap_err();
    assert_eq!(error, AttestError::IdentityChanged.into());
    let executing = executing_caller(2, u32::try_from(EXEC_RETRY_PAUSES.len()).unwrap());
    let error = source.x509_svid(&executing, &shop_id()).await.unwrap_err();
    assert_eq!(error, AttestError::ProcessExecuting.into());
    let other = SpiffeId::parse("spiffe://example.org/other").unwrap();
    let error = source.x509_svid(&caller(1), &other).await.unwrap_err();
    assert!(matches!(error, SourceError::Denied(_)), "{error:?}");

    agent.set_reply(|_| Ok(vec![AWSVID]));
    let own = SpiffeId::parse(AWSVID).unwrap();
    let error = source.x509_svid(&caller(1), &own).await.unwrap_err();
    assert!(matches!(error, SourceError::Denied(_)), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn process_is_queried_again_after_an_execution() {
    let agent = AgentScript::reply(shop);
    let source = source(&agent);
    let tries = u32::try_from(EXEC_RETRY_PAUSES.len()).unwrap();
    assert_eq!(
        ids(source.identify(&executing_caller(1, tries - 1)).await),
        [SHOP]
    );
    assert_eq!(agent.calls(), tries as usize);
    let error = source
        .identify(&executing_caller(2, tries))
        .await
        .unwrap_err();
    assert_eq!(error, AttestError::ProcessExecuting.into());
    assert!(AttestError::ProcessExecuting.is_transient());
    assert_eq!(agent.calls(), 2 * tries as usize);
    assert_eq!(
        ids(source.identify(&caller(2)).await),
        [SHOP],
        "the error is not remembered"
    );
}

#[tokio::test(start_paused = true)]
async fn own_identity_is_issued_to_no_workload() {
    let agent = AgentScript::reply(|_| Ok(vec![AWSVID, "spiffe://example.org/daemon-too"]));
    let source = source(&agent);
    assert_eq!(ids(source.identify(&caller(1)).await), [""; 0]);
    let own = SpiffeId::parse(AWSVID).unwrap();
    let error = source.token(&caller(1), &own, AUDIENCE).await.unwrap_err();
    assert!(matches!(error, SourceError::Denied(_)), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn denial_counts_only_if_the_agent_knows_the_daemon() {
    let agent = AgentScript::reply(own_alone);
    let source = source(&agent);
    assert_eq!(source.ready(AUDIENCE).await, Ok(()));
    assert_eq!(ids(source.identify(&caller(1)).await), [""; 0]);
    // The agent has restarted, and does not have its entries from the server yet.
    agent.set_reply(|_| Err(denied()));
    tokio::time::advance(OWN_ID_RECHECK).await;
    let new = source.identify(&caller(2)).await.unwrap_err();
    assert!(
        matches!(&new, SourceError::Unavailable(text) if text.contains("register one for its process")),
        "{new:?}"
    );
    let not_ready = source.ready(AUDIENCE).await.unwrap_err();
    assert!(
        matches!(not_ready, SourceError::Unavailable(_)),
        "{not_ready:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn deleted_entry_takes_effect_within_a_minute() {
    let agent = AgentScript::reply(shop);
    let source = source(&agent);
    source.identify(&caller(1)).await.unwrap();
    agent.set_reply(own_alone);
    let deleted = Instant::now();
    while !source.identify(&caller(1)).await.unwrap().is_empty() {
        assert!(deleted.elapsed() < Duration::from_secs(60));
        sleep(Duration::from_secs(1)).await;
    }
    assert!(
        deleted.elapsed() >= Duration::from_secs(40),
        "once is not enough: {:?}",
        deleted.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn known_process_keeps_its_identity_in_an_outage() {
    let agent = AgentScript::reply(shop);
    let source = source(&agent);
    source.identify(&caller(1)).await.unwrap();
    agent.set_reply(|_| Err(SourceError::Unavailable("away".to_owned())));
    for _ in 0..600 {
        sleep(Duration::from_secs(1)).await;
        assert_eq!(ids(source.identify(&caller(1)).await), [SHOP]);
    }
    assert!(agent.calls() > 10, "it is queried again all the time");
    assert_eq!(
        source.identify(&caller(2)).await,
        Err(SourceError::Unavailable("away".to_owned()))
    );
    agent.set_reply(shop);
    assert_eq!(ids(source.identify(&caller(2)).await), [SHOP]);
}

#[tokio::test(start_paused = true)]
async fn process_that_is_gone_is_removed() {
    let agent = AgentScript::reply(shop);
    let source = source(&agent);
    // One read before and one after the first call, and then no more.
    source
        .identify(&caller_with(
            1001,
            1,
            Some(2),
            Some(AttestError::CallerGone),
        ))
        .await
        .unwrap();
    assert_eq!(source.0.cache().len(), 1);
    sleep(Duration::from_secs(32)).await;
    assert_eq!((source.0.cache().len(), agent.calls()), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn slow_agent_is_waited_for_within_a_bound_and_its_reply_is_cached() {
    let agent = AgentScript::reply(shop);
    agent.gate.forget_permits(Semaphore::MAX_PERMITS);
    let source = source(&agent);
    let start = Instant::now();
    let first = source.identify(&caller(1)).await.unwrap_err();
    assert!(matches!(first, SourceError::Unavailable(_)), "{first:?}");
    assert_eq!(start.elapsed(), REQUEST_HOLD);
    agent.gate.add_permits(1);
    assert_eq!(ids(source.identify(&caller(1)).await), [SHOP]);
    assert_eq!(agent.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn excess_queries_are_rejected_and_other_workloads_get_permits() {
    let agent = AgentScript::reply(shop);
    agent.gate.forget_permits(Semaphore::MAX_PERMITS);
    let source = Arc::new(source(&agent));
    let start = Instant::now();
    let requests: Vec<_> = (1..=50)
        .map(|pid| {
            let source = source.clone();
            tokio::spawn(async move { (source.identify(&caller(pid)).await, Instant::now()) })
        })
        .collect();
    tokio::task::yield_now().await;
    let other = {
        let source = source.clone();
        tokio::spawn(async move { source.identify(&caller_with(1002, 99, None, None)).await })
    };
    sleep(QUERY_WAIT + Duration::from_millis(100)).await;
    assert_eq!(
        agent.calls(),
        MAX_QUERIES_PER_WORKLOAD + 1,
        "so many of the one, and the other"
    );
    agent.gate.add_permits(MAX_QUERIES_PER_WORKLOAD + 1);
    assert_eq!(ids(other.await.unwrap()), [SHOP]);
    let mut busy = 0;
    for requests in requests {
        match requests.await.unwrap() {
            (Err(SourceError::Busy), at) => {
                busy += 1;
                assert_eq!(at - start, QUERY_WAIT);
            }
            (result, _) => assert_eq!(ids(result), [SHOP]),
        }
    }
    assert_eq!(busy, 50 - MAX_QUERIES_PER_WORKLOAD);
    assert_eq!(
        source.0.cache().len(),
        MAX_QUERIES_PER_WORKLOAD + 1,
        "those without a query are not remembered"
    );
}

#[tokio::test(start_paused = true)]
async fn overflow_user_has_no_identity() {
    let agent = AgentScript::reply(shop);
    assert_eq!(
        source(&agent)
            .identify(&caller_with(OVERFLOW_ID, 1, None, None))
            .await,
        Ok(Vec::new())
    );
    assert_eq!(agent.calls(), 0);
}

/// Returns the identities that are accepted from a reply.
async fn accepted_identities(
    source: &AgentSource,
    svids: Vec<AgentSvid>,
) -> Result<Vec<Identity>, SourceError> {
    source
        .0
        .exclude_own_identities(svids, Some(&Subject::of(&caller(1), false).unwrap()))
        .await
        .map(|ids| ids.to_vec())
}

/// Returns a token of `subject` under the label `id`.
fn labelled(id: &str, subject: &str) -> AgentSvid {
    AgentSvid {
        spiffe_id: id.to_owned(),
        ..svid_of(subject, AUDIENCE)
    }
}

#[tokio::test(start_paused = true)]
async fn identity_that_is_not_a_spiffe_id_is_ignored() {
    let agent = AgentScript::reply(shop);
    let source = source(&agent);
    let odd = ["spiffe://", "https://example.org/x", ""].map(|id| labelled(id, SHOP));
    assert_eq!(
        ids(accepted_identities(
            &source,
            odd.into_iter().chain([svid_of(SHOP, AUDIENCE)]).collect()
        )
        .await),
        [SHOP]
    );
}

const OTHER: &str = "spiffe://example.org/other";

#[tokio::test(start_paused = true)]
async fn identity_needs_a_token_of_its_own() {
    let agent = AgentScript::reply(shop);
    let source = source(&agent);
    let error = accepted_identities(&source, vec![labelled(SHOP, OTHER)])
        .await
        .unwrap_err();
    assert!(matches!(error, SourceError::BadToken(_)), "{error:?}");
    assert!(
        !error.to_string().contains("other"),
        "whose it is, is nobody's business: {error}"
    );
    let no_token = AgentSvid {
        spiffe_id: SHOP.to_owned(),
        token: Zeroizing::new(String::new()),
        hint: None,
    };
    assert!(matches!(
        accepted_identities(&source, vec![no_token]).await,
        Err(SourceError::BadToken(_))
    ));
    // The rest of the reply still counts, in any order.
    for svids in [
        [labelled(SHOP, OTHER), svid_of(OTHER, AUDIENCE)],
        [svid_of(OTHER, AUDIENCE), labelled(SHOP, OTHER)],
    ] {
        assert_eq!(
            ids(accepted_identities(&source, svids.into()).await),
            [OTHER]
        );
    }
    // A token that cannot be exchanged still proves the identity.
    assert_eq!(
        ids(accepted_identities(&source, vec![svid_of(SHOP, "another audience")]).await),
        [SHOP]
    );
}

#[tokio::test(start_paused = true)]
async fn repeated_identity_keeps_all_hints() {
    let agent = AgentScript::reply(shop);
    let source = source(&agent);
    let hinted = |hint: &str| AgentSvid {
        hint: Some(hint.to_owned()),
        ..svid_of(SHOP, AUDIENCE)
    };
    let svids = vec![hinted("a"), hinted("b"), hinted("a"), labelled(SHOP, OTHER)];
    let identities = accepted_identities(&source, svids).await.unwrap();
    let hints: Vec<_> = identities
        .iter()
        .map(|identity| identity.hint.as_deref())
        .collect();
    assert_eq!(hints, [Some("a"), Some("b")]);
    assert!(
        identities
            .iter()
            .all(|identity| identity.spiffe_id == shop_id())
    );
}

#[tokio::test(start_paused = true)]
async fn token_is_found_among_others_with_its_label() {
    let agent = AgentScript::reply(|_| Ok(vec![SHOP]));
    *agent.merged.lock().unwrap() = vec![
        labelled(SHOP, OTHER),
        svid_of(SHOP, AUDIENCE),
        svid_of(SHOP, AUDIENCE),
    ];
    let own = BTreeSet::from([SpiffeId::parse(AWSVID).unwrap()]);
    let source = source(&agent);
    source.0.own.set(own, Instant::now());
    assert_eq!(
        source
            .token(&caller(1), &shop_id(), AUDIENCE)
            .await
            .unwrap()
            .spiffe_id(),
        &shop_id()
    );
    agent.merged.lock().unwrap().truncate(1);
    let error = source
        .token(&caller(1), &shop_id(), AUDIENCE)
        .await
        .unwrap_err();
    assert!(matches!(error, SourceError::BadToken(_)), "{error:?}");
    let other = SpiffeId::parse(OTHER).unwrap();
    let denied = source
        .token(&caller(1), &other, AUDIENCE)
        .await
        .unwrap_err();
    assert!(
        matches!(denied, SourceError::Denied(_)),
        "a token under another name is nobody's: {denied:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn held_token_is_not_used_when_about_to_expire() {
    let agent = AgentScript::reply(shop);
    let source = source(&agent);
    let short = |serial| {
        JwtSvid::check(
            token_for(&shop_id(), 9, serial),
            &shop_id(),
            AUDIENCE,
            now(),
        )
        .unwrap()
    };
    let subject = Subject::of(&caller(1), false).unwrap();
    source.0.tokens.hold(&subject, short(1));
    assert!(
        source
            .0
            .tokens
            .take(&subject, &shop_id(), source.0.clock.now())
            .is_some()
    );
    source.0.tokens.hold(&subject, short(2));
    tokio::time::advance(Duration::from_secs(7)).await;
    assert!(
        source
            .0
            .tokens
            .take(&subject, &shop_id(), source.0.clock.now())
            .is_none()
    );
}

#[tokio::test(start_paused = true)]
async fn alternating_denials_are_logged_once_each() {
    let log = CapturedLog::start();
    let agent = AgentScript::reply(shop);
    let source = source(&agent);
    for _ in 0..100 {
        source.0.log_denial("no entry matches pod a");
        source.0.log_denial("no entry matches pod b");
    }
    assert_eq!(
        log.text()
            .lines()
            .filter(|line| line.contains("no identity"))
            .count(),
        2,
        "{}",
        log.text()
    );
}

#[tokio::test(start_paused = true)]
async fn source_stops_its_task_when_dropped() {
    let agent = AgentScript::reply(shop);
    drop(source(&agent));
    sleep(revalidation::REVALIDATE_TICK * 2).await;
    assert_eq!(Arc::strong_count(&agent), 1);
}

//! The common part of `spire-delegated` and `spiffe-broker`. An agent attests the caller's process
//! by its number, or its pod by its UID, and returns its identities.
//!
//! An agent reads whatever process has the number at some moment of the call. So the daemon holds
//! the process by its pidfd, and reads it before and after. The reply counts only if all facts were
//! equal both times (T3), and if the agent cannot misread the process's cgroups (T2). It is then
//! cached for that process.

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::agent::{AgentSvid, AttestingAgent};
use super::identity_cache::{
    FACTS_FOR_AGENT, IdentityCache, IdentityLookup, IdentityResult, Subject, has_all_facts,
};
use super::log_limit::{LogLimiter, LogPermit};
use super::{IdentityBasis, IdentitySource, JwtSvid, SourceError};
use crate::caller::{AttestError, Caller, ProcessFacts, WorkloadKey};
use crate::cgroup::PodUid;
use crate::clock::{Clock, REQUEST_HOLD};
use crate::identity::SpiffeId;
use crate::limits::{FairPermit, FairSemaphore};
use crate::metrics::{CallLabel, Metrics, UpstreamCall};
use crate::role::Identity;
use crate::telemetry::in_current_request;
use crate::workload_rule::OVERFLOW_ID;

mod revalidation;

/// Maximum wait for a permit. SDKs give up after a second, and on such a busy machine the query
/// needs a part of it.
const QUERY_WAIT: Duration = Duration::from_millis(600);
/// Maximum number of concurrent queries about unknown subjects. At this limit the workload with the
/// most loses its newest query, unless no other workload holds fewer (T29).
const MAX_QUERIES: usize = 32;
/// The part of [`MAX_QUERIES`] that one workload may use.
const MAX_QUERIES_PER_WORKLOAD: usize = 8;
/// Time for which the tokens of a reply are held for the exchange that follows it.
const TOKEN_TTL: Duration = Duration::from_secs(10);
/// Maximum number of held tokens.
const MAX_TOKENS: usize = 256;
/// Age of a pod or container up to which a denial is retried. The kubelet's list, the agent's cache
/// of it, or a new registration entry may lack it.
const NEW_POD_AGE: Duration = Duration::from_secs(10);
/// First delay before such a retry. It doubles with each retry, as long as a request waits.
const NEW_POD_RETRY: Duration = Duration::from_millis(100);
/// Delays before the query is repeated, if the process may have executed a program during the
/// query.
const EXEC_RETRY_PAUSES: [Duration; 4] = [
    Duration::from_millis(20),
    Duration::from_millis(40),
    Duration::from_millis(80),
    Duration::ZERO,
];
/// Time for which the daemon's own identities are taken as current.
const OWN_ID_TTL: Duration = Duration::from_secs(60);
/// Time until the next query of them after one that failed.
const OWN_ID_RETRY: Duration = Duration::from_secs(5);
/// Maximum age of the agent's last confirmation of the daemon, when the agent denies a workload.
const OWN_ID_RECHECK: Duration = Duration::from_secs(1);

/// Identity source of an agent that attests callers. It caches identities, and revalidates them in
/// the background until it is dropped.
pub struct AgentSource(Arc<AgentSourceInner>);

struct AgentSourceInner {
    agent: Arc<dyn AttestingAgent>,
    /// `[identity] audience`, for the tokens that are fetched to learn identities.
    audience: String,
    clock: Clock,
    metrics: Metrics,
    cache: Mutex<IdentityCache>,
    tokens: Mutex<VecDeque<HeldToken>>,
    query_permits: FairSemaphore<WorkloadKey>,
    /// The daemon's own identities, which no workload gets.
    own: Mutex<Option<OwnIds>>,
    /// Held during a query of them. Requests for which the cached ones are fresh enough do not
    /// wait.
    own_query_lock: tokio::sync::Mutex<()>,
    log: LogLimiter,
}

/// The daemon's own identities, as the agent reported them.
#[derive(Debug)]
struct OwnIds {
    ids: BTreeSet<SpiffeId>,
    /// Time of the agent's last confirmation.
    confirmed: Instant,
    /// The start of their age. Later than `confirmed` if a failed query delays the next one.
    fresh_from: Instant,
}

/// Reply of an agent to one query.
type AgentReply = Result<Vec<AgentSvid>, SourceError>;

struct HeldToken {
    subject: Subject,
    token: JwtSvid,
    at: Instant,
}

impl fmt::Debug for AgentSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AgentSource")
            .field("agent", &self.0.agent)
            .finish_non_exhaustive()
    }
}

impl AgentSource {
    /// Creates a source with tokens for `audience`, unless a role has another one. It caches up to
    /// `max_processes` processes. Must be called within a tokio runtime.
    pub fn new(
        agent: Arc<dyn AttestingAgent>,
        audience: String,
        max_processes: usize,
        clock: Clock,
        metrics: Metrics,
    ) -> Self {
        let inner = Arc::new(AgentSourceInner {
            agent,
            audience,
            clock,
            metrics,
            cache: Mutex::new(IdentityCache::new(max_processes)),
            tokens: Mutex::default(),
            query_permits: FairSemaphore::new(MAX_QUERIES, MAX_QUERIES_PER_WORKLOAD),
            own: Mutex::default(),
            own_query_lock: tokio::sync::Mutex::default(),
            log: LogLimiter::default(),
        });
        tokio::spawn(revalidation::run(Arc::downgrade(&inner)));
        Self(inner)
    }
}

#[async_trait]
impl IdentitySource for AgentSource {
    async fn identify(&self, caller: &Arc<Caller>) -> Result<Vec<Identity>, SourceError> {
        let subject = self.0.subject(caller)?;
        // The kernel's stand-in for unmapped IDs does not identify a user (T14). In a pod the user
        // does not matter.
        if caller.uid == OVERFLOW_ID && !matches!(subject, Subject::Pod(_)) {
            return Ok(Vec::new());
        }
        let found = self.0.cache().find(&subject, caller)?;
        let receiver = match found {
            IdentityLookup::Cached(identities) => return Ok(identities.to_vec()),
            IdentityLookup::InFlight(receiver) => receiver,
            IdentityLookup::Unknown(receiver) => {
                // The query continues after the caller disconnects.
                tokio::spawn(in_current_request(
                    self.0.clone().query_new(subject, caller.clone()),
                ));
                receiver
            }
        };
        wait(receiver).await.map(|identities| identities.to_vec())
    }

    async fn token(
        &self,
        caller: &Arc<Caller>,
        id: &SpiffeId,
        audience: &str,
    ) -> Result<JwtSvid, SourceError> {
        let subject = self.0.subject(caller)?;
        if audience == self.0.audience
            && let Some(token) = self.0.take_token(&subject, id)
        {
            return Ok(token);
        }
        let svids = self.0.query(caller, audience).await?;
        let is_own = self.0.own(OWN_ID_TTL).await?.contains(id);
        let tokens = svids
            .into_iter()
            .filter(|svid| svid.spiffe_id == id.as_str() && !is_own)
            .map(|svid| svid.token);
        JwtSvid::check_any(tokens, id, audience, self.0.clock.now())?.ok_or_else(|| {
            SourceError::Denied(format!(
                "the SPIFFE agent does not give {id} to this workload any more"
            ))
        })
    }

    fn facts_needed(&self, caller: &Caller) -> Option<ProcessFacts> {
        let by_pod = caller.pod.is_some() && self.0.agent.supports_pod_references();
        (!by_pod && !has_all_facts(caller)).then_some(FACTS_FOR_AGENT)
    }

    fn basis(&self, _: &SpiffeId) -> IdentityBasis {
        IdentityBasis::Agent(self.0.agent.endpoint().clone())
    }

    async fn ready(&self, _: &str) -> Result<(), SourceError> {
        self.0.agent.ready(&self.0.audience).await
    }
}

/// Waits for the result at most [`REQUEST_HOLD`]. Kubernetes may delay the agent for half a minute.
/// The query continues, and the next request finds its result.
async fn wait(mut receiver: watch::Receiver<Option<IdentityResult>>) -> IdentityResult {
    let timeout_error =
        || SourceError::Unavailable("the SPIFFE agent has not answered yet; retry".to_owned());
    let reply = timeout(REQUEST_HOLD, receiver.wait_for(Option::is_some))
        .await
        .map_err(|_| timeout_error())?;
    // The sender is dropped without a result only if the daemon ends.
    reply
        .ok()
        .and_then(|reply| reply.clone())
        .unwrap_or_else(|| Err(timeout_error()))
}

impl AgentSourceInner {
    fn subject(&self, caller: &Caller) -> Result<Subject, SourceError> {
        Subject::of(caller, self.agent.supports_pod_references())
    }

    /// Queries the agent about an unknown subject, once a permit is free.
    async fn query_new(self: Arc<Self>, subject: Subject, caller: Arc<Caller>) {
        let (until, mut pause) = (Instant::now() + REQUEST_HOLD, NEW_POD_RETRY);
        let (reply, duration) = loop {
            let start = Instant::now();
            let reply = match self
                .query_permits
                .acquire_evicting_within(QUERY_WAIT, &WorkloadKey::of(&caller))
                .await
            {
                Some(permit) => self.query_until_evicted(&permit, &subject, &caller).await,
                None => Err(SourceError::Busy),
            };
            let is_denied = reply.as_ref().is_ok_and(|identities| identities.is_empty());
            if !is_denied || !is_new_pod(&subject, &caller) {
                break (reply, start.elapsed());
            }
            if Instant::now() + pause >= until {
                let text = "the SPIFFE agent does not know this new pod yet, or has no registration entry for it; retry";
                break (
                    Err(SourceError::Unavailable(text.to_owned())),
                    start.elapsed(),
                );
            }
            // The permit is released during the pause, for known subjects.
            sleep(pause).await;
            pause *= 2;
        };
        self.cache().record(&subject, reply, duration);
    }

    /// Queries the identities of an unknown subject. If the permit is evicted, the call to the
    /// agent is cancelled, and the requests that wait fail with [`SourceError::Busy`].
    async fn query_until_evicted(
        self: &Arc<Self>,
        permit: &FairPermit<WorkloadKey>,
        subject: &Subject,
        caller: &Arc<Caller>,
    ) -> IdentityResult {
        let start = Instant::now();
        let query = self.clone().identities(caller, Some(subject));
        if let Some(reply) = permit.run(query).await {
            return reply;
        }
        let evicted = Err(SourceError::Busy);
        self.metrics.source_call_evicted(
            CallLabel::of(&evicted, SourceError::reason),
            start.elapsed(),
        );
        if let Some(LogPermit { missed }) = self.log.admit("evicted") {
            let workload = permit.key();
            tracing::warn!(
                ?workload,
                missed,
                "query to the SPIFFE agent cancelled: all queries are in use, and this workload has the most"
            );
        }
        evicted
    }

    /// Queries the identities of this caller now; an empty list is a valid reply. Holds the tokens
    /// if an exchange may follow.
    async fn identities(
        self: Arc<Self>,
        caller: &Arc<Caller>,
        keep: Option<&Subject>,
    ) -> IdentityResult {
        let (inner, keep, caller) = (self.clone(), keep.cloned(), caller.clone());
        let query = AbortOnDropHandle::new(tokio::spawn(in_current_request(async move {
            match inner.query(&caller, &inner.audience).await {
                Ok(svids) => inner.exclude_own_identities(svids, keep.as_ref()).await,
                Err(SourceError::Denied(reply)) => {
                    inner.log_denial(&reply);
                    Ok(Arc::from([]))
                }
                Err(error) => Err(error),
            }
        })));
        // The query has its own task, so that a panic in a library fails this query and leaves the
        // cache usable.
        query.await.unwrap_or_else(|_| {
            Err(SourceError::Unavailable(
                "query ended by an internal error; see the panic in awsvid's log".to_owned(),
            ))
        })
    }

    /// Returns the identities that the reply proves by a token, without the daemon's own. An
    /// identity keeps all of its hints if it has several entries, or if the agent merges the
    /// replies of two others.
    async fn exclude_own_identities(
        &self,
        svids: Vec<AgentSvid>,
        keep: Option<&Subject>,
    ) -> IdentityResult {
        let own = self.own(OWN_ID_TTL).await?;
        let (mut identities, mut invalid_token) = (Vec::new(), None);
        for svid in svids {
            let Ok(spiffe_id) = SpiffeId::parse(&svid.spiffe_id) else {
                if let Some(LogPermit { missed }) = self.log.admit("no SPIFFE ID") {
                    tracing::warn!(
                        missed,
                        "agent returned an identity that is not a SPIFFE ID; it is ignored"
                    );
                }
                continue;
            };
            if own.contains(&spiffe_id) {
                if let Some(LogPermit { missed }) = self.log.admit(&format!("own {spiffe_id}")) {
                    tracing::info!(%spiffe_id, missed, "a process has awsvid's own identity, which no workload gets");
                }
                continue;
            }
            // Cached credentials of this identity are served without another check of a token.
            if let Err(bad) = JwtSvid::check_subject(&svid.token, &spiffe_id) {
                if let Some(LogPermit { missed }) =
                    self.log.admit(&format!("not its own {spiffe_id} {bad}"))
                {
                    tracing::warn!(%spiffe_id, missed, error = %bad, "agent returned an identity without a valid token; it is ignored");
                }
                invalid_token = Some(bad);
                continue;
            }
            if let Some(subject) = keep
                && let Ok(token) =
                    JwtSvid::check(svid.token, &spiffe_id, &self.audience, self.clock.now())
            {
                self.hold_token(subject, token);
            }
            let identity = Identity {
                spiffe_id,
                hint: svid.hint,
            };
            if !identities.contains(&identity) {
                identities.push(identity);
            }
        }
        match invalid_token {
            Some(bad) if identities.is_empty() => Err(bad.into()),
            _ => Ok(identities.into()),
        }
    }

    /// Queries the agent about the caller.
    async fn query(
        &self,
        caller: &Arc<Caller>,
        audience: &str,
    ) -> Result<Vec<AgentSvid>, SourceError> {
        let result = match self.subject(caller)? {
            Subject::Process { .. } => self.query_by_process(caller, audience).await?,
            Subject::Pod(pod) => self.query_by_pod(caller, &pod, audience).await?,
        };
        if matches!(result, Err(SourceError::Denied(_))) {
            // An agent that does not know the daemon itself, such as one that has just started,
            // denies all workloads.
            self.own(OWN_ID_RECHECK).await?;
        }
        result
    }

    /// Queries the agent by the caller's process. The reply is discarded unless the process is the
    /// same before and after. If an execution was counted meanwhile, the agent may have read
    /// another process, so the query is repeated.
    async fn query_by_process(
        &self,
        caller: &Caller,
        audience: &str,
    ) -> Result<AgentReply, SourceError> {
        for pause in EXEC_RETRY_PAUSES {
            let watch = caller.proof.watch_exec()?;
            let previous = caller.proof.for_agent().await?;
            let start = Instant::now();
            let result = self.agent.fetch_for_pid(previous.pid, audience).await;
            self.count(&result, start);
            if caller.proof.for_agent().await? != previous {
                return Err(AttestError::IdentityChanged.into());
            }
            if watch.no_exec_seen() {
                return Ok(result);
            }
            sleep(pause).await;
        }
        Err(AttestError::ProcessExecuting.into())
    }

    /// Queries the agent by the caller's pod. A UID belongs to one pod for ever. So the only check
    /// is that the pod still exists, before and after.
    async fn query_by_pod(
        &self,
        caller: &Caller,
        pod: &PodUid,
        audience: &str,
    ) -> Result<AgentReply, SourceError> {
        caller.proof.verify_pod()?;
        let start = Instant::now();
        let result = self.agent.fetch_for_pod(pod, audience).await;
        self.count(&result, start);
        caller.proof.verify_pod()?;
        Ok(result)
    }

    fn count(&self, result: &AgentReply, start: Instant) {
        self.metrics.source_call(UpstreamCall {
            name: self.agent.endpoint().to_string(),
            result: CallLabel::of(result, SourceError::reason),
            error: SourceError::of_source(result),
            took: start.elapsed(),
            at: self.clock.now(),
        });
    }

    /// Logs the agent's reason for a denial, which the caller does not learn.
    fn log_denial(&self, reply: &str) {
        if let Some(LogPermit { missed }) = self.log.admit(reply) {
            tracing::warn!(missed, reply, "agent has no identity for a workload");
        }
    }

    /// Returns the daemon's own identities, queried again if they are older than `age`.
    async fn own(&self, age: Duration) -> Result<BTreeSet<SpiffeId>, SourceError> {
        if let Some(ids) = self.cached_own(age) {
            return Ok(ids);
        }
        let _lock = self.own_query_lock.lock().await;
        if let Some(ids) = self.cached_own(age) {
            return Ok(ids);
        }
        let ids = match self.agent.fetch_own(&self.audience).await {
            Ok(ids) => ids,
            // They rarely change, so the earlier ones still count. That the agent knows the daemon
            // now is not proven by them.
            Err(error) if age == OWN_ID_TTL => {
                let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
                let own = own.as_mut().ok_or(error)?;
                // Requests that wait for the lock do not each retry.
                own.fresh_from = Instant::now()
                    .checked_sub(OWN_ID_TTL - OWN_ID_RETRY)
                    .unwrap_or(own.fresh_from);
                return Ok(own.ids.clone());
            }
            Err(error) => return Err(error),
        };
        let ids: BTreeSet<SpiffeId> = ids
            .iter()
            .filter_map(|id| SpiffeId::parse(id).ok())
            .collect();
        let (confirmed, fresh_from) = (Instant::now(), Instant::now());
        *self.own.lock().unwrap_or_else(PoisonError::into_inner) = Some(OwnIds {
            ids: ids.clone(),
            confirmed,
            fresh_from,
        });
        Ok(ids)
    }

    fn cached_own(&self, age: Duration) -> Option<BTreeSet<SpiffeId>> {
        let own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        own.as_ref()
            .filter(|own| own.fresh_from.elapsed() < age)
            .map(|own| own.ids.clone())
    }

    /// Returns the time at which the agent last confirmed the daemon's own identities.
    fn own_confirmed_at(&self) -> Option<Instant> {
        self.own
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map(|own| own.confirmed)
    }

    fn hold_token(&self, subject: &Subject, token: JwtSvid) {
        let mut tokens = self.tokens();
        while tokens.len() >= MAX_TOKENS
            || tokens
                .front()
                .is_some_and(|held| held.at.elapsed() >= TOKEN_TTL)
        {
            tokens.pop_front();
        }
        tokens.push_back(HeldToken {
            subject: subject.clone(),
            token,
            at: Instant::now(),
        });
    }

    fn take_token(&self, subject: &Subject, id: &SpiffeId) -> Option<JwtSvid> {
        let mut tokens = self.tokens();
        let is_match = |held: &HeldToken| held.subject == *subject && held.token.spiffe_id() == id;
        let held = tokens
            .iter()
            .position(is_match)
            .and_then(|index| tokens.remove(index))?;
        // A token with a short life may have expired meanwhile.
        (held.at.elapsed() < TOKEN_TTL && held.token.check_life(self.clock.now()).is_ok())
            .then_some(held.token)
    }

    fn cache(&self) -> MutexGuard<'_, IdentityCache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tokens(&self) -> MutexGuard<'_, VecDeque<HeldToken>> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns true if the agent may not know the caller's pod or container because it is new.
fn is_new_pod(subject: &Subject, caller: &Caller) -> bool {
    caller.proof.verify_pod().is_ok_and(|ages| match subject {
        Subject::Process { .. } => ages.container < NEW_POD_AGE,
        Subject::Pod(_) => ages.pod < NEW_POD_AGE,
    })
}

#[cfg(test)]
mod tests;

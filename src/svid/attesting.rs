//! Sources B and D: an agent attests the caller's process itself, by its number, or its pod, by its UID, and says which
//! identities it has.
//!
//! By a process's number the agent looks at whatever has that number at some moment of the call. So the process is held by its pidfd, and looked
//! at before and after: what is said counts only if it was the same process in every respect, both times (attack 3), and
//! one whose cgroups the agent cannot misread (attack 2). It is then remembered for that process.

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::agent::{AgentSvid, AttestingAgent};
use super::log_limit::{LogLimiter, LogPermit};
use super::memory::{
    FACTS_FOR_AGENT, IdentityCache, IdentityLookup, IdentityResult, Subject, is_known,
};
use super::{IdentityBasis, IdentitySource, JwtSvid, SourceError};
use crate::caller::{AttestError, Caller, ProcessFacts, WorkloadKey};
use crate::cgroup::PodUid;
use crate::clock::{Clock, REQUEST_HOLD};
use crate::identity::SpiffeId;
use crate::limits::FairSemaphore;
use crate::metrics::{CallLabel, Metrics, UpstreamCall};
use crate::role::Identity;
use crate::rule::OVERFLOW_ID;

mod revalidation;

/// How long one waits for its turn to be asked for: SDKs give up after a second, and on a machine as busy as that the answer
/// needs a part of it.
const QUERY_WAIT: Duration = Duration::from_millis(600);
/// Questions under way about processes that are new ...
const MAX_QUERIES: usize = 32;
/// ... and of those about processes of one workload.
const MAX_QUERIES_PER_WORKLOAD: usize = 8;
/// Tokens that came with an answer are kept so long for the exchange that follows it ...
const TOKEN_TTL: Duration = Duration::from_secs(10);
/// ... and so many of them.
const MAX_TOKENS: usize = 256;
/// A pod or container that has been there for less than this may not be known yet to the kubelet's list, to the agent's cache of
/// that, or to the agent as one that an entry is for ...
const NEW_POD_AGE: Duration = Duration::from_secs(10);
/// ... so it is asked about again after this time, twice as long before each one after that, for as long as somebody waits.
const NEW_POD_RETRY: Duration = Duration::from_millis(100);
/// How long to wait each time that an execution was counted while the agent looked at a process, before it is asked again.
const EXEC_RETRY_PAUSES: [Duration; 4] = [
    Duration::from_millis(20),
    Duration::from_millis(40),
    Duration::from_millis(80),
    Duration::ZERO,
];
/// How long it is believed which identities the daemon itself has ...
const OWN_ID_TTL: Duration = Duration::from_secs(60);
/// ... or for so long, once the agent did not say ...
const OWN_ID_RETRY: Duration = Duration::from_secs(5);
/// ... and that the agent knows the daemon, when it says that it does not know a workload.
const OWN_ID_RECHECK: Duration = Duration::from_secs(1);

/// An agent that attests callers, and what it has said of them. Asks again in the background until it is dropped.
pub struct AgentSource(Arc<AgentSourceInner>);

struct AgentSourceInner {
    agent: Arc<dyn AttestingAgent>,
    /// `[identity] audience`: of the tokens that come with an identity.
    audience: String,
    clock: Clock,
    metrics: Metrics,
    memory: Mutex<IdentityCache>,
    tokens: Mutex<VecDeque<HeldToken>>,
    turns: FairSemaphore<WorkloadKey>,
    /// The daemon's own identities, which no workload is given.
    own: Mutex<Option<OwnIds>>,
    /// Held by whoever asks for them. Those for whom they are fresh enough wait for nobody.
    asking_own: tokio::sync::Mutex<()>,
    log: LogLimiter,
}

/// The daemon's own identities.
#[derive(Debug)]
struct OwnIds {
    ids: BTreeSet<SpiffeId>,
    /// When the agent last confirmed them.
    confirmed: Instant,
    /// From when on their age counts. Set later than `confirmed` to delay the next query after one that failed.
    fresh_from: Instant,
}

/// What an agent has answered.
type AgentReply = Result<Vec<AgentSvid>, SourceError>;

struct HeldToken {
    subject: Subject,
    token: JwtSvid,
    at: Instant,
}

impl fmt::Debug for AgentSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attesting")
            .field("agent", &self.0.agent)
            .finish_non_exhaustive()
    }
}

impl AgentSource {
    /// With tokens for `audience` unless a role wants another one; `most` processes are remembered. To be called within a
    /// tokio runtime.
    pub fn new(
        agent: Arc<dyn AttestingAgent>,
        audience: String,
        most: usize,
        clock: Clock,
        metrics: Metrics,
    ) -> Self {
        let shared = Arc::new(AgentSourceInner {
            agent,
            audience,
            clock,
            metrics,
            memory: Mutex::new(IdentityCache::new(most)),
            tokens: Mutex::default(),
            turns: FairSemaphore::new(MAX_QUERIES, MAX_QUERIES_PER_WORKLOAD),
            own: Mutex::default(),
            asking_own: tokio::sync::Mutex::default(),
            log: LogLimiter::default(),
        });
        tokio::spawn(revalidation::run(Arc::downgrade(&shared)));
        Self(shared)
    }
}

#[async_trait]
impl IdentitySource for AgentSource {
    async fn identify(&self, caller: &Arc<Caller>) -> Result<Vec<Identity>, SourceError> {
        let subject = self.0.subject(caller)?;
        // The kernel's stand-in for ids without a mapping is nobody in particular (attack 14). In a pod it doesn't matter who.
        if caller.uid == OVERFLOW_ID && !matches!(subject, Subject::Pod(_)) {
            return Ok(Vec::new());
        }
        let found = self.0.memory().find(&subject, caller)?;
        let asked = match found {
            IdentityLookup::Known(identities) => return Ok(identities.to_vec()),
            IdentityLookup::Asked(asked) => asked,
            IdentityLookup::Unknown(asked) => {
                // Goes on whatever becomes of the caller's connection.
                tokio::spawn(self.0.clone().query_new(subject, caller.clone()));
                asked
            }
        };
        wait(asked).await.map(|identities| identities.to_vec())
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
        (!by_pod && !is_known(caller)).then_some(FACTS_FOR_AGENT)
    }

    fn basis(&self, _: &SpiffeId) -> IdentityBasis {
        IdentityBasis::Agent(self.0.agent.endpoint().clone())
    }

    async fn ready(&self, _: &str) -> Result<(), SourceError> {
        self.0.agent.ready(&self.0.audience).await
    }
}

/// Kubernetes may keep the agent waiting for half a minute. The question goes on, and the next try finds the answer.
async fn wait(mut asked: watch::Receiver<Option<IdentityResult>>) -> IdentityResult {
    let too_long =
        || SourceError::Unavailable("the SPIFFE agent has not answered yet; ask again".to_owned());
    let said = timeout(REQUEST_HOLD, asked.wait_for(Option::is_some))
        .await
        .map_err(|_| too_long())?;
    // Whoever was to say it is gone only if the daemon ends.
    said.ok()
        .and_then(|said| said.clone())
        .unwrap_or_else(|| Err(too_long()))
}

impl AgentSourceInner {
    fn subject(&self, caller: &Caller) -> Result<Subject, SourceError> {
        Subject::of(caller, self.agent.supports_pod_references())
    }

    /// Asks about somebody of whom nothing is known, when the turn comes.
    async fn query_new(self: Arc<Self>, subject: Subject, caller: Arc<Caller>) {
        let (until, mut pause) = (Instant::now() + REQUEST_HOLD, NEW_POD_RETRY);
        let (said, took) = loop {
            let begun = Instant::now();
            let said = match self
                .turns
                .acquire_within(QUERY_WAIT, &WorkloadKey::of(&caller))
                .await
            {
                Some(_turn) => self.clone().identities(&caller, Some(&subject)).await,
                None => Err(SourceError::Busy),
            };
            let is_denied = said.as_ref().is_ok_and(|identities| identities.is_empty());
            if !is_denied || !is_young(&subject, &caller) {
                break (said, begun.elapsed());
            }
            if Instant::now() + pause >= until {
                let text = "the SPIFFE agent does not know this new pod yet, or has no registration entry for it; ask again";
                break (
                    Err(SourceError::Unavailable(text.to_owned())),
                    begun.elapsed(),
                );
            }
            // Without a turn: whoever is known gets one meanwhile.
            sleep(pause).await;
            pause *= 2;
        };
        self.memory().record(&subject, said, took);
    }

    /// What the agent says of this process now: nothing is an answer. Its tokens are kept where an exchange may follow.
    async fn identities(
        self: Arc<Self>,
        caller: &Arc<Caller>,
        keep: Option<&Subject>,
    ) -> IdentityResult {
        let (shared, keep, caller) = (self.clone(), keep.cloned(), caller.clone());
        let asking = AbortOnDropHandle::new(tokio::spawn(async move {
            match shared.query(&caller, &shared.audience).await {
                Ok(svids) => shared.exclude_own_identities(svids, keep.as_ref()).await,
                Err(SourceError::Denied(said)) => {
                    shared.log_denial(&said);
                    Ok(Arc::from([]))
                }
                Err(error) => Err(error),
            }
        }));
        // A panic in a library below ends that question, not the place in the memory.
        asking.await.unwrap_or_else(|_| {
            Err(SourceError::Unavailable(
                "an error inside awsvid ended the question; its log has it".to_owned(),
            ))
        })
    }

    /// Returns the identities that an answer proves by a token, without the daemon's own. An identity with several entries, or
    /// from an agent that merges the answers of two others, keeps all of its hints.
    async fn exclude_own_identities(
        &self,
        svids: Vec<AgentSvid>,
        keep: Option<&Subject>,
    ) -> IdentityResult {
        let own = self.own(OWN_ID_TTL).await?;
        let (mut identities, mut unproven) = (Vec::new(), None);
        for svid in svids {
            let Ok(spiffe_id) = SpiffeId::parse(&svid.spiffe_id) else {
                if let Some(LogPermit { missed }) = self.log.admit("no SPIFFE ID") {
                    tracing::warn!(
                        missed,
                        "the SPIFFE agent gave a process an identity that is no SPIFFE ID; it is left out"
                    );
                }
                continue;
            };
            if own.contains(&spiffe_id) {
                if let Some(LogPermit { missed }) = self.log.admit(&format!("own {spiffe_id}")) {
                    tracing::info!(%spiffe_id, missed, "a process has awsvid's own identity, which is given to nobody");
                }
                continue;
            }
            // Cached credentials of this identity are released without another check of a token.
            if let Err(bad) = JwtSvid::check_subject(&svid.token, &spiffe_id) {
                if let Some(LogPermit { missed }) =
                    self.log.admit(&format!("not its own {spiffe_id} {bad}"))
                {
                    tracing::warn!(%spiffe_id, missed, "the SPIFFE agent gave an identity without a token of its own; it is left out: {bad}");
                }
                unproven = Some(bad);
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
        match unproven {
            Some(bad) if identities.is_empty() => Err(bad.into()),
            _ => Ok(identities.into()),
        }
    }

    /// Asks the agent about the caller.
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
            // An agent that does not know the daemon itself, as one that has just started, denies everybody.
            self.own(OWN_ID_RECHECK).await?;
        }
        result
    }

    /// What the agent says of the caller's process; dropped unless it is the same process as before. An execution that was
    /// counted meanwhile, though the process is what it was, may have been another's, so the agent is asked again.
    async fn query_by_process(
        &self,
        caller: &Caller,
        audience: &str,
    ) -> Result<AgentReply, SourceError> {
        for pause in EXEC_RETRY_PAUSES {
            let watch = caller.evidence.watch_exec()?;
            let before = caller.evidence.for_agent().await?;
            let start = Instant::now();
            let result = self.agent.fetch_for_pid(before.pid, audience).await;
            self.count(&result, start);
            if caller.evidence.for_agent().await? != before {
                return Err(AttestError::IdentityChanged.into());
            }
            if watch.no_exec_seen() {
                return Ok(result);
            }
            sleep(pause).await;
        }
        Err(AttestError::ProcessExecuting.into())
    }

    /// What the agent says of the caller's pod. A UID is that of one pod for ever, so all there is to see to is that nothing is
    /// had for one that is gone.
    async fn query_by_pod(
        &self,
        caller: &Caller,
        pod: &PodUid,
        audience: &str,
    ) -> Result<AgentReply, SourceError> {
        caller.evidence.verify_pod()?;
        let start = Instant::now();
        let result = self.agent.fetch_for_pod(pod, audience).await;
        self.count(&result, start);
        caller.evidence.verify_pod()?;
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
    fn log_denial(&self, said: &str) {
        if let Some(LogPermit { missed }) = self.log.admit(said) {
            tracing::warn!(missed, "a workload has no identity: {said}");
        }
    }

    /// The daemon's own identities, asked for if what is known is older than `age`.
    async fn own(&self, age: Duration) -> Result<BTreeSet<SpiffeId>, SourceError> {
        if let Some(ids) = self.known_own(age) {
            return Ok(ids);
        }
        let _asking = self.asking_own.lock().await;
        if let Some(ids) = self.known_own(age) {
            return Ok(ids);
        }
        let ids = match self.agent.fetch_own(&self.audience).await {
            Ok(ids) => ids,
            // They hardly ever change, so what was said before holds; but that the agent knows the daemon now is not known.
            Err(error) if age == OWN_ID_TTL => {
                let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
                let own = own.as_mut().ok_or(error)?;
                // Those who wait behind this one don't each try as well.
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

    fn known_own(&self, age: Duration) -> Option<BTreeSet<SpiffeId>> {
        let own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        own.as_ref()
            .filter(|own| own.fresh_from.elapsed() < age)
            .map(|own| own.ids.clone())
    }

    /// Returns when the agent last confirmed the daemon's own identities.
    fn own_confirmed(&self) -> Option<Instant> {
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
                .is_some_and(|kept| kept.at.elapsed() >= TOKEN_TTL)
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
        let wanted = |kept: &HeldToken| kept.subject == *subject && kept.token.spiffe_id() == id;
        let kept = tokens
            .iter()
            .position(wanted)
            .and_then(|index| tokens.remove(index))?;
        // A token with a short life may have expired meanwhile.
        (kept.at.elapsed() < TOKEN_TTL && kept.token.check_life(self.clock.now()).is_ok())
            .then_some(kept.token)
    }

    fn memory(&self) -> MutexGuard<'_, IdentityCache> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tokens(&self) -> MutexGuard<'_, VecDeque<HeldToken>> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the agent may not know the caller's pod, or container, for no other reason than that it is new.
fn is_young(subject: &Subject, caller: &Caller) -> bool {
    caller
        .evidence
        .verify_pod()
        .is_ok_and(|ages| match subject {
            Subject::Process { .. } => ages.container < NEW_POD_AGE,
            Subject::Pod(_) => ages.pod < NEW_POD_AGE,
        })
}

#[cfg(test)]
mod tests;

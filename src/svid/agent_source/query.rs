//! Queries to the agent about one caller.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;

use super::AgentSourceInner;
use super::own_ids::{OWN_ID_RECHECK, OWN_ID_TTL};
use super::svid_query::{AgentReply, JwtQuery, ReceivedSvid, SvidKind, SvidQuery, X509Query};
use crate::backoff::{Backoff, Jitter};
use crate::caller::{AttestError, Caller, WorkloadKey};
use crate::cgroup::PodUid;
use crate::clock::REQUEST_HOLD;
use crate::identity::SpiffeId;
use crate::limits::FairPermit;
use crate::metrics::{CallLabel, UpstreamCall};
use crate::role::Identity;
use crate::svid::SourceError;
use crate::svid::identity_cache::{IdentityResult, Subject};
use crate::telemetry::in_current_request;

/// Maximum wait for a permit. SDKs give up after a second, and on such a busy machine the query
/// needs a part of it.
pub(super) const QUERY_WAIT: Duration = Duration::from_millis(600);
/// Age of a pod or container up to which a denial is retried. The kubelet's list, the agent's cache
/// of it, or a new registration entry may lack it.
pub(super) const NEW_POD_AGE: Duration = Duration::from_secs(10);
/// First delay before such a retry.
pub(super) const NEW_POD_RETRY: Duration = Duration::from_millis(100);
/// Delays before such retries, as long as a request waits.
const NEW_POD_BACKOFF: Backoff = Backoff::new(NEW_POD_RETRY, REQUEST_HOLD, Jitter::None);
/// Delays before the query is repeated, if the process may have executed a program during the
/// query.
pub(super) const EXEC_RETRY_PAUSES: [Duration; 4] = [
    Duration::from_millis(20),
    Duration::from_millis(40),
    Duration::from_millis(80),
    Duration::ZERO,
];

impl AgentSourceInner {
    /// Queries the agent about an unknown subject, once a permit is free.
    pub(super) async fn query_new(self: Arc<Self>, subject: Subject, caller: Arc<Caller>) {
        let (until, mut denials) = (Instant::now() + REQUEST_HOLD, 0);
        let (reply, duration) = loop {
            let start = Instant::now();
            let reply = match self
                .query_permits
                .acquire_evicting_within(QUERY_WAIT, &caller.peer.workload_key())
                .await
            {
                Some(permit) => self.query_until_evicted(&permit, &subject, &caller).await,
                None => Err(SourceError::Busy),
            };
            let is_denied = reply.as_ref().is_ok_and(|identities| identities.is_empty());
            if !is_denied || !is_new_pod(&subject, &caller) {
                break (reply, start.elapsed());
            }
            denials += 1;
            let pause = NEW_POD_BACKOFF.delay(denials);
            if Instant::now() + pause >= until {
                let text = "the SPIFFE agent does not know this new pod yet, or has no registration entry for it; retry";
                break (
                    Err(SourceError::Unavailable(text.to_owned())),
                    start.elapsed(),
                );
            }
            // The permit is released during the pause, for known subjects.
            sleep(pause).await;
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
        let query = self.clone().identities_of_new(caller, subject);
        if let Some(reply) = permit.run(query).await {
            return reply;
        }
        let evicted = Err(SourceError::Busy);
        self.metrics.source_call_evicted(
            CallLabel::of(&evicted, SourceError::reason),
            start.elapsed(),
        );
        if let Some(missed) = self.log.take("evicted") {
            let workload = permit.key();
            tracing::warn!(
                ?workload,
                missed,
                "query to the SPIFFE agent cancelled: all queries are in use, and this workload has the most"
            );
        }
        evicted
    }

    /// Queries the identities of a caller that is not known yet. Where certificates are used, they
    /// also prove identities while the agent has no tokens, because its server is unavailable.
    ///
    /// An agent may have fewer certificates than tokens. So they never revalidate an identity.
    async fn identities_of_new(
        self: Arc<Self>,
        caller: &Arc<Caller>,
        subject: &Subject,
    ) -> IdentityResult {
        let by_token = self.clone().identities(caller, Some(subject)).await;
        if !self.uses_certificates || !matches!(by_token, Err(SourceError::Unavailable(_))) {
            return by_token;
        }
        match self.identities_by(SvidKind::X509, caller, None).await {
            Ok(identities) if !identities.is_empty() => Ok(identities),
            // The caller may not be what the agent attested.
            Err(error @ SourceError::Caller(_)) => Err(error),
            Ok(_) | Err(_) => by_token,
        }
    }

    /// Queries the identities of this caller now, by its tokens; an empty list is a valid reply.
    /// Holds the tokens if an exchange may follow.
    pub(super) async fn identities(
        self: Arc<Self>,
        caller: &Arc<Caller>,
        keep: Option<&Subject>,
    ) -> IdentityResult {
        self.identities_by(SvidKind::Jwt, caller, keep).await
    }

    async fn identities_by(
        self: Arc<Self>,
        kind: SvidKind,
        caller: &Arc<Caller>,
        keep: Option<&Subject>,
    ) -> IdentityResult {
        let (inner, keep, caller) = (self.clone(), keep.cloned(), caller.clone());
        let query = AbortOnDropHandle::new(tokio::spawn(in_current_request(async move {
            let keep = keep.as_ref();
            match kind {
                SvidKind::Jwt => inner.learn(&caller, &JwtQuery(&inner.audience), keep).await,
                SvidKind::X509 => inner.learn(&caller, &X509Query, keep).await,
            }
        })));
        // The query has its own task, so that a panic in a library fails this query and leaves the
        // cache usable.
        query.await.unwrap_or(Err(SourceError::Panicked))
    }

    async fn learn<Q: SvidQuery>(
        &self,
        caller: &Arc<Caller>,
        query: &Q,
        keep: Option<&Subject>,
    ) -> IdentityResult {
        match self.query(caller, query).await {
            Ok(svids) => self.exclude_own_identities(svids, keep).await,
            Err(SourceError::Denied(reply)) => {
                self.log_denial(&reply);
                Ok(Arc::from([]))
            }
            Err(error) => Err(error),
        }
    }

    /// Returns the identities that the reply proves by an SVID, without the daemon's own. An
    /// identity keeps all of its hints if it has several entries, or if the agent merges the
    /// replies of two others.
    pub(super) async fn exclude_own_identities<S: ReceivedSvid>(
        &self,
        svids: Vec<S>,
        keep: Option<&Subject>,
    ) -> IdentityResult {
        let own = self.own_ids(OWN_ID_TTL).await?;
        let (mut identities, mut invalid) = (Vec::new(), None);
        for svid in svids {
            let Ok(spiffe_id) = SpiffeId::parse(svid.claimed_id()) else {
                if let Some(missed) = self.log.take("no SPIFFE ID") {
                    tracing::warn!(
                        missed,
                        "agent returned an identity that is not a SPIFFE ID; it is ignored"
                    );
                }
                continue;
            };
            if own.contains(&spiffe_id) {
                if let Some(missed) = self.log.take(&format!("own {spiffe_id}")) {
                    tracing::info!(%spiffe_id, missed, "a process has awsvid's own identity, which no workload gets");
                }
                continue;
            }
            let hint = svid.hint();
            if let Err(bad) = svid.prove(&spiffe_id, self, keep) {
                if let Some(missed) = self.log.take(&format!("not its own {spiffe_id} {bad}")) {
                    tracing::warn!(%spiffe_id, missed, error = %bad, "agent returned an identity without a valid SVID; it is ignored");
                }
                invalid = Some(bad);
                continue;
            }
            let identity = Identity { spiffe_id, hint };
            if !identities.contains(&identity) {
                identities.push(identity);
            }
        }
        match invalid {
            Some(bad) if identities.is_empty() => Err(bad.into()),
            _ => Ok(identities.into()),
        }
    }

    /// Queries the agent about the caller.
    pub(super) async fn query<Q: SvidQuery>(
        &self,
        caller: &Arc<Caller>,
        query: &Q,
    ) -> AgentReply<Q::Svid> {
        let result = match self.subject(caller)? {
            Subject::Process { .. } => self.query_by_process(caller, query).await?,
            Subject::Pod(pod) => self.query_by_pod(caller, &pod, query).await?,
        };
        if matches!(result, Err(SourceError::Denied(_))) {
            // An agent that does not know the daemon itself, such as one that has just started,
            // denies all workloads.
            self.own_ids(OWN_ID_RECHECK).await?;
        }
        result
    }

    /// Queries the agent by the caller's process. The reply is discarded unless the process is the
    /// same before and after. If an execution was counted meanwhile, the agent may have read
    /// another process, so the query is repeated.
    async fn query_by_process<Q: SvidQuery>(
        &self,
        caller: &Caller,
        query: &Q,
    ) -> Result<AgentReply<Q::Svid>, SourceError> {
        for pause in EXEC_RETRY_PAUSES {
            let watch = caller.proof.watch_exec()?;
            let previous = caller.proof.for_agent().await?;
            let start = Instant::now();
            let result = query.for_pid(&*self.agent, previous.pid).await;
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
    async fn query_by_pod<Q: SvidQuery>(
        &self,
        caller: &Caller,
        pod: &PodUid,
        query: &Q,
    ) -> Result<AgentReply<Q::Svid>, SourceError> {
        caller.proof.verify_pod()?;
        let start = Instant::now();
        let result = query.for_pod(&*self.agent, pod).await;
        self.count(&result, start);
        caller.proof.verify_pod()?;
        Ok(result)
    }

    fn count<T>(&self, result: &AgentReply<T>, start: Instant) {
        self.metrics.source_call(UpstreamCall {
            name: self.agent.endpoint().to_string(),
            result: CallLabel::of(result, SourceError::reason),
            error: SourceError::of_source(result),
            took: start.elapsed(),
            at: self.clock.now(),
        });
    }

    /// Logs the agent's reason for a denial, which the caller does not learn.
    pub(super) fn log_denial(&self, reply: &str) {
        if let Some(missed) = self.log.take(reply) {
            tracing::warn!(missed, reply, "agent has no identity for a workload");
        }
    }
}

/// Returns true if the agent may not know the caller's pod or container because it is new.
fn is_new_pod(subject: &Subject, caller: &Caller) -> bool {
    caller.proof.verify_pod().is_ok_and(|ages| match subject {
        Subject::Process { .. } => ages.container < NEW_POD_AGE,
        Subject::Pod(_) => ages.pod < NEW_POD_AGE,
    })
}

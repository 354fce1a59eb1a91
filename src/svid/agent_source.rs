//! The common part of `spire-delegated` and `spiffe-broker`. An agent attests the caller's process
//! by its number, or its pod by its UID, and returns its identities.
//!
//! An agent reads whatever process has the number at some moment of the call. So the daemon holds
//! the process by its pidfd, and reads it before and after. The reply counts only if all facts were
//! equal both times (T3), and if the agent cannot misread the process's cgroups (T2). It is then
//! cached for that process.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::timeout;

use super::agent::AttestingAgent;
use super::identity_cache::{
    FACTS_FOR_AGENT, IdentityCache, IdentityLookup, IdentityResult, Subject, has_all_facts,
};
use super::log_quota;
use super::{IdentityBasis, IdentitySource, JwtSvid, SourceError, X509Svid};
use crate::caller::{Caller, CallerFacts, ProcessFacts, WorkloadKey};
use crate::clock::{Clock, REQUEST_HOLD};
use crate::identity::SpiffeId;
use crate::limits::{FairSemaphore, KeyedLogQuota};
use crate::metrics::Metrics;
use crate::role::Identity;
use crate::telemetry::in_current_request;
use crate::workload_rule::OVERFLOW_ID;

mod held_tokens;
mod own_ids;
mod query;
mod revalidation;
mod svid_query;

use held_tokens::HeldTokens;
use own_ids::{OWN_ID_TTL, OwnIds};
use svid_query::{JwtQuery, X509Query};

/// Maximum number of concurrent queries about unknown subjects. At this limit the workload with the
/// most loses its newest query, unless no other workload holds fewer (T29).
const MAX_QUERIES: usize = 32;
/// The part of [`MAX_QUERIES`] that one workload may use.
const MAX_QUERIES_PER_WORKLOAD: usize = 8;

/// Identity source of an agent that attests callers. It caches identities, and revalidates them in
/// the background until it is dropped.
pub struct AgentSource(Arc<AgentSourceInner>);

struct AgentSourceInner {
    agent: Arc<dyn AttestingAgent>,
    /// `[identity] audience`, for the tokens that are fetched to learn identities.
    audience: String,
    /// Whether roles are assumed by certificates, so that these may prove identities too.
    uses_certificates: bool,
    clock: Clock,
    metrics: Metrics,
    cache: Mutex<IdentityCache>,
    tokens: HeldTokens,
    query_permits: FairSemaphore<WorkloadKey>,
    /// The daemon's own identities, which no workload gets.
    own: OwnIds,
    log: KeyedLogQuota,
}

impl fmt::Debug for AgentSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AgentSource")
            .field("agent", &self.0.agent)
            .finish_non_exhaustive()
    }
}

impl AgentSource {
    /// Creates a source with tokens for `audience`, unless a role has another one. With
    /// `uses_certificates`, it learns identities by X.509-SVIDs while the agent has no tokens. It
    /// caches up to `max_processes` processes. Must be called within a tokio runtime.
    pub fn new(
        agent: Arc<dyn AttestingAgent>,
        audience: String,
        uses_certificates: bool,
        max_processes: usize,
        clock: Clock,
        metrics: Metrics,
    ) -> Self {
        let inner = Arc::new(AgentSourceInner {
            agent,
            audience,
            uses_certificates,
            clock,
            metrics,
            cache: Mutex::new(IdentityCache::new(max_processes)),
            tokens: HeldTokens::default(),
            query_permits: FairSemaphore::new(MAX_QUERIES, MAX_QUERIES_PER_WORKLOAD),
            own: OwnIds::default(),
            log: log_quota(),
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
        if caller.peer.uid == OVERFLOW_ID && !matches!(subject, Subject::Pod(_)) {
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
            && let Some(token) = self.0.tokens.take(&subject, id, self.0.clock.now())
        {
            return Ok(token);
        }
        let svids = self.0.query(caller, &JwtQuery(audience)).await?;
        let is_own = self.0.own_ids(OWN_ID_TTL).await?.contains(id);
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

    async fn x509_svid(
        &self,
        caller: &Arc<Caller>,
        id: &SpiffeId,
    ) -> Result<X509Svid, SourceError> {
        let svids = self.0.query(caller, &X509Query).await?;
        let denied = || {
            SourceError::Denied(format!(
                "the SPIFFE agent does not give an X.509-SVID of {id} to this workload"
            ))
        };
        if self.0.own_ids(OWN_ID_TTL).await?.contains(id) {
            return Err(denied());
        }
        X509Svid::check_any(svids, id, self.0.clock.now())?.ok_or_else(denied)
    }

    fn facts_needed(&self, caller: CallerFacts<'_>) -> Option<ProcessFacts> {
        let by_pod = caller.peer.pod.is_some() && self.0.agent.supports_pod_references();
        (!by_pod && !has_all_facts(caller.process)).then_some(FACTS_FOR_AGENT)
    }

    fn basis(&self, _: &SpiffeId) -> IdentityBasis {
        IdentityBasis::Agent(self.0.agent.endpoint().clone())
    }

    /// Also learns the daemon's own identities, without which no workload gets any. So an outage
    /// that begins before the first request does not hide them.
    async fn ready(&self, _: &str) -> Result<(), SourceError> {
        self.0.agent.ready(&self.0.audience).await?;
        self.0.own_ids(OWN_ID_TTL).await.map(drop)
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

    /// Returns the daemon's own identities, queried again if they are older than `age`.
    async fn own_ids(&self, age: Duration) -> Result<BTreeSet<SpiffeId>, SourceError> {
        self.own.get(&*self.agent, &self.audience, age).await
    }

    fn cache(&self) -> MutexGuard<'_, IdentityCache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;

//! Revalidation of the identities of known subjects, in the background.
//!
//! A workload influences how long the agent needs to attest its processes: hashing a program file
//! of 200 GB takes minutes. It must not delay the revalidation of others, and so hide a deleted
//! entry of theirs (T28). The order, the limit per workload, the timeout and the separate limit for
//! slow subjects prevent that.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::AgentSourceInner;
use crate::caller::Caller;
use crate::svid::SourceError;
use crate::svid::identity_cache::{Capacity, Lane, QUICK_TIMEOUT, Query};

/// Maximum number of queries in flight about subjects with a quick last reply.
const MAX_QUICK_QUERIES: usize = 8;
/// Maximum number of queries in flight about all other subjects.
const MAX_SLOW_QUERIES: usize = 4;
/// Interval between two searches for subjects that are due.
pub(super) const REVALIDATE_TICK: Duration = Duration::from_secs(1);
/// Interval between two queries about the daemon itself, which show whether the agent responds at
/// all.
const OWN_ID_MAX_AGE: Duration = Duration::from_secs(30);

/// Revalidates due subjects until the source is dropped.
pub(super) async fn run(inner: Weak<AgentSourceInner>) {
    let (mut quick, mut slow, mut own_queried_at) = (JoinSet::new(), JoinSet::new(), None);
    loop {
        let Some(inner) = inner.upgrade() else {
            return;
        };
        while quick.try_join_next().is_some() {}
        while slow.try_join_next().is_some() {}
        let capacity = Capacity {
            quick: MAX_QUICK_QUERIES - quick.len(),
            slow: MAX_SLOW_QUERIES - slow.len(),
        };
        let batch = inner.cache().take_due(capacity);
        inner.log_expired(&batch.expired);
        for query in batch.queries {
            let lane = if query.lane == Lane::Quick {
                &mut quick
            } else {
                &mut slow
            };
            lane.spawn(inner.clone().revalidate(query));
        }
        // While subjects wait for a slot, the daemon's own confirmation must not advance the clock
        // past them.
        let is_idle = quick.len() < MAX_QUICK_QUERIES;
        if batch.is_overdue
            && is_idle
            && own_queried_at.is_none_or(|at: Instant| at.elapsed() >= OWN_ID_MAX_AGE)
        {
            own_queried_at = Some(Instant::now());
            quick.spawn(inner.clone().confirm_own());
        }
        drop(inner);
        tokio::select! {
            Some(_) = quick.join_next() => {}
            Some(_) = slow.join_next() => {}
            () = sleep(REVALIDATE_TICK) => {}
        }
    }
}

impl AgentSourceInner {
    async fn revalidate(
        self: Arc<Self>,
        Query {
            subject,
            caller,
            lane,
        }: Query,
    ) {
        let start = Instant::now();
        let query = self.clone().identities(&caller, None);
        let reply = match lane {
            Lane::Quick => timeout(QUICK_TIMEOUT, query).await.unwrap_or_else(|_| {
                Err(SourceError::Unavailable(format!(
                    "the SPIFFE agent did not answer within {QUICK_TIMEOUT:?}"
                )))
            }),
            Lane::Slow => query.await,
        };
        self.cache().record(&subject, reply, start.elapsed());
    }

    /// Queries the daemon's own identity, to advance the clock on a node where all callers are
    /// attested slowly.
    async fn confirm_own(self: Arc<Self>) {
        // With pod references the identity is from the Workload API's stream, which is not evidence
        // about the Broker API.
        if self.agent.supports_pod_references() {
            return;
        }
        let previous = self.own.confirmed_at();
        let _ = timeout(QUICK_TIMEOUT, self.own_ids(OWN_ID_MAX_AGE)).await;
        if let (Some(previous), Some(now)) = (previous, self.own.confirmed_at())
            && now > previous
        {
            self.cache().record_own_confirmation(previous);
        }
    }

    fn log_expired(&self, callers: &[Arc<Caller>]) {
        for caller in callers {
            let text = format!("expired {}", caller.peer.uid);
            if let Some(missed) = self.log.take(&text) {
                let (uid, pid) = (
                    caller.peer.uid,
                    caller.process.as_ref().map(|process| process.pid),
                );
                tracing::warn!(
                    uid,
                    pid,
                    missed,
                    "identity expired: the SPIFFE agent has not confirmed it for 10 minutes, while it confirmed others; \
                     if the agent hashes large programs, set `workload_size_limit` in its unix plugin"
                );
            }
        }
    }
}

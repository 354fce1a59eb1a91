//! Revalidates the identities of known subjects in the background.
//!
//! A workload decides how long the agent needs to attest its processes: a program file of 200 GB is hashed for minutes. The
//! order, the limit per workload, the timeout and the separate limit for slow subjects keep it from delaying the revalidation of
//! others, and so from hiding a deleted entry of theirs (attack 28).

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::AgentSourceInner;
use crate::caller::Caller;
use crate::svid::SourceError;
use crate::svid::identity_cache::{Capacity, Lane, QUICK_TIMEOUT, Query};
use crate::svid::log_limit::LogPermit;

/// Queries in flight about subjects whose last answer was quick.
const MAX_QUICK_QUERIES: usize = 8;
/// Queries in flight about all other subjects.
const MAX_SLOW_QUERIES: usize = 4;
/// Interval between two searches for subjects that are due.
pub(super) const REVALIDATE_TICK: Duration = Duration::from_secs(1);
/// Interval between two queries about the daemon itself, which show whether the agent answers at all.
const OWN_ID_MAX_AGE: Duration = Duration::from_secs(30);

/// Runs until the source is dropped.
pub(super) async fn run(shared: Weak<AgentSourceInner>) {
    let (mut quick, mut slow, mut own_asked) = (JoinSet::new(), JoinSet::new(), None);
    loop {
        let Some(shared) = shared.upgrade() else {
            return;
        };
        while quick.try_join_next().is_some() {}
        while slow.try_join_next().is_some() {}
        let room = Capacity {
            quick: MAX_QUICK_QUERIES - quick.len(),
            slow: MAX_SLOW_QUERIES - slow.len(),
        };
        let round = shared.memory().take_due(room);
        shared.log_expired(&round.expired);
        for question in round.queries {
            let lane = if question.lane == Lane::Quick {
                &mut quick
            } else {
                &mut slow
            };
            lane.spawn(shared.clone().revalidate(question));
        }
        // Not while subjects wait for a slot: the daemon's own answer would advance the clock past them.
        let is_idle = quick.len() < MAX_QUICK_QUERIES;
        if round.is_overdue
            && is_idle
            && own_asked.is_none_or(|at: Instant| at.elapsed() >= OWN_ID_MAX_AGE)
        {
            own_asked = Some(Instant::now());
            quick.spawn(shared.clone().confirm_own());
        }
        drop(shared);
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
        let asked = Instant::now();
        let asking = self.clone().identities(&caller, None);
        let said = match lane {
            Lane::Quick => timeout(QUICK_TIMEOUT, asking).await.unwrap_or_else(|_| {
                Err(SourceError::Unavailable(format!(
                    "the SPIFFE agent did not answer within {QUICK_TIMEOUT:?}"
                )))
            }),
            Lane::Slow => asking.await,
        };
        self.memory().record(&subject, said, asked.elapsed());
    }

    /// Queries the daemon's own identity, to advance the clock on a node where all callers are attested slowly.
    async fn confirm_own(self: Arc<Self>) {
        // There the identity comes from the Workload API's stream, and says nothing about the Broker API.
        if self.agent.supports_pod_references() {
            return;
        }
        let before = self.own_confirmed();
        let _ = timeout(QUICK_TIMEOUT, self.own(OWN_ID_MAX_AGE)).await;
        if let (Some(before), Some(now)) = (before, self.own_confirmed())
            && now > before
        {
            self.memory().own_confirmed(before);
        }
    }

    fn log_expired(&self, callers: &[Arc<Caller>]) {
        for caller in callers {
            let text = format!("expired {}", caller.uid);
            if let Some(LogPermit { missed }) = self.log.admit(&text) {
                let (uid, pid) = (
                    caller.uid,
                    caller.process.as_ref().map(|process| process.pid),
                );
                tracing::warn!(
                    uid,
                    pid,
                    missed,
                    "the SPIFFE agent has not confirmed a workload's identity for 10 minutes, while it confirmed others': it is \
                     believed no longer; if the agent hashes large programs, set `workload_size_limit` in its unix plugin"
                );
            }
        }
    }
}

//! The daemon's own identities, which no workload gets.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::identity::SpiffeId;
use crate::svid::SourceError;
use crate::svid::agent::AttestingAgent;

/// Time for which the daemon's own identities are taken as current.
pub(super) const OWN_ID_TTL: Duration = Duration::from_secs(60);
/// Time until the next query of them after one that failed.
const OWN_ID_RETRY: Duration = Duration::from_secs(5);
/// Maximum age of the agent's last confirmation of the daemon, when the agent denies a workload.
pub(super) const OWN_ID_RECHECK: Duration = Duration::from_secs(1);

/// Cache of the daemon's own identities.
#[derive(Default)]
pub(super) struct OwnIds {
    latest: Mutex<Option<OwnIdsReply>>,
    /// Held during a query. Requests for which the cached identities are fresh enough do not wait.
    query_lock: tokio::sync::Mutex<()>,
}

/// The daemon's own identities, as the agent reported them.
#[derive(Debug)]
struct OwnIdsReply {
    ids: BTreeSet<SpiffeId>,
    /// Time of the agent's last confirmation.
    confirmed: Instant,
    /// The start of their age. Later than `confirmed` if a failed query delays the next one.
    fresh_from: Instant,
}

impl OwnIds {
    /// Returns the identities. Queries `agent` again if they are older than `age`.
    pub(super) async fn get(
        &self,
        agent: &dyn AttestingAgent,
        audience: &str,
        age: Duration,
    ) -> Result<BTreeSet<SpiffeId>, SourceError> {
        if let Some(ids) = self.cached(age) {
            return Ok(ids);
        }
        let _lock = self.query_lock.lock().await;
        if let Some(ids) = self.cached(age) {
            return Ok(ids);
        }
        let ids = match agent.fetch_own(audience).await {
            Ok(ids) => ids,
            // They rarely change, so the earlier ones still count. That the agent knows the daemon
            // now is not proven by them.
            Err(error) if age == OWN_ID_TTL => {
                let mut latest = self.latest();
                let latest = latest.as_mut().ok_or(error)?;
                // Requests that wait for the lock do not each retry.
                latest.fresh_from = Instant::now()
                    .checked_sub(OWN_ID_TTL - OWN_ID_RETRY)
                    .unwrap_or(latest.fresh_from);
                return Ok(latest.ids.clone());
            }
            Err(error) => return Err(error),
        };
        let ids: BTreeSet<SpiffeId> = ids
            .iter()
            .filter_map(|id| SpiffeId::parse(id).ok())
            .collect();
        self.set(ids.clone(), Instant::now());
        Ok(ids)
    }

    /// Returns the time at which the agent last confirmed the identities.
    pub(super) fn confirmed_at(&self) -> Option<Instant> {
        self.latest().as_ref().map(|latest| latest.confirmed)
    }

    pub(super) fn set(&self, ids: BTreeSet<SpiffeId>, confirmed: Instant) {
        *self.latest() = Some(OwnIdsReply {
            ids,
            confirmed,
            fresh_from: confirmed,
        });
    }

    fn cached(&self, age: Duration) -> Option<BTreeSet<SpiffeId>> {
        self.latest()
            .as_ref()
            .filter(|latest| latest.fresh_from.elapsed() < age)
            .map(|latest| latest.ids.clone())
    }

    fn latest(&self) -> MutexGuard<'_, Option<OwnIdsReply>> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

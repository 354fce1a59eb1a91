//! The daemon's own identities, which no workload gets.

use std::collections::BTreeSet;
use std::sync::PoisonError;
use std::time::Duration;

use tokio::time::Instant;

use super::AgentSourceInner;
use crate::identity::SpiffeId;
use crate::svid::SourceError;

/// Time for which the daemon's own identities are taken as current.
pub(super) const OWN_ID_TTL: Duration = Duration::from_secs(60);
/// Time until the next query of them after one that failed.
const OWN_ID_RETRY: Duration = Duration::from_secs(5);
/// Maximum age of the agent's last confirmation of the daemon, when the agent denies a workload.
pub(super) const OWN_ID_RECHECK: Duration = Duration::from_secs(1);

/// The daemon's own identities, as the agent reported them.
#[derive(Debug)]
pub(super) struct OwnIds {
    pub(super) ids: BTreeSet<SpiffeId>,
    /// Time of the agent's last confirmation.
    pub(super) confirmed: Instant,
    /// The start of their age. Later than `confirmed` if a failed query delays the next one.
    pub(super) fresh_from: Instant,
}

impl AgentSourceInner {
    /// Returns the daemon's own identities, queried again if they are older than `age`.
    pub(super) async fn own(&self, age: Duration) -> Result<BTreeSet<SpiffeId>, SourceError> {
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
    pub(super) fn own_confirmed_at(&self) -> Option<Instant> {
        self.own
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map(|own| own.confirmed)
    }
}

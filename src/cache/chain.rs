//! Chains of roles: each session has an entry of its own, which the chains of one SPIFFE ID share.
//!
//! The entry of a session that no workload gets has no body, only credentials that sign the call
//! for the next one. It is refreshed, retried and revoked like any other. A session that STS or the
//! source rejects takes all later ones with it, at the end of the same grace. An outage does not.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::entry::{CachedCredentials, Entry};
use super::failure::FailureKind;
use super::flight::{FlightStart, Waiter};
use super::{CacheError, CacheInner, Lookup};
use crate::caller::Caller;
use crate::credentials::Credentials;
use crate::exchange::{ExchangeError, TokenExchanger};
use crate::role::Grant;
use crate::svid::SourceError;

/// Number of tries to use the entry of an earlier session, while reloads replace it.
const MAX_ENTRY_TRIES: usize = 4;
/// Age of a session from which it is renewed where STS rejects a call that it signed. AWS rejects
/// sessions that were issued before an operator revoked them, and not those after it.
const MIN_RENEWAL_AGE: Duration = Duration::from_secs(60);

/// An exchange that runs.
type Exchange = Pin<Box<dyn Future<Output = Result<Credentials, ExchangeError>> + Send>>;

impl CacheInner {
    /// Exchanges a token of `caller`, or the credentials of the session before it, for those of
    /// this entry.
    pub(super) fn exchange(self: Arc<Self>, entry: Arc<Entry>, caller: Arc<Caller>) -> Exchange {
        Box::pin(async move {
            let grant = &entry.grant;
            let exchanger = self.policy.load().exchanger.clone();
            let result = match grant.previous() {
                None => exchanger.exchange(&caller, grant).await,
                Some(previous) => {
                    self.exchange_chained(&exchanger, grant, &previous, &caller)
                        .await
                }
            };
            result.map_err(|error| error.at_hop(grant))
        })
    }

    /// Exchanges the credentials of the session `previous`. If STS does not accept that session any
    /// more, renews it once.
    async fn exchange_chained(
        self: &Arc<Self>,
        exchanger: &TokenExchanger,
        grant: &Grant,
        previous: &Grant,
        caller: &Arc<Caller>,
    ) -> Result<Credentials, ExchangeError> {
        let session = self.session(previous, caller).await?;
        let rejection = match exchanger.exchange_chained(grant, signing(&session)?).await {
            Err(error) if error.rejects_previous_session() => error,
            result => return result,
        };
        let is_recent = |at: SystemTime| {
            let age = self.clock.now().duration_since(at);
            age.unwrap_or_default() < MIN_RENEWAL_AGE
        };
        if rejection.is_access_denied() && is_recent(session.issued()) {
            return Err(rejection);
        }
        let Some(renewed) = self.renewed(previous, &session, caller).await else {
            return Err(rejection);
        };
        exchanger.exchange_chained(grant, signing(&renewed)?).await
    }

    /// Returns the credentials of an earlier session, from its entry or by a flight of that entry.
    async fn session(
        self: &Arc<Self>,
        grant: &Grant,
        caller: &Arc<Caller>,
    ) -> Result<Arc<CachedCredentials>, ExchangeError> {
        for _ in 0..MAX_ENTRY_TRIES {
            let policy = self.policy.load_full();
            // A flight may be one of a role that a reload has removed.
            if !policy.roles.can_grant(grant) {
                break;
            }
            let found = match self.find(&policy, grant, caller, FlightStart::Due) {
                Ok(Lookup::Credentials(cached, _)) => Ok(cached),
                Ok(Lookup::Flight(waiter)) => waiter.wait_for_end().await,
                Err(error) => Err(error),
            };
            match found {
                Ok(cached) => return Ok(cached),
                Err(CacheError::Exchange(error)) => return Err(error),
                Err(CacheError::Full | CacheError::TooManyRoles) => {
                    return Err(ExchangeError::TooOften);
                }
                Err(CacheError::Pending) => {}
            }
        }
        Err(SourceError::Reloaded.into())
    }

    /// Returns other credentials of an earlier session than `rejected`, by a flight if there are
    /// none. The entry keeps the old ones unless the flight succeeds.
    async fn renewed(
        self: &Arc<Self>,
        grant: &Grant,
        rejected: &Arc<CachedCredentials>,
        caller: &Arc<Caller>,
    ) -> Option<Arc<CachedCredentials>> {
        let entry = self.table.find(grant)?;
        let current = entry.current.load_full();
        if let Some(current) = current.filter(|current| !Arc::ptr_eq(current, rejected)) {
            return Some(current);
        }
        self.renewal(&entry, caller)?.wait_for_end().await.ok()
    }

    /// Joins the flight of an entry, or starts one.
    fn renewal(self: &Arc<Self>, entry: &Arc<Entry>, caller: &Arc<Caller>) -> Option<Waiter> {
        let mut state = entry.state();
        if state.retired {
            return None;
        }
        let flight = match &state.flight {
            Some(flight) => flight.clone(),
            None => self.start_flight(entry, caller.clone(), &mut state, FlightStart::Due, None),
        };
        Some(flight.join(caller))
    }

    /// Records the rejection of a session in all later ones of its chains, at the same moment.
    /// Their refresh is due then, and their credentials end with the grace.
    pub(super) fn fail_later_sessions(
        self: &Arc<Self>,
        hop: &Arc<Entry>,
        error: &ExchangeError,
        now: (Instant, SystemTime),
    ) {
        if !hop.grant.is_hop() || !FailureKind::of(error).is_final() {
            return;
        }
        let mut later = self.table.of(&hop.grant.spiffe_id);
        later.retain(|entry| hop.grant.comes_before(&entry.grant));
        for entry in later {
            let mut state = entry.state();
            if state.retired {
                continue;
            }
            if let Some(flight) = &state.flight {
                flight.overrule(error);
            }
            let Some(cached) = entry.current.load_full() else {
                continue;
            };
            entry.current.store(Some(Arc::new(cached.due_now())));
            let event = self.record_failure(&entry, error, now, &mut state);
            self.plan(&entry, &mut state);
            drop(state);
            if let Some(event) = event {
                event.emit(&entry, &self.log);
            }
        }
    }
}

/// Returns the credentials of a session that sign the next call.
fn signing(session: &CachedCredentials) -> Result<&Credentials, ExchangeError> {
    session.signing.as_deref().ok_or(ExchangeError::Panicked)
}

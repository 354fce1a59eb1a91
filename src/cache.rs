//! Cache of credentials by SPIFFE ID and role. It exchanges once for all callers of an entry,
//! refreshes ahead of expiry, and serves through outages.
//!
//! A flight (one exchange of an SVID for credentials) belongs to the cache. A client that hangs up,
//! as many SDKs do after a second, neither cancels nor wastes it. Requests read the current
//! credentials without waiting for a refresh.
//!
//! | part | has |
//! |---|---|
//! | `chain` | the sessions of a chain, and the effect of one's failure on the later ones |
//! | `entry` | one entry: its credentials as they are served, its refresh state and failure state |
//! | `table` | the table of entries by SPIFFE ID, and its bounds |
//! | `failure` | the kinds of failure, and their effect on cached credentials |
//! | `flight` | an exchange that runs for an entry, the requests that wait for it, and the storage of its result |
//! | `refresh` | the rule of what is due for an entry, and when, and the one task that does it |
//! | `events` | the events that the cache logs |

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use thiserror::Error;
use tokio::time::Instant;

use crate::audit::CacheResult;
use crate::caller::Caller;
use crate::clock::Clock;
use crate::exchange::ExchangeError;
use crate::identity::SpiffeId;
use crate::limits::{FairSemaphore, LogQuota};
use crate::metrics::{CallLabel, EntryStateLabel, EvictionReason, Metrics};
use crate::policy::Policy;
use crate::role::Grant;

mod chain;
mod entry;
mod events;
mod failure;
mod flight;
mod refresh;
mod table;

pub use entry::{CachedCredentials, EntryStatus};

use entry::{CredentialTimes, Entry, EntryState};
use flight::{FlightStart, Waiter};
use refresh::{Action, Schedule};
use table::EntryTable;

/// Bound of concurrent refreshes that the task starts. An outage that ends, or an agent that hangs,
/// must not delay requests for first credentials. A refresh that a request starts needs no permit.
/// At this bound the SPIFFE ID with the most loses its newest one, unless no other one holds fewer
/// (T29).
const MAX_REFRESHES: usize = 64;
/// The part of [`MAX_REFRESHES`] that one SPIFFE ID may use.
const MAX_REFRESHES_PER_SPIFFE_ID: usize = 4;

/// Handle of the cache, cheap to clone.
#[derive(Debug, Clone)]
pub struct CredentialCache(Arc<CacheInner>);

struct CacheInner {
    policy: ArcSwap<Policy>,
    clock: Clock,
    metrics: Metrics,
    table: EntryTable,
    schedule: Arc<Schedule>,
    refreshes: FairSemaphore<SpiffeId>,
    log: LogQuota,
    /// The caller of every refresh if the source does not need a live caller.
    synthetic_caller: Arc<Caller>,
    /// The zero of [`Entry::last_used`].
    start: Instant,
}

/// Reason why the cache has no credentials for a request.
#[derive(Debug, Clone, Error)]
pub enum CacheError {
    /// The exchange failed with this error.
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    /// The exchange is still running, or a reload replaced the entry. A retry finds the result.
    #[error("credentials are not ready: the identity source or STS is slow; retry the request")]
    Pending,
    /// The cache has `max_entries` entries, and none of this SPIFFE ID can be evicted.
    #[error(
        "cache is full: no entry of this workload can be evicted; raise max_entries in [cache] on the node"
    )]
    Full,
    /// All entries of this SPIFFE ID have a running flight, so none can be evicted.
    #[error("too many concurrent exchanges for this workload; retry later with fewer roles")]
    TooManyRoles,
}

/// Result of the search for an entry's credentials.
enum Lookup {
    Credentials(Arc<CachedCredentials>, CacheResult),
    Flight(Waiter),
}

impl CredentialCache {
    /// Creates an empty cache. Its one task runs on the current tokio runtime until the cache is
    /// dropped.
    pub fn new(policy: Policy, clock: Clock, metrics: Metrics) -> Self {
        let schedule = Arc::new(Schedule::default());
        let inner = Arc::new(CacheInner {
            policy: ArcSwap::from_pointee(policy),
            clock,
            metrics,
            table: EntryTable::default(),
            schedule: schedule.clone(),
            refreshes: FairSemaphore::new(MAX_REFRESHES, MAX_REFRESHES_PER_SPIFFE_ID),
            log: events::log_quota(),
            synthetic_caller: Arc::new(Caller::synthetic()),
            start: Instant::now(),
        });
        tokio::spawn(refresh::run(
            Arc::downgrade(&inner),
            schedule,
            inner.clock.clone(),
        ));
        Self(inner)
    }

    /// Returns the current policy. Release what it decides only if it
    /// [is still current](Self::is_current).
    pub fn policy(&self) -> Arc<Policy> {
        self.0.policy.load_full()
    }

    /// Returns whether no reload has replaced `policy`.
    pub fn is_current(&self, policy: &Arc<Policy>) -> bool {
        self.0.is_current(policy)
    }

    /// Replaces the policy, and retires every entry that the new one does not keep (T17). When this
    /// returns, those entries serve nothing, and the results of their running flights are
    /// discarded. Call it for one reload at a time.
    ///
    /// The store is the reload: from there on every request that has begun is decided again,
    /// because its policy is not current. This holds without a lock around reloads and requests:
    ///
    /// 1. A request uses an entry only if its own policy has verified the entry, or added it.
    ///    So it never gets credentials of another basis.
    /// 2. Only `verify` retires an entry for a reload, and it does so after the store. Only after
    ///    the store is a request rejected with an old policy. So `Pending` for one of these reasons
    ///    finds its policy replaced, and no caller sees it.
    /// 3. A policy that keeps an entry never retires it. So a request of the new policy never waits
    ///    for a flight that its own reload ends.
    /// 4. An entry is added within the lock of its shard, and only by the current policy. So either
    ///    the sweep has yet to lock that shard, or the request is rejected.
    /// 5. Each reload sweeps all entries before the next one begins. So an entry that one policy
    ///    did not keep is not served again by a later policy that would.
    ///
    /// `cache/tests/reload_model.rs` checks all of it on a small model, in every interleaving.
    pub fn reload(&self, policy: Policy) {
        let policy = Arc::new(policy);
        self.0.policy.store(policy.clone());
        self.0
            .table
            .retain(|entry| self.0.verify(entry, &policy).unwrap_or(true));
    }

    /// Returns the cached credentials for `grant`, which `policy` has granted, or exchanges
    /// `caller`'s JWT-SVID for new ones.
    ///
    /// Waits for as long as the exchange takes. Fails if the exchange does, if the exchange before
    /// it failed a moment ago, or if the cache has no room for the entry.
    pub async fn get(
        &self,
        policy: &Arc<Policy>,
        grant: &Grant,
        caller: &Arc<Caller>,
    ) -> Result<(Arc<CachedCredentials>, CacheResult), CacheError> {
        let found = self.0.find(policy, grant, caller, FlightStart::Due);
        let result = match &found {
            Ok(Lookup::Credentials(_, freshness)) => *freshness,
            Ok(Lookup::Flight(_)) | Err(_) => CacheResult::Miss,
        };
        let label = CallLabel {
            result: result.name(),
        };
        self.0.metrics.cache_requests.get_or_create(&label).inc();
        match found? {
            Lookup::Credentials(cached, freshness) => Ok((cached, freshness)),
            Lookup::Flight(waiter) => Ok((waiter.wait().await?, CacheResult::Miss)),
        }
    }

    /// Starts the exchange for a request that `caller` is about to send, unless the cache has the
    /// credentials. Nothing waits for it, and a failure of `caller` alone is not recorded.
    pub fn start(&self, policy: &Arc<Policy>, grant: &Grant, caller: &Arc<Caller>) {
        // An error is that of the request, too.
        drop(self.0.find(policy, grant, caller, FlightStart::Ahead));
    }

    /// Returns the state of each entry for `/status`, without secrets.
    pub fn entries(&self) -> Vec<EntryStatus> {
        let mut entries = Vec::new();
        self.0
            .table
            .for_each(|entry| entries.push(entry.describe(&self.0.clock)));
        entries
    }

    /// Sets the gauges of entries by state and of the earliest expiry, for `/metrics`.
    pub fn update_gauges(&self) {
        let mut counts = [0; EntryStateLabel::ALL.len()];
        let mut earliest: Option<Duration> = None;
        self.0.table.for_each(|entry| {
            counts[entry.status(&self.0.clock) as usize] += 1;
            if let Some(cached) = entry.current.load().as_ref() {
                let remaining = cached.remaining(&self.0.clock);
                earliest = Some(earliest.map_or(remaining, |least| least.min(remaining)));
            }
        });
        self.0.metrics.set_earliest_expiry(earliest);
        for state in EntryStateLabel::ALL {
            self.0
                .metrics
                .cache_entries
                .get_or_create(&state.into())
                .set(counts[state as usize]);
        }
    }
}

impl CacheInner {
    /// Returns the credentials or the flight for this request, without waiting.
    fn find(
        self: &Arc<Self>,
        policy: &Arc<Policy>,
        grant: &Grant,
        caller: &Arc<Caller>,
        start: FlightStart,
    ) -> Result<Lookup, CacheError> {
        loop {
            let entry = self.entry(policy, grant)?;
            if self.verify(&entry, policy)? {
                entry.record_use(self.start.elapsed(), caller.peer.uid);
                if policy.source.requires_live_caller() {
                    entry.latest.store(Some(caller.clone()));
                }
                if let Some(found) = self.serve(&entry, caller, start)? {
                    return Ok(found);
                }
            }
            // The entry is retired. Remove it and try again.
            self.table.remove(&entry);
        }
    }

    /// Returns the credentials or the flight of an entry. Returns `None` if the entry is retired.
    fn serve(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        caller: &Arc<Caller>,
        start: FlightStart,
    ) -> Result<Option<Lookup>, CacheError> {
        let servable = self
            .servable(entry)
            .filter(|_| !entry.grant.is_hop() || !entry.is_rejected_hop(&entry.state()));
        let Some((cached, times)) = servable else {
            return self.join_or_start(entry, caller, start);
        };
        let result = if times.is_due() {
            self.refresh_for(entry, caller);
            CacheResult::Stale
        } else {
            CacheResult::Hit
        };
        Ok(Some(Lookup::Credentials(cached, result)))
    }

    /// Returns the entry of `grant`, and adds it if it is missing.
    fn entry(&self, policy: &Arc<Policy>, grant: &Grant) -> Result<Arc<Entry>, CacheError> {
        if let Some(entry) = self.table.find(grant) {
            return Ok(entry);
        }
        let retire = |entry: &Arc<Entry>, state: &mut EntryState| {
            self.retire(entry, state, EvictionReason::Evicted)
        };
        self.table
            .find_or_add(policy, grant, &|| self.is_current(policy), retire)
    }

    fn is_current(&self, policy: &Arc<Policy>) -> bool {
        Arc::ptr_eq(&self.policy.load(), policy)
    }

    /// Returns whether requests of `policy` may use the entry. Retires the entry if the policy does
    /// not keep it. An outdated policy does not decide on entries: the error is `Pending`.
    ///
    /// A thread that calls it holds no lock of an entry.
    fn verify(&self, entry: &Arc<Entry>, policy: &Arc<Policy>) -> Result<bool, CacheError> {
        let verified_by = entry.policy.load();
        if Arc::ptr_eq(&verified_by, policy) {
            return Ok(true);
        }
        // The entry was found before. So its policy is an earlier one if this one is current.
        if !self.is_current(policy) {
            return Err(CacheError::Pending);
        }
        if !policy.keeps(&entry.grant, &verified_by) {
            self.retire(entry, &mut entry.state(), EvictionReason::Reload);
            return Ok(false);
        }
        // A slower thread may store an earlier policy after this. Then the next request verifies
        // the entry once more.
        entry.policy.store(policy.clone());
        Ok(true)
    }

    /// Returns the credentials that may still be served, and their times.
    fn servable(&self, entry: &Entry) -> Option<(Arc<CachedCredentials>, CredentialTimes)> {
        let cached = entry.current.load_full()?;
        let times = cached.times(&self.clock);
        times.is_servable().then_some((cached, times))
    }

    /// Starts the refresh if it is due. It is not due if a flight runs, or one has just succeeded
    /// or failed.
    fn refresh_for(self: &Arc<Self>, entry: &Arc<Entry>, caller: &Arc<Caller>) {
        let mut state = entry.state();
        if !state.retired
            && matches!(
                self.decide(entry, &state, &self.policy.load()).then,
                Action::Refresh(_)
            )
        {
            self.start_flight(entry, caller.clone(), &mut state, FlightStart::Due, None);
        }
    }

    /// Joins the running flight or starts one. Returns the credentials or the failure instead if a
    /// flight has just ended. Returns `None` if the entry is retired.
    fn join_or_start(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        caller: &Arc<Caller>,
        start: FlightStart,
    ) -> Result<Option<Lookup>, CacheError> {
        let mut state = entry.state();
        if state.retired {
            return Ok(None);
        }
        if let Some(flight) = &state.flight {
            return Ok(Some(Lookup::Flight(flight.join(caller))));
        }
        // A flight may have succeeded since the caller found no credentials.
        if let Some((cached, _)) = self.servable(entry)
            && !entry.is_rejected_hop(&state)
        {
            return Ok(Some(Lookup::Credentials(cached, CacheResult::Hit)));
        }
        if let Some(failure) = &state.failure
            && failure.times.is_cached(Instant::now())
        {
            return Err(failure.error.clone().into());
        }
        Ok(Some(Lookup::Flight(
            self.start_flight(entry, caller.clone(), &mut state, start, None)
                .join(caller),
        )))
    }

    /// Clears the credentials of an entry for good: it serves nothing and accepts no result from
    /// now on.
    fn retire(&self, entry: &Arc<Entry>, state: &mut EntryState, reason: EvictionReason) {
        state.retired = true;
        if let Some(flight) = &state.flight {
            flight.finish(Err(CacheError::Pending));
        }
        self.clear_credentials(entry, reason);
        self.schedule.put(entry, &mut state.next, None);
    }

    fn clear_credentials(&self, entry: &Entry, reason: EvictionReason) {
        if entry.current.swap(None).is_some() {
            self.metrics
                .cache_evictions
                .get_or_create(&reason.into())
                .inc();
        }
    }
}

impl Drop for CacheInner {
    fn drop(&mut self) {
        self.schedule.close();
    }
}

impl std::fmt::Debug for CacheInner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CacheInner")
            .field("entries", &self.table.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;

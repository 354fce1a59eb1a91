//! Credentials by SPIFFE ID and role: issued once for all who ask, refreshed ahead, kept through outages.
//!
//! A flight (one exchange of a JWT-SVID at STS) belongs to the cache: a client that hangs up, as many SDKs do after a
//! second, neither cancels it nor wastes it. Readers load the current credentials without waiting for a refresh.
//!
//! | part | |
//! |---|---|
//! | `entry` | one place: what is handed out, and what is known of it |
//! | `places` | all of them, by SPIFFE ID; the bounds |
//! | `issued`, `trouble` | how long credentials are handed out; what a failure means for them |
//! | `flight` | what requests wait for meanwhile |
//! | `issuing` | issuing for a place, and whose caller it is done with |
//! | `rules` | what is to be done with a place, and when |
//! | `rounds` | the one task that does it in time |
//! | `news` | what the log says of it |

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use thiserror::Error;
use tokio::time::Instant;

use crate::audit::CacheResult;
use crate::caller::Caller;
use crate::clock::Clock;
use crate::identity::SpiffeId;
use crate::issue::{ExchangeError, TokenExchanger};
use crate::limits::FairSemaphore;
use crate::metrics::{CallLabel, EntryStateLabel, EvictionReason, Metrics};
use crate::role::Grant;

mod entry;
mod flight;
mod issued;
mod issuing;
mod news;
mod places;
mod rounds;
mod rules;
mod trouble;

pub use entry::EntryStatus;
pub use issued::{CachedBody, CachedCredentials};

use entry::{CachedState, Entry};
use flight::Waiter;
use issued::MIN_REMAINING;
use news::EventLog;
use places::EntryTable;
use rounds::Schedule;
use rules::Action;

/// How many refreshes are under way at most, so that an outage that ends, or a source that hangs, does not hold up those
/// who wait for their first credentials ...
const MAX_REFRESHES: usize = 64;
/// ... and of those of one SPIFFE ID.
const MAX_REFRESHES_PER_WORKLOAD: usize = 4;

/// Hands out credentials. Cheap to clone.
#[derive(Debug, Clone)]
pub struct CredentialCache(Arc<CacheInner>);

struct CacheInner {
    setup: ArcSwap<Generation>,
    clock: Clock,
    metrics: Metrics,
    places: EntryTable,
    schedule: Arc<Schedule>,
    refreshes: FairSemaphore<SpiffeId>,
    log: EventLog,
    /// What refreshes are asked for with, where the source does not look at callers.
    nobody: Arc<Caller>,
    /// [`Entry::last_used`] counts from here.
    start: Instant,
}

/// What a reload replaces.
struct Generation {
    issuer: TokenExchanger,
    limits: Limits,
    keep: Box<dyn Fn(&Grant) -> bool + Send + Sync>,
}

/// `[cache]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How many sets of credentials there are at most.
    pub max_entries: usize,
    /// How long credentials are still handed out once STS refuses to renew them.
    pub revocation_grace: Duration,
}

/// Why there are no credentials to hand out now.
#[derive(Debug, Clone, Error)]
pub enum CacheError {
    /// They could not be issued.
    #[error(transparent)]
    Issue(#[from] ExchangeError),
    /// They are still being issued, or a reload came between: the next try will find them.
    #[error("the credentials are still being issued")]
    Pending,
    /// There are too many others.
    #[error("the daemon holds as many credentials as it may")]
    Full,
    /// So many are being issued for this SPIFFE ID that there is no place for more.
    #[error("too many roles are being issued for this workload at one time")]
    TooManyRoles,
}

/// What a request finds.
enum Lookup {
    Credentials(Arc<CachedCredentials>, CacheResult),
    Flight(Waiter),
}

impl CredentialCache {
    /// An empty cache. Its one task runs on the current tokio runtime until the cache is dropped.
    pub fn new(issuer: TokenExchanger, clock: Clock, metrics: Metrics, limits: Limits) -> Self {
        let schedule = Arc::new(Schedule::default());
        let shared = Arc::new(CacheInner {
            setup: ArcSwap::from_pointee(Generation {
                issuer,
                limits,
                keep: Box::new(|_| true),
            }),
            clock,
            metrics,
            places: EntryTable::default(),
            schedule: schedule.clone(),
            refreshes: FairSemaphore::new(MAX_REFRESHES, MAX_REFRESHES_PER_WORKLOAD),
            log: EventLog::default(),
            nobody: Arc::new(Caller::synthetic()),
            start: Instant::now(),
        });
        tokio::spawn(rounds::run(
            Arc::downgrade(&shared),
            schedule,
            shared.clock.clone(),
        ));
        Self(shared)
    }

    /// Goes on with another source, another STS and other limits, and ends every entry that `keep` is false for: when
    /// this returns nothing of it is handed out any more, and what a flight under way brings for it is thrown away
    /// (attack 17). `keep` is asked again for each new entry, so a request that was decided by the old configuration
    /// and comes late makes none that the new one would not. It must not use the cache.
    pub fn reconfigure(
        &self,
        issuer: TokenExchanger,
        limits: Limits,
        keep: impl Fn(&Grant) -> bool + Send + Sync + 'static,
    ) {
        let setup = Arc::new(Generation {
            issuer,
            limits,
            keep: Box::new(keep),
        });
        self.0.setup.store(setup.clone());
        self.0.places.retain(|slot| {
            let kept = (setup.keep)(&slot.grant);
            if !kept {
                self.0
                    .retire(slot, &mut slot.state(), EvictionReason::Reload);
            }
            kept
        });
    }

    /// The credentials for `grant`: those that are there, or newly issued with `caller`'s token.
    pub async fn get(
        &self,
        grant: &Grant,
        caller: &Arc<Caller>,
    ) -> Result<(Arc<CachedCredentials>, CacheResult), CacheError> {
        let found = self.0.find(grant, caller);
        let result = match &found {
            Ok(Lookup::Credentials(_, freshness)) => *freshness,
            Ok(Lookup::Flight(_)) | Err(_) => CacheResult::Miss,
        };
        let label = CallLabel {
            result: result.name(),
        };
        self.0.metrics.cache_requests.get_or_create(&label).inc();
        match found? {
            Lookup::Credentials(issued, freshness) => Ok((issued, freshness)),
            Lookup::Flight(waiter) => Ok((waiter.wait().await?, CacheResult::Miss)),
        }
    }

    /// What is cached, for `/status`: never a secret.
    pub fn entries(&self) -> Vec<EntryStatus> {
        let mut entries = Vec::new();
        self.0
            .places
            .for_each(|slot| entries.push(slot.describe(&self.0.clock)));
        entries
    }

    /// Counts the entries by state and finds the earliest expiry, for `/metrics`.
    pub fn count(&self) {
        let mut counts = [0; EntryStateLabel::ALL.len()];
        let mut earliest: Option<Duration> = None;
        self.0.places.for_each(|slot| {
            counts[slot.status(&self.0.clock) as usize] += 1;
            if let Some(issued) = slot.current.load().as_ref() {
                let remaining = issued.remaining(&self.0.clock);
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
    /// What there is for this request, without waiting for anything.
    fn find(self: &Arc<Self>, grant: &Grant, caller: &Arc<Caller>) -> Result<Lookup, CacheError> {
        loop {
            let slot = self.slot(grant)?;
            slot.used(self.start.elapsed(), caller.uid);
            let needs_caller = self.setup.load().issuer.needs_caller();
            if needs_caller {
                slot.latest.store(Some(caller.clone()));
            }
            if let Some((issued, left)) = self.servable(&slot) {
                if left > issued.refresh_left {
                    return Ok(Lookup::Credentials(issued, CacheResult::Hit));
                }
                self.refresh_for(&slot, caller);
                return Ok(Lookup::Credentials(issued, CacheResult::Stale));
            }
            if let Some(found) = self.join_or_start(&slot, caller)? {
                return Ok(found);
            }
            // It has ended in this moment. There is a new place for it, or a reason why not.
            self.places.remove(&slot);
        }
    }

    /// The place for `grant`, which may be new.
    fn slot(&self, grant: &Grant) -> Result<Arc<Entry>, CacheError> {
        if let Some(slot) = self.places.find(grant) {
            return Ok(slot);
        }
        let make_room = |slot: &Arc<Entry>, state: &mut CachedState| {
            self.retire(slot, state, EvictionReason::Evicted)
        };
        self.places
            .find_or_add(grant, &|| self.setup.load_full(), make_room)
    }

    /// The credentials that may still be handed out, and for how long they last.
    fn servable(&self, slot: &Entry) -> Option<(Arc<CachedCredentials>, Duration)> {
        let issued = slot.current.load_full()?;
        let left = issued.remaining(&self.clock);
        (left > MIN_REMAINING).then_some((issued, left))
    }

    /// Starts the refresh that is due, unless one runs, or has landed in this moment, or has failed a moment ago.
    fn refresh_for(self: &Arc<Self>, slot: &Arc<Entry>, caller: &Arc<Caller>) {
        let mut state = slot.state();
        if !state.ended
            && matches!(
                self.next_action(slot, &state, &self.setup.load()),
                Action::Refresh(_)
            )
        {
            self.start_flight(slot, caller.clone(), &mut state, None);
        }
    }

    /// A wait for the flight under way, or for a new one; or what came of one that has landed in this moment, or a moment
    /// ago. `None` if this is not the place any more.
    fn join_or_start(
        self: &Arc<Self>,
        slot: &Arc<Entry>,
        caller: &Arc<Caller>,
    ) -> Result<Option<Lookup>, CacheError> {
        let mut state = slot.state();
        if state.ended {
            return Ok(None);
        }
        if let Some(flight) = &state.flight {
            return Ok(Some(Lookup::Flight(flight.join(caller))));
        }
        // It may have landed since the place was found empty.
        if let Some((issued, _)) = self.servable(slot) {
            return Ok(Some(Lookup::Credentials(issued, CacheResult::Hit)));
        }
        if let Some(trouble) = &state.trouble
            && trouble.at.elapsed() < trouble::negative_ttl(&trouble.error)
        {
            return Err(trouble.error.clone().into());
        }
        Ok(Some(Lookup::Flight(
            self.start_flight(slot, caller.clone(), &mut state, None)
                .join(caller),
        )))
    }

    /// Takes the credentials out of a place. From now on nothing is handed out of it, and nothing put in.
    fn retire(&self, slot: &Arc<Entry>, state: &mut CachedState, reason: EvictionReason) {
        state.ended = true;
        if let Some(flight) = &state.flight {
            flight.finish(Err(CacheError::Pending));
        }
        self.clear_credentials(slot, reason);
        self.schedule.put(slot, &mut state.next, None);
    }

    fn clear_credentials(&self, slot: &Entry, reason: EvictionReason) {
        if slot.current.swap(None).is_some() {
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
        f.debug_struct("Shared")
            .field("places", &self.places.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;

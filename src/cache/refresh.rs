//! The one task that serves due entries, and the one rule of what is due and when: a refresh, an
//! expiry, a failure to drop.
//!
//! A task for each of 100,000 entries would cost more memory than the entries.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use tokio::sync::Notify;
use tokio::task::yield_now;
use tokio::time::{Instant, timeout_at};

use super::CacheInner;
use super::entry::{CredentialTimes, Entry, EntryState, MIN_REMAINING};
use super::events::CacheEvent;
use super::failure::{FailureKind, FailureTimes};
use super::flight::FlightStart;
use crate::backoff::Jitter;
use crate::clock::Clock;
use crate::metrics::EvictionReason;
use crate::policy::Policy;

/// Interval at which the task compares the wall clock with the monotonic clock by which it sleeps.
const CLOCK_CHECK_INTERVAL: Duration = Duration::from_secs(30);
/// Number of entries that the task serves before it yields to other tasks of its thread.
const BATCH: usize = 256;
/// Mean delay until a refresh without a permit tries again. It is not urgent, and thousands may
/// wait.
const LIMITER_RETRY: Duration = Duration::from_secs(4);

/// Queue of entries by due time, each at most once.
#[derive(Default)]
pub(super) struct Schedule {
    queue: Mutex<BTreeMap<(Instant, usize), Arc<Entry>>>,
    changed: Notify,
    closed: AtomicBool,
}

impl Schedule {
    /// Schedules `entry` for `at` instead of its previous time. `next` is its
    /// [`EntryState::next`].
    pub(super) fn put(&self, entry: &Arc<Entry>, next: &mut Option<Instant>, at: Option<Instant>) {
        let address = Arc::as_ptr(entry) as usize;
        let mut queue = self.lock();
        if let Some(previous) = next.take() {
            queue.remove(&(previous, address));
        }
        if let Some(at) = at {
            queue.insert((at, address), entry.clone());
            *next = Some(at);
            if queue
                .first_key_value()
                .is_some_and(|(first, _)| *first == (at, address))
            {
                self.changed.notify_one();
            }
        }
    }

    /// Takes up to [`BATCH`] entries that are due.
    fn due(&self) -> Vec<Arc<Entry>> {
        let mut queue = self.lock();
        let now = Instant::now();
        let mut due = Vec::new();
        while due.len() < BATCH
            && let Some(first) = queue.first_entry()
            && first.key().0 <= now
        {
            due.push(first.remove());
        }
        due
    }

    /// Waits until the first entry is due, the clocks are to be compared, or the queue has changed.
    /// Returns `false` when the cache is dropped.
    async fn wait(&self) -> bool {
        let first = self.lock().first_key_value().map(|((at, _), _)| *at);
        match first {
            Some(at) => {
                // A timeout and a notification both mean: process what is due.
                let _ = timeout_at(
                    at.min(Instant::now() + CLOCK_CHECK_INTERVAL),
                    self.changed.notified(),
                )
                .await;
            }
            None => self.changed.notified().await,
        }
        !self.closed.load(Ordering::Acquire)
    }

    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.changed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(Instant, usize), Arc<Entry>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Detector of steps between the wall clock and the monotonic clock: the wall clock was set, or the
/// machine was suspended.
struct ClockStepDetector {
    wall: SystemTime,
    at: Instant,
}

/// Smaller steps do not justify a pass over all entries.
const MIN_CLOCK_STEP: Duration = Duration::from_secs(1);

impl ClockStepDetector {
    fn new(clock: &Clock) -> Self {
        Self {
            wall: clock.now(),
            at: Instant::now(),
        }
    }

    /// Returns true if the clocks have moved apart since the last call.
    fn stepped(&mut self, clock: &Clock) -> bool {
        let now = Self::new(clock);
        let expected = self.wall + now.at.duration_since(self.at);
        let step = now
            .wall
            .duration_since(expected)
            .unwrap_or_else(|error| error.duration());
        *self = now;
        step > MIN_CLOCK_STEP
    }
}

/// The state of an entry at one time, as far as [`decide`] needs it.
#[derive(Debug, Clone)]
pub(super) struct EntrySnapshot {
    pub(super) now: Instant,
    pub(super) has_flight: bool,
    /// Time since the last request.
    pub(super) unused_for: Duration,
    pub(super) credentials: Option<CredentialTimes>,
    pub(super) failure: Option<FailureTimes>,
    /// The end of the grace after a rejection.
    pub(super) grace_end: Option<Instant>,
}

/// Actions that are due for an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DueActions {
    /// Clear the credentials first, for this reason.
    pub(super) clear: Option<EvictionReason>,
    pub(super) then: Action,
}

/// Action that is due for an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Remove the entry, for this reason.
    Remove(EvictionReason),
    /// Refresh now. If that is not possible, check again at this time at the latest.
    Refresh(Instant),
    /// Check again at this time.
    Wait(Instant),
}

/// Returns the due actions of an entry. It decides only, and executes nothing.
pub(super) fn decide(entry: &EntrySnapshot) -> DueActions {
    let now = entry.now;
    let Some(credentials) = &entry.credentials else {
        return DueActions {
            clear: None,
            then: without_credentials(entry),
        };
    };
    let expiry = now + credentials.servable_for();
    let end = entry
        .grace_end
        .map_or(expiry, |grace_end| grace_end.min(expiry));
    if end <= now {
        let reason = if credentials.is_servable() {
            EvictionReason::Refused
        } else {
            EvictionReason::Expired
        };
        return DueActions {
            clear: Some(reason),
            then: without_credentials(entry),
        };
    }
    // The checks are in order of precedence.
    let then = if entry.has_flight {
        Action::Wait(end)
    } else if !credentials.is_due() {
        Action::Wait(end.min(now + credentials.due_in()))
    } else if entry.unused_for > credentials.lifetime {
        Action::Remove(EvictionReason::Unused)
    } else {
        match entry.failure {
            Some(failure) if failure.retry_at > now => Action::Wait(end.min(failure.retry_at)),
            Some(_) | None => Action::Refresh(end),
        }
    };
    DueActions { clear: None, then }
}

/// Returns the action of an entry that has no credentials, or whose credentials are cleared now.
fn without_credentials(entry: &EntrySnapshot) -> Action {
    if entry.has_flight {
        return Action::Wait(entry.now + MIN_REMAINING);
    }
    match entry.failure {
        Some(failure) if failure.is_cached(entry.now) => Action::Wait(failure.cached_until),
        // It has no credentials, so this is not counted as an eviction.
        Some(_) | None => Action::Remove(EvictionReason::Unused),
    }
}

/// Serves due entries until the cache is dropped.
pub(super) async fn run(inner: Weak<CacheInner>, schedule: Arc<Schedule>, clock: Clock) {
    let mut clock_steps = ClockStepDetector::new(&clock);
    while schedule.wait().await {
        let Some(inner) = inner.upgrade() else {
            return;
        };
        if clock_steps.stepped(&clock) {
            let mut all = Vec::new();
            inner.table.for_each(|entry| all.push(entry.clone()));
            all.iter().for_each(|entry| inner.process_due(entry));
        }
        loop {
            let due = schedule.due();
            due.iter().for_each(|entry| inner.process_due(entry));
            if due.len() < BATCH {
                break;
            }
            yield_now().await;
        }
    }
}

impl CacheInner {
    /// Returns the due actions of an entry.
    pub(super) fn decide(&self, entry: &Entry, state: &EntryState, policy: &Policy) -> DueActions {
        let failure = state.failure.as_ref();
        decide(&EntrySnapshot {
            now: Instant::now(),
            has_flight: state.flight.is_some(),
            unused_for: self.start.elapsed().saturating_sub(entry.last_used()),
            credentials: entry
                .current
                .load()
                .as_ref()
                .map(|cached| cached.times(&self.clock)),
            failure: failure.map(|failure| failure.times),
            grace_end: failure
                .and_then(|failure| failure.refused_since)
                .map(|(since, _)| since + policy.limits.revocation_grace),
        })
    }

    /// Executes the due actions of an entry, and schedules its next one.
    fn process_due(self: &Arc<Self>, entry: &Arc<Entry>) {
        let policy = self.policy.load_full();
        let mut state = entry.state();
        if state.retired {
            return;
        }
        let DueActions { clear, then } = self.decide(entry, &state, &policy);
        let mut event = None;
        if let Some(reason) = clear {
            // Without another caller an expiry is expected, so it is not logged.
            let failure = state
                .failure
                .as_ref()
                .filter(|failure| FailureKind::of(&failure.error) != FailureKind::CallerUnusable);
            event = failure.map(|failure| CacheEvent::Expired(failure.error.clone()));
            self.clear_credentials(entry, reason);
        }
        let next_at = match then {
            Action::Remove(reason) => {
                self.retire(entry, &mut state, reason);
                None
            }
            Action::Wait(at) => Some(at),
            Action::Refresh(end) => Some(
                self.refresh(entry, &policy, &mut state)
                    .map_or(end, |at| end.min(at)),
            ),
        };
        self.schedule.put(entry, &mut state.next, next_at);
        drop(state);
        if next_at.is_none() {
            self.table.remove(entry);
        }
        if let Some(event) = event {
            event.emit(entry, &self.log);
        }
    }

    /// Starts a refresh if a caller and a permit are available. Returns the time to try again if
    /// only the permit is missing.
    fn refresh(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        policy: &Policy,
        state: &mut EntryState,
    ) -> Option<Instant> {
        let caller = if policy.source.requires_live_caller() {
            entry.latest.load_full()
        } else {
            Some(self.synthetic_caller.clone())
        };
        // Without a live caller, the next request starts the refresh.
        let caller = caller?;
        let Ok(permit) = self.refreshes.try_acquire_evicting(&entry.grant.spiffe_id) else {
            return Some(Instant::now() + Jitter::Around.apply(LIMITER_RETRY));
        };
        permit.set_in_use();
        self.start_flight(entry, caller, state, FlightStart::Due, Some(permit));
        None
    }

    /// Schedules the entry for its next action.
    pub(super) fn plan(&self, entry: &Arc<Entry>, state: &mut EntryState) {
        let due = self.decide(entry, state, &self.policy.load());
        let at = match (due.clear, due.then) {
            (None, Action::Wait(at)) => at,
            (Some(_), _) | (None, Action::Remove(_) | Action::Refresh(_)) => Instant::now(),
        };
        self.schedule.put(entry, &mut state.next, Some(at));
    }
}

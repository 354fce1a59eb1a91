//! The one task that looks at places when something is due: a refresh, an end, a failure to forget.
//!
//! A task for each of 100,000 entries would cost more memory than the entries.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use tokio::sync::Notify;
use tokio::task::yield_now;
use tokio::time::{Instant, timeout_at};

use super::entry::{CachedState, Entry};
use super::events::CacheEvent;
use super::failure::FailureKind;
use super::next_action::Action;
use super::{CacheInner, Generation};
use crate::clock::Clock;

/// How often the wall clock is compared with the monotonic one, by which the task sleeps.
const CLOCK_CHECK_INTERVAL: Duration = Duration::from_secs(30);
/// How many places are looked at before other tasks of the same thread have their turn.
const BATCH: usize = 256;
/// A refresh that has no turn now looks again after about this. It is not urgent, and thousands may wait.
const LIMITER_RETRY: Duration = Duration::from_secs(4);

/// Places in the order of time, each once at most.
#[derive(Default)]
pub(super) struct Schedule {
    queue: Mutex<BTreeMap<(Instant, usize), Arc<Entry>>>,
    changed: Notify,
    closed: AtomicBool,
}

impl Schedule {
    /// Has `slot` looked at `at`, and not when it was to be before. `next` is its [`CachedState::next`].
    pub(super) fn put(&self, slot: &Arc<Entry>, next: &mut Option<Instant>, at: Option<Instant>) {
        let address = Arc::as_ptr(slot) as usize;
        let mut queue = self.lock();
        if let Some(before) = next.take() {
            queue.remove(&(before, address));
        }
        if let Some(at) = at {
            queue.insert((at, address), slot.clone());
            *next = Some(at);
            if queue
                .first_key_value()
                .is_some_and(|(first, _)| *first == (at, address))
            {
                self.changed.notify_one();
            }
        }
    }

    /// Takes out some of those whose time has come.
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

    /// Until the first is due, or the clocks are to be compared, or something has changed; `false` at the end.
    async fn wait(&self) -> bool {
        let first = self.lock().first_key_value().map(|((at, _), _)| *at);
        match first {
            Some(at) => {
                // Whichever comes first.
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

/// Notices that the wall clock has left the monotonic one: it was set, or the machine was suspended.
struct ClockStepDetector {
    wall: SystemTime,
    at: Instant,
}

/// Less is not worth a look at everything.
const MIN_CLOCK_STEP: Duration = Duration::from_secs(1);

impl ClockStepDetector {
    fn new(clock: &Clock) -> Self {
        Self {
            wall: clock.now(),
            at: Instant::now(),
        }
    }

    /// Since the last time this was asked.
    fn stepped(&mut self, clock: &Clock) -> bool {
        let now = Self::new(clock);
        let expected = self.wall + now.at.duration_since(self.at);
        let away = now
            .wall
            .duration_since(expected)
            .unwrap_or_else(|error| error.duration());
        *self = now;
        away > MIN_CLOCK_STEP
    }
}

/// Until the cache is dropped.
pub(super) async fn run(shared: Weak<CacheInner>, schedule: Arc<Schedule>, clock: Clock) {
    let mut drift = ClockStepDetector::new(&clock);
    while schedule.wait().await {
        let Some(shared) = shared.upgrade() else {
            return;
        };
        if drift.stepped(&clock) {
            let mut all = Vec::new();
            shared.places.for_each(|slot| all.push(slot.clone()));
            all.iter().for_each(|slot| shared.process_due(slot));
        }
        loop {
            let due = schedule.due();
            due.iter().for_each(|slot| shared.process_due(slot));
            if due.len() < BATCH {
                break;
            }
            yield_now().await;
        }
    }
}

impl CacheInner {
    /// Does what is to be done with a place now, and says when it is looked at again.
    fn process_due(self: &Arc<Self>, slot: &Arc<Entry>) {
        let setup = self.setup.load_full();
        let mut state = slot.state();
        if state.ended {
            return;
        }
        let mut next = self.next_action(slot, &state, &setup);
        let mut news = None;
        if let Action::Clear(reason) = next {
            // Without another caller an end is what has to come.
            let trouble = state
                .trouble
                .as_ref()
                .filter(|trouble| FailureKind::of(&trouble.error) != FailureKind::CallerGone);
            news = trouble.map(|trouble| CacheEvent::Over(trouble.error.clone()));
            self.clear_credentials(slot, reason);
            next = self.next_action(slot, &state, &setup);
        }
        let again = match next {
            Action::Remove(reason) | Action::Clear(reason) => {
                self.retire(slot, &mut state, reason);
                None
            }
            Action::Wait(at) => Some(at),
            Action::Refresh(end) => Some(
                self.refresh(slot, &setup, &mut state)
                    .map_or(end, |at| end.min(at)),
            ),
        };
        self.schedule.put(slot, &mut state.next, again);
        drop(state);
        if again.is_none() {
            self.places.remove(slot);
        }
        if let Some(news) = news {
            news.emit(slot, &self.log);
        }
    }

    /// Starts a refresh, if there is somebody to ask for it with, and a turn; if only that is missing, says when to look
    /// again.
    fn refresh(
        self: &Arc<Self>,
        slot: &Arc<Entry>,
        setup: &Generation,
        state: &mut CachedState,
    ) -> Option<Instant> {
        let caller = if setup.issuer.needs_caller() {
            slot.latest.load_full()
        } else {
            Some(self.nobody.clone())
        };
        // Without one, the next request brings it.
        let caller = caller?;
        let Ok(turn) = self.refreshes.try_acquire(&slot.grant.spiffe_id) else {
            return Some(Instant::now() + LIMITER_RETRY.mul_f64(0.5 + fastrand::f64()));
        };
        self.start_flight(slot, caller, state, Some(turn));
        None
    }

    /// Has the place looked at when there is something to do.
    pub(super) fn plan(&self, slot: &Arc<Entry>, state: &mut CachedState) {
        let at = match self.next_action(slot, state, &self.setup.load()) {
            Action::Wait(at) => at,
            Action::Refresh(_) | Action::Clear(_) | Action::Remove(_) => Instant::now(),
        };
        self.schedule.put(slot, &mut state.next, Some(at));
    }
}

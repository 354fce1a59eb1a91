//! Flights: the exchanges that run, the requests that wait for them, and the storage of their
//! results.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::entry::{CachedCredentials, Entry, EntryState};
use super::events::CacheEvent;
use super::failure::{FailureKind, FailureState};
use super::{CacheError, CacheInner};
use crate::caller::Caller;
use crate::clock::REQUEST_HOLD;
use crate::credentials::Credentials;
use crate::exchange::ExchangeError;
use crate::identity::SpiffeId;
use crate::limits::FairPermit;
use crate::metrics::{CallLabel, EvictionReason};
use crate::telemetry::in_current_request;

pub(super) type FlightResult = Result<Arc<CachedCredentials>, CacheError>;

/// The cause for which a flight starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FlightStart {
    /// A request waits for it, or an entry is due for a refresh.
    Due,
    /// A request is going to need it. Its caller may be gone by then, which fails nothing.
    Ahead,
}

/// One exchange that is running.
pub(super) struct Flight {
    start: FlightStart,
    result: watch::Sender<Option<FlightResult>>,
    waiting: Mutex<WaitingCallers>,
    /// The rejection of an earlier session of the chain, which came while the flight ran.
    overruled: OnceLock<ExchangeError>,
}

/// The callers that wait, in order of arrival.
#[derive(Default)]
struct WaitingCallers {
    callers: BTreeMap<u64, Arc<Caller>>,
    next: u64,
}

/// A request that waits for a flight.
pub(super) struct Waiter {
    flight: Arc<Flight>,
    number: u64,
}

impl Flight {
    pub(super) fn new(start: FlightStart) -> Arc<Self> {
        Arc::new(Self {
            start,
            result: watch::Sender::new(None),
            waiting: Mutex::default(),
            overruled: OnceLock::new(),
        })
    }

    pub(super) fn join(self: &Arc<Self>, caller: &Arc<Caller>) -> Waiter {
        let mut waiting = self.lock();
        let number = waiting.next;
        waiting.next += 1;
        waiting.callers.insert(number, caller.clone());
        Waiter {
            flight: self.clone(),
            number,
        }
    }

    /// Returns the number of callers that wait.
    pub(super) fn waiting(&self) -> usize {
        self.lock().callers.len()
    }

    /// Sends the result to all waiters. Only the first result counts.
    pub(super) fn finish(&self, result: FlightResult) {
        self.result.send_if_modified(|current| {
            let first = current.is_none();
            if first {
                *current = Some(result);
            }
            first
        });
    }

    /// Makes the flight fail with this error, whatever its exchange returns.
    pub(super) fn overrule(&self, error: &ExchangeError) {
        // The first one is as good as a later one.
        let _ = self.overruled.set(error.clone());
    }

    /// Returns the latest caller that still waits, except `gone`.
    pub(super) fn another_caller(&self, gone: &Arc<Caller>) -> Option<Arc<Caller>> {
        let mut waiting = self.lock();
        waiting
            .callers
            .retain(|_, caller| !Arc::ptr_eq(caller, gone));
        waiting
            .callers
            .last_key_value()
            .map(|(_, caller)| caller.clone())
    }

    fn lock(&self) -> MutexGuard<'_, WaitingCallers> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiter {
    /// Waits for the result, at most [`REQUEST_HOLD`].
    pub(super) async fn wait(&self) -> FlightResult {
        timeout(REQUEST_HOLD, self.wait_for_end())
            .await
            .unwrap_or(Err(CacheError::Pending))
    }

    /// Waits for the result until the flight ends.
    pub(super) async fn wait_for_end(&self) -> FlightResult {
        let mut result = self.flight.result.subscribe();
        let result = result.wait_for(Option::is_some).await;
        // The waiter holds its flight, and thus the sender, so there is a result.
        result
            .ok()
            .and_then(|result| result.clone())
            .unwrap_or(Err(CacheError::Pending))
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.flight.lock().callers.remove(&self.number);
    }
}

/// Next step after an exchange ended.
enum FlightOutcome {
    /// The flight ends with this result.
    Done(FlightResult),
    /// The flight continues with another caller of the same identity.
    Retry(Arc<Caller>),
}

impl CacheInner {
    /// Starts the one flight of this entry, with `caller`'s token. A closed connection of `caller`
    /// does not cancel it.
    pub(super) fn start_flight(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        caller: Arc<Caller>,
        state: &mut EntryState,
        start: FlightStart,
        permit: Option<FairPermit<SpiffeId>>,
    ) -> Arc<Flight> {
        let flight = Flight::new(start);
        state.flight = Some(flight.clone());
        tokio::spawn(in_current_request(run_flight(
            self.clone(),
            entry.clone(),
            flight.clone(),
            caller,
            permit,
        )));
        flight
    }

    /// Stores the result of an exchange in the entry, and plans what is due next.
    fn complete(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        flight: &Flight,
        result: Result<Credentials, ExchangeError>,
        caller: &Arc<Caller>,
    ) -> FlightOutcome {
        let mut state = entry.state();
        if state.retired {
            state.flight = None;
            return FlightOutcome::Done(Err(CacheError::Pending));
        }
        let result = match flight.overruled.get() {
            Some(error) => Err(error.clone()),
            None => result,
        };
        let result = result.and_then(|credentials| {
            let cached = CachedCredentials::new(&entry.grant, &credentials, &self.clock);
            // Credentials this short can never be served, so they are a failure.
            if cached.times(&self.clock).is_servable() {
                Ok(Arc::new(cached))
            } else {
                Err(ExchangeError::TooShort.at_hop(&entry.grant))
            }
        });
        if let Err(error) = &result
            && FailureKind::of(error) == FailureKind::CallerUnusable
        {
            entry.drop_caller(caller);
            if let Some(other) = flight
                .another_caller(caller)
                .or_else(|| entry.latest.load_full())
            {
                return FlightOutcome::Retry(other);
            }
            // The next request has a caller of its own, and must not get this failure.
            if flight.start == FlightStart::Ahead {
                state.flight = None;
                self.plan(entry, &mut state);
                return FlightOutcome::Done(result.map_err(CacheError::from));
            }
        }
        self.metrics
            .exchanges
            .get_or_create(&CallLabel::of(&result, ExchangeError::reason))
            .inc();
        state.flight = None;
        let now = (Instant::now(), self.clock.now());
        let event = match &result {
            Ok(cached) => {
                entry.current.store(Some(cached.clone()));
                state
                    .failure
                    .take()
                    .is_some_and(|failure| failure.logged)
                    .then_some(CacheEvent::Recovered)
            }
            Err(error) => self.record_failure(entry, error, now, &mut state),
        };
        self.plan(entry, &mut state);
        drop(state);
        if let Some(event) = event {
            event.emit(entry, &self.log);
        }
        if let Err(error) = &result {
            self.fail_later_sessions(entry, error, now);
        }
        FlightOutcome::Done(result.map_err(CacheError::from))
    }

    /// Records a failure of this moment, and returns its log line.
    pub(super) fn record_failure(
        &self,
        entry: &Entry,
        error: &ExchangeError,
        (at, time): (Instant, SystemTime),
        state: &mut EntryState,
    ) -> Option<CacheEvent> {
        let previous = state.failure.take();
        let is_new_kind = previous
            .as_ref()
            .is_none_or(|previous| !previous.logged || !previous.error.is_same_kind(error));
        let mut failure = Box::new(FailureState::record(previous.as_deref(), error, at, time));
        let kept = entry.current.load().is_some();
        let event = if failure.withdrawn && kept {
            self.clear_credentials(entry, EvictionReason::Withdrawn);
            Some(CacheEvent::Withdrawn(error.clone()))
        } else if is_new_kind && FailureKind::of(error) != FailureKind::CallerUnusable {
            let missed = self.log.take();
            failure.logged = missed.is_some();
            missed.map(|missed| CacheEvent::Failed {
                error: error.clone(),
                kept,
                missed,
            })
        } else {
            None
        };
        state.failure = Some(failure);
        event
    }
}

async fn run_flight(
    inner: Arc<CacheInner>,
    entry: Arc<Entry>,
    flight: Arc<Flight>,
    mut caller: Arc<Caller>,
    permit: Option<FairPermit<SpiffeId>>,
) {
    let result = loop {
        let exchange = inner.clone().exchange(entry.clone(), caller.clone());
        let task = AbortOnDropHandle::new(tokio::spawn(in_current_request(exchange)));
        // The exchange has its own task, so that a panic in a library fails this flight and leaves
        // the entry usable.
        let ended = match &permit {
            Some(permit) => permit.run(task).await,
            None => Some(task.await),
        };
        let result = match ended {
            Some(result) => {
                result.unwrap_or_else(|_| Err(ExchangeError::Panicked.at_hop(&entry.grant)))
            }
            None => Err(ExchangeError::TooOften.at_hop(&entry.grant)),
        };
        match inner.complete(&entry, &flight, result, &caller) {
            FlightOutcome::Retry(other) => caller = other,
            FlightOutcome::Done(result) => break result,
        }
    };
    drop(permit);
    flight.finish(result);
}

//! Exchanges that run for an entry, and the storage of their results.

use std::sync::Arc;

use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::entry::{CachedState, Entry};
use super::events::CacheEvent;
use super::failure::{FailureKind, FailureState};
use super::flight::{Flight, FlightResult};
use super::issued::{CachedCredentials, MIN_REMAINING};
use super::{CacheError, CacheInner};
use crate::caller::Caller;
use crate::credentials::Credentials;
use crate::exchange::ExchangeError;
use crate::identity::SpiffeId;
use crate::limits::FairPermit;
use crate::metrics::{CallLabel, EvictionReason};
use crate::telemetry::in_current_request;

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
        state: &mut CachedState,
        permit: Option<FairPermit<SpiffeId>>,
    ) -> Arc<Flight> {
        let flight = Flight::new();
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
        let result = result.and_then(|credentials| {
            let cached = CachedCredentials::new(&entry.grant, &credentials, &self.clock);
            // Credentials this short can never be served, so they are a failure.
            if cached.remaining(&self.clock) > MIN_REMAINING {
                Ok(Arc::new(cached))
            } else {
                Err(ExchangeError::TooShort)
            }
        });
        if let Err(error) = &result
            && FailureKind::of(error) == FailureKind::CallerGone
        {
            entry.drop_caller(caller);
            if let Some(other) = flight
                .another_caller(caller)
                .or_else(|| entry.latest.load_full())
            {
                return FlightOutcome::Retry(other);
            }
        }
        self.metrics
            .exchanges
            .get_or_create(&CallLabel::of(&result, ExchangeError::reason))
            .inc();
        state.flight = None;
        let event = match &result {
            Ok(cached) => {
                entry.current.store(Some(cached.clone()));
                state
                    .failure
                    .take()
                    .is_some_and(|failure| failure.logged)
                    .then_some(CacheEvent::Recovered)
            }
            Err(error) => self.record_failure(entry, error, &mut state),
        };
        self.plan(entry, &mut state);
        drop(state);
        if let Some(event) = event {
            event.emit(entry, &self.log);
        }
        FlightOutcome::Done(result.map_err(CacheError::from))
    }

    fn record_failure(
        &self,
        entry: &Entry,
        error: &ExchangeError,
        state: &mut CachedState,
    ) -> Option<CacheEvent> {
        let previous = state.failure.take();
        let is_new_kind = previous
            .as_ref()
            .is_none_or(|previous| !previous.logged || previous.error.reason() != error.reason());
        let mut failure = Box::new(FailureState::record(
            previous.as_deref(),
            error,
            Instant::now(),
            self.clock.now(),
        ));
        let kept = entry.current.load().is_some();
        let event = if failure.withdrawn && kept {
            self.clear_credentials(entry, EvictionReason::Withdrawn);
            Some(CacheEvent::Withdrawn(error.clone()))
        } else if is_new_kind && FailureKind::of(error) != FailureKind::CallerGone {
            let missed = self.log.allows();
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
        let exchanger = inner.generation.load().exchanger.clone();
        let task = {
            let (entry, caller) = (entry.clone(), caller.clone());
            AbortOnDropHandle::new(tokio::spawn(in_current_request(async move {
                exchanger.exchange(&caller, &entry.grant).await
            })))
        };
        // The exchange has its own task, so that a panic in a library fails this flight and leaves
        // the entry usable.
        let result = tokio::select! {
            biased;
            result = task => result.unwrap_or_else(|_| Err(ExchangeError::task_panicked())),
            () = evicted(permit.as_ref()) => Err(ExchangeError::TooOften),
        };
        match inner.complete(&entry, &flight, result, &caller) {
            FlightOutcome::Retry(other) => caller = other,
            FlightOutcome::Done(result) => break result,
        }
    };
    drop(permit);
    flight.finish(result);
}

/// Waits until the permit of a refresh is evicted: for ever if there is none.
async fn evicted(permit: Option<&FairPermit<SpiffeId>>) {
    match permit {
        Some(permit) => permit.evicted().await,
        None => std::future::pending().await,
    }
}

//! Issuing for one place, for all who wait for it.

use std::sync::Arc;

use tokio::time::Instant;

use super::entry::{CachedState, Entry};
use super::flight::{Flight, FlightResult};
use super::issued::{CachedCredentials, MIN_REMAINING};
use super::news::CacheEvent;
use super::trouble::{FailureKind, FailureState};
use super::{CacheError, CacheInner};
use crate::caller::Caller;
use crate::credentials::Credentials;
use crate::identity::SpiffeId;
use crate::issue::ExchangeError;
use crate::limits::FairPermit;
use crate::metrics::{CallLabel, EvictionReason};
use crate::telemetry::in_current_request;

/// What becomes of a flight.
enum FlightOutcome {
    /// It ends.
    Done(FlightResult),
    /// It goes on, for another caller of the same identity.
    Again(Arc<Caller>),
}

impl CacheInner {
    /// Starts the one flight of this place, with `caller`'s token. It goes on whatever becomes of `caller`'s connection.
    pub(super) fn start_flight(
        self: &Arc<Self>,
        slot: &Arc<Entry>,
        caller: Arc<Caller>,
        state: &mut CachedState,
        turn: Option<FairPermit<SpiffeId>>,
    ) -> Arc<Flight> {
        let flight = Flight::new();
        state.flight = Some(flight.clone());
        tokio::spawn(in_current_request(run_flight(
            self.clone(),
            slot.clone(),
            flight.clone(),
            caller,
            turn,
        )));
        flight
    }

    /// Puts a flight's result in its place.
    fn complete(
        self: &Arc<Self>,
        slot: &Arc<Entry>,
        flight: &Flight,
        result: Result<Credentials, ExchangeError>,
        caller: &Arc<Caller>,
    ) -> FlightOutcome {
        let mut state = slot.state();
        if state.ended {
            state.flight = None;
            return FlightOutcome::Done(Err(CacheError::Pending));
        }
        let result = result.and_then(|credentials| {
            let issued = CachedCredentials::new(&slot.grant, &credentials, &self.clock);
            // Too short to be handed out, ever: nobody may be told that there are credentials.
            if issued.remaining(&self.clock) > MIN_REMAINING {
                Ok(Arc::new(issued))
            } else {
                Err(ExchangeError::TooShort)
            }
        });
        if let Err(error) = &result
            && FailureKind::of(error) == FailureKind::CallerGone
        {
            slot.drop_caller(caller);
            if let Some(other) = flight
                .another_caller(caller)
                .or_else(|| slot.latest.load_full())
            {
                return FlightOutcome::Again(other);
            }
        }
        self.metrics
            .exchanges
            .get_or_create(&CallLabel::of(&result, ExchangeError::reason))
            .inc();
        state.flight = None;
        let news = match &result {
            Ok(issued) => {
                slot.current.store(Some(issued.clone()));
                state
                    .trouble
                    .take()
                    .is_some_and(|trouble| trouble.logged)
                    .then_some(CacheEvent::Again)
            }
            Err(error) => self.failed(slot, error, &mut state),
        };
        self.plan(slot, &mut state);
        drop(state);
        if let Some(news) = news {
            news.emit(slot, &self.log);
        }
        FlightOutcome::Done(result.map_err(CacheError::from))
    }

    fn failed(
        &self,
        slot: &Entry,
        error: &ExchangeError,
        state: &mut CachedState,
    ) -> Option<CacheEvent> {
        let before = state.trouble.take();
        let is_news = before
            .as_ref()
            .is_none_or(|before| !before.logged || before.error.reason() != error.reason());
        let mut trouble = Box::new(FailureState::record(
            before.as_deref(),
            error,
            Instant::now(),
            self.clock.now(),
        ));
        let kept = slot.current.load().is_some();
        let news = if trouble.withdrawn && kept {
            self.clear_credentials(slot, EvictionReason::Withdrawn);
            Some(CacheEvent::Withdrawn(error.clone()))
        } else if is_news && FailureKind::of(error) != FailureKind::CallerGone {
            let missed = self.log.allows();
            trouble.logged = missed.is_some();
            missed.map(|missed| CacheEvent::Failed {
                error: error.clone(),
                kept,
                missed,
            })
        } else {
            None
        };
        state.trouble = Some(trouble);
        news
    }
}

async fn run_flight(
    shared: Arc<CacheInner>,
    slot: Arc<Entry>,
    flight: Arc<Flight>,
    mut caller: Arc<Caller>,
    turn: Option<FairPermit<SpiffeId>>,
) {
    let landed = loop {
        let issuer = shared.setup.load().issuer.clone();
        let flying = {
            let (slot, caller) = (slot.clone(), caller.clone());
            tokio::spawn(in_current_request(async move {
                issuer.exchange(&caller, &slot.grant).await
            }))
        };
        // A panic in a library below ends that flight, not the place that it was for.
        let result = flying
            .await
            .unwrap_or_else(|_| Err(ExchangeError::task_panicked()));
        match shared.complete(&slot, &flight, result, &caller) {
            FlightOutcome::Again(other) => caller = other,
            FlightOutcome::Done(landed) => break landed,
        }
    };
    drop(turn);
    flight.finish(landed);
}

//! Issuing for one place, for all who wait for it.

use std::sync::Arc;

use tokio::time::Instant;

use super::entry::{Slot, State};
use super::flight::{Flight, Landed};
use super::issued::{Issued, LAST_GOOD};
use super::news::News;
use super::trouble::{Class, Trouble};
use super::{CacheError, Shared};
use crate::caller::Caller;
use crate::credentials::Credentials;
use crate::identity::SpiffeId;
use crate::issue::ExchangeError;
use crate::limits::FairPermit;
use crate::metrics::Call;

/// What becomes of a flight.
enum Landing {
    /// It ends.
    Done(Landed),
    /// It goes on, for another caller of the same identity.
    Again(Arc<Caller>),
}

impl Shared {
    /// Starts the one flight of this place, with `caller`'s token. It goes on whatever becomes of `caller`'s connection.
    pub(super) fn launch(
        self: &Arc<Self>,
        slot: &Arc<Slot>,
        caller: Arc<Caller>,
        state: &mut State,
        turn: Option<FairPermit<SpiffeId>>,
    ) -> Arc<Flight> {
        let flight = Flight::new();
        state.flight = Some(flight.clone());
        tokio::spawn(fly(self.clone(), slot.clone(), flight.clone(), caller, turn));
        flight
    }

    /// Puts a flight's result in its place.
    fn landed(
        self: &Arc<Self>,
        slot: &Arc<Slot>,
        flight: &Flight,
        result: Result<Credentials, ExchangeError>,
        caller: &Arc<Caller>,
    ) -> Landing {
        let mut state = slot.state();
        if state.ended {
            state.flight = None;
            return Landing::Done(Err(CacheError::Pending));
        }
        let result = result.and_then(|credentials| {
            let issued = Issued::new(&slot.grant, &credentials, &self.clock);
            // Too short to be handed out, ever: nobody may be told that there are credentials.
            if issued.left(&self.clock) > LAST_GOOD { Ok(Arc::new(issued)) } else { Err(ExchangeError::TooShort) }
        });
        if let Err(error) = &result
            && Class::of(error) == Class::CallerGone
        {
            slot.forget(caller);
            if let Some(other) = flight.another(caller).or_else(|| slot.latest.load_full()) {
                return Landing::Again(other);
            }
        }
        self.metrics.issues.get_or_create(&Call::of(&result, ExchangeError::reason)).inc();
        state.flight = None;
        let news = match &result {
            Ok(issued) => {
                slot.current.store(Some(issued.clone()));
                state.trouble.take().is_some_and(|trouble| trouble.logged).then_some(News::Again)
            }
            Err(error) => self.failed(slot, error, &mut state),
        };
        self.plan(slot, &mut state);
        drop(state);
        if let Some(news) = news {
            news.tell(slot, &self.log);
        }
        Landing::Done(result.map_err(CacheError::from))
    }

    fn failed(&self, slot: &Slot, error: &ExchangeError, state: &mut State) -> Option<News> {
        let before = state.trouble.take();
        let is_news = before.as_ref().is_none_or(|before| !before.logged || before.error.reason() != error.reason());
        let mut trouble = Box::new(Trouble::after(before.as_deref(), error, Instant::now(), self.clock.now()));
        let kept = slot.current.load().is_some();
        let news = if trouble.withdrawn && kept {
            self.clear(slot, "withdrawn");
            Some(News::Withdrawn(error.clone()))
        } else if is_news && Class::of(error) != Class::CallerGone {
            let missed = self.log.allows();
            trouble.logged = missed.is_some();
            missed.map(|missed| News::Failed { error: error.clone(), kept, missed })
        } else {
            None
        };
        state.trouble = Some(trouble);
        news
    }
}

async fn fly(
    shared: Arc<Shared>,
    slot: Arc<Slot>,
    flight: Arc<Flight>,
    mut caller: Arc<Caller>,
    turn: Option<FairPermit<SpiffeId>>,
) {
    let landed = loop {
        let issuer = shared.setup.load().issuer.clone();
        let flying = {
            let (slot, caller) = (slot.clone(), caller.clone());
            tokio::spawn(async move { issuer.exchange(&caller, &slot.grant).await })
        };
        // A panic in a library below ends that flight, not the place that it was for.
        let result = flying.await.unwrap_or_else(|_| Err(ExchangeError::task_panicked()));
        match shared.landed(&slot, &flight, result, &caller) {
            Landing::Again(other) => caller = other,
            Landing::Done(landed) => break landed,
        }
    };
    drop(turn);
    flight.land(landed);
}

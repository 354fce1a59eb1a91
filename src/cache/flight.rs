//! Issuing for one place, for all who wait for it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::entry::{Issued, Slot, State};
use super::news::News;
use super::rules::{self, Class, Trouble};
use super::{CacheError, Shared};
use crate::caller::Caller;
use crate::clock::HOLD;
use crate::credentials::Credentials;
use crate::issue::IssueError;
use crate::metrics::Call;
use crate::turns::Turn;

pub(super) type Landed = Result<Arc<Issued>, CacheError>;

/// One exchange under way.
pub(super) struct Flight {
    landed: watch::Sender<Option<Landed>>,
    waiting: Mutex<Waiting>,
}

/// The callers that wait, in the order in which they came.
#[derive(Default)]
struct Waiting {
    callers: BTreeMap<u64, Arc<Caller>>,
    next: u64,
}

/// A request that waits for a flight.
pub(super) struct Waiter {
    flight: Arc<Flight>,
    number: u64,
}

/// What becomes of a flight.
enum Landing {
    /// It ends.
    Done(Landed),
    /// It goes on, for another caller of the same identity.
    Again(Arc<Caller>),
}

impl Flight {
    fn new() -> Arc<Self> {
        Arc::new(Self { landed: watch::Sender::new(None), waiting: Mutex::default() })
    }

    pub(super) fn join(self: &Arc<Self>, caller: &Arc<Caller>) -> Waiter {
        let mut waiting = self.lock();
        let number = waiting.next;
        waiting.next += 1;
        waiting.callers.insert(number, caller.clone());
        Waiter { flight: self.clone(), number }
    }

    /// How many callers wait.
    pub(super) fn waiting(&self) -> usize {
        self.lock().callers.len()
    }

    /// Tells all who wait. What they were told first stays.
    pub(super) fn land(&self, landed: Landed) {
        self.landed.send_if_modified(|told| {
            let first = told.is_none();
            if first {
                *told = Some(landed);
            }
            first
        });
    }

    /// The caller that came last and still waits, but for the one that is gone.
    fn another(&self, gone: &Arc<Caller>) -> Option<Arc<Caller>> {
        let mut waiting = self.lock();
        waiting.callers.retain(|_, caller| !Arc::ptr_eq(caller, gone));
        waiting.callers.last_key_value().map(|(_, caller)| caller.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiter {
    /// Waits, but not for ever.
    pub(super) async fn landing(&self) -> Landed {
        let mut landed = self.flight.landed.subscribe();
        let landed = timeout(HOLD, landed.wait_for(Option::is_some)).await.map_err(|_| CacheError::Pending)?;
        // The sender is this waiter's own flight, so there is a result.
        landed.ok().and_then(|landed| landed.clone()).unwrap_or(Err(CacheError::Pending))
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.flight.lock().callers.remove(&self.number);
    }
}

impl Shared {
    /// Starts the one flight of this place, with `caller`'s token. It goes on whatever becomes of `caller`'s connection.
    pub(super) fn launch(
        self: &Arc<Self>,
        slot: &Arc<Slot>,
        caller: Arc<Caller>,
        state: &mut State,
        turn: Option<Turn>,
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
        result: Result<Credentials, IssueError>,
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
            if issued.left(&self.clock) > rules::LAST_GOOD { Ok(Arc::new(issued)) } else { Err(IssueError::TooShort) }
        });
        if let Err(error) = &result
            && Class::of(error) == Class::CallerGone
        {
            slot.forget(caller);
            if let Some(other) = flight.another(caller).or_else(|| slot.latest.load_full()) {
                return Landing::Again(other);
            }
        }
        self.metrics.issues.get_or_create(&Call::of(&result, IssueError::reason)).inc();
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

    fn failed(&self, slot: &Slot, error: &IssueError, state: &mut State) -> Option<News> {
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

async fn fly(shared: Arc<Shared>, slot: Arc<Slot>, flight: Arc<Flight>, mut caller: Arc<Caller>, turn: Option<Turn>) {
    let landed = loop {
        let issuer = shared.setup.load().issuer.clone();
        let flying = {
            let (slot, caller) = (slot.clone(), caller.clone());
            tokio::spawn(async move { issuer.issue(&caller, &slot.grant).await })
        };
        // A panic in a library below ends that flight, not the place that it was for.
        let result = flying.await.unwrap_or_else(|_| Err(IssueError::broken()));
        match shared.landed(&slot, &flight, result, &caller) {
            Landing::Again(other) => caller = other,
            Landing::Done(landed) => break landed,
        }
    };
    drop(turn);
    flight.land(landed);
}

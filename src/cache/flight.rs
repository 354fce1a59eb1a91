//! What requests wait for while credentials are being issued.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio::time::timeout;

use super::CacheError;
use super::issued::CachedCredentials;
use crate::caller::Caller;
use crate::clock::REQUEST_HOLD;

pub(super) type FlightResult = Result<Arc<CachedCredentials>, CacheError>;

/// One exchange under way.
pub(super) struct Flight {
    landed: watch::Sender<Option<FlightResult>>,
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

impl Flight {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            landed: watch::Sender::new(None),
            waiting: Mutex::default(),
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

    /// How many callers wait.
    pub(super) fn waiting(&self) -> usize {
        self.lock().callers.len()
    }

    /// Tells all who wait. What they were told first stays.
    pub(super) fn finish(&self, landed: FlightResult) {
        self.landed.send_if_modified(|told| {
            let first = told.is_none();
            if first {
                *told = Some(landed);
            }
            first
        });
    }

    /// The caller that came last and still waits, but for the one that is gone.
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

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiter {
    /// Waits, but not for ever.
    pub(super) async fn wait(&self) -> FlightResult {
        let mut landed = self.flight.landed.subscribe();
        let landed = timeout(REQUEST_HOLD, landed.wait_for(Option::is_some))
            .await
            .map_err(|_| CacheError::Pending)?;
        // The sender is this waiter's own flight, so there is a result.
        landed
            .ok()
            .and_then(|landed| landed.clone())
            .unwrap_or(Err(CacheError::Pending))
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.flight.lock().callers.remove(&self.number);
    }
}

//! Flights: the exchanges that run, and the requests that wait for them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio::time::timeout;

use super::CacheError;
use super::issued::CachedCredentials;
use crate::caller::Caller;
use crate::clock::REQUEST_HOLD;

pub(super) type FlightResult = Result<Arc<CachedCredentials>, CacheError>;

/// One exchange that is running.
pub(super) struct Flight {
    result: watch::Sender<Option<FlightResult>>,
    waiting: Mutex<Waiting>,
}

/// The callers that wait, in order of arrival.
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
            result: watch::Sender::new(None),
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

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiter {
    /// Waits for the result, at most [`REQUEST_HOLD`].
    pub(super) async fn wait(&self) -> FlightResult {
        let mut result = self.flight.result.subscribe();
        let result = timeout(REQUEST_HOLD, result.wait_for(Option::is_some))
            .await
            .map_err(|_| CacheError::Pending)?;
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

//! Where a search for the holder of a socket looks first.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

/// Under which numbers processes held their last connections. Whoever connects again and again mostly has one of these
/// again, and to list the descriptors of a process costs more than all else. A wrong one costs a look.
#[derive(Debug, Default)]
pub(crate) struct Hints(Mutex<HashMap<u32, VecDeque<u32>>>);

/// For one process: as many as threads may well connect at a time.
const NUMBERS: usize = 8;
/// Processes, before all are forgotten.
const PROCESSES: usize = 1024;

impl Hints {
    /// Those of one process, to be tried in this order.
    pub(crate) fn of(&self, pid: u32) -> VecDeque<u32> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&pid).cloned().unwrap_or_default()
    }

    /// The one that was seen last comes last: it is in use now.
    pub(crate) fn seen(&self, pid: u32, number: u32) {
        let mut hints = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if hints.len() >= PROCESSES && !hints.contains_key(&pid) {
            hints.clear();
        }
        let numbers = hints.entry(pid).or_default();
        numbers.retain(|known| *known != number);
        if numbers.len() == NUMBERS {
            numbers.pop_front();
        }
        numbers.push_back(number);
    }
}

//! Limiter of equal log lines.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Minimum interval between two log lines with the same text.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Distinct texts within [`LOG_INTERVAL`]. Further ones are not logged.
const MAX_TEXTS: usize = 64;

/// Table of the texts that were logged within [`LOG_INTERVAL`]. Workloads influence some of them (a
/// pod's UID), so it is bounded.
#[derive(Debug, Default)]
pub(super) struct LogLimiter(Mutex<LogLimiterState>);

#[derive(Debug, Default)]
struct LogLimiterState {
    logged: HashMap<String, Instant>,
    /// Texts that exceeded [`MAX_TEXTS`] since the last line.
    missed: u64,
}

/// Permission to log one line.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LogPermit {
    /// Number of texts that were dropped before this line, if any, for the line's field of that
    /// name.
    pub(super) missed: Option<u64>,
}

impl LogLimiter {
    /// Returns a permit if `text` may be logged now.
    pub(super) fn admit(&self, text: &str) -> Option<LogPermit> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let is_recent = |at: &Instant| now.duration_since(*at) < LOG_INTERVAL;
        if state.logged.get(text).is_some_and(is_recent) {
            return None;
        }
        if state.logged.len() >= MAX_TEXTS {
            state.logged.retain(|_, at| is_recent(at));
        }
        if state.logged.len() >= MAX_TEXTS {
            state.missed += 1;
            return None;
        }
        state.logged.insert(text.to_owned(), now);
        Some(LogPermit {
            missed: Some(std::mem::take(&mut state.missed)).filter(|missed| *missed > 0),
        })
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn limiter_admits_each_alternating_text_once() {
        let limiter = LogLimiter::default();
        let admitted = || {
            ["one", "other"]
                .into_iter()
                .filter_map(|text| limiter.admit(text))
                .count()
        };
        assert_eq!((0..100).map(|_| admitted()).sum::<usize>(), 2);
        advance(LOG_INTERVAL).await;
        assert_eq!((0..100).map(|_| admitted()).sum::<usize>(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn limiter_is_bounded_and_counts_dropped_texts() {
        let limiter = LogLimiter::default();
        let admitted = (0..1000)
            .filter(|number| limiter.admit(&number.to_string()).is_some())
            .count();
        assert_eq!(
            (admitted, limiter.0.lock().unwrap().logged.len()),
            (MAX_TEXTS, MAX_TEXTS)
        );
        advance(LOG_INTERVAL).await;
        let missed = u64::try_from(1000 - MAX_TEXTS).unwrap();
        assert_eq!(
            limiter.admit("next"),
            Some(LogPermit {
                missed: Some(missed)
            })
        );
        assert_eq!(
            limiter.admit("after that"),
            Some(LogPermit { missed: None })
        );
        assert_eq!(limiter.0.lock().unwrap().logged.len(), 2);
    }
}

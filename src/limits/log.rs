//! Limits for log lines, with a count of the lines that are left out.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::TokenBucket;

/// A limit for log lines of one kind: a burst at first, then one in each interval.
#[derive(Debug)]
pub struct LogQuota {
    burst: u32,
    every: Duration,
    state: Mutex<QuotaState>,
}

#[derive(Debug, Default)]
struct QuotaState {
    bucket: TokenBucket,
    missed: u64,
}

impl LogQuota {
    /// Allows `burst` lines at once, and one more each `every` after that.
    pub fn new(burst: u32, every: Duration) -> Self {
        Self {
            burst,
            every,
            state: Mutex::default(),
        }
    }

    /// Takes a line if the limit allows it, and returns how many were left out since the last one.
    pub fn take(&self) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.bucket.take(self.burst, self.every) {
            return Some(std::mem::take(&mut state.missed));
        }
        state.missed += 1;
        None
    }
}

/// A line that is logged once.
#[derive(Debug, Default)]
pub struct LogOnce(AtomicBool);

impl LogOnce {
    /// Returns whether this is the first call, and so whether to log the line.
    pub fn first(&self) -> bool {
        !self.0.swap(true, Ordering::Relaxed)
    }

    /// Returns whether the line was logged.
    pub fn is_logged(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A limit for log lines by their text: each text once in an interval.
///
/// Workloads influence some texts (a pod's UID), so the number of texts is bounded.
#[derive(Debug)]
pub struct KeyedLogQuota {
    every: Duration,
    max_texts: usize,
    state: Mutex<KeyedState>,
}

#[derive(Debug, Default)]
struct KeyedState {
    logged: HashMap<String, Instant>,
    missed: u64,
}

impl KeyedLogQuota {
    /// Allows each of at most `max_texts` different texts once in each `every`.
    pub fn new(max_texts: usize, every: Duration) -> Self {
        Self {
            every,
            max_texts,
            state: Mutex::default(),
        }
    }

    /// Takes a line with this text if the limit allows it. Returns how many lines were left out
    /// since the last one because there were too many texts.
    pub fn take(&self, text: &str) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let is_recent = |at: &Instant| now.duration_since(*at) < self.every;
        if state.logged.get(text).is_some_and(is_recent) {
            return None;
        }
        if state.logged.len() >= self.max_texts {
            state.logged.retain(|_, at| is_recent(at));
        }
        if state.logged.len() >= self.max_texts {
            state.missed += 1;
            return None;
        }
        state.logged.insert(text.to_owned(), now);
        Some(std::mem::take(&mut state.missed))
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const INTERVAL: Duration = Duration::from_secs(60);
    const MAX_TEXTS: usize = 64;

    #[tokio::test(start_paused = true)]
    async fn quota_counts_lines_beyond_its_burst() {
        let quota = LogQuota::new(2, INTERVAL);
        let taken: Vec<_> = (0..5).map(|_| quota.take()).collect();
        assert_eq!(taken, [Some(0), Some(0), None, None, None]);
        advance(INTERVAL).await;
        assert_eq!([quota.take(), quota.take()], [Some(3), None]);
    }

    #[test]
    fn line_is_logged_once() {
        let line = LogOnce::default();
        assert!(!line.is_logged());
        assert_eq!([line.first(), line.first()], [true, false]);
        assert!(line.is_logged());
    }

    #[tokio::test(start_paused = true)]
    async fn keyed_quota_allows_each_alternating_text_once() {
        let quota = KeyedLogQuota::new(MAX_TEXTS, INTERVAL);
        let taken = || {
            let texts = ["one", "other"].into_iter();
            texts.filter_map(|text| quota.take(text)).count()
        };
        assert_eq!((0..100).map(|_| taken()).sum::<usize>(), 2);
        advance(INTERVAL).await;
        assert_eq!((0..100).map(|_| taken()).sum::<usize>(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn keyed_quota_is_bounded_and_counts_dropped_texts() {
        let quota = KeyedLogQuota::new(MAX_TEXTS, INTERVAL);
        let taken = (0..1000)
            .filter(|number| quota.take(&number.to_string()).is_some())
            .count();
        let texts = quota.state.lock().unwrap().logged.len();
        assert_eq!((taken, texts), (MAX_TEXTS, MAX_TEXTS));
        advance(INTERVAL).await;
        let missed = u64::try_from(1000 - MAX_TEXTS).unwrap();
        assert_eq!(quota.take("next"), Some(missed));
        assert_eq!(quota.take("after that"), Some(0));
        assert_eq!(quota.state.lock().unwrap().logged.len(), 2);
    }
}

//! Rate limits: a burst, and after it one operation per interval.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::identity::SpiffeId;

/// A token bucket that refills over time. It stores only the moment at which it will be full.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokenBucket(Option<Instant>);

impl TokenBucket {
    /// Takes one of `burst` tokens, which refill at one per `every`. Returns `false` if none is
    /// left.
    pub fn take(&mut self, burst: u32, every: Duration) -> bool {
        let now = Instant::now();
        let full_at = self.0.map_or(now, |at| at.max(now)) + every;
        let has_room = full_at.duration_since(now) <= every * burst;
        if has_room {
            self.0 = Some(full_at);
        }
        has_room
    }

    fn is_full(&self) -> bool {
        self.0.is_none_or(|at| at <= Instant::now())
    }
}

/// One [`TokenBucket`] per SPIFFE ID.
#[derive(Debug)]
pub struct KeyedRateLimiter {
    burst: u32,
    every: Duration,
    buckets: Mutex<HashMap<SpiffeId, TokenBucket>>,
}

/// The number of buckets below which full ones are not removed.
const SWEEP_FROM_BUCKETS: usize = 1024;

impl KeyedRateLimiter {
    /// Creates a limiter that allows a burst of `burst`, and after it one operation per `every`.
    pub fn new(burst: u32, every: Duration) -> Self {
        Self {
            burst,
            every,
            buckets: Mutex::default(),
        }
    }

    /// Takes one token of `owner`. Returns `false` if none is left.
    pub fn take(&self, owner: &SpiffeId) -> bool {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        // A full bucket is the same as none. The table doubles between two sweeps, so a sweep costs
        // little per call.
        if buckets.len() >= SWEEP_FROM_BUCKETS && buckets.len() == buckets.capacity() {
            buckets.retain(|_, bucket| !bucket.is_full());
        }
        buckets
            .entry(owner.clone())
            .or_default()
            .take(self.burst, self.every)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn id(name: &str) -> SpiffeId {
        SpiffeId::parse(&format!("spiffe://example.org/{name}")).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn limiter_refills_each_key_over_time() {
        let limiter = KeyedRateLimiter::new(3, Duration::from_secs(10));
        let taken = (0..5).filter(|_| limiter.take(&id("a"))).count();
        assert_eq!(taken, 3);
        assert!(limiter.take(&id("b")));
        advance(Duration::from_secs(9)).await;
        assert!(!limiter.take(&id("a")));
        advance(Duration::from_secs(1)).await;
        assert!(limiter.take(&id("a")));
        assert!(!limiter.take(&id("a")));
        advance(Duration::from_secs(1000)).await;
        assert_eq!(
            (0..5).filter(|_| limiter.take(&id("a"))).count(),
            3,
            "never more than the burst"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn limiter_drops_full_buckets() {
        let limiter = KeyedRateLimiter::new(1, Duration::from_secs(1));
        for number in 0..100_000 {
            limiter.take(&id(&number.to_string()));
            advance(Duration::from_millis(1)).await;
        }
        let size = limiter.buckets.lock().unwrap().capacity();
        assert!(size < 10_000, "{size} for 1,000 that are not full");
    }
}

//! Wall-clock time, which only `Expiration` and tokens need; everything else is measured on tokio's monotonic clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// How long a request is held while what it needs is asked for. The most patient SDKs give up after 5 s.
pub const REQUEST_HOLD: Duration = Duration::from_millis(4500);

/// The last second of the year 9999, in which RFC 3339 ends.
pub const LAST_TIME: Duration = Duration::from_secs(253_402_300_799);

/// Returns the time, or the nearest one that RFC 3339 can express.
pub fn printable(time: SystemTime) -> SystemTime {
    time.clamp(UNIX_EPOCH, UNIX_EPOCH + LAST_TIME)
}

/// Reads the time. A value, so that tests can stand anywhere in time.
#[derive(Debug, Clone, Default)]
pub struct Clock {
    fixed: Option<Arc<Fixed>>,
}

#[derive(Debug)]
struct Fixed {
    start: SystemTime,
    since: Instant,
    /// Seconds that somebody has set it ahead, or back.
    stepped: AtomicI64,
}

impl Clock {
    /// The system's clock.
    pub fn system() -> Self {
        Self::default()
    }

    /// A clock that shows `now` at this moment and goes on with tokio's (possibly paused) time.
    pub fn starting_at(now: SystemTime) -> Self {
        let fixed = Fixed {
            start: now,
            since: Instant::now(),
            stepped: AtomicI64::new(0),
        };
        Self {
            fixed: Some(Arc::new(fixed)),
        }
    }

    /// Sets a clock made by [`Clock::starting_at`], and all its clones, ahead by so many seconds, or back. The system's
    /// clock is not touched.
    pub fn step(&self, seconds: i64) {
        if let Some(fixed) = &self.fixed {
            fixed.stepped.fetch_add(seconds, Ordering::SeqCst);
        }
    }

    /// The wall-clock time.
    pub fn now(&self) -> SystemTime {
        let Some(fixed) = &self.fixed else {
            return SystemTime::now();
        };
        let stepped = fixed.stepped.load(Ordering::SeqCst);
        let (by, now) = (
            Duration::from_secs(stepped.unsigned_abs()),
            fixed.start + fixed.since.elapsed(),
        );
        if stepped < 0 { now - by } else { now + by }
    }

    /// How long until `moment`; zero if it has passed.
    pub fn until(&self, moment: SystemTime) -> Duration {
        moment.duration_since(self.now()).unwrap_or_default()
    }
}

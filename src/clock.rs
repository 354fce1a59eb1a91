//! Wall-clock time, for `Expiration`, tokens, and times that are shown. Everything else uses
//! tokio's monotonic clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// The longest time that a request is held while the daemon fetches what it needs. The most patient
/// SDKs give up after 5 s.
pub const REQUEST_HOLD: Duration = Duration::from_millis(4500);

/// The last second of the year 9999, in which RFC 3339 ends.
pub const LAST_TIME: Duration = Duration::from_secs(253_402_300_799);

/// Returns the time, or the nearest one that RFC 3339 can express.
pub fn printable(time: SystemTime) -> SystemTime {
    time.clamp(UNIX_EPOCH, UNIX_EPOCH + LAST_TIME)
}

/// A source of the wall-clock time. Tests can start it at any time.
#[derive(Debug, Clone, Default)]
pub struct Clock {
    simulated: Option<Arc<SimulatedTime>>,
}

#[derive(Debug)]
struct SimulatedTime {
    start: SystemTime,
    since: Instant,
    /// The seconds by which the clock was set ahead, or back.
    offset: AtomicI64,
}

impl Clock {
    /// Returns the system's clock.
    pub fn system() -> Self {
        Self::default()
    }

    /// Returns a clock that shows `now` at this moment and continues with tokio's time, which may
    /// be paused.
    pub fn starting_at(now: SystemTime) -> Self {
        let simulated = SimulatedTime {
            start: now,
            since: Instant::now(),
            offset: AtomicI64::new(0),
        };
        Self {
            simulated: Some(Arc::new(simulated)),
        }
    }

    /// Sets a clock made by [`Clock::starting_at`], and all its clones, ahead by so many seconds,
    /// or back. Does not change the system's clock.
    pub fn step(&self, seconds: i64) {
        if let Some(simulated) = &self.simulated {
            simulated.offset.fetch_add(seconds, Ordering::SeqCst);
        }
    }

    /// Returns the current wall-clock time.
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    pub fn now(&self) -> SystemTime {
        let Some(simulated) = &self.simulated else {
            return SystemTime::now();
        };
        let offset = simulated.offset.load(Ordering::SeqCst);
        let (by, now) = (
            Duration::from_secs(offset.unsigned_abs()),
            simulated.start + simulated.since.elapsed(),
        );
        if offset < 0 { now - by } else { now + by }
    }

    /// Returns the time until `moment`, or zero if it has passed.
    pub fn until(&self, moment: SystemTime) -> Duration {
        moment.duration_since(self.now()).unwrap_or_default()
    }
}

//! Wall-clock time, which only `Expiration` and tokens need; everything else is measured on tokio's monotonic clock.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

/// Reads the time. A value, so that tests can stand anywhere in time.
#[derive(Debug, Clone, Default)]
pub struct Clock {
    fixed: Option<(SystemTime, Instant)>,
}

impl Clock {
    /// The system's clock.
    pub fn system() -> Self {
        Self::default()
    }

    /// A clock that shows `now` at this moment and goes on with tokio's (possibly paused) time.
    pub fn starting_at(now: SystemTime) -> Self {
        Self { fixed: Some((now, Instant::now())) }
    }

    /// The wall-clock time.
    pub fn now(&self) -> SystemTime {
        match self.fixed {
            Some((start, since)) => start + since.elapsed(),
            None => SystemTime::now(),
        }
    }

    /// How long until `moment`; zero if it has passed.
    pub fn until(&self, moment: SystemTime) -> Duration {
        moment.duration_since(self.now()).unwrap_or_default()
    }
}

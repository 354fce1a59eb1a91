//! The times of retries of what a start could not do: a file system may be mounted later.

use std::time::Duration;

use tokio::time::{sleep, timeout};

/// Interval between attempts, unless a request needs the result.
const INTERVAL: Duration = Duration::from_secs(5);
/// Minimum interval between two attempts.
const PAUSE: Duration = Duration::from_secs(1);

/// Waits for the next attempt: until `needed` returns, or for the interval.
pub(super) async fn until_needed(needed: impl Future<Output = ()>) {
    // A timeout and a need both mean: try it.
    let _ = timeout(INTERVAL, needed).await;
}

/// Waits after an attempt that failed.
pub(super) async fn pause() {
    sleep(PAUSE).await;
}

//! Watches whether every worker thread of the runtime makes progress.
//!
//! A worker that is blocked keeps the connections that it polls at that time, and half of the
//! daemon's capacity on a small machine. The log then has a line. Under systemd the daemon notifies
//! the watchdog no more, and is restarted, while systemd holds its sockets. The notification itself
//! needs a worker and the runtime's timers, so it also ends when those do.
//!
//! It does not depend on a request, an agent, STS or a file: a caller could make those fail, and
//! with them the daemon (T20, T25). For the same reason the threads that may block are no part of
//! it.

use std::time::Duration;

use tokio::runtime::{Handle, RuntimeMetrics};
use tokio::time::{MissedTickBehavior, interval};

/// The number of attempts within the watchdog's time. A worker may be late for all but one.
const ATTEMPTS: u32 = 4;

/// The state of a worker thread, by the runtime's own counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct WorkerProgress {
    /// The number of times that it has begun and ended to wait for work. Odd while it waits.
    parks: u64,
    /// The time in which it had work. The runtime adds to it after each batch of tasks.
    busy: Duration,
}

impl WorkerProgress {
    fn of_all(metrics: &RuntimeMetrics) -> Vec<Self> {
        let progress = |worker| Self {
            parks: metrics.worker_park_unpark_count(worker),
            busy: metrics.worker_total_busy_duration(worker),
        };
        (0..metrics.num_workers()).map(progress).collect()
    }

    fn is_waiting(self) -> bool {
        self.parks % 2 == 1
    }
}

/// Returns the number of workers that have polled one task since `before`, and have not returned.
fn blocked(before: &[WorkerProgress], now: &[WorkerProgress]) -> usize {
    let is_blocked =
        |(before, now): &(&WorkerProgress, &WorkerProgress)| before == now && !now.is_waiting();
    before.iter().zip(now).filter(is_blocked).count()
}

/// Calls `report` several times within `limit`, with the number of workers that are blocked. Runs
/// until it is dropped. Has to be called in the runtime that it observes.
pub async fn watch(limit: Duration, report: impl Fn(usize)) {
    let metrics = Handle::current().metrics();
    let mut attempts = interval(limit / ATTEMPTS);
    attempts.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before = Vec::new();
    loop {
        attempts.tick().await;
        let now = WorkerProgress::of_all(&metrics);
        report(blocked(&before, &now));
        before = now;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use tokio::sync::mpsc::unbounded_channel;
    use tokio::time::timeout;

    use super::*;

    #[test]
    fn worker_is_blocked_only_if_its_counters_stay() {
        let progress = |parks, seconds| WorkerProgress {
            parks,
            busy: Duration::from_secs(seconds),
        };
        for (before, now, expected) in [
            (progress(2, 1), progress(2, 1), 1),
            // It has waited, it waits, and it has had work all the time.
            (progress(2, 1), progress(4, 1), 0),
            (progress(3, 1), progress(3, 1), 0),
            (progress(2, 1), progress(2, 2), 0),
        ] {
            assert_eq!(blocked(&[before], &[now]), expected, "{before:?} {now:?}");
        }
        // The first attempt has nothing to compare with.
        assert_eq!(blocked(&[], &[progress(2, 1)]), 0);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn blocked_worker_is_reported_until_it_returns() {
        let (sender, mut reports) = unbounded_channel();
        tokio::spawn(watch(Duration::from_millis(200), move |workers| {
            let _ = sender.send(workers);
        }));
        for _ in 0..8 {
            reports.recv().await.unwrap();
        }
        // A task that blocks its worker until this channel is closed.
        let (release, blocks) = mpsc::channel::<()>();
        let blocking = tokio::spawn(async move {
            let _ = blocks.recv();
        });
        let mut await_report = async |expected| {
            let report = async { while reports.recv().await != Some(expected) {} };
            timeout(Duration::from_secs(30), report).await.unwrap();
        };
        await_report(1).await;
        drop(release);
        blocking.await.unwrap();
        await_report(0).await;
    }
}

//! Notifies systemd's watchdog while every worker thread of the runtime makes progress.
//!
//! A worker that is blocked keeps the connections that it polls at that time, and half of the
//! daemon's capacity on a small machine. systemd then restarts the daemon, and holds its sockets
//! meanwhile. The notification itself needs a worker and the runtime's timers, so it also ends when
//! those do.
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

/// Calls `notify` several times within `limit`, except while a worker is blocked. Runs until it is
/// dropped. Has to be called in the runtime that it observes.
pub async fn watch(limit: Duration, notify: impl Fn()) {
    let metrics = Handle::current().metrics();
    let mut attempts = interval(limit / ATTEMPTS);
    attempts.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before = Vec::new();
    loop {
        attempts.tick().await;
        let now = WorkerProgress::of_all(&metrics);
        match blocked(&before, &now) {
            0 => notify(),
            workers => tracing::error!(
                workers,
                "worker threads are blocked: systemd will restart the daemon"
            ),
        }
        before = now;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use tokio::sync::mpsc::unbounded_channel;

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
    async fn watchdog_is_not_notified_while_a_worker_is_blocked() {
        let (sender, mut notified) = unbounded_channel();
        tokio::spawn(watch(Duration::from_millis(200), move || {
            let _ = sender.send(());
        }));
        for _ in 0..8 {
            notified.recv().await.unwrap();
        }
        // A task that blocks its worker until this channel is closed.
        let (release, blocks) = mpsc::channel::<()>();
        let (begin, begun) = tokio::sync::oneshot::channel();
        let blocking = tokio::spawn(async move {
            begin.send(()).unwrap();
            let _ = blocks.recv();
        });
        begun.await.unwrap();
        // Notifications of the time before, and no more.
        let silence = async {
            while tokio::time::timeout(Duration::from_secs(1), notified.recv())
                .await
                .is_ok()
            {}
        };
        tokio::time::timeout(Duration::from_secs(30), silence)
            .await
            .unwrap();
        drop(release);
        blocking.await.unwrap();
        notified.recv().await.unwrap();
    }
}

//! The tasks and connections of a set of listeners, from the start until they have ended.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// The number of connections of one listener that may be accepted and not yet attested.
pub(super) const MAX_UNATTESTED: usize = 64;
/// The longest wait for connections after the daemon has begun to stop. Every connection ends
/// within [`super::CONNECTION_TIMEOUT`], so none that keeps to its time is cut off.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(16);

/// Stops a set of listeners, and waits until their connections have ended.
#[derive(Debug)]
pub struct Drain {
    stop: watch::Sender<bool>,
    handle: DrainHandle,
}

/// The part that a listener has of a [`Drain`].
#[derive(Debug, Clone)]
pub struct DrainHandle {
    stop: watch::Receiver<bool>,
    /// Accept loops, and tasks that start some.
    tasks: TaskTracker,
    // Unlike a JoinSet, it wakes no task when one of many connections ends.
    connections: TaskTracker,
    gauge: Gauge,
}

impl Drain {
    /// Makes one without listeners. `gauge` counts the open connections.
    pub fn new(gauge: Gauge) -> Self {
        let (stop, stopped) = watch::channel(false);
        let handle = DrainHandle {
            stop: stopped,
            tasks: TaskTracker::new(),
            connections: TaskTracker::new(),
            gauge,
        };
        Self { stop, handle }
    }

    /// Returns the part for a listener.
    pub fn handle(&self) -> DrainHandle {
        self.handle.clone()
    }

    /// Makes all listeners stop accepting. Returns when they have, and when their connections have
    /// ended or 16 s have passed.
    pub async fn drain(&self) {
        self.stop.send_replace(true);
        self.handle.tasks.close();
        self.handle.tasks.wait().await;
        self.handle.connections_ended().await;
    }
}

impl DrainHandle {
    /// Starts a task that ends once the daemon stops. [`Drain::drain`] waits for it.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(task);
    }

    /// Waits until the daemon stops.
    pub async fn stopped(&self) {
        // An error means that the daemon has ended.
        let _ = self.stop.clone().wait_for(|stop| *stop).await;
    }

    /// Waits for `pause` at most. Returns whether the daemon stops.
    pub async fn stops_within(&self, pause: Duration) -> bool {
        timeout(pause, self.stopped()).await.is_ok()
    }

    /// Waits until all connections have ended, at most for 16 s. The caller has to stop accepting
    /// first.
    pub async fn connections_ended(&self) {
        self.connections.close();
        if timeout(DRAIN_TIMEOUT, self.connections.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                open = self.connections.len(),
                "drain timed out; closing connections"
            );
        }
    }
}

/// A connection that is accepted and not yet attested.
#[derive(Debug)]
pub struct PendingConnection {
    /// The permit to drop as soon as the workload is known, or before a wait for a cgroup scan,
    /// which has limits of its own.
    pub permit: PendingPermit,
    /// The guard to drop when the connection has ended.
    pub open: OpenConnection,
}

/// One of the few permits of a listener for connections that are not yet attested.
#[derive(Debug)]
pub struct PendingPermit {
    _permit: Option<OwnedSemaphorePermit>,
}

impl PendingPermit {
    /// Returns the permit of a connection that is not counted.
    #[cfg(test)]
    pub(crate) fn none() -> Self {
        Self { _permit: None }
    }
}

/// A guard that counts one open connection.
#[derive(Debug)]
pub struct OpenConnection {
    gauge: Gauge,
    _token: TaskTrackerToken,
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

/// The permits of one listener for connections that are not yet attested.
#[derive(Debug)]
pub(super) struct PendingConnections {
    unattested: Arc<Semaphore>,
    drain: DrainHandle,
}

impl PendingConnections {
    pub(super) fn new(drain: DrainHandle) -> Self {
        Self {
            unattested: Arc::new(Semaphore::new(MAX_UNATTESTED)),
            drain,
        }
    }

    /// Waits until the listener may accept another connection.
    ///
    /// The wait depends only on the daemon's own work, never on a client: the workload is attested
    /// before the daemon reads from the connection. Until then the connection counts towards no
    /// other limit. Each listener has its own permits, so a pod with callers that are slow to
    /// attest does not block other listeners.
    pub(super) async fn acquire(&self) -> PendingConnection {
        // The semaphore is never closed, so a permit always follows.
        let permit = PendingPermit {
            _permit: self.unattested.clone().acquire_owned().await.ok(),
        };
        let gauge = self.drain.gauge.clone();
        gauge.inc();
        PendingConnection {
            permit,
            open: OpenConnection {
                gauge,
                _token: self.drain.connections.token(),
            },
        }
    }
}

//! Listeners, bound by the daemon or passed by systemd, and accept loops that run until the daemon
//! ends.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use prometheus_client::metrics::gauge::Gauge;
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::metrics::Metrics;
use crate::telemetry::LogQuota;

mod lazy_socket;
mod listener;
mod pod_listener;
mod socket_activation;
mod socket_file;
mod sys;
mod tcp;
mod unprivileged;

pub use lazy_socket::LazySocket;
pub use listener::{AcceptedStream, Listener, ListenerSource};
pub use pod_listener::{NetnsRef, POD_ADDRESSES, PodListener};
pub use socket_activation::ActivatedSockets;
pub use socket_file::SocketFile;
pub use unprivileged::{first_unprivileged_port, unprivileged_ports, warn_of_unprivileged_ports};

/// The pause of an accept loop while the process or the system is out of descriptors or memory.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
/// The shortest interval between two log lines for the same error of a listener.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// The number of connections of one listener that may be accepted and not yet attested.
const MAX_UNATTESTED: usize = 64;
/// The shortest interval between two rebinds of a listener that was killed.
const REBIND_INTERVAL: Duration = Duration::from_secs(1);
/// The lifetime of any connection: the head, a held request (4.5 s), and the response.
pub const CONNECTION_TIMEOUT: Duration = Duration::from_secs(15);
/// The longest wait for connections after the daemon has begun to stop. Every connection ends
/// within [`CONNECTION_TIMEOUT`], so none that keeps to its time is cut off.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(16);

/// The reason why a listener could not be set up.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug, Error)]
pub enum ListenError {
    /// The TCP address could not be bound.
    #[error(
        "{address}: {source}; find the process that holds it with `ss -lntp`, or choose another address in [listen]"
    )]
    Tcp {
        address: SocketAddr,
        source: io::Error,
    },
    /// Another process serves this unix socket.
    #[error("{}: another process serves this socket; stop it first, or choose another path in [listen]", path.display())]
    InUse { path: PathBuf },
    /// Other users can replace files in the socket's directory.
    #[error("{}: other users can write to or read from the directory, and so replace or use the socket; make it owned by root with mode {mode:04o}", path.display())]
    UnsafeDirectory {
        /// The directory that is unsafe.
        path: PathBuf,
        /// The mode that the directory may have at most.
        mode: u32,
    },
    /// The unix socket could not be created.
    #[error("{}: {source}", path.display())]
    Unix { path: PathBuf, source: io::Error },
    /// A socket that systemd passed could not be used.
    #[error("cannot use a socket that systemd passed: {source}")]
    Inherited { source: io::Error },
    /// A listener in a pod's network namespace could not be set up.
    #[error("{name}: {source}")]
    Pod {
        /// The address and the file of the network namespace.
        name: String,
        source: io::Error,
    },
    /// The daemon stopped while it was setting up the listener.
    #[error("{0}")]
    Interrupted(String),
}

impl ListenError {
    /// Returns whether the machine lacks the address family.
    pub fn is_unavailable_family(&self) -> bool {
        let Self::Tcp { source, .. } = self else {
            return false;
        };
        let errno = source.raw_os_error().map(Errno::from_raw);
        matches!(errno, Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL))
    }
}

/// The open connections of a set of listeners.
#[derive(Debug, Clone)]
pub struct ConnectionTracker {
    gauge: Gauge,
    // Unlike a JoinSet, it wakes no task when one of many connections ends.
    open: TaskTracker,
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

impl ConnectionTracker {
    /// Creates a tracker without connections, which counts in the gauge of `metrics`.
    pub fn new(metrics: &Metrics) -> Self {
        Self {
            gauge: metrics.connections.clone(),
            open: TaskTracker::new(),
        }
    }

    /// Waits until a listener may accept another connection. `unattested` holds the permits for
    /// connections that are not yet attested.
    ///
    /// The wait depends only on the daemon's own work, never on a client: the workload is attested
    /// before the daemon reads from the connection. Until then the connection counts towards no
    /// other limit. Each listener has its own permits, so a pod with callers that are slow to
    /// attest does not block other listeners.
    async fn acquire_pending(&self, unattested: &Arc<Semaphore>) -> PendingConnection {
        // The semaphore is never closed, so a permit always follows.
        let permit = PendingPermit {
            _permit: unattested.clone().acquire_owned().await.ok(),
        };
        self.gauge.inc();
        PendingConnection {
            permit,
            open: OpenConnection {
                gauge: self.gauge.clone(),
                _token: self.open.token(),
            },
        }
    }

    /// Waits until all connections have ended, at most for 16 s. The caller has to stop accepting
    /// first.
    pub async fn drained(&self) {
        self.open.close();
        if timeout(DRAIN_TIMEOUT, self.open.wait()).await.is_err() {
            tracing::warn!(
                open = self.open.len(),
                "drain timed out; closing connections"
            );
        }
    }
}

/// Accepts connections until `stop` is true, then closes the listener. Accepting never waits for a
/// client. `connection` serves each one: `CredentialEndpoint::serve_connection` for workloads,
/// `Admin::connection` for operators.
pub async fn serve<F, C>(
    mut listener: Listener,
    connections: ConnectionTracker,
    mut stop: watch::Receiver<bool>,
    connection: F,
) where
    F: Fn(AcceptedStream, PendingConnection) -> C,
    C: Future<Output = ()> + Send + 'static,
{
    let (unattested, mut errors) = (
        Arc::new(Semaphore::new(MAX_UNATTESTED)),
        AcceptErrorState::default(),
    );
    let mut stopping = stop.clone();
    let mut stopped = pin!(stopping.wait_for(|stop| *stop));
    loop {
        let accepted = tokio::select! {
            biased;
            _ = &mut stopped => break,
            accepted = accept(&listener, &connections, &unattested) => accepted,
        };
        match accepted {
            Ok((stream, pending)) => drop(tokio::spawn(connection(stream, pending))),
            Err(error) => handle_accept_error(&mut listener, &error, &mut stop, &mut errors).await,
        }
    }
    let name = listener.name();
    match listener.close_and_drain_backlog() {
        Ok(waiting) => {
            for stream in waiting {
                let pending = connections.acquire_pending(&unattested).await;
                tokio::spawn(connection(stream, pending));
            }
        }
        Err(error) => {
            tracing::warn!(%error, listener = name, "cannot drain the backlog")
        }
    }
}

/// Waits for the next connection and accepts it.
async fn accept(
    listener: &Listener,
    connections: &ConnectionTracker,
    unattested: &Arc<Semaphore>,
) -> io::Result<(AcceptedStream, PendingConnection)> {
    loop {
        let mut ready = listener.readable().await?;
        let pending = connections.acquire_pending(unattested).await;
        if let Some(accepted) = listener.accept(&mut ready) {
            return accepted.map(|stream| (stream, pending));
        }
    }
}

/// The state of an accept loop across errors. A pod can kill its own listener and take its port as
/// often as it likes, so each kind of error is logged at a limited rate.
#[derive(Debug)]
struct AcceptErrorState {
    short: LogQuota,
    killed: LogQuota,
    unbound: LogQuota,
    /// The time at which the listener was last rebound.
    last_rebind: Option<Instant>,
}

impl Default for AcceptErrorState {
    fn default() -> Self {
        let [short, killed, unbound] = [(); 3].map(|()| LogQuota::new(1, LOG_INTERVAL));
        Self {
            short,
            killed,
            unbound,
            last_rebind: None,
        }
    }
}

/// Handles an error of accept(2): ignores errors of a single connection, waits out resource
/// shortages, and rebinds a listener that is dead.
async fn handle_accept_error(
    listener: &mut Listener,
    error: &io::Error,
    stop: &mut watch::Receiver<bool>,
    errors: &mut AcceptErrorState,
) {
    if listener::is_per_connection_error(error) {
        return;
    }
    let pause = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EINVAL | Errno::EBADF | Errno::ENOTSOCK) => {
            if let Some(missed) = errors.killed.take() {
                tracing::error!(%error, listener = listener.name(), missed, "listener was killed; rebinding");
            }
            // A pod can kill its listener again and again.
            let soonest = errors
                .last_rebind
                .map_or_else(Instant::now, |at| at + REBIND_INTERVAL);
            if timeout_at(soonest, stop.wait_for(|stop| *stop))
                .await
                .is_ok()
            {
                return;
            }
            errors.last_rebind = Some(Instant::now());
            match listener.rebind().await {
                Ok(new) => {
                    *listener = new;
                    return;
                }
                Err(error) => {
                    if let Some(missed) = errors.unbound.take() {
                        tracing::error!(%error, missed, "cannot rebind the listener");
                    }
                }
            }
            REBIND_INTERVAL
        }
        // The process or the system is out of descriptors or memory, or the error is unknown. The
        // loop never continues without a pause.
        _ => {
            if let Some(missed) = errors.short.take() {
                tracing::warn!(%error, listener = listener.name(), missed, "cannot accept connections; backing off");
            }
            ACCEPT_BACKOFF
        }
    };
    // The pause ends early when the daemon stops.
    let _ = timeout(pause, stop.wait_for(|stop| *stop)).await;
}

#[cfg(test)]
mod tests;

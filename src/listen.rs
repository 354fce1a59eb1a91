//! Listeners: bound by the daemon or handed over by systemd, and accept loops that nothing ends but the daemon's own end.

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

/// How long an accept loop pauses when the process or the system is out of descriptors or memory.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
/// How often the log says so, if it goes on.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// So many connections of one listener may have been accepted and not yet attested.
const MAX_UNATTESTED: usize = 64;
/// How often a listener that was killed is bound again.
const REBIND_INTERVAL: Duration = Duration::from_secs(1);
/// The whole of any connection: the head, a held request (4.5 s), the answer.
pub const CONNECTION_TIMEOUT: Duration = Duration::from_secs(15);
/// Once the daemon was told to end. Every connection ends by itself before that, so this cuts none that keeps to its time.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(16);

/// Why a listener could not be had.
#[derive(Debug, Error)]
pub enum ListenError {
    /// Another process has the address.
    #[error(
        "{address}: {source}; see who has it with `ss -lntp`, or choose another address in [listen]"
    )]
    Tcp {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Another daemon serves this socket.
    #[error("{}: another process serves this socket; stop it first, or choose another path in [listen]", path.display())]
    InUse {
        /// Which.
        path: PathBuf,
    },
    /// The directory is not safe to put the socket in.
    #[error("{}: the directory is open to others, who could put a socket of their own there or use one that is not for them; make it owned by root with mode {mode:04o}", path.display())]
    UnsafeDirectory {
        /// Which.
        path: PathBuf,
        /// What it may be like.
        mode: u32,
    },
    /// The socket can't be made.
    #[error("{}: {source}", path.display())]
    Unix {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A socket that systemd handed over.
    #[error("a socket that systemd handed over: {source}")]
    Inherited {
        /// Why.
        source: io::Error,
    },
    /// In a pod's network namespace.
    #[error("{name}: {source}")]
    Pod {
        /// Which.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The daemon ends.
    #[error("{0}")]
    Interrupted(String),
}

impl ListenError {
    /// Whether the machine has no such address family.
    pub fn is_unavailable_family(&self) -> bool {
        let Self::Tcp { source, .. } = self else {
            return false;
        };
        let errno = source.raw_os_error().map(Errno::from_raw);
        matches!(errno, Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL))
    }
}

/// The open connections of some listeners.
#[derive(Debug, Clone)]
pub struct ConnectionTracker {
    gauge: Gauge,
    // It wakes nobody when one of many ends, as a JoinSet would.
    open: TaskTracker,
}

/// A connection whose workload is not known yet.
#[derive(Debug)]
pub struct PendingConnection {
    /// To be dropped as soon as the workload is known, or nothing but the workload's own share is waited for.
    pub permit: PendingPermit,
    /// To be dropped when the connection has ended.
    pub open: OpenConnection,
}

/// One of the few connections of its listener whose workloads are not known yet.
#[derive(Debug)]
pub struct PendingPermit {
    _permit: Option<OwnedSemaphorePermit>,
}

/// Says that a connection is open.
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
    /// None yet. They are counted in `metrics`.
    pub fn new(metrics: &Metrics) -> Self {
        Self {
            gauge: metrics.connections.clone(),
            open: TaskTracker::new(),
        }
    }

    /// Waits until another connection of a listener may be accepted, where `arriving` are those whose workload is not known yet.
    /// That depends on the daemon's own work alone, never on a client: whose a connection is, is known before anything is
    /// expected of it. Until then it counts among no others. Each listener has its own few, so that a pod whose callers are hard
    /// to find keeps no other from being accepted.
    async fn acquire_pending(&self, arriving: &Arc<Semaphore>) -> PendingConnection {
        // The semaphore is never closed, so there is always a permit in the end.
        let permit = PendingPermit {
            _permit: arriving.clone().acquire_owned().await.ok(),
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

    /// Waits until they have ended. To be called when nothing is accepted any more.
    pub async fn drained(&self) {
        self.open.close();
        if timeout(DRAIN_TIMEOUT, self.open.wait()).await.is_err() {
            tracing::warn!(
                open = self.open.len(),
                "connections did not end in time and are cut"
            );
        }
    }
}

/// Accepts until `stop` says so, then closes the listener. Accepting never waits for a client.
pub async fn serve<F, C>(
    mut bound: Listener,
    connections: ConnectionTracker,
    mut stop: watch::Receiver<bool>,
    connection: F,
) where
    F: Fn(AcceptedStream, PendingConnection) -> C,
    C: Future<Output = ()> + Send + 'static,
{
    let (arriving, mut troubles) = (
        Arc::new(Semaphore::new(MAX_UNATTESTED)),
        AcceptErrorState::default(),
    );
    let mut stopping = stop.clone();
    let mut stopped = pin!(stopping.wait_for(|stop| *stop));
    loop {
        let accepted = tokio::select! {
            biased;
            _ = &mut stopped => break,
            accepted = accept(&bound, &connections, &arriving) => accepted,
        };
        match accepted {
            Ok((stream, arrival)) => drop(tokio::spawn(connection(stream, arrival))),
            Err(error) => handle_accept_error(&mut bound, &error, &mut stop, &mut troubles).await,
        }
    }
    let name = bound.name();
    match bound.close_and_drain_backlog() {
        Ok(waiting) => {
            for stream in waiting {
                let arrival = connections.acquire_pending(&arriving).await;
                tokio::spawn(connection(stream, arrival));
            }
        }
        Err(error) => {
            tracing::warn!(%error, listener = name, "who had connected last is not served")
        }
    }
}

/// The next connection.
async fn accept(
    bound: &Listener,
    connections: &ConnectionTracker,
    arriving: &Arc<Semaphore>,
) -> io::Result<(AcceptedStream, PendingConnection)> {
    loop {
        let mut arrived = bound.readable().await?;
        let arrival = connections.acquire_pending(arriving).await;
        if let Some(accepted) = bound.accept(&mut arrived) {
            return accepted.map(|stream| (stream, arrival));
        }
    }
}

/// What a loop has been through. A pod can kill its own listener over and over, and take the port; none of that is a line of the
/// log each time.
#[derive(Debug)]
struct AcceptErrorState {
    short: LogQuota,
    killed: LogQuota,
    unbound: LogQuota,
    /// When the listener was last bound again.
    bound: Option<Instant>,
}

impl Default for AcceptErrorState {
    fn default() -> Self {
        let [short, killed, unbound] = [(); 3].map(|()| LogQuota::new(1, LOG_INTERVAL));
        Self {
            short,
            killed,
            unbound,
            bound: None,
        }
    }
}

/// After an error of accept(2): those of one connection are nothing, those of the machine pass, a dead listener is replaced.
async fn handle_accept_error(
    bound: &mut Listener,
    error: &io::Error,
    stop: &mut watch::Receiver<bool>,
    troubles: &mut AcceptErrorState,
) {
    if listener::is_per_connection_error(error) {
        return;
    }
    let pause = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EINVAL | Errno::EBADF | Errno::ENOTSOCK) => {
            if let Some(missed) = troubles.killed.take() {
                tracing::error!(%error, listener = bound.name(), missed, "the listener was killed; binding it again");
            }
            // Somebody may kill it again and again.
            let soonest = troubles
                .bound
                .map_or_else(Instant::now, |bound| bound + REBIND_INTERVAL);
            if timeout_at(soonest, stop.wait_for(|stop| *stop))
                .await
                .is_ok()
            {
                return;
            }
            troubles.bound = Some(Instant::now());
            match bound.rebind().await {
                Ok(new) => {
                    *bound = new;
                    return;
                }
                Err(error) => {
                    if let Some(missed) = troubles.unbound.take() {
                        tracing::error!(%error, missed, "the listener cannot be bound again yet");
                    }
                }
            }
            REBIND_INTERVAL
        }
        // Out of descriptors or memory, or something that nobody has seen yet: never a loop without a pause.
        _ => {
            if let Some(missed) = troubles.short.take() {
                tracing::warn!(%error, listener = bound.name(), missed, "no connection can be taken for the moment");
            }
            ACCEPT_BACKOFF
        }
    };
    // Ends early when the daemon is told to stop.
    let _ = timeout(pause, stop.wait_for(|stop| *stop)).await;
}

#[cfg(test)]
mod tests;

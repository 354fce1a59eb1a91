//! Listeners, bound by the daemon or passed by systemd, and accept loops that run until the daemon
//! ends.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::time::Duration;

use nix::errno::Errno;
use thiserror::Error;
use tokio::time::Instant;

use crate::limits::LogQuota;

mod connect;
mod drain;
mod lazy_socket;
mod listener;
mod pod_listener;
mod socket_activation;
mod socket_file;
mod sys;
mod tcp;
mod unprivileged_ports;

pub(crate) use connect::connect_unix;
#[cfg(test)]
pub(crate) use connect::fill_backlog;
pub use drain::{Drain, DrainHandle, OpenConnection, PendingConnection, PendingPermit};
pub use lazy_socket::LazySocket;
pub use listener::{AcceptedStream, Listener, ListenerSource};
pub use pod_listener::{
    METADATA_ADDRESSES, NetnsRef, POD_ADDRESSES, POD_PORT, PodListener, is_metadata_address,
    is_metadata_ip,
};
pub use socket_activation::ActivatedSockets;
pub use socket_file::SocketFile;
pub use unprivileged_ports::{
    first_unprivileged_port, read_first_unprivileged_port, unprivileged_ports,
    warn_of_unprivileged_ports,
};

use drain::PendingConnections;

/// The pause of an accept loop while the process or the system is out of descriptors or memory.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
/// The shortest interval between two log lines for the same error of a listener.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// The shortest interval between two rebinds of a listener that was killed.
const REBIND_INTERVAL: Duration = Duration::from_secs(1);
/// The lifetime of any connection: the head, a held request (4.5 s), and the response.
pub const CONNECTION_TIMEOUT: Duration = Duration::from_secs(15);

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
        path: PathBuf,
        /// The mode that the directory may have at most.
        mode: u32,
    },
    /// The unix socket could not be created.
    #[error("{}: {source}", path.display())]
    Unix { path: PathBuf, source: io::Error },
    /// A socket that systemd passed could not be used.
    #[error("cannot use a socket that systemd passed: {source}")]
    Activated { source: io::Error },
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

/// Accepts connections until the daemon stops, then closes the listener. Accepting never waits for
/// a client. `connection` serves each one: `CredentialEndpoint::serve_connection` for workloads,
/// `Admin::connection` for operators.
pub async fn serve<F, C>(mut listener: Listener, drain: DrainHandle, connection: F)
where
    F: Fn(AcceptedStream, PendingConnection) -> C,
    C: Future<Output = ()> + Send + 'static,
{
    let (pending, mut errors) = (
        PendingConnections::new(drain.clone()),
        AcceptErrorState::default(),
    );
    let mut stopped = pin!(drain.stopped());
    loop {
        let accepted = tokio::select! {
            biased;
            () = &mut stopped => break,
            accepted = accept(&listener, &pending) => accepted,
        };
        match accepted {
            Ok((stream, pending)) => drop(tokio::spawn(connection(stream, pending))),
            Err(error) => handle_accept_error(&mut listener, &error, &drain, &mut errors).await,
        }
    }
    let name = listener.name();
    match listener.close_and_drain_backlog() {
        Ok(waiting) => {
            for stream in waiting {
                tokio::spawn(connection(stream, pending.acquire().await));
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
    pending: &PendingConnections,
) -> io::Result<(AcceptedStream, PendingConnection)> {
    loop {
        let mut ready = listener.readable().await?;
        let pending = pending.acquire().await;
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
    drain: &DrainHandle,
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
            let since = errors.last_rebind.map(|at| at.elapsed());
            let pause = since.map_or(Duration::ZERO, |since| {
                REBIND_INTERVAL.saturating_sub(since)
            });
            if drain.stops_within(pause).await {
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
    let _ = drain.stops_within(pause).await;
}

#[cfg(test)]
mod tests;

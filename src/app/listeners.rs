//! Addresses of `[listen]`: bound at the start or retried later. Handles the systemd sockets that
//! the configuration does not name, too.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tokio::task::spawn_blocking;

use crate::limits::KeyedLogQuota;
use crate::listen::{
    self, AcceptedStream, ActivatedSockets, Drain, DrainHandle, LazySocket, ListenError, Listener,
    PendingConnection,
};

/// Interval between attempts to bind an address.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Minimum interval between two log lines with the same reason.
const LOG_INTERVAL: Duration = Duration::from_secs(3600);
/// Distinct reasons within [`LOG_INTERVAL`]. Further ones are not logged.
const MAX_LOGGED_REASONS: usize = 16;

/// An address in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ListenAddress {
    /// A loopback address with its port.
    Tcp(SocketAddr),
    /// Path of a unix socket, and its mode.
    Unix(PathBuf, u32),
}

impl ListenAddress {
    fn bind(&self, inherited: &mut ActivatedSockets) -> Result<Listener, ListenError> {
        match self {
            Self::Tcp(address) => Listener::tcp(*address, inherited),
            Self::Unix(path, mode) => Listener::unix(path, *mode, inherited),
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path, _) => write!(f, "{}", path.display()),
        }
    }
}

/// An address, and the result of binding it.
pub(super) type BindAttempt = (ListenAddress, Result<Listener, ListenError>);

/// Binds each address. IPv6 addresses are left out, with a warning, on a machine without IPv6.
pub(super) fn bind_all(
    requested: Vec<ListenAddress>,
    inherited: &mut ActivatedSockets,
) -> Vec<BindAttempt> {
    let mut attempts = Vec::new();
    for address in requested {
        match (address.bind(inherited), &address) {
            (Err(error), ListenAddress::Tcp(tcp))
                if tcp.is_ipv6() && error.is_unavailable_family() =>
            {
                tracing::warn!(%address, "address skipped: this machine has no IPv6; use 127.0.0.1 in clients");
            }
            (bound, _) => attempts.push((address, bound)),
        }
    }
    attempts
}

/// Returns the TCP address with the port that the kernel chose. `None` for a unix socket, and for a
/// port that is not chosen yet.
pub(super) fn tcp_address((requested, bound): &BindAttempt) -> Option<SocketAddr> {
    match (bound, requested) {
        (Ok(Listener::Tcp { address, .. }), _) => Some(*address),
        (Err(_), ListenAddress::Tcp(address)) if address.port() != 0 => Some(*address),
        _ => None,
    }
}

/// Serves the listener until `drain` stops it if it is bound, and logs `event`. Otherwise retries
/// the bind in the background.
pub(super) fn serve<F, C>(
    drain: &Drain,
    (address, bound): BindAttempt,
    event: &'static str,
    connection: F,
) where
    F: Fn(AcceptedStream, PendingConnection) -> C + Send + Sync + 'static,
    C: Future<Output = ()> + Send + 'static,
{
    let handle = drain.handle();
    match bound {
        Ok(bound) => {
            tracing::info!(address = bound.name(), "{event}");
            drain
                .handle()
                .spawn(listen::serve(bound, handle, connection));
        }
        Err(error) => {
            let log = BindLog::new(address.clone());
            log.warn(&error.to_string());
            drain.handle().spawn(async move {
                if let Some(bound) = bind_later(address, &log, &handle).await {
                    tracing::info!(address = bound.name(), "{event}");
                    listen::serve(bound, handle, connection).await;
                }
            });
        }
    }
}

/// Resets callers of sockets that systemd holds and the configuration does not name. In their
/// queues the callers would wait for ever.
pub(super) fn reset_unclaimed(drain: &Drain, inherited: &mut ActivatedSockets) {
    for bound in inherited.take_unclaimed() {
        let bound = match bound {
            Ok(bound) => bound,
            Err(error) => {
                tracing::warn!(%error, "a socket of the .socket unit cannot be used");
                continue;
            }
        };
        tracing::warn!(
            address = bound.name(),
            "callers of a systemd socket are rejected: [listen] does not name it; make the .socket unit and \
             the configuration agree"
        );
        let reset = |stream: AcceptedStream, _| async move {
            LazySocket::reset_on_close(stream.socket().descriptor())
        };
        let handle = drain.handle();
        drain.handle().spawn(listen::serve(bound, handle, reset));
    }
}

/// The log lines of an address that is not bound yet.
struct BindLog {
    address: ListenAddress,
    quota: KeyedLogQuota,
}

impl BindLog {
    fn new(address: ListenAddress) -> Self {
        Self {
            address,
            quota: KeyedLogQuota::new(MAX_LOGGED_REASONS, LOG_INTERVAL),
        }
    }

    /// Logs the reason, at most once in [`LOG_INTERVAL`].
    fn warn(&self, error: &str) {
        if self.quota.take(error).is_some() {
            let address = &self.address;
            tracing::warn!(%address, error, "an address of [listen] cannot be bound yet");
        }
    }
}

/// Retries until the address is bound or the daemon stops.
async fn bind_later(
    address: ListenAddress,
    log: &BindLog,
    drain: &DrainHandle,
) -> Option<Listener> {
    loop {
        if drain.stops_within(RETRY_INTERVAL).await {
            return None;
        }
        let requested = address.clone();
        // Binding touches files, so it may block.
        match spawn_blocking(move || requested.bind(&mut ActivatedSockets::default())).await {
            Ok(Ok(bound)) => return Some(bound),
            Ok(Err(error)) => log.warn(&error.to_string()),
            Err(error) => log.warn(&error.to_string()),
        }
    }
}

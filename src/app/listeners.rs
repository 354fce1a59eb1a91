//! Addresses of `[listen]`: bound at the start or retried later. Handles the systemd sockets that
//! the configuration does not name, too.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::timeout;

use crate::listen::{
    self, AcceptedStream, ActivatedSockets, ConnectionTracker, LazySocket, ListenError, Listener,
    PendingConnection,
};
use crate::metrics::Metrics;

/// Interval between attempts to bind an address.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

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

/// Accept loops, the signal that stops them, and the connections that they accepted.
#[derive(Debug)]
pub(super) struct AcceptLoops {
    /// Set to true when the loops have to stop.
    pub(super) stop: watch::Sender<bool>,
    pub(super) loops: JoinSet<()>,
    /// Connections that were accepted and are open.
    pub(super) connections: ConnectionTracker,
}

/// An address, and the result of binding it.
pub(super) type BindAttempt = (ListenAddress, Result<Listener, ListenError>);

/// Binds each address. IPv6 addresses are left out, with a warning, on a machine without IPv6.
pub(super) fn bind_all(
    wanted: Vec<ListenAddress>,
    inherited: &mut ActivatedSockets,
) -> Vec<BindAttempt> {
    let mut attempts = Vec::new();
    for address in wanted {
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
pub(super) fn tcp_address((wanted, bound): &BindAttempt) -> Option<SocketAddr> {
    match (bound, wanted) {
        (Ok(Listener::Tcp { address, .. }), _) => Some(*address),
        (Err(_), ListenAddress::Tcp(address)) if address.port() != 0 => Some(*address),
        _ => None,
    }
}

impl AcceptLoops {
    pub(super) fn new(metrics: &Metrics) -> Self {
        Self {
            stop: watch::Sender::default(),
            loops: JoinSet::new(),
            connections: ConnectionTracker::new(metrics),
        }
    }

    /// Serves the listener if it is bound, and logs `event`. Otherwise retries the bind in the
    /// background.
    pub(super) fn serve<F, C>(
        &mut self,
        (address, bound): BindAttempt,
        event: &'static str,
        connection: F,
    ) where
        F: Fn(AcceptedStream, PendingConnection) -> C + Send + Sync + 'static,
        C: Future<Output = ()> + Send + 'static,
    {
        let (connections, stop) = (self.connections.clone(), self.stop.subscribe());
        match bound {
            Ok(bound) => {
                tracing::info!(address = bound.name(), "{event}");
                self.loops
                    .spawn(listen::serve(bound, connections, stop, connection));
            }
            Err(error) => {
                tracing::warn!(%address, %error, "an address of [listen] cannot be bound yet: retrying every second");
                self.loops.spawn(async move {
                    if let Some(bound) = bind_later(address, error.to_string(), stop.clone()).await
                    {
                        tracing::info!(address = bound.name(), "{event}");
                        listen::serve(bound, connections, stop, connection).await;
                    }
                });
            }
        }
    }

    /// Resets callers of sockets that systemd holds and the configuration does not name. In their
    /// queues the callers would wait for ever.
    pub(super) fn refuse_rest(&mut self, inherited: &mut ActivatedSockets) {
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
                "callers of a systemd socket are refused: [listen] does not name it; make the .socket unit and \
                 the configuration agree"
            );
            let reset = |stream: AcceptedStream, _| async move {
                LazySocket::reset_on_close(stream.socket().descriptor())
            };
            self.loops.spawn(listen::serve(
                bound,
                self.connections.clone(),
                self.stop.subscribe(),
                reset,
            ));
        }
    }

    /// Stops accepting, and waits until the open connections have ended.
    pub(super) async fn end(&mut self) {
        self.stop.send_replace(true);
        while self.loops.join_next().await.is_some() {}
        self.connections.drained().await;
    }
}

/// Retries until the address is bound or the daemon stops. Logs each reason once.
async fn bind_later(
    address: ListenAddress,
    mut logged: String,
    mut stop: watch::Receiver<bool>,
) -> Option<Listener> {
    loop {
        if timeout(RETRY_INTERVAL, stop.wait_for(|stop| *stop))
            .await
            .is_ok()
        {
            return None;
        }
        let wanted = address.clone();
        // Binding touches files, so it may block.
        let error =
            match spawn_blocking(move || wanted.bind(&mut ActivatedSockets::default())).await {
                Ok(Ok(bound)) => return Some(bound),
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
        if error != logged {
            tracing::warn!(%address, error, "an address of [listen] cannot be bound yet");
            logged = error;
        }
    }
}

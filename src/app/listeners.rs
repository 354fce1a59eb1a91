//! The addresses of `[listen]`: bound now, or as soon as that is possible, and what is done with a socket of systemd's that the
//! configuration does not name.

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

/// How often an address is tried again that could not be bound.
const RETRY: Duration = Duration::from_secs(1);

/// An address of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ListenAddress {
    /// A loopback address.
    Tcp(SocketAddr),
    /// The path of a unix socket, and its mode.
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

/// Accept loops, how they are told to end, and what they have accepted.
#[derive(Debug)]
pub(super) struct AcceptLoops {
    /// Set to true once they are to end.
    pub(super) stop: watch::Sender<bool>,
    /// The loops.
    pub(super) loops: JoinSet<()>,
    /// The connections.
    pub(super) connections: ConnectionTracker,
}

/// An address, and what came of binding it.
pub(super) type BindAttempt = (ListenAddress, Result<Listener, ListenError>);

/// Binds each address. One of IPv6 is left out, with a warning, where the machine has none.
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
                tracing::warn!(%address, "this machine has no IPv6; clients use 127.0.0.1");
            }
            (bound, _) => attempts.push((address, bound)),
        }
    }
    attempts
}

/// The TCP address, with the port that the kernel chose; `None` of a unix socket, and of a port that is not chosen yet.
pub(super) fn tcp_address((wanted, bound): &BindAttempt) -> Option<SocketAddr> {
    match (bound, wanted) {
        (Ok(Listener::Tcp { address, .. }), _) => Some(*address),
        (Err(_), ListenAddress::Tcp(address)) if address.port() != 0 => Some(*address),
        _ => None,
    }
}

impl AcceptLoops {
    /// Nothing yet.
    pub(super) fn new(metrics: &Metrics) -> Self {
        Self {
            stop: watch::Sender::default(),
            loops: JoinSet::new(),
            connections: ConnectionTracker::new(metrics),
        }
    }

    /// Serves what is bound, and writes `event` to the log. What is not is bound as soon as that is possible.
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
                tracing::warn!(%address, %error, "an address of [listen] is not served yet: binding it is retried every second");
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

    /// Resets the callers of sockets that systemd holds and the configuration does not name. In its queue they would wait for
    /// ever.
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
                "systemd holds a socket that [listen] does not name: its callers are refused; make the .socket unit and \
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

    /// Takes no more connections, and waits for those that are open.
    pub(super) async fn end(&mut self) {
        self.stop.send_replace(true);
        while self.loops.join_next().await.is_some() {}
        self.connections.drained().await;
    }
}

/// Tries until the address is bound, or the daemon ends. The log has each reason once.
async fn bind_later(
    address: ListenAddress,
    mut logged: String,
    mut stop: watch::Receiver<bool>,
) -> Option<Listener> {
    loop {
        if timeout(RETRY, stop.wait_for(|stop| *stop)).await.is_ok() {
            return None;
        }
        let wanted = address.clone();
        // What it does with files may block.
        let error =
            match spawn_blocking(move || wanted.bind(&mut ActivatedSockets::default())).await {
                Ok(Ok(bound)) => return Some(bound),
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
        if error != logged {
            tracing::warn!(%address, error, "an address of [listen] is not served yet");
            logged = error;
        }
    }
}

//! One pod's network namespace: what was made inside, and how all of it ends.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use nix::errno::Errno;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::attest::{PodAttestor, SockDiag};
use crate::http::CredentialEndpoint;
use crate::listen::{
    self, ConnectionTracker, ListenError, Listener, NetnsRef, POD_ADDRESSES, PodListener,
};
use crate::netns::{NamespaceError, NamespaceId};
use crate::pod_listeners::handover_protocol::{self, HandoverKey};
use crate::pod_listeners::sys;

/// What serves every pod.
#[derive(Debug)]
pub(super) struct PodService {
    pub(super) front: Arc<CredentialEndpoint>,
    pub(super) connections: ConnectionTracker,
    /// Ends all accept loops.
    pub(super) stop: watch::Receiver<bool>,
    pub(super) loops: TaskTracker,
}

/// A namespace that is listened in.
#[derive(Debug)]
pub(super) struct ListenedPod {
    pub(super) place: Arc<NetnsRef>,
    attestor: Arc<PodAttestor>,
    listeners: Vec<Arc<PodListener>>,
    /// Addresses that could not be had yet.
    pub(super) missing: Vec<SocketAddr>,
    /// Whether it was told whose pod it is where that happens.
    named: bool,
    /// Since when it is listened in.
    pub(super) since: Instant,
    /// Whether it was looked at which ports its users may bind.
    pub(super) ports_seen: bool,
    /// Accept loops.
    accepting: CancellationToken,
}

/// What could be made inside.
pub(super) struct NamespaceSockets {
    diag: io::Result<SockDiag>,
    listeners: Vec<BindResult>,
}

/// An address, and how binding it went.
pub(super) type BindResult = (SocketAddr, io::Result<PodListener>);

/// Listeners of one namespace that another daemon says it had.
pub(super) type ReceivedSockets = Vec<(SocketAddr, OwnedFd)>;

/// Listens on these addresses, in the namespace of this place.
pub(super) fn bind(
    place: &Arc<NetnsRef>,
    addresses: &[SocketAddr],
) -> Result<Vec<BindResult>, NamespaceError> {
    place.run_in(|| {
        addresses
            .iter()
            .map(|address| (*address, PodListener::bind(place.clone(), *address)))
            .collect()
    })
}

impl NamespaceSockets {
    /// Makes everything that a pod needs, but for the listeners that another daemon has given. It keeps the namespace alive
    /// until it is dropped.
    pub(super) fn inside(
        place: &Arc<NetnsRef>,
        given: ReceivedSockets,
    ) -> Result<Self, NamespaceError> {
        let mut given: HashMap<_, _> = given.into_iter().collect();
        let mut listener = |address: SocketAddr| match given
            .remove(&address)
            .filter(|given| handover_protocol::is_listener(given, address).unwrap_or(false))
        {
            Some(listener) => PodListener::with(place.clone(), address, listener),
            None => PodListener::bind(place.clone(), address),
        };
        place.run_in(|| {
            let cookie = match sys::cookie_here() {
                // Kernels that have none tell nobody's cgroup either: what is made here is not served.
                Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => None,
                cookie => Some(cookie?),
            };
            if place.id().is_initial(cookie) {
                return Err(NamespaceError::Machines);
            }
            let listeners = POD_ADDRESSES
                .iter()
                .map(|address| (*address, listener(*address)))
                .collect();
            Ok(Self {
                diag: SockDiag::open(),
                listeners,
            })
        })?
    }
}

/// Why an address of a pod can't be had.
#[derive(Debug)]
pub(super) enum BindFailure {
    /// A process of the pod has it.
    Taken,
    /// `CAP_NET_BIND_SERVICE` is missing.
    Denied,
    /// Something else.
    Failed(io::Error),
}

impl ListenedPod {
    /// Serves what was made in this place. `None` where the kernel doesn't tell TCP callers apart.
    pub(super) fn serve(
        place: Arc<NetnsRef>,
        made: NamespaceSockets,
        service: &PodService,
    ) -> io::Result<Option<(Self, Vec<BindFailure>)>> {
        let Some(attestor) = service.front.attestor.in_pod(made.diag?) else {
            return Ok(None);
        };
        let mut pod = Self {
            place,
            attestor: Arc::new(attestor),
            listeners: Vec::new(),
            missing: Vec::new(),
            named: false,
            since: Instant::now(),
            ports_seen: false,
            accepting: CancellationToken::new(),
        };
        let unbound = pod.add(made.listeners, service);
        Ok(Some((pod, unbound)))
    }

    /// Serves on these, too; says which could not be had, and remembers those for another try.
    pub(super) fn add(
        &mut self,
        listeners: Vec<BindResult>,
        service: &PodService,
    ) -> Vec<BindFailure> {
        let mut unbound = Vec::new();
        for (address, bound) in listeners {
            self.missing.retain(|missing| *missing != address);
            let served = match bound {
                Ok(inside) => self.listen(Arc::new(inside), service),
                Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
                    // The machine has no IPv6.
                    continue;
                }
                Err(error) => Err(error),
            };
            if let Err(error) = served {
                self.missing.push(address);
                unbound.push(match error.raw_os_error().map(Errno::from_raw) {
                    Some(Errno::EADDRINUSE) => BindFailure::Taken,
                    Some(Errno::EACCES) => BindFailure::Denied,
                    _ => BindFailure::Failed(error),
                });
            }
        }
        unbound
    }

    fn listen(&mut self, inside: Arc<PodListener>, service: &PodService) -> io::Result<()> {
        let bound = Listener::pod(inside.clone()).map_err(|error| match error {
            ListenError::Pod { source, .. } => source,
            other => io::Error::other(other),
        })?;
        let (front, attestor) = (service.front.clone(), self.attestor.clone());
        let connection = move |stream, arrival| {
            front
                .clone()
                .connection(stream, arrival, Some(attestor.clone()))
        };
        let accepting = listen::serve(
            bound,
            service.connections.clone(),
            service.stop.clone(),
            connection,
        );
        service
            .loops
            .spawn(self.accepting.clone().run_until_cancelled_owned(accepting));
        self.listeners.push(inside);
        Ok(())
    }

    /// All that accepts there.
    pub(super) fn listening(&self) -> impl Iterator<Item = (HandoverKey, Arc<OwnedFd>)> {
        self.listeners
            .iter()
            .map(|inside| ((self.id(), inside.address()), inside.listener()))
    }

    /// Stops accepting, and keeps those listeners that are among `kept`, which are another daemon's, too. Connections go on.
    pub(super) fn pause(&mut self, kept: &[(HandoverKey, Arc<OwnedFd>)]) {
        self.accepting.cancel();
        let is_kept = |inside: &Arc<PodListener>| {
            kept.iter()
                .any(|(_, listener)| Arc::ptr_eq(listener, &inside.listener()))
        };
        let (listeners, dropped) = self.listeners.drain(..).partition::<Vec<_>, _>(is_kept);
        self.missing
            .extend(dropped.into_iter().map(|inside| inside.address()));
        self.listeners = listeners;
    }

    /// Accepts again after a pause; what could not be kept is missing.
    pub(super) fn resume(&mut self, service: &PodService) {
        self.accepting = CancellationToken::new();
        for inside in std::mem::take(&mut self.listeners) {
            let address = inside.address();
            if let Err(error) = self.listen(inside, service) {
                tracing::warn!(%error, namespace = %self.path().display(), "a listener cannot be served again yet");
                self.missing.push(address);
            }
        }
    }

    /// Leaves listeners to whoever has them, too. Connections go on.
    pub(super) fn release(&mut self) {
        self.listeners.clear();
    }

    /// Whose pod it is, if an address is missing there, once that is known; only once.
    pub(super) fn warn_missing_with_owner(&mut self) -> Option<String> {
        if self.missing.is_empty() || self.named {
            return None;
        }
        let owner = self.attestor.owner()?.to_string();
        self.named = true;
        Some(owner)
    }

    /// Which namespace it is.
    pub(super) fn id(&self) -> NamespaceId {
        self.place.id()
    }

    /// For the log.
    pub(super) fn path(&self) -> PathBuf {
        self.place.path()
    }
}

impl Drop for ListenedPod {
    /// Closes everything that was made inside: each of these would keep the network of a dead pod.
    fn drop(&mut self) {
        self.accepting.cancel();
        self.attestor.close();
    }
}

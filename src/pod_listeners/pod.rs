//! The network namespace of one pod: its sockets and their life.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::attest::{PodAttestor, SockDiag};
use crate::http::CredentialEndpoint;
use crate::listen::{
    self, DrainHandle, ListenError, Listener, METADATA_ADDRESSES, NetnsRef, POD_ADDRESSES,
    PodListener, first_unprivileged_port, is_metadata_address, unprivileged_ports,
};
use crate::netns::{NamespaceError, NamespaceId};
use crate::pod_listeners::handover_protocol::{self, HandoverKey, MetadataParts};
use crate::pod_listeners::metadata::{MetadataObstacle, MetadataState};
use crate::pod_listeners::opt_in::OptInFile;
use crate::pod_listeners::sys;

/// Age at which a namespace has its final settings. The runtime creates it with the kernel's
/// defaults, and sets other values with the pod's first container.
const SETTLE_TIME: Duration = Duration::from_secs(5);

/// Parts that all pods share.
#[derive(Debug)]
pub(super) struct PodService {
    pub(super) endpoint: Arc<CredentialEndpoint>,
    pub(super) drain: DrainHandle,
    /// The accept loops in pods.
    pub(super) loops: TaskTracker,
    /// Set if pods may opt in to the metadata address.
    pub(super) serves_metadata: bool,
}

impl PodService {
    /// Returns the parts of the instance metadata service that this instance takes over.
    pub(super) fn metadata_parts(&self) -> MetadataParts {
        MetadataParts {
            key: self.endpoint.imds.is_some(),
            listeners: self.serves_metadata,
        }
    }

    /// Returns a file with the key of metadata tokens, for the next instance.
    pub(super) fn sealed_key(&self) -> Option<Arc<OwnedFd>> {
        let imds = self.endpoint.imds.as_ref()?;
        match handover_protocol::sealed_key(&imds.tokens.bytes()) {
            Ok(file) => Some(Arc::new(file)),
            Err(error) => {
                tracing::warn!(%error, "the key of metadata tokens cannot be passed to the next instance");
                None
            }
        }
    }

    /// Issues metadata tokens by the key of the previous instance from now on.
    pub(super) fn adopt_key(&self, file: &OwnedFd) {
        let Some(imds) = &self.endpoint.imds else {
            return;
        };
        match handover_protocol::key_of(file) {
            Ok(key) => imds.tokens.adopt(key),
            Err(error) => {
                tracing::warn!(%error, "the key of the previous instance's metadata tokens cannot be read");
            }
        }
    }
}

/// A pod's namespace in which the daemon listens.
#[derive(Debug)]
pub(super) struct ListenedPod {
    pub(super) netns: Arc<NetnsRef>,
    attestor: Arc<PodAttestor>,
    listeners: Vec<Arc<PodListener>>,
    /// Addresses of the endpoint that could not be bound yet.
    pub(super) missing: Vec<SocketAddr>,
    pub(super) metadata: MetadataState,
    /// Set when the pod that owns the namespace was logged.
    owner_logged: bool,
    /// Time from which on [`unprivileged_port_start`] can be read. `None` once it was read.
    port_check: Option<Instant>,
    /// Cancels the pod's accept loops.
    accepting: CancellationToken,
}

/// Results of making the sockets of one namespace.
pub(super) struct NamespaceSockets {
    diag: io::Result<SockDiag>,
    opt_in: Option<OptInFile>,
    listeners: Vec<BindResult>,
}

/// An address, and the result of binding it.
pub(super) type BindResult = (SocketAddr, io::Result<PodListener>);

/// Listeners that another instance claims to have had in one namespace. They are not verified yet.
pub(super) type ReceivedSockets = Vec<(SocketAddr, Arc<OwnedFd>)>;

/// Listens on these addresses in the namespace `netns`.
pub(super) fn bind(
    netns: &Arc<NetnsRef>,
    addresses: &[SocketAddr],
) -> Result<Vec<BindResult>, NamespaceError> {
    netns.run_in(|| {
        addresses
            .iter()
            .map(|address| (*address, PodListener::bind(netns.clone(), *address)))
            .collect()
    })
}

/// Takes the received listener on this address if it is valid, or binds one. Call it within the
/// namespace.
pub(super) fn take_or_bind(
    netns: &Arc<NetnsRef>,
    address: SocketAddr,
    received: &mut HashMap<SocketAddr, Arc<OwnedFd>>,
) -> io::Result<PodListener> {
    let passed = received.remove(&address);
    match passed.filter(|passed| handover_protocol::is_listener(passed, address).unwrap_or(false)) {
        Some(listener) => PodListener::with(netns.clone(), address, listener),
        None => PodListener::bind(netns.clone(), address),
    }
}

/// Returns the namespace's `net.ipv4.ip_unprivileged_port_start` and one of its files, if any user
/// of the pod may bind the port of the endpoint. `None` also if the namespace is gone.
pub(super) fn unprivileged_port_start(netns: &NetnsRef) -> Option<(PathBuf, u16)> {
    let first = netns.run_in(first_unprivileged_port).ok()?;
    (!unprivileged_ports(&POD_ADDRESSES, first).is_empty()).then(|| (netns.path(), first))
}

impl NamespaceSockets {
    /// Makes all sockets that a pod needs, except listeners that another instance passed. The
    /// result keeps the namespace alive until it is dropped. With `serves_metadata` the pod may
    /// opt in to the metadata address.
    pub(super) fn open(
        netns: &Arc<NetnsRef>,
        received: ReceivedSockets,
        serves_metadata: bool,
    ) -> Result<Self, NamespaceError> {
        let mut received = received.into_iter().collect();
        netns.run_in(|| {
            let cookie = match sys::cookie_here() {
                // Kernels without cookies do not report a caller's cgroup either: this namespace is
                // not served.
                Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => None,
                cookie => Some(cookie?),
            };
            if netns.id().is_initial(cookie) {
                return Err(NamespaceError::Initial);
            }
            let listeners = POD_ADDRESSES
                .iter()
                .map(|address| (*address, take_or_bind(netns, *address, &mut received)))
                .collect();
            Ok(Self {
                diag: SockDiag::open(),
                opt_in: serves_metadata.then(OptInFile::open).and_then(Result::ok),
                listeners,
            })
        })?
    }
}

/// Reason why an address of a pod cannot be bound.
#[derive(Debug)]
pub(super) enum BindFailure {
    /// A process of the pod uses it.
    Taken,
    /// The daemon lacks `CAP_NET_BIND_SERVICE`.
    Denied,
    /// Any other error of the bind.
    Failed(io::Error),
}

impl ListenedPod {
    /// Serves on the sockets of this namespace. `None` where the kernel does not distinguish TCP
    /// callers.
    pub(super) fn serve(
        netns: Arc<NetnsRef>,
        sockets: NamespaceSockets,
        service: &PodService,
    ) -> io::Result<Option<(Self, Vec<BindFailure>)>> {
        let Some(attestor) = service.endpoint.attestor.in_pod(sockets.diag?, netns.id()) else {
            return Ok(None);
        };
        let metadata = sockets
            .opt_in
            .map_or(MetadataState::Off, MetadataState::undecided);
        let mut pod = Self {
            netns,
            metadata,
            attestor: Arc::new(attestor),
            listeners: Vec::new(),
            missing: Vec::new(),
            owner_logged: false,
            port_check: Some(Instant::now() + SETTLE_TIME),
            accepting: CancellationToken::new(),
        };
        let unbound = pod.add(sockets.listeners, service);
        Ok(Some((pod, unbound)))
    }

    /// Serves on these addresses, too. Returns the failures, and keeps their addresses for a retry.
    pub(super) fn add(
        &mut self,
        listeners: Vec<BindResult>,
        service: &PodService,
    ) -> Vec<BindFailure> {
        let mut unbound = Vec::new();
        for (address, bound) in listeners {
            self.missing.retain(|missing| *missing != address);
            let served = match bound {
                Ok(pod_listener) => self.listen(Arc::new(pod_listener), service),
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

    fn listen(&mut self, pod_listener: Arc<PodListener>, service: &PodService) -> io::Result<()> {
        let bound = Listener::pod(pod_listener.clone()).map_err(|error| match error {
            ListenError::Pod { source, .. } => source,
            other => io::Error::other(other),
        })?;
        let (endpoint, attestor) = (service.endpoint.clone(), self.attestor.clone());
        let connection = move |stream, pending| {
            endpoint
                .clone()
                .serve_connection(stream, pending, Some(attestor.clone()))
        };
        let accepting = listen::serve(bound, service.drain.clone(), connection);
        service
            .loops
            .spawn(self.accepting.clone().run_until_cancelled_owned(accepting));
        self.listeners.push(pod_listener);
        Ok(())
    }

    /// Serves on the metadata addresses, up to the first that cannot be.
    pub(super) fn add_metadata(
        &mut self,
        listeners: Vec<PodListener>,
        service: &PodService,
    ) -> Result<(), (IpAddr, MetadataObstacle)> {
        listeners.into_iter().try_for_each(|inside| {
            let address = inside.address().ip();
            let served = self.listen(Arc::new(inside), service);
            served.map_err(|error| (address, MetadataObstacle::Failed(error)))
        })
    }

    /// Leaves the metadata addresses to an instance that has these listeners.
    pub(super) fn leave_metadata(&mut self, sent: &[(HandoverKey, Arc<OwnedFd>)]) {
        let is_sent = |address| sent.iter().any(|(key, _)| *key == (self.id(), address));
        if METADATA_ADDRESSES.into_iter().any(is_sent) {
            self.metadata = MetadataState::waiting();
        }
    }

    /// Returns the metadata addresses that are served there.
    pub(super) fn metadata_addresses(&self) -> Vec<SocketAddr> {
        let addresses = self.listeners.iter().map(|inside| inside.address());
        addresses
            .filter(|address| is_metadata_address(*address))
            .collect()
    }

    /// Returns the listeners that accept there.
    pub(super) fn listening(&self) -> impl Iterator<Item = (HandoverKey, Arc<OwnedFd>)> {
        self.listeners
            .iter()
            .map(|pod_listener| ((self.id(), pod_listener.address()), pod_listener.listener()))
    }

    /// Stops accepting, and keeps the listeners in `kept`, which another instance has, too.
    /// Connections go on.
    pub(super) fn pause(&mut self, kept: &[(HandoverKey, Arc<OwnedFd>)]) {
        self.accepting.cancel();
        let is_kept = |pod_listener: &Arc<PodListener>| {
            kept.iter()
                .any(|(_, listener)| Arc::ptr_eq(listener, &pod_listener.listener()))
        };
        let (listeners, dropped) = self.listeners.drain(..).partition::<Vec<_>, _>(is_kept);
        let dropped = dropped
            .into_iter()
            .map(|pod_listener| pod_listener.address());
        self.missing
            .extend(dropped.filter(|address| !is_metadata_address(*address)));
        self.listeners = listeners;
        self.leave_metadata(kept);
    }

    /// Accepts again after a pause. Addresses without a kept listener are missing.
    pub(super) fn resume(&mut self, service: &PodService) {
        self.accepting = CancellationToken::new();
        let addresses = self.metadata_addresses();
        if !addresses.is_empty() {
            self.metadata = MetadataState::unchecked(addresses);
        } else if self.metadata.is_served() {
            self.metadata = MetadataState::waiting();
        }
        for pod_listener in std::mem::take(&mut self.listeners) {
            let address = pod_listener.address();
            if let Err(error) = self.listen(pod_listener, service) {
                tracing::warn!(%error, namespace = %self.path().display(), "a pod's listener cannot be served again yet");
                match is_metadata_address(address) {
                    true => self.metadata = MetadataState::waiting(),
                    false => self.missing.push(address),
                }
            }
        }
    }

    /// Drops the listeners that another instance has, too. Connections go on.
    pub(super) fn release(&mut self) {
        self.listeners.clear();
    }

    /// Returns the pod that owns the namespace if an address is missing there and the owner is
    /// known. Returns it once.
    pub(super) fn warn_missing_with_owner(&mut self) -> Option<String> {
        if self.missing.is_empty() || self.owner_logged {
            return None;
        }
        let owner = self.attestor.owner()?.to_string();
        self.owner_logged = true;
        Some(owner)
    }

    /// Returns the time of the check whether any user may bind the port. `None` after the check.
    pub(super) fn port_check(&self) -> Option<Instant> {
        self.port_check
    }

    /// Returns the namespace if that check is due. Returns it once.
    pub(super) fn take_port_check(&mut self, now: Instant) -> Option<Arc<NetnsRef>> {
        self.port_check.take_if(|due| *due <= now)?;
        Some(self.netns.clone())
    }

    pub(super) fn netns(&self) -> Arc<NetnsRef> {
        self.netns.clone()
    }

    pub(super) fn id(&self) -> NamespaceId {
        self.netns.id()
    }

    pub(super) fn path(&self) -> PathBuf {
        self.netns.path()
    }
}

impl Drop for ListenedPod {
    /// Closes all sockets made inside, because each of them would keep the network of a dead pod.
    fn drop(&mut self) {
        self.accepting.cancel();
        self.attestor.close();
    }
}

//! Attestation of callers in a pod's own network namespace.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::attest::pod_lookup::ResolvedPod;
use crate::attest::rejection::Rejection;
use crate::attest::tcp::{SocketProof, TcpAttestor};
use crate::caller::{AttestError, PeerFacts};
use crate::cgroup::PodUid;
use crate::listen::PendingPermit;
use crate::netns::NamespaceId;

/// An attestor for the peers of a listener in one pod's network namespace.
///
/// Only a caller's cgroup shows the pod that owns the namespace. The first pod that connects is
/// taken for the owner as long as it lives. A process of another pod can only be there if a
/// privileged process moved it into the namespace, so it is rejected.
pub struct PodAttestor {
    tcp: TcpAttestor,
    netns: NamespaceId,
    owner: Mutex<Option<NetnsOwner>>,
    closed: CancellationToken,
}

struct NetnsOwner {
    pod: ResolvedPod,
    /// Whether another pod's process has connected, and a warning has been logged.
    has_intruder: bool,
}

impl fmt::Debug for PodAttestor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PodAttestor")
            .field("tcp", &self.tcp)
            .field("owner", &self.owner())
            .finish_non_exhaustive()
    }
}

impl PodAttestor {
    pub(crate) fn new(tcp: TcpAttestor, netns: NamespaceId) -> Self {
        Self {
            tcp,
            netns,
            owner: Mutex::default(),
            closed: CancellationToken::new(),
        }
    }

    /// Returns the identity of the namespace.
    pub fn netns(&self) -> NamespaceId {
        self.netns
    }

    /// Returns the pod that owns the namespace, once one of its processes has connected.
    pub fn owner(&self) -> Option<PodUid> {
        self.lock().as_ref().map(|owner| owner.pod.pod.uid.clone())
    }

    /// Finds the socket of a peer in the namespace, as [`TcpAttestor::find_socket`] does on the
    /// host.
    pub(crate) async fn find_socket(
        &self,
        addresses: (SocketAddr, SocketAddr),
        pending: PendingPermit,
    ) -> Result<(PeerFacts, SocketProof), Rejection> {
        self.tcp.find_socket(addresses, pending).await
    }

    /// Releases the network namespace, which would otherwise live as long as one of its callers is
    /// remembered. The callers count as gone from then on.
    pub fn close(&self) {
        self.tcp.close();
        self.closed.cancel();
    }

    /// Waits until the network namespace is released. No connection in it may stay open, since each
    /// would keep it alive.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }

    /// Claims the namespace for the pod of this socket if it belongs to no other pod. Fails if it
    /// does, or if the socket is in no pod.
    pub(crate) fn check_owner(&self, proof: &SocketProof) -> Result<(), AttestError> {
        let pod = proof.pod().ok_or(AttestError::NotAPod)?;
        let namespace = self.tcp.namespace();
        let mut owner = self.lock();
        let owner = match &mut *owner {
            Some(owner) if owner.pod.is_same(pod) => return Ok(()),
            // The pod's directory was recreated, or this is another pod and the previous owner has
            // no process left.
            Some(owner) if owner.pod.pod.uid != pod.pod.uid && !owner.pod.is_gone() => owner,
            owner => {
                if let Some(before) = owner
                    .as_ref()
                    .filter(|before| before.pod.pod.uid != pod.pod.uid)
                {
                    // A process that may enter namespaces could have waited for that.
                    tracing::info!(
                        pod = %pod.pod.uid, before = %before.pod.pod.uid, namespace,
                        "a network namespace has a new pod: its previous pod is gone"
                    );
                }
                *owner = Some(NetnsOwner {
                    pod: pod.clone(),
                    has_intruder: false,
                });
                return Ok(());
            }
        };
        // The audit log records each rejection.
        if !std::mem::replace(&mut owner.has_intruder, true) {
            tracing::warn!(
                pod = %pod.pod.uid, owner = %owner.pod.pod.uid, namespace,
                "rejecting a pod's process in the network namespace of another pod"
            );
        }
        Err(AttestError::OtherPod)
    }

    fn lock(&self) -> MutexGuard<'_, Option<NetnsOwner>> {
        self.owner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

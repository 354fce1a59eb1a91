//! The peer on loopback TCP: the process that made the socket. It is attested by the socket itself
//! and, if needed, by the process that holds it.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::timeout;

use crate::attest::Unattested;
use crate::attest::cgroup_tree::{ScanKey, TreeScope};
use crate::attest::host::Host;
use crate::attest::kernel::{TcpUnsupported, try_tcp_of};
use crate::attest::pod_lookup::ResolvedPod;
use crate::attest::sock_diag::{SockDiag, SocketInfo};
use crate::attest::socket_owner::{self, Budget, SocketOwner};
use crate::caller::{
    AgentProcessRef, AttestError, Caller, ExecWatch, ListenerKind, PeerFacts, PeerProof, PodAge,
    Process, ProcessFacts, WorkloadKey,
};
use crate::cgroup::CgroupPath;
use crate::clock::REQUEST_HOLD;
use crate::limits::FairSemaphore;

/// The time after which a search releases its permit. A long search takes 20 ms of CPU time; one
/// that takes longer than this is blocked.
const SEARCH_SHARE: Duration = Duration::from_millis(500);

/// An attestor for peers of TCP listeners in one network namespace. Clones share its state.
#[derive(Debug, Clone)]
pub(crate) struct TcpAttestor(Arc<SocketQuery>);

#[derive(Debug)]
struct SocketQuery {
    host: Arc<Host>,
    diag: SockDiag,
    /// Limits long searches: one at a time per workload, and few in total.
    searches: FairSemaphore<WorkloadKey>,
    /// The inode of the network namespace, if that is a pod's.
    namespace: Option<u64>,
}

/// The kernel's description of the client's socket, to be compared before credentials are released.
#[derive(Debug, Clone)]
pub(crate) struct SocketProof {
    attestor: TcpAttestor,
    client: SocketAddr,
    server: SocketAddr,
    socket: SocketInfo,
    cgroup: CgroupPath,
    pod: Option<ResolvedPod>,
}

/// A socket proof with a process that holds the socket.
#[derive(Debug)]
struct SocketOwnerProof {
    socket: SocketProof,
    workload: WorkloadKey,
    socket_owner: Arc<SocketOwner>,
}

impl TcpAttestor {
    /// Creates an attestor for the host's network namespace.
    pub(crate) fn new(
        host: Arc<Host>,
        diag: SockDiag,
        searches: FairSemaphore<WorkloadKey>,
    ) -> Self {
        Self(Arc::new(SocketQuery {
            host,
            diag,
            searches,
            namespace: None,
        }))
    }

    /// Verifies that the kernel still reports the facts that this attestor needs.
    pub(crate) fn test_support(&self) -> Result<(), TcpUnsupported> {
        try_tcp_of(&self.0.host, &self.0.diag)
    }

    /// Creates an attestor for the network namespace of a pod, in which `diag` was opened.
    pub(crate) fn in_pod(&self, diag: SockDiag) -> Self {
        let (host, searches) = (self.0.host.clone(), self.0.searches.clone());
        Self(Arc::new(SocketQuery {
            namespace: Some(diag.namespace()),
            host,
            diag,
            searches,
        }))
    }

    /// Returns the limit on long searches.
    #[cfg(test)]
    pub(crate) fn searches(&self) -> &FairSemaphore<WorkloadKey> {
        &self.0.searches
    }

    /// Returns the inode of the network namespace, if that is a pod's.
    pub(crate) fn namespace(&self) -> Option<u64> {
        self.0.namespace
    }

    /// Releases the network namespace. Callers that were attested here count as gone from then on.
    pub(crate) fn close(&self) {
        self.0.diag.close();
    }

    /// Finds the socket of the peer `client` of a connection to `server`. Calls `on_wait` before it
    /// waits.
    pub(crate) async fn find_socket(
        &self,
        (client, server): (SocketAddr, SocketAddr),
        on_wait: impl FnOnce(),
    ) -> Result<SocketProof, Unattested> {
        let socket = self.0.diag.client_socket(client, server)?;
        let mut peer = PeerFacts {
            uid: socket.uid,
            cgroup: None,
            pod: None,
            netns_inode: self.0.namespace,
        };
        let cgroup = self
            .cgroup(&socket, on_wait)
            .await
            .map_err(|refusal| Unattested::of(refusal, &peer))?;
        peer.cgroup = Some(cgroup.clone());
        // On the host a process of one user passes sockets to those of another. A pod is one
        // workload.
        if self.0.namespace.is_none() && cgroup.is_service_managers() {
            return Err(Unattested::of(AttestError::ManagerSocket, &peer));
        }
        let pod = self
            .0
            .host
            .pod(Some(&cgroup))
            .map_err(|refusal| Unattested::of(refusal, &peer))?;
        Ok(SocketProof {
            attestor: self.clone(),
            client,
            server,
            socket,
            cgroup,
            pod,
        })
    }

    /// Returns the path of the socket's cgroup.
    async fn cgroup(
        &self,
        socket: &SocketInfo,
        on_wait: impl FnOnce(),
    ) -> Result<CgroupPath, AttestError> {
        let namespace = &self.0.namespace;
        let cgroups = self.0.host.cgroup_tree();
        let cgroups = cgroups.ok_or(TcpUnsupported::NoCgroups.refusal())?;
        let uid = namespace.is_none().then_some(socket.uid);
        let key = ScanKey {
            namespace: *namespace,
            uid,
        };
        if namespace.is_none() {
            let id = socket.cgroup_id;
            let id = id.ok_or(TcpUnsupported::NoCgroupId.refusal())?;
            return cgroups.path_of(id, (TreeScope::All, key), on_wait).await;
        }
        let id = socket.cgroup_id.ok_or(AttestError::NotAPod)?;
        match cgroups.path_of(id, (TreeScope::Pods, key), on_wait).await {
            Err(AttestError::UnreadableCgroup) if !cgroups.detects_removed() => {
                Err(AttestError::NotAPod)
            }
            path => path,
        }
    }
}

impl SocketProof {
    /// Returns whether the socket is in the root cgroup.
    pub(crate) fn is_in_root_cgroup(&self) -> bool {
        self.cgroup.is_root()
    }

    /// Returns the pod of the socket, if it is in one.
    pub(crate) fn pod(&self) -> Option<&ResolvedPod> {
        self.pod.as_ref()
    }

    /// Returns the caller, as far as its socket shows it.
    pub(crate) fn into_caller(self) -> Caller {
        let namespace = self.attestor.0.namespace;
        Caller {
            listener: if namespace.is_some() {
                ListenerKind::Pod
            } else {
                ListenerKind::Tcp
            },
            uid: self.socket.uid,
            cgroup: Some(self.cgroup.clone()),
            pod: self.pod.as_ref().map(|resolved| resolved.pod.clone()),
            netns_inode: namespace,
            process: None,
            proof: Box::new(self),
        }
    }

    /// Returns the facts of the socket for the audit log.
    pub(crate) fn peer(&self) -> PeerFacts {
        let pod = self.pod.as_ref().map(|resolved| resolved.pod.clone());
        let namespace = self.attestor.0.namespace;
        PeerFacts {
            uid: self.socket.uid,
            cgroup: Some(self.cgroup.clone()),
            pod,
            netns_inode: namespace,
        }
    }

    fn verify_socket(&self) -> Result<(), AttestError> {
        let now = self
            .attestor
            .0
            .diag
            .client_socket(self.client, self.server)?;
        if now == self.socket {
            Ok(())
        } else {
            Err(AttestError::IdentityChanged)
        }
    }

    /// Finds the process that holds the socket.
    ///
    /// First it tries a short search. The second search is long, since the caller determines its
    /// length. Long searches are limited to one at a time for this workload, and to few in total: a
    /// party with many user ids has many workloads.
    async fn find_owner(
        &self,
        workload: &WorkloadKey,
        facts: ProcessFacts,
    ) -> Result<SocketOwner, AttestError> {
        let query = &self.attestor.0;
        match query
            .host
            .lookups
            .run(workload, self.search(facts, Budget::SHORT))
            .await
        {
            Err(AttestError::TooManyDescriptors) => {}
            done => return done,
        }
        // The wait is as long as a request is held. The SDK of a caller that waits longer would
        // time out without a response.
        let permit = query
            .searches
            .acquire_within(REQUEST_HOLD, workload)
            .await
            .ok_or(AttestError::SearchBusy)?;
        // Many callers have closed the connection by now. Searches for these would delay those that
        // have connected again.
        self.verify_socket().map_err(|_| AttestError::CallerGone)?;
        let mut search = pin!(
            query
                .host
                .lookups
                .run_offloaded(workload, self.search(facts, Budget::LONG))
        );
        if let Ok(done) = timeout(SEARCH_SHARE, &mut search).await {
            return done;
        }
        // It is blocked, and does not take CPU time from others.
        permit.detach();
        search.await
    }

    fn search(
        &self,
        facts: ProcessFacts,
        budget: Budget,
    ) -> impl FnOnce() -> Result<SocketOwner, AttestError> + Send + 'static {
        let Self {
            attestor,
            socket,
            cgroup,
            ..
        } = self.clone();
        move || {
            let host = &attestor.0.host;
            let cgroups = host.cgroup_tree();
            socket_owner::find_socket_owner(
                host,
                &*cgroups.ok_or(TcpUnsupported::NoCgroups.refusal())?,
                &socket,
                &cgroup,
                (facts, budget),
            )
        }
    }
}

#[async_trait]
impl PeerProof for SocketProof {
    async fn verify_unchanged(&self) -> Result<(), AttestError> {
        self.verify_socket()
    }

    async fn with_process(
        &self,
        workload: &WorkloadKey,
        facts: ProcessFacts,
    ) -> Result<(Process, Box<dyn PeerProof>), AttestError> {
        if self.cgroup.is_service_managers() {
            return Err(AttestError::ManagerSocket);
        }
        let socket_owner = self.find_owner(workload, facts).await?;
        // Whether the socket changed during the search shows at the next verification, before
        // credentials are released.
        let process = socket_owner.process.to_process();
        Ok((
            process,
            Box::new(SocketOwnerProof {
                socket: self.clone(),
                workload: workload.clone(),
                socket_owner: Arc::new(socket_owner),
            }),
        ))
    }

    fn verify_pod(&self) -> Result<PodAge, AttestError> {
        self.pod
            .as_ref()
            .ok_or(AttestError::kernel("no pod is known", None))?
            .verify_exists()
    }
}

#[async_trait]
impl PeerProof for SocketOwnerProof {
    async fn verify_unchanged(&self) -> Result<(), AttestError> {
        self.socket.verify_socket()?;
        let (socket_owner, inode) = (self.socket_owner.clone(), self.socket.socket.inode);
        let verify = move || {
            socket_owner.process.verify_unchanged_blocking()?;
            if socket_owner.process.has_fd(socket_owner.descriptor, inode) {
                Ok(())
            } else {
                Err(AttestError::CallerGone)
            }
        };
        self.socket
            .attestor
            .0
            .host
            .lookups
            .run(&self.workload, verify)
            .await
    }

    async fn for_agent(&self) -> Result<AgentProcessRef, AttestError> {
        self.socket_owner.process.for_agent(&self.workload).await
    }

    fn watch_exec(&self) -> Result<Box<dyn ExecWatch>, AttestError> {
        Ok(Box::new(self.socket_owner.process.watch_exec()?))
    }

    fn is_alive(&self) -> bool {
        self.socket_owner.process.is_alive()
    }

    fn verify_pod(&self) -> Result<PodAge, AttestError> {
        PeerProof::verify_pod(&self.socket)
    }
}

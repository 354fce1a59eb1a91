//! The peer on loopback TCP: the process that made the socket. It is attested by the socket itself
//! and, if needed, by the process that holds it.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::timeout;

use crate::attest::cgroup_tree::{ScanKey, TreeScope};
use crate::attest::host::Host;
use crate::attest::kernel::{TcpUnsupported, try_tcp_of};
use crate::attest::pod_lookup::ResolvedPod;
use crate::attest::rejection::Rejection;
use crate::attest::sock_diag::{SockDiag, SocketInfo};
use crate::attest::socket_owner::{self, SearchBudget, SocketOwner};
use crate::caller::{
    AgentProcessRef, AttestError, ExecWatch, PeerFacts, PeerProof, PodAge, Process, ProcessFacts,
    WorkloadKey,
};
use crate::cgroup::CgroupPath;
use crate::clock::REQUEST_HOLD;
use crate::limits::FairSemaphore;
use crate::listen::PendingPermit;

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
pub(crate) struct SocketOwnerProof {
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

    /// Finds the socket of the peer `client` of a connection to `server`. Releases `pending` before
    /// it waits.
    pub(crate) async fn find_socket(
        &self,
        (client, server): (SocketAddr, SocketAddr),
        pending: PendingPermit,
    ) -> Result<(PeerFacts, SocketProof), Rejection> {
        let socket = self.0.diag.client_socket(client, server)?;
        let mut peer = PeerFacts {
            netns_inode: self.0.namespace,
            ..PeerFacts::of_user(socket.uid)
        };
        let cgroup = self
            .cgroup(&socket, pending)
            .await
            .map_err(|error| Rejection::of(error, &peer))?;
        peer.cgroup = Some(cgroup.clone());
        // On the host a process of one user passes sockets to those of another. A pod is one
        // workload.
        if self.0.namespace.is_none() && cgroup.is_service_managers() {
            return Err(Rejection::of(AttestError::ManagerSocket, &peer));
        }
        let pod = self
            .0
            .host
            .pod(Some(&cgroup))
            .map_err(|error| Rejection::of(error, &peer))?;
        peer.pod = pod.as_ref().map(|resolved| resolved.pod.clone());
        let proof = SocketProof {
            attestor: self.clone(),
            client,
            server,
            socket,
            cgroup,
            pod,
        };
        Ok((peer, proof))
    }

    /// Returns the path of the socket's cgroup. Releases `pending` before it waits for a scan,
    /// which has limits of its own.
    async fn cgroup(
        &self,
        socket: &SocketInfo,
        pending: PendingPermit,
    ) -> Result<CgroupPath, AttestError> {
        let namespace = &self.0.namespace;
        let cgroups = self.0.host.cgroup_tree();
        let cgroups = cgroups.ok_or(TcpUnsupported::NoCgroups.rejection())?;
        let key = ScanKey {
            namespace: *namespace,
            uid: namespace.is_none().then_some(socket.uid),
        };
        let (id, scope) = match namespace {
            None => (
                socket
                    .cgroup_id
                    .ok_or(TcpUnsupported::NoCgroupId.rejection())?,
                TreeScope::All,
            ),
            Some(_) => (
                socket.cgroup_id.ok_or(AttestError::NotAPod)?,
                TreeScope::Pods,
            ),
        };
        let path = match cgroups.cached_path(id) {
            Some(cached) => cached,
            None => {
                drop(pending);
                cgroups.scan_for(id, scope, key).await
            }
        };
        match path {
            Err(AttestError::UnreadableCgroup)
                if namespace.is_some() && !cgroups.detects_removed() =>
            {
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

    /// Finds the process that holds the socket, and reads `facts` from it. The returned proof
    /// covers these facts too.
    pub(crate) async fn find_process(
        self: Box<Self>,
        workload: WorkloadKey,
        facts: ProcessFacts,
    ) -> Result<(Process, Box<SocketOwnerProof>), AttestError> {
        if self.cgroup.is_service_managers() {
            return Err(AttestError::ManagerSocket);
        }
        let socket_owner = self.find_owner(&workload, facts).await?;
        // Whether the socket changed during the search shows at the next verification, before
        // credentials are released.
        let process = socket_owner.process.to_process();
        let proof = Box::new(SocketOwnerProof {
            socket: *self,
            workload,
            socket_owner: Arc::new(socket_owner),
        });
        Ok((process, proof))
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
            .run(workload, self.search(facts, SearchBudget::INLINE))
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
                .run_offloaded(workload, self.search(facts, SearchBudget::OFFLOADED))
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
        budget: SearchBudget,
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
                &*cgroups.ok_or(TcpUnsupported::NoCgroups.rejection())?,
                &socket,
                &cgroup,
                facts,
                budget,
            )
        }
    }
}

#[async_trait]
impl PeerProof for SocketProof {
    async fn verify_unchanged(&self) -> Result<(), AttestError> {
        self.verify_socket()
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

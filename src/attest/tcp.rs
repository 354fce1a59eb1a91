//! The peer on loopback TCP: the process that made the socket, by the socket itself and, where needed, by its holder.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::timeout;

use crate::attest::Unattested;
use crate::attest::cgroup_tree::{CgroupTree, TreeScope, WalkKey};
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

/// A long search takes 20 ms of a processor; one that lasts longer than this counts no more among all.
const SEARCH_SHARE: Duration = Duration::from_millis(500);

/// Attests peers of TCP listeners in one network namespace. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct TcpAttestor(Arc<SocketQuery>);

#[derive(Debug)]
struct SocketQuery {
    host: Arc<Host>,
    diag: SockDiag,
    cgroups: Arc<CgroupTree>,
    /// Long searches: one at a time for each workload, and few in all.
    searches: FairSemaphore<WorkloadKey>,
    /// By its inode, if it is a pod's.
    namespace: Option<u64>,
}

/// What the kernel says of the client's socket of a connection, to be compared before anything is released.
#[derive(Debug, Clone)]
pub(crate) struct SocketProof {
    attestor: TcpAttestor,
    client: SocketAddr,
    server: SocketAddr,
    socket: SocketInfo,
    cgroup: CgroupPath,
    pod: Option<ResolvedPod>,
}

/// The same, with a process that holds the socket.
#[derive(Debug)]
struct SocketOwnerProof {
    socket: SocketProof,
    owner: WorkloadKey,
    holder: Arc<SocketOwner>,
}

impl TcpAttestor {
    /// In the host's network namespace.
    pub(crate) fn new(
        host: Arc<Host>,
        diag: SockDiag,
        cgroups: Arc<CgroupTree>,
        searches: FairSemaphore<WorkloadKey>,
    ) -> Self {
        Self(Arc::new(SocketQuery {
            host,
            diag,
            cgroups,
            searches,
            namespace: None,
        }))
    }

    /// Whether the kernel still tells what this rests on.
    pub(crate) fn works(&self) -> Result<(), TcpUnsupported> {
        try_tcp_of(&self.0.host, &self.0.diag)
    }

    /// The same for the network namespace of a pod, in which `diag` was made.
    pub(crate) fn in_pod(&self, diag: SockDiag) -> Self {
        let SocketQuery {
            host,
            cgroups,
            searches,
            ..
        } = &*self.0;
        let (host, cgroups, searches) = (host.clone(), cgroups.clone(), searches.clone());
        Self(Arc::new(SocketQuery {
            namespace: Some(diag.namespace()),
            host,
            diag,
            cgroups,
            searches,
        }))
    }

    /// What limits long searches.
    #[cfg(test)]
    pub(crate) fn searches(&self) -> &FairSemaphore<WorkloadKey> {
        &self.0.searches
    }

    /// By its inode, if it is a pod's.
    pub(crate) fn namespace(&self) -> Option<u64> {
        self.0.namespace
    }

    /// Lets the network namespace go. Callers that were attested here are gone from then on.
    pub(crate) fn close(&self) {
        self.0.diag.close();
    }

    /// What the socket of the peer `client` of a connection to `server` tells. `on_wait` is called before that takes time.
    pub(crate) async fn look(
        &self,
        (client, server): (SocketAddr, SocketAddr),
        on_wait: impl FnOnce(),
    ) -> Result<SocketProof, Unattested> {
        let socket = self.0.diag.client_socket(client, server)?;
        let mut peer = PeerFacts {
            uid: socket.uid,
            cgroup: None,
            pod: None,
            namespace: self.0.namespace,
        };
        let cgroup = self
            .cgroup(&socket, on_wait)
            .await
            .map_err(|refusal| Unattested::of(refusal, &peer))?;
        peer.cgroup = Some(cgroup.clone());
        // On the host a process of one user gives sockets to those of another; a pod is one workload.
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

    /// The path of the socket's cgroup.
    async fn cgroup(
        &self,
        socket: &SocketInfo,
        on_wait: impl FnOnce(),
    ) -> Result<CgroupPath, AttestError> {
        let SocketQuery {
            cgroups, namespace, ..
        } = &*self.0;
        let uid = namespace.is_none().then_some(socket.uid);
        let key = WalkKey {
            namespace: *namespace,
            uid,
        };
        if namespace.is_none() {
            let id = socket.cgroup_id;
            let id = id.ok_or(AttestError::Unsupported(
                "TCP callers need Linux 5.15 or newer, built with cgroups",
            ))?;
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
    /// Whether the socket is in no cgroup below the root.
    pub(crate) fn is_in_root_cgroup(&self) -> bool {
        self.cgroup.is_root()
    }

    /// Where it is, if it is a pod's.
    pub(crate) fn pod(&self) -> Option<&ResolvedPod> {
        self.pod.as_ref()
    }

    /// The caller, as far as the socket alone tells who it is.
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
            pod: self.pod.as_ref().map(|housed| housed.pod.clone()),
            namespace,
            process: None,
            evidence: Box::new(self),
        }
    }

    /// See [`SocketProof::into_caller`], for the audit.
    pub(crate) fn peer(&self) -> PeerFacts {
        let pod = self.pod.as_ref().map(|housed| housed.pod.clone());
        let namespace = self.attestor.0.namespace;
        PeerFacts {
            uid: self.socket.uid,
            cgroup: Some(self.cgroup.clone()),
            pod,
            namespace,
        }
    }

    fn is_unchanged(&self) -> Result<(), AttestError> {
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

    /// The process that holds the socket: at once where that is soon done. Else in a search of its own, one at a time for this
    /// workload, and few in all, since whoever has many users' ids is many workloads: a search is a loop as long as the caller
    /// makes it.
    async fn find_owner(
        &self,
        owner: &WorkloadKey,
        looks: ProcessFacts,
    ) -> Result<SocketOwner, AttestError> {
        let parts = &self.attestor.0;
        match parts
            .host
            .lookups
            .run(owner, self.search(looks, Budget::INLINE))
            .await
        {
            Err(AttestError::TooManyDescriptors) => {}
            done => return done,
        }
        // As long as a request is held: who waits longer would be cut off without a word.
        let permit = parts
            .searches
            .acquire_within(REQUEST_HOLD, owner)
            .await
            .ok_or(AttestError::SearchBusy)?;
        // Many have hung up meanwhile. A search for each of them would keep those waiting who have come again.
        self.is_unchanged().map_err(|_| AttestError::CallerGone)?;
        let mut searching = pin!(
            parts
                .host
                .lookups
                .run_offloaded(owner, self.search(looks, Budget::OFFLOADED))
        );
        if let Ok(done) = timeout(SEARCH_SHARE, &mut searching).await {
            return done;
        }
        // It waits for something, and takes no processor's time from others.
        permit.detach();
        searching.await
    }

    fn search(
        &self,
        looks: ProcessFacts,
        budget: Budget,
    ) -> impl FnOnce() -> Result<SocketOwner, AttestError> + Send + 'static {
        let Self {
            attestor,
            socket,
            cgroup,
            ..
        } = self.clone();
        move || {
            let parts = &attestor.0;
            socket_owner::find_socket_owner(
                &parts.host,
                &parts.cgroups,
                &socket,
                &cgroup,
                (looks, budget),
            )
        }
    }
}

#[async_trait]
impl PeerProof for SocketProof {
    async fn verify_unchanged(&self) -> Result<(), AttestError> {
        self.is_unchanged()
    }

    async fn with_process(
        &self,
        owner: &WorkloadKey,
        looks: ProcessFacts,
    ) -> Result<(Process, Box<dyn PeerProof>), AttestError> {
        if self.cgroup.is_service_managers() {
            return Err(AttestError::ManagerSocket);
        }
        let holder = self.find_owner(owner, looks).await?;
        // That the socket is still what it was before the search is seen when the caller is looked at again, before anything
        // is released.
        let process = holder.process.to_process();
        Ok((
            process,
            Box::new(SocketOwnerProof {
                socket: self.clone(),
                owner: owner.clone(),
                holder: Arc::new(holder),
            }),
        ))
    }

    fn verify_pod(&self) -> Result<PodAge, AttestError> {
        self.pod.as_ref().ok_or(AttestError::Kernel)?.is_there()
    }
}

#[async_trait]
impl PeerProof for SocketOwnerProof {
    async fn verify_unchanged(&self) -> Result<(), AttestError> {
        self.socket.is_unchanged()?;
        let (holder, inode) = (self.holder.clone(), self.socket.socket.inode);
        let look = move || {
            holder.process.verify_unchanged()?;
            if holder.process.has_fd(holder.descriptor, inode) {
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
            .run(&self.owner, look)
            .await
    }

    async fn for_agent(&self) -> Result<AgentProcessRef, AttestError> {
        self.holder.process.for_agent(&self.owner).await
    }

    fn watch_exec(&self) -> Result<Box<dyn ExecWatch>, AttestError> {
        Ok(Box::new(self.holder.process.watch_exec()?))
    }

    fn is_alive(&self) -> bool {
        self.holder.process.is_alive()
    }

    fn verify_pod(&self) -> Result<PodAge, AttestError> {
        PeerProof::verify_pod(&self.socket)
    }
}

//! The peer on loopback TCP: the process that made the socket, by the socket itself and, where needed, by its holder.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::timeout;

use crate::attest::Unattested;
use crate::attest::cgroups::{CgroupTree, Part, WalkKey};
use crate::attest::host::Host;
use crate::attest::inet_diag::{SockDiag, Socket};
use crate::attest::kernel::{TcpUnsupported, try_tcp_of};
use crate::attest::pods::Housed;
use crate::attest::search::{self, Budget, Holder};
use crate::caller::{Ages, Caller, Evidence, ListenerKind, Looks, Named, Owner, Process, Refusal, Stranger, Watch};
use crate::cgroup::CgroupPath;
use crate::clock::HOLD;
use crate::limits::FairSemaphore;

/// A long search takes 20 ms of a processor; one that lasts longer than this counts no more among all.
const SEARCH_SHARE: Duration = Duration::from_millis(500);

/// Attests peers of TCP listeners in one network namespace. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct TcpAttestor(Arc<Parts>);

#[derive(Debug)]
struct Parts {
    host: Arc<Host>,
    diag: SockDiag,
    cgroups: Arc<CgroupTree>,
    /// Long searches: one at a time for each workload, and few in all.
    searches: FairSemaphore<Owner>,
    /// By its inode, if it is a pod's.
    namespace: Option<u64>,
}

/// What the kernel says of the client's socket of a connection, to be compared before anything is released.
#[derive(Debug, Clone)]
pub(crate) struct SocketProof {
    attestor: TcpAttestor,
    client: SocketAddr,
    server: SocketAddr,
    socket: Socket,
    cgroup: CgroupPath,
    pod: Option<Housed>,
}

/// The same, with a process that holds the socket.
#[derive(Debug)]
struct HolderProof {
    socket: SocketProof,
    owner: Owner,
    holder: Arc<Holder>,
}

impl TcpAttestor {
    /// In the host's network namespace.
    pub(crate) fn new(
        host: Arc<Host>,
        diag: SockDiag,
        cgroups: Arc<CgroupTree>,
        searches: FairSemaphore<Owner>,
    ) -> Self {
        Self(Arc::new(Parts { host, diag, cgroups, searches, namespace: None }))
    }

    /// Whether the kernel still tells what this rests on.
    pub(crate) fn works(&self) -> Result<(), TcpUnsupported> {
        try_tcp_of(&self.0.host, &self.0.diag)
    }

    /// The same for the network namespace of a pod, in which `diag` was made.
    pub(crate) fn in_pod(&self, diag: SockDiag) -> Self {
        let Parts { host, cgroups, searches, .. } = &*self.0;
        let (host, cgroups, searches) = (host.clone(), cgroups.clone(), searches.clone());
        Self(Arc::new(Parts { namespace: Some(diag.namespace()), host, diag, cgroups, searches }))
    }

    /// What limits long searches.
    #[cfg(test)]
    pub(crate) fn searches(&self) -> &FairSemaphore<Owner> {
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
        let mut peer = Stranger { uid: socket.uid, cgroup: None, pod: None, namespace: self.0.namespace };
        let cgroup = self.cgroup(&socket, on_wait).await.map_err(|refusal| Unattested::of(refusal, &peer))?;
        peer.cgroup = Some(cgroup.clone());
        // On the host a process of one user gives sockets to those of another; a pod is one workload.
        if self.0.namespace.is_none() && cgroup.is_service_managers() {
            return Err(Unattested::of(Refusal::ManagerSocket, &peer));
        }
        let pod = self.0.host.pod(Some(&cgroup)).map_err(|refusal| Unattested::of(refusal, &peer))?;
        Ok(SocketProof { attestor: self.clone(), client, server, socket, cgroup, pod })
    }

    /// The path of the socket's cgroup.
    async fn cgroup(&self, socket: &Socket, on_wait: impl FnOnce()) -> Result<CgroupPath, Refusal> {
        let Parts { cgroups, namespace, .. } = &*self.0;
        let uid = namespace.is_none().then_some(socket.uid);
        let key = WalkKey { namespace: *namespace, uid };
        if namespace.is_none() {
            let id = socket.cgroup_id;
            let id = id.ok_or(Refusal::Unsupported("TCP callers need Linux 5.15 or newer, built with cgroups"))?;
            return cgroups.path_of(id, (Part::All, key), on_wait).await;
        }
        let id = socket.cgroup_id.ok_or(Refusal::NotAPod)?;
        match cgroups.path_of(id, (Part::Pods, key), on_wait).await {
            Err(Refusal::UnreadableCgroup) if !cgroups.tells_removed() => Err(Refusal::NotAPod),
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
    pub(crate) fn pod(&self) -> Option<&Housed> {
        self.pod.as_ref()
    }

    /// The caller, as far as the socket alone tells who it is.
    pub(crate) fn into_caller(self) -> Caller {
        let namespace = self.attestor.0.namespace;
        Caller {
            listener: if namespace.is_some() { ListenerKind::Pod } else { ListenerKind::Tcp },
            uid: self.socket.uid,
            cgroup: Some(self.cgroup.clone()),
            pod: self.pod.as_ref().map(|housed| housed.pod.clone()),
            namespace,
            process: None,
            evidence: Box::new(self),
        }
    }

    /// See [`SocketProof::into_caller`], for the audit.
    pub(crate) fn peer(&self) -> Stranger {
        let pod = self.pod.as_ref().map(|housed| housed.pod.clone());
        let namespace = self.attestor.0.namespace;
        Stranger { uid: self.socket.uid, cgroup: Some(self.cgroup.clone()), pod, namespace }
    }

    fn is_unchanged(&self) -> Result<(), Refusal> {
        let now = self.attestor.0.diag.client_socket(self.client, self.server)?;
        if now == self.socket { Ok(()) } else { Err(Refusal::Changed) }
    }

    /// The process that holds the socket: at once where that is soon done. Else in a search of its own, one at a time for this
    /// workload, and few in all, since whoever has many users' ids is many workloads: a search is a loop as long as the caller
    /// makes it.
    async fn holder(&self, owner: &Owner, looks: Looks) -> Result<Holder, Refusal> {
        let parts = &self.attestor.0;
        match parts.host.lookups.run(owner, self.search(looks, Budget::SHORT)).await {
            Err(Refusal::TooManyDescriptors) => {}
            done => return done,
        }
        // As long as a request is held: who waits longer would be cut off without a word.
        let permit = parts.searches.acquire_within(HOLD, owner).await.ok_or(Refusal::Busy)?;
        // Many have hung up meanwhile. A search for each of them would keep those waiting who have come again.
        self.is_unchanged().map_err(|_| Refusal::Gone)?;
        let mut searching = pin!(parts.host.lookups.run_apart(owner, self.search(looks, Budget::LONG)));
        if let Ok(done) = timeout(SEARCH_SHARE, &mut searching).await {
            return done;
        }
        // It waits for something, and takes no processor's time from others.
        permit.detach();
        searching.await
    }

    fn search(&self, looks: Looks, budget: Budget) -> impl FnOnce() -> Result<Holder, Refusal> + Send + 'static {
        let Self { attestor, socket, cgroup, .. } = self.clone();
        move || {
            let parts = &attestor.0;
            search::holder(&parts.host, &parts.cgroups, &socket, &cgroup, (looks, budget))
        }
    }
}

#[async_trait]
impl Evidence for SocketProof {
    async fn still_same(&self) -> Result<(), Refusal> {
        self.is_unchanged()
    }

    async fn with_process(&self, owner: &Owner, looks: Looks) -> Result<(Process, Box<dyn Evidence>), Refusal> {
        if self.cgroup.is_service_managers() {
            return Err(Refusal::ManagerSocket);
        }
        let holder = self.holder(owner, looks).await?;
        // That the socket is still what it was before the search is seen when the caller is looked at again, before anything
        // is released.
        let process = holder.process.describe();
        Ok((process, Box::new(HolderProof { socket: self.clone(), owner: owner.clone(), holder: Arc::new(holder) })))
    }

    fn pod(&self) -> Result<Ages, Refusal> {
        self.pod.as_ref().ok_or(Refusal::Kernel)?.is_there()
    }
}

#[async_trait]
impl Evidence for HolderProof {
    async fn still_same(&self) -> Result<(), Refusal> {
        self.socket.is_unchanged()?;
        let (holder, inode) = (self.holder.clone(), self.socket.socket.inode);
        let look = move || {
            holder.process.still_same()?;
            if holder.process.holds(holder.descriptor, inode) { Ok(()) } else { Err(Refusal::Gone) }
        };
        self.socket.attestor.0.host.lookups.run(&self.owner, look).await
    }

    async fn process(&self) -> Result<Named, Refusal> {
        self.holder.process.named(&self.owner).await
    }

    fn watch(&self) -> Result<Box<dyn Watch>, Refusal> {
        Ok(Box::new(self.holder.process.watch()?))
    }

    fn is_there(&self) -> bool {
        self.holder.process.is_there()
    }

    fn pod(&self) -> Result<Ages, Refusal> {
        Evidence::pod(&self.socket)
    }
}

//! The caller on loopback TCP: the process that made the socket, by the socket itself and, where needed, by its holder.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::attest::cgroups::{CgroupTree, Part};
use crate::attest::host::Host;
use crate::attest::inet_diag::{SockDiag, Socket};
use crate::attest::pods::Housed;
use crate::attest::search::{self, Budget, Holder};
use crate::caller::{Ages, Caller, Evidence, Listener, Looks, Named, Owner, Refusal, Stranger, Watch};
use crate::cgroup::CgroupPath;
use crate::clock::HOLD;
use crate::turns::Turns;

/// Attests peers of TCP listeners in one network namespace.
#[derive(Debug)]
pub(crate) struct TcpAttestor {
    host: Arc<Host>,
    diag: Arc<SockDiag>,
    cgroups: Arc<CgroupTree>,
    /// Long searches: one at a time for each workload, and few in all.
    searches: Turns<Owner>,
    /// By its inode, if it is a pod's.
    namespace: Option<u64>,
}

/// What was seen of the connection, to be compared before anything is released.
#[derive(Debug)]
struct Seen {
    diag: Arc<SockDiag>,
    client: SocketAddr,
    server: SocketAddr,
    socket: Socket,
    pod: Option<Housed>,
    holder: Option<Holder>,
}

impl Evidence for Seen {
    fn still_same(&self) -> Result<(), Refusal> {
        if self.diag.client_socket(self.client, self.server)? != self.socket {
            return Err(Refusal::Changed);
        }
        let Some(Holder { process, descriptor }) = &self.holder else { return Ok(()) };
        process.still_same()?;
        if process.holds(*descriptor, self.socket.inode) { Ok(()) } else { Err(Refusal::Gone) }
    }

    fn process(&self) -> Result<Named, Refusal> {
        self.holder.as_ref().ok_or(Refusal::Kernel)?.process.named()
    }

    fn watch(&self) -> Result<Box<dyn Watch>, Refusal> {
        self.holder.as_ref().ok_or(Refusal::Kernel)?.process.watch()
    }

    fn is_there(&self) -> bool {
        self.holder.as_ref().is_some_and(|holder| holder.process.is_there())
    }

    fn pod(&self) -> Result<Ages, Refusal> {
        self.pod.as_ref().ok_or(Refusal::Kernel)?.is_there()
    }
}

impl TcpAttestor {
    pub(crate) fn new(host: Arc<Host>, diag: SockDiag, cgroups: Arc<CgroupTree>, searches: Turns<Owner>) -> Self {
        Self { host, diag: Arc::new(diag), cgroups, searches, namespace: None }
    }

    /// In the network namespace of a pod, in which `diag` was made.
    pub(crate) fn in_pod(host: Arc<Host>, diag: SockDiag, cgroups: Arc<CgroupTree>, searches: Turns<Owner>) -> Self {
        let namespace = Some(diag.namespace());
        Self { namespace, ..Self::new(host, diag, cgroups, searches) }
    }

    /// Lets the network namespace go. Callers that were attested here are gone from then on.
    pub(crate) fn close(&self) {
        self.diag.close();
    }

    /// Attests the peer `client` of a connection to `server`, if it belongs there; looks for its process only if `needs` says so.
    pub(crate) async fn attest(
        &self,
        (client, server): (SocketAddr, SocketAddr),
        admit: impl FnOnce(&Caller) -> bool,
        belongs: impl FnOnce(&Caller, Option<&Housed>) -> Result<(), Refusal>,
        needs: impl Fn(&Caller) -> Option<Looks>,
    ) -> Result<Caller, Refusal> {
        let socket = self.diag.client_socket(client, server)?;
        let cgroup = self.cgroup(&socket).await?;
        let pod = self.host.pod(socket.uid, Some(&cgroup), self.namespace)?;
        let seen = Seen { diag: self.diag.clone(), client, server, socket, pod: pod.clone(), holder: None };
        let caller = Caller {
            listener: if self.namespace.is_some() { Listener::Pod } else { Listener::Tcp },
            uid: socket.uid,
            cgroup: Some(cgroup.clone()),
            pod: pod.as_ref().map(|housed| housed.pod.clone()),
            namespace: self.namespace,
            process: None,
            evidence: Box::new(seen),
        };
        // A workload that has too many connections must not have a search for each of them as well.
        if !admit(&caller) {
            return Err(Refusal::TooManyConnections);
        }
        belongs(&caller, pod.as_ref())?;
        let Some(looks) = needs(&caller) else { return Ok(caller) };
        let holder = self.search((client, server), socket, cgroup, (Owner::of(&caller), looks)).await?;
        let process = Some(holder.process.describe());
        // That the socket is still what it was before the search is seen when the caller is looked at again, before anything
        // is released.
        let seen = Seen { diag: self.diag.clone(), client, server, socket, pod, holder: Some(holder) };
        Ok(Caller { process, evidence: Box::new(seen), ..caller })
    }

    /// The path of the socket's cgroup.
    async fn cgroup(&self, socket: &Socket) -> Result<CgroupPath, Refusal> {
        let Some(namespace) = self.namespace else {
            let id = socket.cgroup_id;
            let id = id.ok_or(Refusal::Unsupported("TCP callers need Linux 5.15 or newer, built with cgroups"))?;
            return self.cgroups.path_of(id, Part::All).await;
        };
        let elsewhere = || {
            Refusal::NotAPod(Box::new(Stranger {
                uid: socket.uid,
                cgroup: None,
                pod: None,
                namespace: Some(namespace),
            }))
        };
        match self.cgroups.path_of(socket.cgroup_id.ok_or_else(elsewhere)?, Part::Pods).await {
            Err(Refusal::UnreadableCgroup) if !self.cgroups.tells_removed() => Err(elsewhere()),
            path => path,
        }
    }

    /// At once where that is soon done. Else off the I/O threads, one at a time for this workload, and few in all, since whoever
    /// has many users' ids is many workloads: a search is a loop as long as the caller makes it.
    async fn search(
        &self,
        (client, server): (SocketAddr, SocketAddr),
        socket: Socket,
        cgroup: CgroupPath,
        (owner, looks): (Owner, Looks),
    ) -> Result<Holder, Refusal> {
        match search::holder(&self.host, &self.cgroups, &socket, &cgroup, (looks, Budget::SHORT)) {
            Err(Refusal::TooManyDescriptors) => {}
            done => return done,
        }
        let (host, cgroups) = (self.host.clone(), self.cgroups.clone());
        // As long as a request is held: who waits longer would be cut off without a word.
        let turn = self.searches.take_within(HOLD, &owner).await.ok_or(Refusal::Busy)?;
        // Many have hung up meanwhile. A search for each of them would keep those waiting who have come again.
        if self.diag.client_socket(client, server)? != socket {
            return Err(Refusal::Gone);
        }
        let search = move || {
            // Whatever becomes of whoever asked.
            let _turn = turn;
            search::holder(&host, &cgroups, &socket, &cgroup, (looks, Budget::LONG))
        };
        tokio::task::spawn_blocking(search).await.unwrap_or(Err(Refusal::Kernel))
    }
}

//! The facts of a peer, which its socket shows.

use crate::caller::{ListenerKind, Process, WorkloadKey};
use crate::cgroup::{CgroupPath, Pod};

/// The facts that the socket of a peer shows, whether the peer is attested or not.
///
/// On TCP `uid` and `cgroup` are those of the process that made the socket. On the unix socket
/// `uid` is that of the process that connected, and `cgroup` is the one that it has now.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerFacts {
    pub uid: u32,
    /// The cgroup v2 path from the host's root of that hierarchy. `None` if the kernel does not
    /// report it.
    pub cgroup: Option<CgroupPath>,
    /// The pod that the cgroup belongs to.
    pub pod: Option<Pod>,
    /// The inode of the listener's network namespace, if that is a pod's.
    pub netns_inode: Option<u64>,
}

impl PeerFacts {
    /// Returns the facts of a peer of which only the user is known.
    pub fn of_user(uid: u32) -> Self {
        Self {
            uid,
            cgroup: None,
            pod: None,
            netns_inode: None,
        }
    }

    /// Returns the key by which limits count this peer.
    pub fn workload_key(&self) -> WorkloadKey {
        WorkloadKey::at(self.uid, self.cgroup.as_ref(), self.pod.as_ref())
    }
}

/// The facts by which rules decide: those of the socket, and those of the process as far as it was
/// read.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug, Clone, Copy)]
pub struct CallerFacts<'a> {
    pub listener: ListenerKind,
    pub peer: &'a PeerFacts,
    pub process: Option<&'a Process>,
}

impl CallerFacts<'_> {
    /// Returns whether the caller lives in a container. `None` if neither its cgroup nor its
    /// process show it.
    pub fn in_container(self) -> Option<bool> {
        if self.peer.pod.is_some() {
            return Some(true);
        }
        let by_process = self.process.map(|process| process.in_container);
        // On a host that also has cgroup v1, a container may be in the root cgroup of v2. So the
        // root cgroup alone proves nothing.
        let by_cgroup = self
            .peer
            .cgroup
            .as_ref()
            .filter(|path| !path.is_root())
            .map(CgroupPath::names_container);
        match (by_cgroup, by_process) {
            (Some(true), _) | (_, Some(true)) => Some(true),
            (None, None) => None,
            _ => Some(false),
        }
    }
}

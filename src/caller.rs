//! The caller: the kernel's facts about the process at the other end of a connection, as a plain
//! value.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::cgroup::{CgroupPath, Pod};

mod attest_error;
mod groups;
#[cfg(test)]
pub(crate) mod unchanged;
mod workload_key;

pub use attest_error::AttestError;
pub use groups::{GroupDetail, Groups};
pub use workload_key::{WorkloadKey, WorkloadScope};

/// The kind of listener that a caller connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ListenerKind {
    /// The unix socket of the host.
    Unix,
    /// A loopback TCP address in the host's network namespace.
    Tcp,
    /// A loopback TCP address in a pod's network namespace.
    Pod,
}

impl ListenerKind {
    /// All kinds of listeners.
    pub const ALL: [Self; 3] = [Self::Unix, Self::Tcp, Self::Pod];

    /// Returns the name that audit records and metrics use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unix => "unix",
            Self::Tcp => "tcp",
            Self::Pod => "pod",
        }
    }
}

/// The attested peer of one connection.
///
/// On TCP `uid` and `cgroup` are those of the process that made the socket. On the unix socket
/// `uid` is that of the process that connected, and `cgroup` is the one that it has now. `process`
/// is always set on the unix socket. On TCP it is set only if a decision needs it.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug)]
pub struct Caller {
    pub listener: ListenerKind,
    pub uid: u32,
    /// The cgroup v2 path from the host's root of that hierarchy. `None` if the kernel does not
    /// report it.
    pub cgroup: Option<CgroupPath>,
    /// The pod that the cgroup belongs to.
    pub pod: Option<Pod>,
    /// The inode of the listener's network namespace, if that is a pod's.
    pub netns_inode: Option<u64>,
    /// The facts that were read from the process itself.
    pub process: Option<Process>,
    /// The proof that the caller is unchanged since these facts were read.
    pub proof: Box<dyn PeerProof>,
}

/// The facts about a calling process.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Process {
    /// The number of the process in the daemon's pid namespace.
    pub pid: u32,
    pub gid: u32,
    /// The supplementary groups. `None` if no decision needs them.
    pub groups: Option<Groups>,
    /// Whether the process lives in another pid or user namespace than the daemon, or in a cgroup
    /// (v1 too) that names a container.
    pub in_container: bool,
    /// The program that the process executes. `None` if no decision needs it.
    pub program: Option<Program>,
    /// A number that distinguishes this process from every other one with the same pid. It is the
    /// inode of the pidfd from Linux 6.9 on, and before that the start time in clock ticks since
    /// boot. `None` if no decision needs it.
    pub started: Option<u64>,
}

/// The facts about a process that a decision needs in addition to its ids and its cgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProcessFacts {
    /// How much of [`Process::groups`] is needed.
    pub groups: GroupDetail,
    /// Whether [`Process::program`] is needed.
    pub program: bool,
    /// Whether [`Process::started`] is needed.
    pub started: bool,
}

impl ProcessFacts {
    /// Returns whether reading these facts can block on something that the caller controls: a lock
    /// of the process, the file system of its program, or the number of its groups.
    pub fn may_wait(self) -> bool {
        self.groups != GroupDetail::None || self.program || self.started
    }

    /// Returns the union of both sets of facts.
    pub fn and(self, other: Self) -> Self {
        Self {
            groups: self.groups.max(other.groups),
            program: self.program || other.program,
            started: self.started || other.started,
        }
    }
}

/// The program that a process executes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Program {
    /// The executable, if the daemon may see it. For processes of other users that takes
    /// `CAP_SYS_PTRACE`.
    pub exe: Option<Executable>,
}

/// An executable: the file itself, and a path for display.
///
/// Only `device` and `inode` decide. In a mount namespace of its own a process can show any path
/// (T11).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Executable {
    /// The `st_dev` of the file.
    pub device: u64,
    /// The `st_ino` of the file.
    pub inode: u64,
    /// The `st_ctim` of the file, in seconds and nanoseconds. It differs for a later file that gets
    /// the same inode, and for this file after it has lost a name.
    pub changed: (i64, i64),
    /// The target of `/proc/<pid>/exe` when the process was first seen to execute the file. Do not
    /// trust it.
    pub path: Arc<Path>,
}

/// A proof that the caller of a connection is unchanged since it was attested.
///
/// Reading a process can block on something that the caller controls (T25). So a connection moves
/// to a lookup thread ([`Caller::may_wait`]) before the first such read. All later reads run on
/// threads of their own.
#[async_trait]
pub trait PeerProof: fmt::Debug + Send + Sync {
    /// Reads the facts again and compares them. Call it right before credentials are released.
    /// Fails if one of them differs or cannot be read.
    async fn verify_unchanged(&self) -> Result<(), AttestError>;

    /// Finds the process that holds the socket, if it is not yet known, and reads the facts in
    /// `facts` from it. The returned proof covers these facts too.
    async fn with_process(
        &self,
        _: &WorkloadKey,
        _: ProcessFacts,
    ) -> Result<(Process, Box<dyn PeerProof>), AttestError> {
        Err(AttestError::kernel("no process is known", None))
    }

    /// Returns whether [`PeerProof::with_process`] has to read the process although no rule needs a
    /// fact of it: the proof is not complete without that.
    fn needs_process(&self) -> bool {
        false
    }

    /// Returns the process for an agent that attests it by pid.
    ///
    /// Verifies that it is unchanged in all facts that were read, whatever has become of its
    /// connection. Also verifies that an agent cannot take its cgroups for those of another
    /// workload. Call it before and after the query to the agent; both results have to be equal
    /// (T2, T3).
    async fn for_agent(&self) -> Result<AgentProcessRef, AttestError> {
        Err(AttestError::kernel("no process is known", None))
    }

    /// Starts to watch the process for exec. Call it before the first of these reads, and check the
    /// watch after the last.
    ///
    /// Between two reads a process may execute a setuid program, be attested by the agent as that,
    /// and return to its old state.
    fn watch_exec(&self) -> Result<Box<dyn ExecWatch>, AttestError> {
        Ok(Box::new(NoExecWatch))
    }

    /// Returns whether the process still runs, in whatever state.
    fn is_alive(&self) -> bool {
        false
    }

    /// Verifies that the caller's pod still exists, and returns how long it and the container have
    /// existed. Used for an agent that gets the pod's UID.
    fn verify_pod(&self) -> Result<PodAge, AttestError> {
        Err(AttestError::CallerGone)
    }
}

/// A watch that notices if a process executes a program.
pub trait ExecWatch: fmt::Debug + Send + Sync {
    /// Returns whether the process has executed no program since the watch began, and still exists.
    fn no_exec_seen(&self) -> bool;
}

/// A watch for proofs without a process. If an agent gets no pid, it cannot take one process for
/// another.
#[derive(Debug)]
struct NoExecWatch;

impl ExecWatch for NoExecWatch {
    fn no_exec_seen(&self) -> bool {
        true
    }
}

/// A process, as it is passed to an agent that attests it by pid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentProcessRef {
    /// The number of the process in the daemon's pid namespace.
    pub pid: u32,
    /// The text of `/proc/<pid>/cgroup`, with the cgroups of all hierarchies. The agent reads the
    /// same text.
    pub cgroups: String,
}

/// The minimum age of a pod and of the caller's container, by the change times of their
/// directories. The kernel may have lost the creation time of a directory, which then appears
/// younger.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodAge {
    pub pod: Duration,
    /// The age of the container, or of the pod if the container is not known.
    pub container: Duration,
}

#[derive(Debug)]
struct NoPeer;

#[async_trait]
impl PeerProof for NoPeer {
    async fn verify_unchanged(&self) -> Result<(), AttestError> {
        Err(AttestError::CallerGone)
    }
}

impl Caller {
    /// Creates a caller for requests of the daemon itself, with a result that depends on no caller.
    /// It has a user id that no process can have, and every verification of it fails.
    pub fn synthetic() -> Self {
        Self {
            listener: ListenerKind::Unix,
            uid: u32::MAX,
            cgroup: None,
            pod: None,
            netns_inode: None,
            process: None,
            proof: Box::new(NoPeer),
        }
    }

    /// Verifies that the caller is unchanged since it was attested: same process, same ids, same
    /// socket. Fails if it is not, if it has ended, or if the kernel does not answer in time.
    pub async fn verify_unchanged(&self) -> Result<(), AttestError> {
        self.proof.verify_unchanged().await
    }

    /// Returns whether reading these facts can block on something that the caller controls, now or
    /// at a later verification.
    pub fn may_wait(&self, facts: ProcessFacts) -> bool {
        self.process.is_none() || facts.may_wait() || self.proof.needs_process()
    }

    /// Returns the facts to read by [`Caller::with_process`] before the request is decided: those
    /// that are `needed` for it. `None` if the process is not read.
    pub fn facts_to_read(&self, needed: Option<ProcessFacts>) -> Option<ProcessFacts> {
        needed.or_else(|| self.proof.needs_process().then(ProcessFacts::default))
    }

    /// Reads `facts` from the caller's process, which is searched for if it is not known. Fails if
    /// no process, or several different ones, hold the socket, and if the search has used its time.
    pub async fn with_process(self, facts: ProcessFacts) -> Result<Self, AttestError> {
        let (process, evidence) = self
            .proof
            .with_process(&WorkloadKey::of(&self), facts)
            .await?;
        Ok(Self {
            process: Some(process),
            proof: evidence,
            ..self
        })
    }

    /// Returns whether the caller lives in a container. `None` if neither its cgroup nor its
    /// process show it.
    pub fn in_container(&self) -> Option<bool> {
        if self.pod.is_some() {
            return Some(true);
        }
        let by_process = self.process.as_ref().map(|process| process.in_container);
        // On a host that also has cgroup v1, a container may be in the root cgroup of v2. So the
        // root cgroup alone proves nothing.
        let by_cgroup = self
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

/// The facts that the socket of a peer shows, whether the peer is attested or not.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerFacts {
    pub uid: u32,
    /// The cgroup, as in [`Caller::cgroup`].
    pub cgroup: Option<CgroupPath>,
    /// The pod, as in [`Caller::pod`].
    pub pod: Option<Pod>,
    /// The network namespace, as in [`Caller::netns_inode`].
    pub netns_inode: Option<u64>,
}

impl PeerFacts {
    /// Returns the facts that the socket of `caller` showed.
    pub fn of(caller: &Caller) -> Self {
        let Caller {
            uid,
            cgroup,
            pod,
            netns_inode: namespace,
            ..
        } = caller;
        Self {
            uid: *uid,
            cgroup: cgroup.clone(),
            pod: pod.clone(),
            netns_inode: *namespace,
        }
    }

    /// Returns the key by which limits count this peer.
    pub fn workload_key(&self) -> WorkloadKey {
        WorkloadKey::at(self.uid, self.cgroup.as_ref(), self.pod.as_ref())
    }
}

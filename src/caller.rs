//! Who is asking: what the kernel said of the process at the other end of a connection, as a plain value.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::cgroup::{CgroupPath, Pod, PodUid, WorkloadCgroup, WorkloadKind};

mod groups;
mod refusal;
#[cfg(test)]
pub(crate) mod unchanged;

pub use groups::{GroupDetail, Groups};
pub use refusal::AttestError;

/// Over which kind of listener a caller came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ListenerKind {
    /// The unix socket.
    Unix,
    /// A loopback TCP address in the host's network namespace.
    Tcp,
    /// A loopback TCP address in a pod's network namespace.
    Pod,
}

impl ListenerKind {
    /// All kinds of listeners.
    pub const ALL: [Self; 3] = [Self::Unix, Self::Tcp, Self::Pod];

    /// The name in audit records and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unix => "unix",
            Self::Tcp => "tcp",
            Self::Pod => "pod",
        }
    }
}

/// The caller of one connection.
///
/// `uid` and `cgroup` are what the kernel fixed: of the connector on the unix socket, of the process that made the socket
/// on TCP. `process` is always there on the unix socket, on TCP only if a decision needs it.
#[derive(Debug)]
pub struct Caller {
    /// Which listener.
    pub listener: ListenerKind,
    /// The user id.
    pub uid: u32,
    /// The cgroup v2 path, as seen from the host's root of that hierarchy; `None` where the kernel doesn't tell.
    pub cgroup: Option<CgroupPath>,
    /// The pod that the cgroup is in.
    pub pod: Option<Pod>,
    /// The network namespace of the listener, by its inode, if that is a pod's.
    pub namespace: Option<u64>,
    /// What was read of the process itself.
    pub process: Option<Process>,
    /// Proof that the caller is still the one that these facts were read of.
    pub evidence: Box<dyn PeerProof>,
}

/// The key of everything that is limited per workload. It is the pod; else the container, whoever its users are; else the
/// person, whose sessions, user units and rootless containers all lie below one `user-N.slice`; else a user within an
/// outermost systemd unit (T20, T29).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WorkloadKey {
    scope: WorkloadScope,
    /// `None` where a scope is one workload's, whichever users it has.
    uid: Option<u32>,
}

/// What the workloads have in common that one person may multiply: the users of one unit. Where a limit of all is reached,
/// the scope that has the most gives way.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum WorkloadScope {
    /// A pod.
    Pod(PodUid),
    /// A container, a `user-N.slice`, or an outermost unit.
    Cgroup(WorkloadCgroup),
    /// The whole machine: no cgroup is known.
    Machine,
}

/// What is known of the calling process.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Process {
    /// In the daemon's pid namespace.
    pub pid: u32,
    /// The group id.
    pub gid: u32,
    /// Supplementary groups; `None` where no decision needs them.
    pub groups: Option<Groups>,
    /// Whether it lives in another pid or user namespace than the daemon, or in a cgroup (v1 too) that names a container.
    pub in_container: bool,
    /// What it runs; `None` where no decision needs it.
    pub program: Option<Program>,
    /// What no other process that had or will have its number has: the inode of its pidfd from Linux 6.9 on, else when it
    /// started, in clock ticks since boot. `None` where no decision needs it.
    pub started: Option<u64>,
}

/// What a decision needs to know of a process beside its ids and its cgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProcessFacts {
    /// [`Process::groups`].
    pub groups: GroupDetail,
    /// [`Process::program`].
    pub program: bool,
    /// [`Process::started`].
    pub started: bool,
}

impl ProcessFacts {
    /// Whether to look at this may mean to wait for what the process controls, or takes as long as it likes: its lock, its
    /// program's file system, the number of its groups.
    pub fn may_wait(self) -> bool {
        self.groups != GroupDetail::None || self.program || self.started
    }

    /// This and the other one.
    pub fn and(self, other: Self) -> Self {
        Self {
            groups: self.groups.max(other.groups),
            program: self.program || other.program,
            started: self.started || other.started,
        }
    }
}

/// What a process runs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Program {
    /// The executable, where the daemon may see it (`CAP_SYS_PTRACE` for processes of other users).
    pub exe: Option<Executable>,
}

/// An executable: the file itself, and the path for people to read.
///
/// Only `device` and `inode` decide: in a mount namespace of his own anybody can show any path (attack 11).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Executable {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
    /// `st_ctim`, seconds and nanoseconds: another file that is given the same inode later has another one, and so has this
    /// one once it has lost a name.
    pub changed: (i64, i64),
    /// What `/proc/<pid>/exe` read as when the process was first seen to run it. Not to be trusted.
    pub path: Arc<Path>,
}

/// Shows whether a connection's caller is unchanged since it was attested.
///
/// To look at a process may mean to wait for something that the caller controls (T25). So a connection goes on elsewhere
/// ([`Caller::may_wait`]) before the first such look, and all others are made on threads of their own.
#[async_trait]
pub trait PeerProof: fmt::Debug + Send + Sync {
    /// Looks again; to be called right before anything is released.
    async fn verify_unchanged(&self) -> Result<(), AttestError>;

    /// Finds the process behind the socket, if that is not known yet, and reads of it what `looks` names. The evidence that
    /// it gives proves that too.
    async fn with_process(
        &self,
        _: &WorkloadKey,
        _: ProcessFacts,
    ) -> Result<(Process, Box<dyn PeerProof>), AttestError> {
        Err(AttestError::Kernel)
    }

    /// The process, for an agent that attests it by its number: still the same one in every respect that was looked at,
    /// whatever has become of its connection, and with cgroups in which an agent cannot mistake it for another
    /// workload's. To be called before and after the agent is asked; the two have to be equal (attacks 2 and 3).
    async fn for_agent(&self) -> Result<AgentProcessRef, AttestError> {
        Err(AttestError::Kernel)
    }

    /// To be called before the first of these looks, and asked after the last: between two of them a process may execute a
    /// setuid program, be seen by the agent as that, and be back at what it was.
    fn watch_exec(&self) -> Result<Box<dyn ExecWatch>, AttestError> {
        Ok(Box::new(NoExecWatch))
    }

    /// Whether the process runs still, whatever it has become.
    fn is_alive(&self) -> bool {
        false
    }

    /// The pod, for an agent that is told its UID: it is there still, and has not been for long if so it says.
    fn verify_pod(&self) -> Result<PodAge, AttestError> {
        Err(AttestError::CallerGone)
    }
}

/// Notices whether a process executes a program.
pub trait ExecWatch: fmt::Debug + Send + Sync {
    /// Whether it has executed none since, and is there.
    fn no_exec_seen(&self) -> bool;
}

/// Where no process is named to an agent, none can be mistaken.
#[derive(Debug)]
struct NoExecWatch;

impl ExecWatch for NoExecWatch {
    fn no_exec_seen(&self) -> bool {
        true
    }
}

/// A process as it is named to an agent that attests it itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentProcessRef {
    /// Its number in the daemon's pid namespace.
    pub pid: u32,
    /// Its cgroups in all hierarchies, as `/proc/<pid>/cgroup` has them: what the agent reads, too.
    pub cgroups: String,
}

/// How long a pod and the caller's container have been there, as their directories tell: at least so long. The kernel may
/// have forgotten when it made one, and then takes it for younger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodAge {
    /// The pod.
    pub pod: Duration,
    /// The container; the pod if that is not known.
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
    /// Stands in for a caller where the daemon asks by itself and the answer depends on none. It has the user id that
    /// nobody can have, and is not there when it is looked at.
    pub fn synthetic() -> Self {
        Self {
            listener: ListenerKind::Unix,
            uid: u32::MAX,
            cgroup: None,
            pod: None,
            namespace: None,
            process: None,
            evidence: Box::new(NoPeer),
        }
    }

    /// Whether the caller is still what it was when it was attested: same process, same ids, same socket.
    pub async fn still_same(&self) -> Result<(), AttestError> {
        self.evidence.verify_unchanged().await
    }

    /// Whether to look at this of its process may mean to wait for what the caller controls, also when it is looked at again.
    pub fn may_wait(&self, looks: ProcessFacts) -> bool {
        self.process.is_none() || looks.may_wait()
    }

    /// With what `looks` names of its process, which is searched for if it is not known.
    pub async fn with_process(self, looks: ProcessFacts) -> Result<Self, AttestError> {
        let (process, evidence) = self
            .evidence
            .with_process(&WorkloadKey::of(&self), looks)
            .await?;
        Ok(Self {
            process: Some(process),
            evidence,
            ..self
        })
    }

    /// Whether it lives in a container, as far as it is known: `None` if neither cgroup nor process tell.
    pub fn in_container(&self) -> Option<bool> {
        if self.pod.is_some() {
            return Some(true);
        }
        let by_process = self.process.as_ref().map(|process| process.in_container);
        // In the root cgroup of a host that also has cgroup v1 a container may sit without a name of its own, so the
        // root says nothing by itself.
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

impl WorkloadKey {
    /// Of a caller that was attested, as far as its socket tells.
    pub fn of(caller: &Caller) -> Self {
        Self::at(caller.uid, caller.cgroup.as_ref(), caller.pod.as_ref())
    }

    fn at(uid: u32, cgroup: Option<&CgroupPath>, pod: Option<&Pod>) -> Self {
        if let Some(pod) = pod {
            return Self {
                scope: WorkloadScope::Pod(pod.uid.clone()),
                uid: None,
            };
        }
        let Some(cgroup) = cgroup else {
            return Self::user(uid);
        };
        let (workload, kind) = cgroup.workload();
        Self {
            scope: WorkloadScope::Cgroup(workload),
            uid: (kind == WorkloadKind::Unit).then_some(uid),
        }
    }

    /// Of a user's processes, where nothing else is known.
    pub fn user(uid: u32) -> Self {
        Self {
            scope: WorkloadScope::Machine,
            uid: Some(uid),
        }
    }

    /// Of those of whom not even the user is known: together they get as much as one workload.
    pub fn unknown() -> Self {
        Self {
            scope: WorkloadScope::Machine,
            uid: None,
        }
    }

    /// See [`WorkloadScope`].
    pub fn scope(&self) -> &WorkloadScope {
        &self.scope
    }
}

/// What its socket tells of a peer, whether it is attested or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerFacts {
    /// The user id.
    pub uid: u32,
    /// See [`Caller::cgroup`].
    pub cgroup: Option<CgroupPath>,
    /// See [`Caller::pod`].
    pub pod: Option<Pod>,
    /// See [`Caller::namespace`].
    pub namespace: Option<u64>,
}

impl PeerFacts {
    /// What the socket told of a caller.
    pub fn of(caller: &Caller) -> Self {
        let Caller {
            uid,
            cgroup,
            pod,
            namespace,
            ..
        } = caller;
        Self {
            uid: *uid,
            cgroup: cgroup.clone(),
            pod: pod.clone(),
            namespace: *namespace,
        }
    }

    /// See [`WorkloadKey`].
    pub fn owner(&self) -> WorkloadKey {
        WorkloadKey::at(self.uid, self.cgroup.as_ref(), self.pod.as_ref())
    }
}

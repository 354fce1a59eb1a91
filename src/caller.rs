//! Who is asking: what the kernel said of the process at the other end of a connection, as a plain value.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::cgroup::{CgroupPath, Pod, PodUid, Workload};

mod groups;

pub use groups::{GroupDetail, Groups};

/// Over which kind of listener a caller came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Listener {
    /// The unix socket.
    Unix,
    /// A loopback TCP address in the host's network namespace.
    Tcp,
    /// A loopback TCP address in a pod's network namespace.
    Pod,
}

impl Listener {
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
    pub listener: Listener,
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
    pub evidence: Box<dyn Evidence>,
}

/// Whose share of the daemon a caller takes, where something is bounded per workload: a pod's, whoever its users are, else
/// a user's within an outermost systemd unit (attack 20).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Owner {
    uid: Option<u32>,
    place: Option<Workload>,
    pod: Option<PodUid>,
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
    pub contained: bool,
    /// What it runs; `None` where no decision needs it.
    pub program: Option<Program>,
    /// When it started, in clock ticks since boot; `None` where no decision needs it.
    pub started: Option<u64>,
}

/// What a decision needs to know of a process beside its ids and its cgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Looks {
    /// [`Process::groups`].
    pub groups: GroupDetail,
    /// [`Process::program`].
    pub program: bool,
    /// [`Process::started`].
    pub started: bool,
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
pub trait Evidence: fmt::Debug + Send + Sync {
    /// Looks again; to be called right before anything is released.
    fn still_same(&self) -> Result<(), Refusal>;

    /// The process, for an agent that attests it by its number: still the same one in every respect that was looked at,
    /// whatever has become of its connection, and with cgroups in which an agent cannot mistake it for another
    /// workload's. To be called before and after the agent is asked; the two have to be equal (attacks 2 and 3).
    fn process(&self) -> Result<Named, Refusal> {
        Err(Refusal::Kernel)
    }

    /// To be called before the first of these looks, and asked after the last: between two of them a process may execute a
    /// setuid program, be seen by the agent as that, and be back at what it was.
    fn watch(&self) -> Result<Box<dyn Watch>, Refusal> {
        Ok(Box::new(Unwatched))
    }

    /// Whether the process runs still, whatever it has become.
    fn is_there(&self) -> bool {
        self.process().is_ok()
    }

    /// The pod, for an agent that is told its UID: it is there still, and has not been for long if so it says.
    fn pod(&self) -> Result<Ages, Refusal> {
        Err(Refusal::Gone)
    }
}

/// Notices whether a process executes a program.
pub trait Watch: fmt::Debug + Send + Sync {
    /// Whether it has executed none since, and is there.
    fn is_unbroken(&self) -> bool;
}

/// Where no process is named to an agent, none can be mistaken.
#[derive(Debug)]
struct Unwatched;

impl Watch for Unwatched {
    fn is_unbroken(&self) -> bool {
        true
    }
}

/// A process as it is named to an agent that attests it itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// Its number in the daemon's pid namespace.
    pub pid: u32,
    /// Its cgroups in all hierarchies, as `/proc/<pid>/cgroup` has them: what the agent reads, too.
    pub cgroups: String,
}

/// How long a pod and the caller's container have been there, as their directories tell: at least so long. The kernel may
/// have forgotten when it made one, and then takes it for younger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ages {
    /// The pod.
    pub pod: Duration,
    /// The container; the pod if that is not known.
    pub container: Duration,
}

#[derive(Debug)]
struct Nobody;

impl Evidence for Nobody {
    fn still_same(&self) -> Result<(), Refusal> {
        Err(Refusal::Gone)
    }
}

impl Caller {
    /// Stands in for a caller where the daemon asks by itself and the answer depends on none. It has the user id that
    /// nobody can have, and is not there when it is looked at.
    pub fn nobody() -> Self {
        Self {
            listener: Listener::Unix,
            uid: u32::MAX,
            cgroup: None,
            pod: None,
            namespace: None,
            process: None,
            evidence: Box::new(Nobody),
        }
    }

    /// Whether the caller is still what it was when it was attested: same process, same ids, same socket.
    pub fn still_same(&self) -> Result<(), Refusal> {
        self.evidence.still_same()
    }

    /// Whether it lives in a container, as far as it is known: `None` if neither cgroup nor process tell.
    pub fn in_container(&self) -> Option<bool> {
        if self.pod.is_some() {
            return Some(true);
        }
        let by_process = self.process.as_ref().map(|process| process.contained);
        // In the root cgroup of a host that also has cgroup v1 a container may sit without a name of its own, so the
        // root says nothing by itself.
        let by_cgroup = self.cgroup.as_ref().filter(|path| !path.is_root()).map(CgroupPath::names_container);
        match (by_cgroup, by_process) {
            (Some(true), _) | (_, Some(true)) => Some(true),
            (None, None) => None,
            _ => Some(false),
        }
    }
}

impl Owner {
    /// Of a caller that was attested, as far as its socket tells.
    pub fn of(caller: &Caller) -> Self {
        Self::at(caller.uid, caller.cgroup.as_ref(), caller.pod.as_ref())
    }

    fn at(uid: u32, cgroup: Option<&CgroupPath>, pod: Option<&Pod>) -> Self {
        if let Some(pod) = pod {
            return Self { uid: None, place: None, pod: Some(pod.uid.clone()) };
        }
        let Some(cgroup) = cgroup else { return Self::user(uid) };
        let (place, is_pod) = cgroup.workload();
        Self { uid: (!is_pod).then_some(uid), place: Some(place), pod: None }
    }

    /// Of a user's processes, where nothing else is known.
    pub fn user(uid: u32) -> Self {
        Self { uid: Some(uid), place: None, pod: None }
    }

    /// Of all those who could not be attested: together they get as much as one workload.
    pub fn unknown() -> Self {
        Self { uid: None, place: None, pod: None }
    }
}

/// Why a caller was not attested. Each but [`Refusal::Busy`] is a refusal (403); all are counted and audited by
/// [`Refusal::reason`].
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The socket or process is gone, closing, or never was that of this connection.
    #[error("the calling socket or process is gone")]
    Gone,
    /// The peer's address is not loopback.
    #[error("the caller's address is not loopback")]
    NotLoopback,
    /// The kernel names no process that the daemon can see.
    #[error("the caller lives in a pid namespace that this daemon cannot see; in Kubernetes set hostPID: true")]
    InvisibleProcess,
    /// Several processes hold the socket and differ in what a rule can see, or the facts do not describe one process.
    #[error("several different processes hold the calling socket, so it is not clear whose it is")]
    Ambiguous,
    /// No process of the socket's cgroup and user shows the socket among its descriptors.
    #[error("no process of the caller's cgroup and user holds the calling socket")]
    NoHolder,
    /// Its workload has as many connections as it may; this one is reset without an answer.
    #[error("the workload has too many connections")]
    TooManyConnections,
    /// The search for the socket's process went over its budget.
    #[error("the processes beside the caller have too many open descriptors to find the caller among them")]
    TooManyDescriptors,
    /// The process changed its user, groups, cgroup or executable since it connected.
    #[error("the calling process changed its user, groups, cgroup or executable after it connected")]
    Changed,
    /// The cgroup is removed, can't be listed, or is not below the tree that the daemon sees.
    #[error("the caller's cgroup cannot be read")]
    UnreadableCgroup,
    /// Searches for others have taken all the time that there is. The only one of these that may pass by itself.
    #[error("more callers have to be searched for on this node than there is time for; ask again in a moment")]
    Busy,
    /// Somebody else than root can name cgroups beside the caller's own, so an agent may take it for a container's process.
    #[error(
        "the caller's cgroup is in the hands of a user, who could give it a container's name; run it in a cgroup of \
         root's (not below user@.service)"
    )]
    DelegatedCgroup,
    /// Its cgroup names a container in a place where no container runtime does, or several.
    #[error("the caller's cgroups name a container inside another, or in a place that is no container runtime's")]
    NestedContainer,
    /// Its cgroup names a pod where this node's kubelet puts none.
    #[error(
        "the caller's cgroup names a pod in a place that is not the kubelet's; if it is, write the kubelet's cgroup root as \
         `pods_cgroup` in [listen]"
    )]
    MisplacedPod(Box<Stranger>),
    /// It came over a pod's listener, and is in no pod.
    #[error(
        "the caller uses a pod's network, but its cgroup is not that of a pod: use the unix socket, or the host's own \
         network"
    )]
    NotAPod(Box<Stranger>),
    /// It came over the listener of another pod.
    #[error("the caller uses the network of another pod than its own")]
    OtherPod(Box<Stranger>),
    /// It has more than [`Groups::MAX`] supplementary groups, and the decision depends on them.
    #[error(
        "the calling process has more than {} supplementary groups, and the decision depends on them; run it with fewer",
        Groups::MAX
    )]
    TooManyGroups,
    /// The daemon may not see what the process runs, so it would not notice that it runs something else meanwhile.
    #[error(
        "the daemon cannot see what the calling process runs; give it CAP_SYS_PTRACE, CAP_PERFMON and the system call \
         perf_event_open"
    )]
    UnseenProgram,
    /// The kernel lacks what this listener needs for this caller.
    #[error("this kernel cannot tell who is calling: {0}")]
    Unsupported(&'static str),
    /// Asking the kernel failed.
    #[error("the kernel did not say who is calling")]
    Kernel,
}

/// What was seen of somebody who was refused for the place where he is, for the audit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stranger {
    /// The user id.
    pub uid: u32,
    /// See [`Caller::cgroup`].
    pub cgroup: Option<CgroupPath>,
    /// See [`Caller::pod`].
    pub pod: Option<Pod>,
    /// See [`Caller::namespace`].
    pub namespace: Option<u64>,
}

impl Stranger {
    /// What is seen of a caller before its process is looked for.
    pub fn of(caller: &Caller) -> Self {
        let Caller { uid, cgroup, pod, namespace, .. } = caller;
        Self { uid: *uid, cgroup: cgroup.clone(), pod: pod.clone(), namespace: *namespace }
    }

    /// Whose share it takes.
    pub fn owner(&self) -> Owner {
        Owner::at(self.uid, self.cgroup.as_ref(), self.pod.as_ref())
    }
}

impl Refusal {
    /// Who was refused, where that was seen.
    pub fn stranger(&self) -> Option<&Stranger> {
        match self {
            Self::MisplacedPod(stranger) | Self::NotAPod(stranger) | Self::OtherPod(stranger) => Some(stranger),
            _ => None,
        }
    }

    /// The label in metrics and audit records.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Gone => "caller_gone",
            Self::NotLoopback => "not_loopback",
            Self::InvisibleProcess => "invisible_process",
            Self::Ambiguous => "ambiguous_caller",
            Self::NoHolder => "no_holder",
            Self::TooManyConnections => "too_many_of_one",
            Self::TooManyDescriptors => "too_many_descriptors",
            Self::Changed => "identity_changed",
            Self::UnreadableCgroup => "unreadable_cgroup",
            Self::Busy => "search_busy",
            Self::DelegatedCgroup => "delegated_cgroup",
            Self::NestedContainer => "nested_container",
            Self::MisplacedPod(_) => "misplaced_pod",
            Self::NotAPod(_) => "not_a_pod",
            Self::OtherPod(_) => "other_pod",
            Self::TooManyGroups => "too_many_groups",
            Self::UnseenProgram => "unseen_program",
            Self::Unsupported(_) => "unsupported_kernel",
            Self::Kernel => "kernel_error",
        }
    }
}

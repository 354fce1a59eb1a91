//! The reasons why a caller is not attested.

use nix::errno::Errno;
use thiserror::Error;

use super::Groups;

/// The reason why a caller is not attested. The request is rejected with 403, or with 503 if
/// [`AttestError::is_transient`]. Metrics and audit records use [`AttestError::reason`].
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AttestError {
    /// The socket or the process is gone or closing, or never belonged to this connection.
    #[error("the calling socket or process is gone")]
    CallerGone,
    /// The peer's address is not loopback.
    #[error("the caller's address is not loopback")]
    NotLoopback,
    /// The kernel reports no process that the daemon can see.
    #[error(
        "the caller is in a pid namespace that the daemon cannot see; in Kubernetes set hostPID: true"
    )]
    InvisibleProcess,
    /// Several processes hold the socket and differ in facts that a rule can see, or the facts do
    /// not fit one process.
    #[error(
        "cannot determine the caller: several different processes hold the calling socket; open a new socket for this request"
    )]
    Ambiguous,
    /// No process of the socket's cgroup and user has the socket among its descriptors.
    #[error("no process of the caller's cgroup and user holds the calling socket")]
    NoSocketOwner,
    /// The search for the process that holds the socket exceeded its budget.
    #[error(
        "cannot find the caller: the processes of its cgroup have too many open descriptors; use a rule by user or unit, or the unix socket"
    )]
    TooManyDescriptors,
    /// The process changed its user, groups, cgroup or executable after it connected.
    #[error(
        "the calling process changed its user, groups, cgroup or executable after it connected; open a new connection"
    )]
    IdentityChanged,
    /// The cgroup is removed, cannot be listed, or is not in the tree that the daemon sees.
    #[error("the caller's cgroup cannot be read")]
    UnreadableCgroup,
    /// All searches that the caller's workload, or the node, may run at a time are running.
    #[error("cannot find the caller: too many searches run on this node; retry in a moment")]
    SearchBusy,
    /// A user other than root can name cgroups next to the caller's own. So an agent may take the
    /// caller for a process of a container.
    #[error(
        "the caller's cgroup is delegated to a user, which could give it a container's name; run the caller in a cgroup that root owns (not below user@.service)"
    )]
    DelegatedCgroup,
    /// The cgroup names several containers, or one at a level where no container runtime creates
    /// them.
    #[error(
        "the caller's cgroups name a container inside another, or at a path that no container runtime uses"
    )]
    NestedContainer,
    /// The cgroup names a pod at a path where this node's kubelet creates none.
    #[error(
        "the caller's cgroup names a pod at a path outside the kubelet's cgroup root; set `cgroup_root` in [pods] if the kubelet has another root"
    )]
    MisplacedPod,
    /// The caller connected to a pod's listener and does not belong to a pod.
    #[error(
        "the caller is in a pod's network, but its cgroup is not that of a pod; use the unix socket, or the host's own network"
    )]
    NotAPod,
    /// The caller connected to the listener of another pod.
    #[error("the caller is in the network of another pod than its own")]
    OtherPod,
    /// The caller has more than [`Groups::MAX_GROUPS`] supplementary groups, and they matter.
    #[error(
        "the calling process has more than {} supplementary groups, and the decision depends on them; run it with fewer",
        Groups::MAX_GROUPS
    )]
    TooManyGroups,
    /// The service manager made the socket. It passes sockets to services of other users.
    #[error(
        "cannot determine the caller: the service manager made the calling socket (init.scope, or a .socket unit); open a new socket for this request"
    )]
    ManagerSocket,
    /// The daemon cannot see which program the process executes, or could not detect an exec.
    #[error(
        "the daemon cannot see what the calling process executes; grant the privilege that its log names at the start (CAP_SYS_PTRACE, CAP_BPF, CAP_PERFMON, the system call bpf)"
    )]
    ExecUnobservable,
    /// At each attempt a program was executed while the agent attested the process. It was executed
    /// by the process itself, or by another one of its workload where [`super::ExecWatch`] cannot
    /// distinguish them. The error is transient.
    #[error(
        "the calling process, or another one of its workload, executed programs each time that the SPIFFE agent attested it; retry in a moment"
    )]
    ProcessExecuting,
    /// The executable of the process, or the file in a rule's `exe`, cannot be read, or not in
    /// time. The error is transient if a file system hung for a moment.
    #[error(
        "cannot compare the calling process with the program of a rule: the process, or the file system of a program, does not respond; retry in a moment"
    )]
    ProcessUnresponsive,
    /// The kernel lacks an interface that this listener needs for this caller.
    #[error("this kernel cannot identify the caller: {0}")]
    Unsupported(&'static str),
    /// A query to the kernel failed. The caller does not see which; the log has it.
    #[error("a query to the kernel for the caller failed")]
    Kernel {
        /// The system call, or the name of the file in `/proc/<pid>`, as the log shows it.
        operation: &'static str,
        /// The kernel's error. `None` if it sent a reply that the daemon cannot read.
        errno: Option<Errno>,
    },
}

impl AttestError {
    /// One error of each kind, for their labels.
    pub const ALL: [Self; 21] = [
        Self::CallerGone,
        Self::NotLoopback,
        Self::InvisibleProcess,
        Self::Ambiguous,
        Self::NoSocketOwner,
        Self::TooManyDescriptors,
        Self::IdentityChanged,
        Self::UnreadableCgroup,
        Self::SearchBusy,
        Self::DelegatedCgroup,
        Self::NestedContainer,
        Self::MisplacedPod,
        Self::NotAPod,
        Self::OtherPod,
        Self::TooManyGroups,
        Self::ManagerSocket,
        Self::ExecUnobservable,
        Self::ProcessExecuting,
        Self::ProcessUnresponsive,
        Self::Unsupported(""),
        Self::Kernel {
            operation: "",
            errno: None,
        },
    ];

    /// Creates the error of a query to the kernel. Without an `errno` its reply is not readable.
    pub fn kernel(operation: &'static str, errno: impl Into<Option<Errno>>) -> Self {
        Self::Kernel {
            operation,
            errno: errno.into(),
        }
    }

    /// Returns whether the error may pass by itself, so that the caller should retry.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::SearchBusy | Self::ProcessExecuting | Self::ProcessUnresponsive => true,
            Self::CallerGone
            | Self::NotLoopback
            | Self::InvisibleProcess
            | Self::Ambiguous
            | Self::NoSocketOwner
            | Self::TooManyDescriptors
            | Self::IdentityChanged
            | Self::UnreadableCgroup
            | Self::DelegatedCgroup
            | Self::NestedContainer
            | Self::MisplacedPod
            | Self::NotAPod
            | Self::OtherPod
            | Self::TooManyGroups
            | Self::ManagerSocket
            | Self::ExecUnobservable
            | Self::Unsupported(_)
            | Self::Kernel { .. } => false,
        }
    }

    /// Returns the fix, if the text of the error has none.
    pub fn fix(&self) -> Option<&'static str> {
        match self {
            Self::CallerGone => Some("retry on a new connection"),
            Self::NotLoopback => Some("connect to a loopback address, or to the unix socket"),
            Self::NestedContainer => Some("run the caller in a container of the node's runtime"),
            Self::OtherPod => Some("run the caller in the network of its own pod"),
            Self::NoSocketOwner | Self::UnreadableCgroup | Self::Kernel { .. } => {
                Some("retry on a new connection, and see the node's log if this repeats")
            }
            Self::Unsupported(_) => Some("see the node's log"),
            Self::InvisibleProcess
            | Self::Ambiguous
            | Self::TooManyDescriptors
            | Self::IdentityChanged
            | Self::SearchBusy
            | Self::DelegatedCgroup
            | Self::MisplacedPod
            | Self::NotAPod
            | Self::TooManyGroups
            | Self::ManagerSocket
            | Self::ExecUnobservable
            | Self::ProcessExecuting
            | Self::ProcessUnresponsive => None,
        }
    }

    /// Returns the label that metrics and audit records use.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::CallerGone => "caller_gone",
            Self::NotLoopback => "not_loopback",
            Self::InvisibleProcess => "invisible_process",
            Self::Ambiguous => "ambiguous_caller",
            Self::NoSocketOwner => "no_holder",
            Self::TooManyDescriptors => "too_many_descriptors",
            Self::IdentityChanged => "identity_changed",
            Self::UnreadableCgroup => "unreadable_cgroup",
            Self::SearchBusy => "search_busy",
            Self::DelegatedCgroup => "delegated_cgroup",
            Self::NestedContainer => "nested_container",
            Self::MisplacedPod => "misplaced_pod",
            Self::NotAPod => "not_a_pod",
            Self::OtherPod => "other_pod",
            Self::TooManyGroups => "too_many_groups",
            Self::ManagerSocket => "manager_socket",
            Self::ExecUnobservable => "unseen_program",
            Self::ProcessExecuting => "process_executing",
            Self::ProcessUnresponsive => "process_unresponsive",
            Self::Unsupported(_) => "unsupported_kernel",
            Self::Kernel { .. } => "kernel_error",
        }
    }
}

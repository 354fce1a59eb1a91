//! Why a caller was not attested.

use thiserror::Error;

use super::Groups;

/// Why a caller was not attested. Each is a refusal (403), or a failure (503) if [`AttestError::is_transient`]; all are counted and
/// audited by [`AttestError::reason`].
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AttestError {
    /// The socket or process is gone, closing, or never was that of this connection.
    #[error("the calling socket or process is gone")]
    CallerGone,
    /// The peer's address is not loopback.
    #[error("the caller's address is not loopback")]
    NotLoopback,
    /// The kernel names no process that the daemon can see.
    #[error(
        "the caller lives in a pid namespace that this daemon cannot see; in Kubernetes set hostPID: true"
    )]
    InvisibleProcess,
    /// Several processes hold the socket and differ in what a rule can see, or the facts do not describe one process.
    #[error("several different processes hold the calling socket, so it is not clear whose it is")]
    Ambiguous,
    /// No process of the socket's cgroup and user shows the socket among its descriptors.
    #[error("no process of the caller's cgroup and user holds the calling socket")]
    NoSocketOwner,
    /// The search for the socket's process went over its budget.
    #[error(
        "the processes beside the caller have too many open descriptors to find the caller among them"
    )]
    TooManyDescriptors,
    /// The process changed its user, groups, cgroup or executable since it connected.
    #[error(
        "the calling process changed its user, groups, cgroup or executable after it connected"
    )]
    IdentityChanged,
    /// The cgroup is removed, can't be listed, or is not below the tree that the daemon sees.
    #[error("the caller's cgroup cannot be read")]
    UnreadableCgroup,
    /// Searches for others have taken all the time that there is.
    #[error(
        "more callers have to be searched for on this node than there is time for; ask again in a moment"
    )]
    SearchBusy,
    /// Somebody else than root can name cgroups beside the caller's own, so an agent may take it for a container's process.
    #[error(
        "the caller's cgroup is in the hands of a user, who could give it a container's name; run it in a cgroup of \
         root's (not below user@.service)"
    )]
    DelegatedCgroup,
    /// Its cgroup names a container in a place where no container runtime does, or several.
    #[error(
        "the caller's cgroups name a container inside another, or in a place that is no container runtime's"
    )]
    NestedContainer,
    /// Its cgroup names a pod where this node's kubelet puts none.
    #[error(
        "the caller's cgroup names a pod in a place that is not the kubelet's; if it is, write the kubelet's cgroup root as \
         `pods_cgroup` in [listen]"
    )]
    MisplacedPod,
    /// It came over a pod's listener, and is in no pod.
    #[error(
        "the caller uses a pod's network, but its cgroup is not that of a pod: use the unix socket, or the host's own \
         network"
    )]
    NotAPod,
    /// It came over the listener of another pod.
    #[error("the caller uses the network of another pod than its own")]
    OtherPod,
    /// It has more than [`Groups::MAX`] supplementary groups, and the decision depends on them.
    #[error(
        "the calling process has more than {} supplementary groups, and the decision depends on them; run it with fewer",
        Groups::MAX
    )]
    TooManyGroups,
    /// The socket was made by the service manager, which gives sockets to services of other users.
    #[error(
        "the calling socket was made by the service manager (init.scope, or a .socket unit), so it does not tell which \
         service is calling; open a new socket for this request"
    )]
    ManagerSocket,
    /// The daemon may not see what the process runs, or would not notice that it runs something else meanwhile.
    #[error(
        "the daemon cannot see what the calling process executes; its log says at the start which privilege is missing \
         (CAP_SYS_PTRACE, CAP_BPF, CAP_PERFMON, the system call bpf)"
    )]
    ExecUnobservable,
    /// Each time that the agent looked at the process, a program was executed: by it, or where processes can't be told apart
    /// ([`super::ExecWatch`]) by another one of its workload. Passes with that.
    #[error(
        "the calling process, or another one of its workload, executed programs each time that the SPIFFE agent looked at \
         it; ask again in a moment"
    )]
    ProcessExecuting,
    /// What the process executes, or what a rule's `exe` names, cannot be looked at, or not in time. Passes if that was a file
    /// system that hangs for a moment.
    #[error(
        "the daemon cannot see whether the calling process executes the program that a rule names: the process, or the file \
         system of a program, does not answer"
    )]
    ProcessUnresponsive,
    /// The kernel lacks what this listener needs for this caller.
    #[error("this kernel cannot tell who is calling: {0}")]
    Unsupported(&'static str),
    /// Asking the kernel failed.
    #[error("the kernel did not say who is calling")]
    Kernel,
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
        Self::Kernel,
    ];

    /// Whether it may pass by itself, so that the caller is to try again.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::SearchBusy | Self::ProcessExecuting | Self::ProcessUnresponsive
        )
    }

    /// The label in metrics and audit records.
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
            Self::Kernel => "kernel_error",
        }
    }
}

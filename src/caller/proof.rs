//! The proof of the facts about a caller.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;

use crate::caller::AttestError;

/// A proof that the caller of a connection is unchanged since it was attested.
///
/// Reading a process can block on something that the caller controls (T25). So a connection moves
/// to a lookup thread before the first such read. All later reads run on threads of their own.
#[async_trait]
pub trait PeerProof: fmt::Debug + Send + Sync {
    /// Reads the facts again and compares them. Call it right before credentials are released.
    /// Fails if one of them differs or cannot be read.
    async fn verify_unchanged(&self) -> Result<(), AttestError>;

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

/// The proof of a caller that is the daemon itself. Every verification fails.
#[derive(Debug)]
pub(super) struct NoPeer;

#[async_trait]
impl PeerProof for NoPeer {
    async fn verify_unchanged(&self) -> Result<(), AttestError> {
        Err(AttestError::CallerGone)
    }
}

//! The caller: the kernel's facts about the process at the other end of a connection, as a plain
//! value.

use std::path::Path;
use std::sync::Arc;

mod attest_error;
#[cfg(test)]
pub(crate) mod constant_proof;
mod groups;
mod peer;
mod proof;
mod workload_key;

pub use attest_error::AttestError;
pub use groups::{GroupDetail, Groups};
pub use peer::{CallerFacts, PeerFacts};
pub use proof::{AgentProcessRef, ExecWatch, PeerProof, PodAge};
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
/// `process` is always set on the unix socket. On TCP it is set only if a decision needs it.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug)]
pub struct Caller {
    pub listener: ListenerKind,
    /// The facts that the socket shows.
    pub peer: PeerFacts,
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

impl Caller {
    /// Creates a caller for requests of the daemon itself, with a result that depends on no caller.
    /// It has a user id that no process can have, and every verification of it fails.
    pub fn synthetic() -> Self {
        Self {
            listener: ListenerKind::Unix,
            peer: PeerFacts::of_user(u32::MAX),
            process: None,
            proof: Box::new(proof::NoPeer),
        }
    }

    /// Verifies that the caller is unchanged since it was attested: same process, same ids, same
    /// socket. Fails if it is not, if it has ended, or if the kernel does not answer in time.
    pub async fn verify_unchanged(&self) -> Result<(), AttestError> {
        self.proof.verify_unchanged().await
    }

    /// Returns the facts by which rules decide.
    pub fn facts(&self) -> CallerFacts<'_> {
        CallerFacts {
            listener: self.listener,
            peer: &self.peer,
            process: self.process.as_ref(),
        }
    }
}

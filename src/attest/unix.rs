//! The caller on the unix socket: the process that connected, whichever process holds the
//! descriptor now.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use async_trait::async_trait;
use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{SysconfVar, sysconf};

use crate::attest::host::Host;
use crate::attest::pod_lookup::ResolvedPod;
use crate::attest::process_snapshot::ProcessSnapshot;
use crate::attest::rejection::Rejection;
use crate::attest::sys;
use crate::caller::{
    AgentProcessRef, AttestError, ExecWatch, GroupDetail, Groups, PeerFacts, PeerProof, PodAge,
    Process, ProcessFacts, WorkloadKey,
};

/// The process that connected, with the facts that were read.
#[derive(Debug)]
pub(crate) struct ConnectorProof {
    process: ProcessSnapshot,
    /// The time of accept, with which the start of the process is not compared yet.
    accepted: Option<u64>,
    workload: WorkloadKey,
    pod: Option<ResolvedPod>,
}

impl ConnectorProof {
    /// Returns the process, as far as it was read.
    pub(crate) fn to_process(&self) -> Process {
        self.process.to_process()
    }

    /// Returns whether the process has to be read although no rule needs a fact of it: the proof is
    /// not complete without that.
    pub(crate) fn needs_process(&self) -> bool {
        self.accepted.is_some()
    }

    /// Reads the facts in `facts` from the process, which then are part of the proof.
    pub(crate) async fn read_facts(
        mut self: Box<Self>,
        stream: BorrowedFd<'_>,
        facts: ProcessFacts,
    ) -> Result<(Process, Box<Self>), AttestError> {
        // The groups of connect(2) come first: if there are too many, the kernel fails without
        // copying them.
        let connect_groups = match facts.groups {
            GroupDetail::None => None,
            detail => Some(Groups::new(peer_groups(stream)?, detail)?),
        };
        self.verify_start().await?;
        let process = self.process.read_facts(&self.workload, facts).await?;
        if process.groups() != connect_groups.as_ref() {
            return Err(AttestError::IdentityChanged);
        }
        (self.process, self.accepted) = (process, None);
        Ok((self.to_process(), self))
    }

    /// Verifies that the process is not one that started after the connection was accepted.
    async fn verify_start(&self) -> Result<(), AttestError> {
        match self.accepted {
            Some(ticks) => self.process.verify_started_by(ticks, &self.workload).await,
            None => Ok(()),
        }
    }
}

#[async_trait]
impl PeerProof for ConnectorProof {
    async fn verify_unchanged(&self) -> Result<(), AttestError> {
        self.verify_start().await?;
        self.process.verify_unchanged(&self.workload).await
    }

    async fn for_agent(&self) -> Result<AgentProcessRef, AttestError> {
        self.verify_start().await?;
        self.process.for_agent(&self.workload).await
    }

    fn watch_exec(&self) -> Result<Box<dyn ExecWatch>, AttestError> {
        Ok(Box::new(self.process.watch_exec()?))
    }

    fn is_alive(&self) -> bool {
        self.process.is_alive()
    }

    fn verify_pod(&self) -> Result<PodAge, AttestError> {
        self.pod
            .as_ref()
            .ok_or(AttestError::kernel("no pod is known", None))?
            .verify_exists()
    }
}

/// The facts that the kernel recorded at connect(2). It is a plain value, so tests can construct
/// those of other kernels.
#[derive(Debug)]
pub(crate) struct ConnectedPeer {
    pid: u32,
    uid: u32,
    gid: u32,
    pin: PeerPin,
}

/// The certainty that a process with the recorded pid is the one that connected.
#[derive(Debug)]
enum PeerPin {
    /// The kernel holds the process since it connected: `SO_PEERPIDFD`.
    ByKernel(OwnedFd),
    /// The kernel does not hold the process, before Linux 6.5. The connection was accepted at this
    /// time, in clock ticks since boot.
    SinceAccept(u64),
}

impl ConnectedPeer {
    /// Reads `SO_PEERCRED` and `SO_PEERPIDFD` of the stream.
    pub(crate) fn of(stream: BorrowedFd<'_>) -> Result<Self, Rejection> {
        let peer = getsockopt(&stream, PeerCredentials)
            .map_err(|errno| AttestError::kernel("SO_PEERCRED", errno))?;
        let facts = PeerFacts::of_user(peer.uid());
        let rejected = |error| Rejection::of(error, &facts);
        let pid = u32::try_from(peer.pid()).ok().filter(|pid| *pid != 0);
        let pid = pid.ok_or_else(|| rejected(AttestError::InvisibleProcess))?;
        let pin = match sys::peer_pidfd(stream).map_err(|_| rejected(AttestError::CallerGone))? {
            Some(pidfd) => PeerPin::ByKernel(pidfd),
            None => PeerPin::SinceAccept(ticks_since_boot()?),
        };
        Ok(Self {
            pid,
            uid: peer.uid(),
            gid: peer.gid(),
            pin,
        })
    }
}

/// Finds the process that connected to `stream`, and reads its ids and its cgroup.
///
/// The process must still exist, with exactly these ids. A process that has since executed a setuid
/// program or dropped a privilege is rejected (T3).
pub(crate) fn find_connector(
    host: &Arc<Host>,
    connected: ConnectedPeer,
    stream: BorrowedFd<'_>,
) -> Result<(PeerFacts, ConnectorProof), Rejection> {
    let ConnectedPeer { pid, uid, gid, pin } = connected;
    let mut facts = PeerFacts::of_user(uid);
    if !host.pidfds_report_ids {
        // The daemon would have to read its `status` on this thread, which takes milliseconds for
        // 65,536 groups (T27).
        peer_groups(stream).map_err(|error| Rejection::of(error, &facts))?;
    }
    let (process, accepted) = match pin {
        PeerPin::ByKernel(pidfd) => {
            let handle = host.process(pid, pidfd);
            (
                handle.and_then(|handle| ProcessSnapshot::read(host, handle)),
                None,
            )
        }
        PeerPin::SinceAccept(accepted) => (read_unpinned(host, pid), Some(accepted)),
    };
    let process = process.map_err(|error| Rejection::of(error, &facts))?;
    let credentials = process.ids();
    if credentials.uids != [uid; 4] || credentials.gids != [gid; 4] {
        return Err(Rejection::of(AttestError::IdentityChanged, &facts));
    }
    facts.cgroup = process.cgroup().cloned();
    let pod = host
        .pod(process.cgroup())
        .map_err(|error| Rejection::of(error, &facts))?;
    facts.pod = pod.as_ref().map(|resolved| resolved.pod.clone());
    let workload = facts.workload_key();
    let proof = ConnectorProof {
        process,
        accepted,
        workload,
        pod,
    };
    Ok((facts, proof))
}

/// Reads the process that has the pid now, on a kernel that cannot prove that it is the one that
/// connected.
///
/// A process that started after the connection was accepted certainly is not. The proof compares
/// that later, because reading the start may block (T25). A process that started between connect
/// and accept is not detected. Callers in containers can cause pids to be reused, so they are
/// rejected on such kernels (T16).
fn read_unpinned(host: &Arc<Host>, pid: u32) -> Result<ProcessSnapshot, AttestError> {
    let pidfd = sys::pidfd_open(pid).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOSYS) => AttestError::Unsupported("it lacks pidfd_open(2) (Linux 5.3)"),
        _ => AttestError::CallerGone,
    })?;
    let process = ProcessSnapshot::read(host, host.process(pid, pidfd)?)?;
    if process.in_container() {
        return Err(AttestError::Unsupported(
            "it lacks SO_PEERPIDFD (Linux 6.5), which callers in containers need on the unix socket",
        ));
    }
    Ok(process)
}

/// Reads `SO_PEERGROUPS` of the stream.
fn peer_groups(stream: BorrowedFd<'_>) -> Result<Vec<u32>, AttestError> {
    sys::peer_groups(stream, Groups::MAX_GROUPS).map_err(|error| match error {
        Errno::ERANGE => AttestError::TooManyGroups,
        errno => AttestError::kernel("SO_PEERGROUPS", errno),
    })
}

#[expect(
    clippy::disallowed_methods,
    reason = "/proc counts from the boot, as this clock does"
)]
fn ticks_since_boot() -> Result<u64, AttestError> {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map_err(|errno| AttestError::kernel("clock_gettime", errno))?;
    let per_second = sysconf(SysconfVar::CLK_TCK)
        .map_err(|errno| AttestError::kernel("sysconf", errno))?
        .ok_or(AttestError::kernel("sysconf", None))?;
    let ticks = now.tv_sec() * per_second + now.tv_nsec() * per_second / 1_000_000_000;
    Ok(ticks.cast_unsigned())
}

#[cfg(test)]
mod tests;

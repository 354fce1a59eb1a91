//! The caller on the unix socket: the process that connected, whoever holds the descriptor now.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{SysconfVar, sysconf};

use crate::attest::host::Host;
use crate::attest::pods::Housed;
use crate::attest::process::HeldProcess;
use crate::attest::sys;
use crate::caller::{Ages, Caller, Evidence, GroupDetail, Groups, Listener, Looks, Named, Refusal, Watch};

#[derive(Debug)]
struct Connector(HeldProcess, Option<Housed>);

impl Evidence for Connector {
    fn still_same(&self) -> Result<(), Refusal> {
        self.0.still_same()
    }

    fn process(&self) -> Result<Named, Refusal> {
        self.0.named()
    }

    fn watch(&self) -> Result<Box<dyn Watch>, Refusal> {
        self.0.watch()
    }

    fn is_there(&self) -> bool {
        self.0.is_there()
    }

    fn pod(&self) -> Result<Ages, Refusal> {
        self.1.as_ref().ok_or(Refusal::Kernel)?.is_there()
    }
}

/// Stands in while the decision is still open what has to be looked at: nothing is released on it.
#[derive(Debug)]
struct NotYet;

impl Evidence for NotYet {
    fn still_same(&self) -> Result<(), Refusal> {
        Err(Refusal::Gone)
    }
}

/// What the kernel recorded of the connector at connect(2). A plain value, with which tests stand in for other kernels.
#[derive(Debug)]
pub(crate) struct Peer {
    pid: u32,
    uid: u32,
    gid: u32,
    pinned: Pinned,
}

/// How sure it is that a process with the connector's number is the connector.
#[derive(Debug)]
enum Pinned {
    /// By the kernel, since it connected: `SO_PEERPIDFD`.
    ByKernel(OwnedFd),
    /// Not at all before Linux 6.5. The connection was accepted at this time, in clock ticks since boot.
    SinceAccept(u64),
}

impl Peer {
    /// Reads `SO_PEERCRED` and `SO_PEERPIDFD`.
    pub(crate) fn of(stream: BorrowedFd<'_>) -> Result<Self, Refusal> {
        let peer = getsockopt(&stream, PeerCredentials).map_err(|_| Refusal::Kernel)?;
        let pid = u32::try_from(peer.pid()).ok().filter(|pid| *pid != 0).ok_or(Refusal::InvisibleProcess)?;
        let pinned = match sys::peer_pidfd(stream).map_err(|_| Refusal::Gone)? {
            Some(pidfd) => Pinned::ByKernel(pidfd),
            None => Pinned::SinceAccept(ticks_since_boot()?),
        };
        Ok(Self { pid, uid: peer.uid(), gid: peer.gid(), pinned })
    }
}

/// Attests the connector `peer`; looks at more than its ids and cgroup only as far as `needs` says so. `groups` reads
/// `SO_PEERGROUPS`.
///
/// The process must still be there, and still be exactly that in each of its ids: one that has executed a setuid program
/// meanwhile, or has dropped a privilege, is refused (attack 3).
pub(crate) fn attest(
    host: &Arc<Host>,
    peer: Peer,
    groups: impl Fn() -> Result<Vec<u32>, Refusal>,
    needs: impl Fn(&Caller) -> Option<Looks>,
) -> Result<Caller, Refusal> {
    let Peer { pid, uid, gid, pinned } = peer;
    let process = match pinned {
        Pinned::ByKernel(pidfd) => HeldProcess::look(host, host.process(pid, pidfd)?)?,
        Pinned::SinceAccept(accepted) => unpinned(host, pid, accepted)?,
    };
    let credentials = process.credentials();
    if credentials.uids != [uid; 4] || credentials.gids != [gid; 4] {
        return Err(Refusal::Changed);
    }
    let pod = host.pod(uid, process.cgroup(), None)?;
    let mut caller = Caller {
        listener: Listener::Unix,
        uid,
        cgroup: process.cgroup().cloned(),
        pod: pod.as_ref().map(|housed| housed.pod.clone()),
        namespace: None,
        process: Some(process.describe()),
        evidence: Box::new(NotYet),
    };
    let process = match needs(&caller) {
        None => process,
        Some(looks) => {
            // First the groups of connect(2): for too many of them the kernel returns an error without copying them.
            let connected = match looks.groups {
                GroupDetail::None => None,
                detail => Some(Groups::new(groups()?, detail)?),
            };
            let process = process.with(looks)?;
            if process.groups() != connected.as_ref() {
                return Err(Refusal::Changed);
            }
            caller.process = Some(process.describe());
            process
        }
    };
    caller.evidence = Box::new(Connector(process, pod));
    Ok(caller)
}

/// The process that has the number now, on a kernel that does not say whether it is the connector. One that started after
/// the connection was accepted certainly isn't. One that started between connect and accept is not noticed, which is why
/// callers in containers, who can make pids be used again, are not served there (attack 16).
fn unpinned(host: &Arc<Host>, pid: u32, accepted: u64) -> Result<HeldProcess, Refusal> {
    let pidfd = sys::pidfd_open(pid).map_err(|_| Refusal::Gone)?;
    let process = HeldProcess::look(host, host.process(pid, pidfd)?)?;
    if process.start_time()? > accepted {
        return Err(Refusal::Gone);
    }
    if process.contained() {
        return Err(Refusal::Unsupported("callers in containers need Linux 6.5 or newer on the unix socket"));
    }
    Ok(process)
}

fn ticks_since_boot() -> Result<u64, Refusal> {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).map_err(|_| Refusal::Kernel)?;
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().ok_or(Refusal::Kernel)?;
    let ticks = now.tv_sec() * per_second + now.tv_nsec() * per_second / 1_000_000_000;
    Ok(ticks.cast_unsigned())
}

#[cfg(test)]
mod tests;

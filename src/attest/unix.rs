//! The caller on a unix socket: the process that connected, whoever holds the descriptor now.

use std::os::fd::AsFd;
use std::path::Path;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{SysconfVar, sysconf};
use tokio::net::UnixStream;

use crate::attest::process::HeldProcess;
use crate::attest::sys;
use crate::caller::{Caller, Evidence, Listener, Refusal};

#[derive(Debug)]
struct Connector(HeldProcess);

impl Evidence for Connector {
    fn still_same(&self) -> Result<(), Refusal> {
        self.0.still_same()
    }
}

/// Attests the peer of `stream`.
///
/// User, group, pid and supplementary groups are the connector's at connect(2) (`SO_PEERCRED`, `SO_PEERPIDFD`,
/// `SO_PEERGROUPS`). The process must still be there, and still be exactly that in each of its ids: one that has executed a
/// setuid program meanwhile, or has dropped a privilege, is refused (attack 3).
pub(crate) fn attest(proc_root: &Path, stream: &UnixStream) -> Result<Caller, Refusal> {
    let peer = getsockopt(stream, PeerCredentials).map_err(|_| Refusal::Kernel)?;
    let pid = u32::try_from(peer.pid()).ok().filter(|pid| *pid != 0).ok_or(Refusal::InvisibleProcess)?;
    let groups = sys::peer_groups(stream.as_fd()).map_err(|_| Refusal::Kernel)?;
    let pinned = sys::peer_pidfd(stream.as_fd()).map_err(|_| Refusal::Gone)?;
    let kernel_pins_peer = pinned.is_some();
    let pidfd = match pinned {
        Some(pidfd) => pidfd,
        None => sys::pidfd_open(pid).map_err(|_| Refusal::Gone)?,
    };
    let process = HeldProcess::look(proc_root, pid, pidfd)?;
    if !kernel_pins_peer {
        started_before_now(&process)?;
    }
    let facts = process.facts();
    if facts.uids != [peer.uid(); 4] || facts.gids != [peer.gid(); 4] || facts.groups != groups {
        return Err(Refusal::Changed);
    }
    if !kernel_pins_peer && facts.contained {
        return Err(Refusal::Unsupported("callers in containers need Linux 6.5 or newer on the unix socket"));
    }
    Ok(Caller {
        listener: Listener::Unix,
        uid: peer.uid(),
        cgroup: facts.cgroup.clone(),
        process: Some(process.describe()),
        evidence: Box::new(Connector(process)),
    })
}

/// Before Linux 6.5 the pid may be in use again by the time it is opened. One that started after the connection was
/// accepted is certainly another; one that started between connect and accept is not noticed, which is why callers in
/// containers are not served there (attack 16).
fn started_before_now(process: &HeldProcess) -> Result<(), Refusal> {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).map_err(|_| Refusal::Kernel)?;
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().ok_or(Refusal::Kernel)?;
    let ticks = now.tv_sec() * per_second + now.tv_nsec() * per_second / 1_000_000_000;
    if process.start_time() > ticks.cast_unsigned() { Err(Refusal::Gone) } else { Ok(()) }
}

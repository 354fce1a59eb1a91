//! Where the facts of this machine are found.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl;
use nix::sys::stat::fstat;
use nix::sys::statfs::{FsType, fstatfs};

use crate::attest::cgroups::CgroupTree;
use crate::attest::hierarchies::Hierarchies;
use crate::attest::hints::Hints;
use crate::attest::sys;
use crate::caller::Refusal;

/// The machine, as the daemon sees it.
#[derive(Debug)]
pub(crate) struct Host {
    /// `/proc`, of the pid namespace in which callers are named.
    pub(crate) proc_root: PathBuf,
    /// The cgroup v2 hierarchy, if there is one.
    pub(crate) cgroups: Option<Arc<CgroupTree>>,
    /// All cgroup hierarchies, v1's too.
    pub(crate) hierarchies: Hierarchies,
    /// The daemon's own user and pid namespaces: `user:[4026531837]`.
    namespaces: [Option<OsString>; 2],
    /// Whether a process lives in namespaces of its own, by the inode of its pidfd, which no other process ever has.
    known: Mutex<HashMap<u64, bool>>,
    /// Where searches look first.
    pub(crate) hints: Hints,
    /// From Linux 6.9 on pidfds have such inodes.
    pidfds_have_inodes: bool,
}

/// `PID_FS_MAGIC` of linux/magic.h.
const PID_FS: FsType = FsType(0x5049_4446);
/// Processes whose namespaces are remembered, before all are forgotten.
const REMEMBERED: usize = 4096;

/// Links below `/proc/<pid>`.
const NAMESPACES: [&str; 2] = ["ns/user", "ns/pid"];

/// Whether a process shares a namespace with the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shared {
    Yes,
    No,
    /// The daemon may not see it: `CAP_SYS_PTRACE` is missing, and the process is another user's.
    Unseen,
}

impl Host {
    /// Looks at the daemon's own process below `proc_root`.
    pub(crate) fn new(proc_root: PathBuf, cgroups: Option<Arc<CgroupTree>>) -> Self {
        let own = |name: &str| std::fs::read_link(proc_root.join("self").join(name)).ok().map(PathBuf::into_os_string);
        let namespaces = NAMESPACES.map(own);
        let own_pidfd = sys::pidfd_open(std::process::id()).ok();
        let mountinfo = std::fs::read_to_string(proc_root.join("self/mountinfo")).unwrap_or_default();
        let kind = own_pidfd.and_then(|pidfd| Some(fstatfs(pidfd).ok()?.filesystem_type()));
        Self {
            proc_root,
            cgroups,
            hierarchies: Hierarchies::find(&mountinfo),
            namespaces,
            known: Mutex::default(),
            hints: Hints::default(),
            pidfds_have_inodes: kind == Some(PID_FS),
        }
    }

    /// What `look` says of the process behind `pidfd`, which is asked once for each process: whoever asks again and again
    /// does not cost two more links of `/proc` each time. A process that moves to other namespaces later keeps its user.
    pub(crate) fn remember(
        &self,
        pidfd: &OwnedFd,
        look: impl FnOnce() -> Result<bool, Refusal>,
    ) -> Result<bool, Refusal> {
        if !self.pidfds_have_inodes {
            return look();
        }
        let inode = fstat(pidfd).map_err(|_| Refusal::Kernel)?.st_ino;
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(answer) = known().get(&inode) {
            return Ok(*answer);
        }
        let answer = look()?;
        let mut known = known();
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(inode, answer);
        Ok(answer)
    }

    /// Whether the process whose `/proc/<pid>` is `directory` lives in the daemon's user and pid namespace, in this order.
    pub(crate) fn shares(&self, directory: impl AsFd) -> nix::Result<[Shared; 2]> {
        let mut shared = [Shared::Unseen; 2];
        for ((name, own), shared) in NAMESPACES.into_iter().zip(&self.namespaces).zip(&mut shared) {
            *shared = match (fcntl::readlinkat(&directory, name), own) {
                (Ok(link), Some(own)) if link == *own => Shared::Yes,
                (Ok(_), Some(_)) => Shared::No,
                (Ok(_), None) | (Err(Errno::EACCES | Errno::EPERM), _) => Shared::Unseen,
                (Err(error), _) => return Err(error),
            };
        }
        Ok(shared)
    }
}

//! Where the facts of this machine are found.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl;

use crate::attest::cgroups::CgroupTree;

/// The machine, as the daemon sees it.
#[derive(Debug)]
pub(crate) struct Host {
    /// `/proc`, of the pid namespace in which callers are named.
    pub(crate) proc_root: PathBuf,
    /// The cgroup v2 hierarchy, if there is one.
    pub(crate) cgroups: Option<Arc<CgroupTree>>,
    /// The daemon's own user and pid namespaces: `user:[4026531837]`.
    namespaces: [Option<OsString>; 2],
}

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
        Self { proc_root, cgroups, namespaces }
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

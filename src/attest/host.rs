//! The sources of facts on this machine.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use nix::sys::stat::fstat;
use nix::sys::statfs::{FsType, fstatfs};

use arc_swap::{ArcSwap, Guard};

use crate::attest::cgroup_mounts::CgroupMounts;
use crate::attest::cgroup_tree::CgroupTree;
use crate::attest::exec_monitor::ExecMonitor;
use crate::attest::lookups::LookupThreads;
use crate::attest::pod_lookup::{PodLookup, ResolvedPod};
use crate::attest::process_cache::{ProcessCache, ProcessHandle};
use crate::attest::sys;
use crate::caller::AttestError;
use crate::cgroup::{self, CgroupPath, PodRoots};

/// The machine, as the daemon sees it.
#[derive(Debug)]
pub(crate) struct Host {
    /// The mount of `/proc`, in the pid namespace that pids of callers refer to.
    pub(crate) proc_root: PathBuf,
    /// The kubelet's cgroup roots.
    roots: PodRoots,
    /// The cgroup hierarchies, as they were mounted at the latest test.
    cgroups: ArcSwap<Cgroups>,
    /// The processes that were read before.
    pub(crate) processes: ProcessCache,
    /// Counts executions of programs, if the daemon has the privileges for that.
    pub(crate) exec_monitor: Option<Arc<ExecMonitor>>,
    /// The threads for reads that may block.
    pub(crate) lookups: LookupThreads,
    /// From Linux 6.9 on a pidfd has an inode that is unique to its process.
    pidfds_have_inodes: bool,
    /// From Linux 6.13 on a pidfd reports the ids of its process. Before, they are read from its
    /// `status`, which is as long as the list of its groups.
    pub(crate) pidfds_report_ids: bool,
}

/// The cgroup hierarchies of the machine.
#[derive(Debug)]
pub(crate) struct Cgroups {
    /// All of them, v1's too.
    pub(crate) hierarchies: CgroupMounts,
    /// The v2 hierarchy, if it is mounted.
    pub(crate) tree: Option<Arc<CgroupTree>>,
    /// The pods in that hierarchy.
    pods: Option<PodLookup>,
}

impl Cgroups {
    fn new(hierarchies: CgroupMounts, roots: &PodRoots) -> Self {
        let tree = CgroupTree::find(&hierarchies, roots.clone()).map(Arc::new);
        Self {
            pods: tree.clone().map(PodLookup::new),
            tree,
            hierarchies,
        }
    }

    /// Returns the kubelet's cgroup roots that exist.
    pub(crate) fn pod_roots(&self) -> Vec<CgroupPath> {
        self.pods
            .as_ref()
            .map(PodLookup::discover_roots)
            .unwrap_or_default()
    }
}

/// `PID_FS_MAGIC` of linux/magic.h.
const PID_FS: FsType = FsType(0x5049_4446);

impl Host {
    /// Detects what the kernel supports, by the daemon's own process below `proc_root`.
    pub(crate) fn new(
        proc_root: PathBuf,
        hierarchies: CgroupMounts,
        roots: PodRoots,
        exec_monitor: Option<Arc<ExecMonitor>>,
    ) -> Self {
        let own_pidfd = sys::pidfd_open(std::process::id()).ok();
        let reports_ids = own_pidfd
            .as_ref()
            .and_then(|pidfd| sys::pidfd_info(pidfd.as_fd()).ok().flatten())
            .is_some();
        let kind = own_pidfd.and_then(|pidfd| Some(fstatfs(pidfd).ok()?.filesystem_type()));
        Self {
            proc_root,
            cgroups: ArcSwap::from_pointee(Cgroups::new(hierarchies, &roots)),
            roots,
            processes: ProcessCache::new(),
            exec_monitor,
            lookups: LookupThreads::default(),
            pidfds_report_ids: reports_ids,
            pidfds_have_inodes: kind == Some(PID_FS),
        }
    }

    /// Returns the cgroup hierarchies that are mounted.
    pub(crate) fn cgroups(&self) -> Guard<Arc<Cgroups>> {
        self.cgroups.load()
    }

    /// Returns the v2 hierarchy, if it is mounted.
    pub(crate) fn cgroup_tree(&self) -> Option<Arc<CgroupTree>> {
        self.cgroups().tree.clone()
    }

    /// Returns whether this process is below the cgroup of a kubelet.
    pub(crate) fn is_in_pod(&self) -> bool {
        let Ok(membership) = std::fs::read_to_string(self.proc_root.join("self/cgroup")) else {
            return false;
        };
        let cgroups = self.cgroups();
        let own =
            cgroup::unified(&membership).and_then(|shown| cgroups.hierarchies.path("", shown));
        own.is_some_and(|own| {
            let roots = cgroups.pod_roots();
            roots.iter().any(|root| own.is_at_or_below(root))
        })
    }

    /// Reads again which hierarchies are mounted. Keeps what is known of them if that is unchanged.
    /// Blocks where it has to find the daemon's own cgroup in a new mount.
    ///
    /// Only root can mount a cgroup hierarchy where this process sees it, so no caller chooses the
    /// tree. The kernel's ids of cgroups are the same in each mount. A request keeps the facts by
    /// which it was decided.
    pub(crate) fn find_cgroups_again(&self) {
        let Ok(mountinfo) = std::fs::read_to_string(self.proc_root.join("self/mountinfo")) else {
            return;
        };
        let hierarchies = self.cgroups().hierarchies.find_again(&mountinfo);
        if hierarchies != self.cgroups().hierarchies {
            tracing::info!("the mounts of cgroup hierarchies have changed");
            self.cgroups
                .store(Arc::new(Cgroups::new(hierarchies, &self.roots)));
        }
    }

    /// Returns the handle of the process behind `pidfd`, with the number that is or was `pid`.
    /// Reuses a cached handle if the inode of the pidfd proves that it is the same process.
    pub(crate) fn process(
        &self,
        pid: u32,
        pidfd: OwnedFd,
    ) -> Result<Arc<ProcessHandle>, AttestError> {
        let inode = match self.pidfds_have_inodes {
            true => {
                let facts = fstat(&pidfd);
                let facts =
                    facts.map_err(|errno| AttestError::kernel("fstat of a pidfd", errno))?;
                Some(facts.st_ino)
            }
            false => None,
        };
        if let Some(handle) = self
            .processes
            .get(pid)
            .filter(|handle| inode.is_some() && handle.inode() == inode)
        {
            return Ok(handle);
        }
        let handle = Arc::new(ProcessHandle::new(pid, pidfd, inode));
        self.processes.insert(handle.clone());
        Ok(handle)
    }

    /// Returns the pod that a process or socket in this cgroup belongs to.
    pub(crate) fn pod(
        &self,
        cgroup: Option<&CgroupPath>,
    ) -> Result<Option<ResolvedPod>, AttestError> {
        match (&self.cgroups().pods, cgroup) {
            (Some(pods), Some(cgroup)) => pods.of(cgroup),
            _ => Ok(None),
        }
    }
}

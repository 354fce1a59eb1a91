//! A process with its facts, held so that they can be verified later.
//!
//! Interfaces: `PIDFD_GET_INFO` of `ioctl_pidfd(2)` where the kernel has it, else
//! `proc_pid_status(5)` and `proc_pid_cgroup(5)`; `proc_pid_stat(5)`, `pidfd_open(2)`.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::fcntl;

use crate::attest::exec_monitor::ExecCountWatch;
use crate::attest::host::Host;
use crate::attest::proc_files::{
    executable_file, in_other_namespaces, names_container, os_error, read, read_groups, start_time,
    status_numbers, v2,
};
use crate::attest::process_cache::ProcessHandle;
use crate::attest::sys;
use crate::caller::{
    AgentProcessRef, AttestError, Executable, GroupDetail, Groups, Process, ProcessFacts, Program,
    WorkloadKey,
};
use crate::cgroup::CgroupPath;

/// The ids of a process, which change when it gains other privileges or is moved to another cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProcessIds {
    /// The user ids: real, effective, saved, file system.
    pub(crate) uids: [u32; 4],
    /// The group ids, in the same order.
    pub(crate) gids: [u32; 4],
    /// The cgroup in the v2 hierarchy.
    pub(crate) cgroup: CgroupMembership,
}

/// A process's cgroup v2: by its id where the kernel reports it, else by the text of
/// `/proc/<pid>/cgroup`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CgroupMembership {
    Id(u64),
    Text(Option<String>),
}

/// A process and its facts at one time. They can be read again without mistaking another process
/// for it.
///
/// The pidfd and the directory are both tied to one process, so its start time is read only once.
/// Reads fail once the process has exited, even if its pid is reused.
#[derive(Debug, Clone)]
pub(crate) struct ProcessSnapshot {
    host: Arc<Host>,
    handle: Arc<ProcessHandle>,
    ids: ProcessIds,
    cgroup: Option<CgroupPath>,
    in_container: bool,
    /// The supplementary groups, if they were read.
    groups: Option<Groups>,
    program: Option<Program>,
    /// The start of the process as in [`Process::started`], if it was read.
    started: Option<u64>,
}

impl ProcessSnapshot {
    /// Reads the ids and the cgroup of a process. Whether it is alive shows at the next read.
    pub(crate) fn read(host: &Arc<Host>, handle: Arc<ProcessHandle>) -> Result<Self, AttestError> {
        let directory = || handle.directory(&host.proc_root);
        let ids = ProcessIds::read(handle.pidfd(), directory)?;
        let cgroups = host.cgroups();
        let hierarchies = &cgroups.hierarchies;
        let cgroup = match (&ids.cgroup, &cgroups.tree) {
            (CgroupMembership::Text(text), _) => {
                text.as_ref().and_then(|text| hierarchies.path("", text))
            }
            (CgroupMembership::Id(id), Some(tree)) => {
                let shown = || {
                    Ok(v2(&read(directory()?, "cgroup")?)
                        .and_then(|shown| hierarchies.path("", shown)))
                };
                Some(tree.path_of_live_process(*id, shown)?)
            }
            (CgroupMembership::Id(_), None) => None,
        };
        let in_container = names_container(hierarchies, cgroup.as_ref(), directory)?
            || handle.in_other_namespaces(|| in_other_namespaces(host, &handle))?;
        Ok(Self {
            host: host.clone(),
            handle,
            ids,
            cgroup,
            in_container,
            groups: None,
            program: None,
            started: None,
        })
    }

    /// Reads these facts in addition. May block: see [`crate::attest::lookups`].
    pub(crate) fn read_facts_blocking(&self, facts: ProcessFacts) -> Result<Self, AttestError> {
        let mut next = self.clone();
        if facts.groups != GroupDetail::None {
            next.groups = Some(read_groups(self.directory()?, facts.groups)?);
        }
        if facts.program {
            next.program = Some(Program {
                exe: self.executable()?,
            });
        }
        // A zombie has no executable, but still has groups.
        if next.groups.is_some()
            || next
                .program
                .as_ref()
                .is_some_and(|program| program.exe.is_none())
        {
            self.handle.verify_alive()?;
        }
        if facts.started {
            next.started = Some(self.instance()?);
        }
        Ok(next)
    }

    /// Reads these facts in addition, on a lookup thread if that may block.
    pub(crate) async fn read_facts(
        &self,
        workload: &WorkloadKey,
        facts: ProcessFacts,
    ) -> Result<Self, AttestError> {
        if !facts.may_wait() {
            return self.read_facts_blocking(facts);
        }
        let process = self.clone();
        self.host
            .lookups
            .run(workload, move || process.read_facts_blocking(facts))
            .await
    }

    fn directory(&self) -> Result<&OwnedFd, AttestError> {
        self.handle.directory(&self.host.proc_root)
    }

    fn executable(&self) -> Result<Option<Executable>, AttestError> {
        let directory = self.directory()?;
        let path = || {
            fcntl::readlinkat(directory, "exe")
                .unwrap_or_default()
                .into()
        };
        Ok(executable_file(directory)?.map(|file| Executable {
            device: file.device,
            inode: file.inode,
            changed: file.changed,
            path: self.handle.exe_path((file.device, file.inode), path),
        }))
    }

    /// Verifies that the process is alive and all facts that were read are unchanged. May block if
    /// the executable was read.
    pub(crate) fn verify_unchanged_blocking(&self) -> Result<(), AttestError> {
        let ids = ProcessIds::read(self.handle.pidfd(), || self.directory())? == self.ids;
        let groups = match &self.groups {
            Some(groups) => read_groups(self.directory()?, GroupDetail::Digest)? == *groups,
            None => true,
        };
        let program = match &self.program {
            Some(program) => {
                file(executable_file(self.directory()?)?) == program.exe.as_ref().map(key)
            }
            None => true,
        };
        self.handle.verify_alive()?;
        if ids && groups && program {
            Ok(())
        } else {
            Err(AttestError::IdentityChanged)
        }
    }

    /// Verifies the process on a lookup thread if that may block.
    pub(crate) async fn verify_unchanged(&self, workload: &WorkloadKey) -> Result<(), AttestError> {
        if self.program.is_none() && self.groups.is_none() {
            return self.verify_unchanged_blocking();
        }
        let process = self.clone();
        self.host
            .lookups
            .run(workload, move || process.verify_unchanged_blocking())
            .await
    }

    /// Returns whether the process still runs.
    pub(crate) fn is_alive(&self) -> bool {
        self.handle.verify_alive().is_ok()
    }

    /// Verifies that the process is unchanged, and that an agent cannot take its cgroups for those
    /// of another workload.
    pub(crate) async fn for_agent(
        &self,
        workload: &WorkloadKey,
    ) -> Result<AgentProcessRef, AttestError> {
        let process = self.clone();
        self.host
            .lookups
            .run(workload, move || process.verify_unchanged_blocking())
            .await?;
        let cgroups = read(self.directory()?, "cgroup")?;
        self.host.cgroups().hierarchies.check(&cgroups)?;
        Ok(AgentProcessRef {
            pid: self.handle.pid(),
            cgroups,
        })
    }

    /// Starts to watch the process for exec.
    pub(crate) fn watch_exec(&self) -> Result<ExecCountWatch, AttestError> {
        let monitor = self
            .host
            .exec_monitor
            .as_ref()
            .ok_or(AttestError::ExecUnobservable)?;
        let watch = monitor.watch(monitor.key(self.handle.pid(), || self.workload_id())?);
        // The process is alive after that, so the pid cannot have belonged to another process
        // before.
        self.handle.verify_alive()?;
        Ok(watch)
    }

    /// Returns the id of the cgroup of its workload.
    fn workload_id(&self) -> Result<u64, AttestError> {
        let cgroups = self.host.cgroups();
        let (Some(cgroup), Some(tree)) = (&self.cgroup, &cgroups.tree) else {
            return Err(AttestError::ExecUnobservable);
        };
        let (workload, _) = cgroup.workload();
        let path = CgroupPath::parse(workload.as_str()).ok_or(AttestError::UnreadableCgroup)?;
        tree.id(&path)
    }

    /// Returns whether both agree in all facts that a rule, or SPIRE by pid, can see.
    pub(crate) fn same_facts(&self, other: &Self) -> bool {
        let exe = |held: &Self| {
            held.program
                .as_ref()
                .and_then(|program| program.exe.as_ref())
                .map(key)
        };
        self.ids == other.ids
            && self.in_container == other.in_container
            && self.groups == other.groups
            && exe(self) == exe(other)
    }

    /// Returns the ids and the cgroup.
    pub(crate) fn ids(&self) -> &ProcessIds {
        &self.ids
    }

    /// Returns the path of its cgroup, if there is a v2 hierarchy.
    pub(crate) fn cgroup(&self) -> Option<&CgroupPath> {
        self.cgroup.as_ref()
    }

    /// Returns whether it lives in a container, as [`Process::in_container`] defines it.
    pub(crate) fn in_container(&self) -> bool {
        self.in_container
    }

    /// Verifies on a lookup thread that the process has started by then, in clock ticks since boot.
    pub(crate) async fn verify_started_by(
        &self,
        ticks: u64,
        workload: &WorkloadKey,
    ) -> Result<(), AttestError> {
        let process = self.clone();
        let verify = move || match process.start_time()? > ticks {
            true => Err(AttestError::CallerGone),
            false => Ok(()),
        };
        self.host.lookups.run(workload, verify).await
    }

    /// Returns the start time in clock ticks since boot. May block.
    pub(crate) fn start_time(&self) -> Result<u64, AttestError> {
        start_time(&read(self.directory()?, "stat")?).ok_or(AttestError::kernel("stat", None))
    }

    /// Returns the number that [`Process::started`] describes.
    fn instance(&self) -> Result<u64, AttestError> {
        self.handle.inode().map_or_else(|| self.start_time(), Ok)
    }

    /// Returns whether descriptor `number` of the process is the socket with this inode.
    pub(crate) fn has_fd(&self, number: u32, inode: u32) -> bool {
        self.handle.socket(&self.host.proc_root, number) == Some(inode)
    }

    /// Returns the supplementary groups, if they were read.
    pub(crate) fn groups(&self) -> Option<&Groups> {
        self.groups.as_ref()
    }

    /// Returns the facts as a plain value.
    pub(crate) fn to_process(&self) -> Process {
        Process {
            pid: self.handle.pid(),
            gid: self.ids.gids[1],
            groups: self.groups.clone(),
            in_container: self.in_container,
            program: self.program.clone(),
            started: self.started,
        }
    }
}

impl ProcessIds {
    fn read<'d>(
        pidfd: &OwnedFd,
        directory: impl FnOnce() -> Result<&'d OwnedFd, AttestError>,
    ) -> Result<Self, AttestError> {
        match sys::pidfd_info(pidfd.as_fd()) {
            Ok(Some(sys::PidfdInfo {
                uids,
                gids,
                cgroup_id: Some(id),
            })) => Ok(Self {
                uids,
                gids,
                cgroup: CgroupMembership::Id(id),
            }),
            Ok(_) => Self::of_proc(directory()?),
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(AttestError::CallerGone),
            Err(error) => Err(AttestError::kernel("PIDFD_GET_INFO", os_error(&error))),
        }
    }

    /// Reads the ids from `/proc`, which every kernel has.
    fn of_proc(directory: &OwnedFd) -> Result<Self, AttestError> {
        let [uids, gids] = status_numbers(directory, [("Uid", 4), ("Gid", 4)])?;
        let four = |ids: Vec<u32>| {
            ids.try_into()
                .map_err(|_| AttestError::kernel("status", None))
        };
        let (uids, gids) = (four(uids)?, four(gids)?);
        let cgroups = read(directory, "cgroup")?;
        Ok(Self {
            uids,
            gids,
            cgroup: CgroupMembership::Text(v2(&cgroups).map(str::to_owned)),
        })
    }
}

/// Returns device and inode: the parts of an executable that cannot be forged (T11).
fn key(exe: &Executable) -> (u64, u64) {
    (exe.device, exe.inode)
}

fn file(facts: Option<sys::FileFacts>) -> Option<(u64, u64)> {
    facts.map(|facts| (facts.device, facts.inode))
}

#[cfg(test)]
mod tests;

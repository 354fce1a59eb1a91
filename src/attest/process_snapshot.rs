//! A process with its facts, held so that they can be verified later.
//!
//! Interfaces: `PIDFD_GET_INFO` of `ioctl_pidfd(2)` where the kernel has it, else
//! `proc_pid_status(5)` and `proc_pid_cgroup(5)`; `proc_pid_stat(5)`, `pidfd_open(2)`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{self, OFlag};
use nix::sys::stat::Mode;

use crate::attest::cgroup_mounts::CgroupMounts;
use crate::attest::exec_monitor::ExecCountWatch;
use crate::attest::host::Host;
use crate::attest::process_cache::ProcessHandle;
use crate::attest::status::{self, StatusError};
use crate::attest::sys;
use crate::caller::{
    AgentProcessRef, AttestError, Executable, GroupDetail, Groups, Process, ProcessFacts, Program,
    WorkloadKey,
};
use crate::cgroup::{self, CgroupPath};

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
    Shown(Option<String>),
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
        let credentials = ProcessIds::read(handle.pidfd(), directory)?;
        let cgroups = host.cgroups();
        let hierarchies = &cgroups.hierarchies;
        let cgroup = match (&credentials.cgroup, &cgroups.tree) {
            (CgroupMembership::Shown(shown), _) => {
                shown.as_ref().and_then(|shown| hierarchies.path("", shown))
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
            ids: credentials,
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
        let credentials = ProcessIds::read(self.handle.pidfd(), || self.directory())? == self.ids;
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
        if credentials && groups && program {
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
            cgroup: CgroupMembership::Shown(v2(&cgroups).map(str::to_owned)),
        })
    }
}

/// Returns the path on the line of the v2 hierarchy.
fn v2(cgroups: &str) -> Option<&str> {
    cgroups.lines().find_map(|line| line.strip_prefix("0::"))
}

/// Returns whether any of its cgroups names a container. On a host that also has cgroup v1, a
/// container may be in the root of the v2 hierarchy, and only v1 names it.
fn names_container<'d>(
    hierarchies: &CgroupMounts,
    cgroup: Option<&CgroupPath>,
    directory: impl FnOnce() -> Result<&'d OwnedFd, AttestError>,
) -> Result<bool, AttestError> {
    if let Some(path) = cgroup.filter(|path| !path.is_root()) {
        return Ok(path.names_container());
    }
    let text = read(directory()?, "cgroup")?;
    let mut paths = cgroup::lines(&text).map(|(names, path)| hierarchies.path(names, path));
    Ok(paths.any(|path| path.is_none_or(|path| path.names_container())))
}

/// Returns whether the process lives in another user or pid namespace than the daemon.
///
/// It does not read the links to its namespaces, for which the kernel takes a lock of the process.
/// It does not read its `status` either, which is as long as the list of its groups.
fn in_other_namespaces(host: &Host, handle: &ProcessHandle) -> Result<bool, AttestError> {
    // A user namespace that maps every id to itself equals the host's (systemd's
    // PrivateUsers=identity).
    let other_user = !is_identity_map(&read(handle.directory(&host.proc_root)?, "uid_map")?);
    // The daemon's own pidfd shows the other process: pidfd_open(2), "NSpid" from Linux 5.5 on.
    let own = host
        .proc_root
        .join("self/fdinfo")
        .join(handle.pidfd().as_raw_fd().to_string());
    let info = std::fs::File::open(own)
        .map_err(|error| AttestError::kernel("self/fdinfo", os_error(&error)))?;
    let pids = match status::numbers(info, [NAMESPACE_PIDS]) {
        Ok([pids]) => pids,
        Err(_) => {
            let [pids] = status_numbers(handle.directory(&host.proc_root)?, [NAMESPACE_PIDS])?;
            pids
        }
    };
    match pids[..] {
        // The process has exited, or is not visible from here.
        [] | [0, ..] => Err(AttestError::CallerGone),
        _ => Ok(other_user || pids.len() > 1),
    }
}

/// Returns whether the process with this pid, which is visible here, lives in this process's pid
/// namespace: then it has one pid only. Like [`in_other_namespaces`], this does not read the link
/// to its namespace.
pub(crate) fn shares_pid_namespace(proc_root: &Path, pid: i32) -> bool {
    let status = std::fs::File::open(proc_root.join(pid.to_string()).join("status"));
    status.is_ok_and(|file| {
        status::numbers(file, [NAMESPACE_PIDS]).is_ok_and(|[pids]| pids.len() == 1)
    })
}

/// Returns device and inode: the parts of an executable that cannot be forged (T11).
fn key(exe: &Executable) -> (u64, u64) {
    (exe.device, exe.inode)
}

fn file(facts: Option<sys::FileFacts>) -> Option<(u64, u64)> {
    facts.map(|facts| (facts.device, facts.inode))
}

/// Reads the executable's file. Without `CAP_SYS_PTRACE` another user's executable is not visible;
/// then no rule with `exe` matches.
fn executable_file(directory: &OwnedFd) -> Result<Option<sys::FileFacts>, AttestError> {
    match sys::file_facts(directory.as_fd(), c"exe") {
        Ok(facts) => Ok(Some(facts)),
        Err(Errno::EACCES | Errno::EPERM | Errno::ENOENT) => Ok(None),
        Err(_) => Err(AttestError::CallerGone),
    }
}

/// The line with the process's pid in each of its pid namespaces, from that of the `/proc` mount
/// on. The kernel nests at most 32.
const NAMESPACE_PIDS: (&str, usize) = ("NSpid", 33);

fn read_groups(directory: &OwnedFd, detail: GroupDetail) -> Result<Groups, AttestError> {
    let [groups] = status_numbers(directory, [("Groups", Groups::MAX_GROUPS)])?;
    Groups::new(groups, detail)
}

fn status_numbers<const N: usize>(
    directory: &OwnedFd,
    lines: [(&str, usize); N],
) -> Result<[Vec<u32>; N], AttestError> {
    status::numbers(open(directory, "status")?, lines).map_err(|error| match error {
        StatusError::Io(error) => read_error("status", error),
        StatusError::Malformed => AttestError::kernel("status", None),
        // A process always has four ids of each kind, so only its groups can be too many.
        StatusError::TooMany => AttestError::TooManyGroups,
    })
}

fn read(directory: &OwnedFd, name: &'static str) -> Result<String, AttestError> {
    sys::read_whole(&open(directory, name)?, usize::MAX).map_err(|error| read_error(name, error))
}

fn open(directory: &OwnedFd, name: &'static str) -> Result<OwnedFd, AttestError> {
    let file = fcntl::openat(
        directory,
        name,
        OFlag::O_RDONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    );
    file.map_err(|error| read_error(name, error))
}

fn read_error(name: &'static str, error: Errno) -> AttestError {
    match error {
        Errno::ESRCH | Errno::ENOENT => AttestError::CallerGone,
        error => AttestError::kernel(name, error),
    }
}

fn os_error(error: &io::Error) -> Option<Errno> {
    error.raw_os_error().map(Errno::from_raw)
}

/// Parses field 22 of `stat`. It counts from the *last* `)`, since the process chooses the name in
/// field 2.
pub(crate) fn start_time(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Returns whether a `uid_map` maps every id to itself, as in the initial user namespace.
pub(crate) fn is_identity_map(text: &str) -> bool {
    let mut numbers = text.split_ascii_whitespace();
    (
        numbers.next(),
        numbers.next(),
        numbers.next(),
        numbers.next(),
    ) == (Some("0"), Some("0"), Some("4294967295"), None)
}

#[cfg(test)]
mod tests;

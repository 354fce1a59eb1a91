//! What `/proc` says of a process, held so that it can be asked whether it is still the same one.
//!
//! Interfaces: `proc_pid_stat(5)`, `proc_pid_status(5)`, `proc_pid_cgroup(5)`, `pidfd_open(2)`.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{self, OFlag};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{Mode, fstatat};

use crate::caller::{Executable, Process, Refusal};
use crate::cgroup::CgroupPath;

/// Everything that a rule, or SPIRE by pid, can see of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Real, effective, saved, filesystem.
    pub(crate) uids: [u32; 4],
    /// Likewise.
    pub(crate) gids: [u32; 4],
    /// Supplementary, ascending.
    pub(crate) groups: Vec<u32>,
    /// In the v2 hierarchy.
    pub(crate) cgroup: Option<CgroupPath>,
    /// See [`Process::contained`].
    pub(crate) contained: bool,
    /// Where the daemon may see it.
    pub(crate) exe: Option<Executable>,
}

/// A process that was looked at, and can be looked at again without mistaking another one for it.
#[derive(Debug)]
pub(crate) struct HeldProcess {
    pid: u32,
    start_time: u64,
    pidfd: OwnedFd,
    /// Of `/proc/<pid>`: reads fail once this process is gone, even if its number is in use again.
    directory: OwnedFd,
    facts: Facts,
}

impl HeldProcess {
    /// Looks at the process behind `pidfd`, which is `pid` in the daemon's pid namespace.
    pub(crate) fn look(proc_root: &Path, pid: u32, pidfd: OwnedFd) -> Result<Self, Refusal> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_PATH;
        let directory =
            fcntl::open(&proc_root.join(pid.to_string()), flags, Mode::empty()).map_err(|_| Refusal::Gone)?;
        let start_time = start_time(&read(&directory, "stat")?).ok_or(Refusal::Kernel)?;
        let facts = Facts::read(&directory)?;
        let held = Self { pid, start_time, pidfd, directory, facts };
        // Alive after the directory was opened, so that the number cannot have been another process's at that time.
        held.alive()?;
        Ok(held)
    }

    /// Whether it runs. A zombie still has its `/proc` entries, but its pidfd is readable.
    fn alive(&self) -> Result<(), Refusal> {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::ZERO) {
            Ok(0) => Ok(()),
            Ok(_) => Err(Refusal::Gone),
            Err(_) => Err(Refusal::Kernel),
        }
    }

    /// Whether it is alive and every fact of it as it was.
    pub(crate) fn still_same(&self) -> Result<(), Refusal> {
        let unchanged = Facts::read(&self.directory)? == self.facts
            && start_time(&read(&self.directory, "stat")?) == Some(self.start_time);
        self.alive()?;
        if unchanged { Ok(()) } else { Err(Refusal::Changed) }
    }

    /// In clock ticks since boot.
    pub(crate) fn start_time(&self) -> u64 {
        self.start_time
    }

    /// What was read.
    pub(crate) fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Whether descriptor `number` of the process is the socket with this inode.
    pub(crate) fn holds(&self, number: &str, inode: u32) -> bool {
        let link = fcntl::readlinkat(&self.directory, Path::new("fd").join(number).as_path());
        link.is_ok_and(|link| link.to_str() == Some(&socket_link(inode)))
    }

    /// As a plain value.
    pub(crate) fn describe(&self) -> Process {
        Process {
            pid: self.pid,
            start_time: self.start_time,
            gid: self.facts.gids[1],
            groups: self.facts.groups.clone(),
            exe: self.facts.exe.clone(),
            contained: self.facts.contained,
        }
    }
}

/// How `/proc/<pid>/fd` shows a socket.
pub(crate) fn socket_link(inode: u32) -> String {
    format!("socket:[{inode}]")
}

impl Facts {
    fn read(directory: &OwnedFd) -> Result<Self, Refusal> {
        let status = Status::parse(&read(directory, "status")?).ok_or(Refusal::Kernel)?;
        let cgroups = read(directory, "cgroup")?;
        let contained = status.namespaces > 1
            || !is_identity_map(&read(directory, "uid_map")?)
            || cgroup_paths(&cgroups).any(|path| CgroupPath::parse(path).is_none_or(|path| path.names_container()));
        let cgroup = cgroups.lines().find_map(|line| line.strip_prefix("0::")).and_then(CgroupPath::parse);
        let Status { uids, gids, groups, .. } = status;
        Ok(Self { uids, gids, groups, cgroup, contained, exe: executable(directory)? })
    }
}

/// Without `CAP_SYS_PTRACE` another user's executable can't be seen; then no rule by `exe` matches.
fn executable(directory: &OwnedFd) -> Result<Option<Executable>, Refusal> {
    let stat = match fstatat(directory, "exe", fcntl::AtFlags::empty()) {
        Ok(stat) => stat,
        Err(Errno::EACCES | Errno::EPERM | Errno::ENOENT) => return Ok(None),
        Err(_) => return Err(Refusal::Gone),
    };
    let path = fcntl::readlinkat(directory, "exe").map_or_else(|_| PathBuf::new(), PathBuf::from);
    Ok(Some(Executable { device: stat.st_dev, inode: stat.st_ino, path }))
}

fn read(directory: &OwnedFd, name: &str) -> Result<String, Refusal> {
    let open = || -> io::Result<String> {
        let file = fcntl::openat(directory, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        let mut bytes = Vec::new();
        File::from(file).read_to_end(&mut bytes)?;
        // A process may have named itself in any bytes; everything that is read here is ASCII.
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    open().map_err(|error| match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ESRCH | Errno::ENOENT) => Refusal::Gone,
        _ => {
            tracing::warn!(%error, file = name, "a caller's /proc entry cannot be read");
            Refusal::Kernel
        }
    })
}

/// Field 22 of `stat`. Counted from the *last* `)`, since field 2 is a name that the process chooses.
pub(crate) fn start_time(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Status {
    pub(crate) uids: [u32; 4],
    pub(crate) gids: [u32; 4],
    pub(crate) groups: Vec<u32>,
    /// Of how many nested pid namespaces, from that of the `/proc` mount, the process is a member.
    pub(crate) namespaces: usize,
}

impl Status {
    /// Reads the lines that matter; `None` if one is missing. `Name:` comes first and holds what the process chose, but
    /// its newlines are escaped by the kernel.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let numbers =
            |name: &str| field(name)?.split_ascii_whitespace().map(|n| n.parse().ok()).collect::<Option<Vec<u32>>>();
        let mut groups = numbers("Groups")?;
        groups.sort_unstable();
        groups.dedup();
        Some(Self {
            uids: numbers("Uid")?.try_into().ok()?,
            gids: numbers("Gid")?.try_into().ok()?,
            groups,
            namespaces: numbers("NSpid")?.len(),
        })
    }
}

/// The paths of `/proc/<pid>/cgroup`: three fields by `:`, of which the last may hold more of them.
fn cgroup_paths(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| line.splitn(3, ':').nth(2))
}

/// Whether a `uid_map` maps every id to itself, as in the initial user namespace.
pub(crate) fn is_identity_map(text: &str) -> bool {
    let mut numbers = text.split_ascii_whitespace();
    (numbers.next(), numbers.next(), numbers.next(), numbers.next()) == (Some("0"), Some("0"), Some("4294967295"), None)
}

#[cfg(test)]
mod tests;

//! Finds the process behind a TCP caller's socket, among the processes of the socket's own cgroup.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::attest::cgroups::CgroupTree;
use crate::attest::inet_diag::Socket;
use crate::attest::process::{HeldProcess, socket_link};
use crate::attest::sys;
use crate::caller::Refusal;
use crate::cgroup::CgroupPath;

/// How much one search may look at. The loop is as long as the caller makes it (attack 21).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    /// Descriptors.
    pub(crate) descriptors: usize,
    /// Time.
    pub(crate) time: Duration,
}

impl Default for Budget {
    fn default() -> Self {
        Self { descriptors: 4096, time: Duration::from_millis(20) }
    }
}

/// A process that holds the socket, and under which descriptor number.
#[derive(Debug)]
pub(crate) struct Holder {
    pub(crate) process: HeldProcess,
    pub(crate) descriptor: String,
}

/// The process that holds `socket`, where `cgroup` is the socket's own.
///
/// Several may (a forked worker pool does): they have to agree in everything that a rule or SPIRE can see, and the oldest is
/// named. In the root cgroup only the processes of the socket's user are looked at, since all others are no neighbours.
/// This proves no exclusive ownership: a descriptor may wait in a queue or an io_uring (attack 7).
pub(crate) fn holder(
    proc_root: &Path,
    cgroups: &CgroupTree,
    socket: &Socket,
    cgroup: &CgroupPath,
    budget: Budget,
) -> Result<Holder, Refusal> {
    let mut spent = Spent { descriptors: 0, deadline: Instant::now() + budget.time, budget };
    let mut found: Option<Holder> = None;
    for pid in cgroups.processes(cgroup)? {
        // 0 is a process outside the daemon's pid namespace.
        if pid == 0 {
            return Err(Refusal::InvisibleProcess);
        }
        let directory = proc_root.join(pid.to_string());
        if cgroup.is_root() && !fs::metadata(&directory).is_ok_and(|process| process.uid() == socket.uid) {
            spent.in_time()?;
            continue;
        }
        let Some(next) = holding(proc_root, pid, &directory, socket, &mut spent)? else { continue };
        let facts = next.process.facts();
        if facts.uids != [socket.uid; 4] || facts.cgroup.as_ref() != Some(cgroup) {
            return Err(Refusal::Ambiguous);
        }
        found = Some(match found {
            Some(first) if first.process.facts() != facts => return Err(Refusal::Ambiguous),
            Some(first) if first.process.start_time() <= next.process.start_time() => first,
            _ => next,
        });
    }
    found.ok_or(Refusal::NoHolder)
}

/// Looks through one process's descriptors. Order matters: pidfd, then the facts, then the descriptor once more.
fn holding(
    proc_root: &Path,
    pid: u32,
    directory: &Path,
    socket: &Socket,
    spent: &mut Spent,
) -> Result<Option<Holder>, Refusal> {
    let Some(descriptor) = descriptor(directory, socket.inode, spent)? else { return Ok(None) };
    // One that exits meanwhile holds nothing any more.
    let Ok(pidfd) = sys::pidfd_open(pid) else { return Ok(None) };
    let process = match HeldProcess::look(proc_root, pid, pidfd) {
        Ok(process) => process,
        Err(Refusal::Gone) => return Ok(None),
        Err(refusal) => return Err(refusal),
    };
    if !process.holds(&descriptor, socket.inode) {
        return Ok(None);
    }
    if process.facts().gids.iter().any(|gid| *gid != process.facts().gids[0]) {
        return Err(Refusal::Changed);
    }
    Ok(Some(Holder { process, descriptor }))
}

fn descriptor(directory: &Path, inode: u32, spent: &mut Spent) -> Result<Option<String>, Refusal> {
    let wanted = socket_link(inode);
    // A process that is gone, or (kernel threads, no privilege) shows nothing.
    let Ok(entries) = fs::read_dir(directory.join("fd")) else { return Ok(None) };
    for entry in entries.filter_map(Result::ok) {
        spent.one()?;
        if fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == OsStr::new(&wanted)) {
            return Ok(entry.file_name().into_string().ok());
        }
    }
    Ok(None)
}

struct Spent {
    descriptors: usize,
    deadline: Instant,
    budget: Budget,
}

impl Spent {
    fn one(&mut self) -> Result<(), Refusal> {
        self.descriptors += 1;
        if self.descriptors > self.budget.descriptors { Err(Refusal::TooManyDescriptors) } else { self.in_time() }
    }

    fn in_time(&self) -> Result<(), Refusal> {
        if Instant::now() > self.deadline { Err(Refusal::TooManyDescriptors) } else { Ok(()) }
    }
}

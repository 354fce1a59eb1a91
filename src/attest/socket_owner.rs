//! Finds the process that holds a TCP caller's socket, among the processes of the socket's own
//! cgroup.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::dir::Dir;
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, stat};

use crate::attest::cgroup_tree::CgroupTree;
use crate::attest::host::Host;
use crate::attest::process_cache::{self, ProcessHandle};
use crate::attest::process_snapshot::ProcessSnapshot;
use crate::attest::sock_diag::SocketInfo;
use crate::attest::sys;
use crate::caller::{AttestError, ProcessFacts};
use crate::cgroup::CgroupPath;

/// The limits of one search. The caller determines the length of its loop (T21).
#[derive(Debug, Clone, Copy)]
pub(crate) struct SearchBudget {
    /// The bytes of the cgroup's list of processes.
    pub(crate) list: usize,
    /// The number of descriptors that are read.
    pub(crate) descriptors: usize,
    /// The CPU time of the search.
    pub(crate) time: Duration,
}

impl SearchBudget {
    /// The budget of the first search: as much as a small program needs, well under a millisecond.
    pub(crate) const INLINE: Self = Self {
        list: 1024,
        descriptors: 256,
        time: Duration::from_millis(1),
    };
    /// The most that one search may use.
    pub(crate) const OFFLOADED: Self = Self {
        list: 64 * 1024,
        descriptors: 4096,
        time: Duration::from_millis(20),
    };
}

/// The number of steps between two reads of the clock.
const CLOCK_CHECK_EVERY: usize = 64;

/// A process that holds the socket, and the descriptor number.
#[derive(Debug)]
pub(crate) struct SocketOwner {
    pub(crate) process: ProcessSnapshot,
    pub(crate) descriptor: u32,
}

/// Finds the process that holds `socket`. `cgroup` is the socket's own.
///
/// Several processes may hold it, as in a forked worker pool. They have to agree in all facts that
/// a rule or SPIRE can see, and the oldest one is returned. In the root cgroup only processes of
/// the socket's user are searched, since the others there are unrelated. This does not prove
/// exclusive ownership: a descriptor may wait in a queue or an io_uring (T7).
///
/// Blocks. Fails if none holds it, if they disagree, or if `budget` is used up before the end.
pub(crate) fn find_socket_owner(
    host: &Arc<Host>,
    cgroups: &CgroupTree,
    socket: &SocketInfo,
    cgroup: &CgroupPath,
    facts: ProcessFacts,
    budget: SearchBudget,
) -> Result<SocketOwner, AttestError> {
    let mut tracker = BudgetTracker::start(budget);
    let mut found: Option<SocketOwner> = None;
    for pid in cgroups.processes(cgroup, budget.list)? {
        // Pid 0 is a process outside the daemon's pid namespace.
        if pid == 0 {
            return Err(AttestError::InvisibleProcess);
        }
        let directory = host.proc_root.join(pid.to_string());
        tracker.check_time()?;
        if cgroup.is_root() && !stat(&directory).is_ok_and(|process| process.st_uid == socket.uid) {
            continue;
        }
        let Some(next) = process_owning(host, pid, &directory, socket, facts, &mut tracker)? else {
            continue;
        };
        if next.process.ids().uids != [socket.uid; 4] || next.process.cgroup() != Some(cgroup) {
            return Err(AttestError::Ambiguous);
        }
        found = Some(match found {
            Some(first) if !first.process.same_facts(&next.process) => {
                return Err(AttestError::Ambiguous);
            }
            Some(first) if first.process.start_time()? <= next.process.start_time()? => first,
            _ => next,
        });
    }
    found.ok_or(AttestError::NoSocketOwner)
}

/// Searches the descriptors of one process. The order matters: first the pidfd, then the facts,
/// then the descriptor again.
fn process_owning(
    host: &Arc<Host>,
    pid: u32,
    directory: &Path,
    socket: &SocketInfo,
    facts: ProcessFacts,
    tracker: &mut BudgetTracker,
) -> Result<Option<SocketOwner>, AttestError> {
    let handle = host.processes.get(pid);
    let hint = match &handle {
        Some(handle) => {
            handle.find_by_hint(&host.proc_root, socket.inode, || tracker.charge_fd())?
        }
        None => None,
    };
    let (handle, descriptor) = match (handle, hint) {
        (Some(handle), Some(number)) => (handle, number),
        (handle, _) => {
            let Some(found) = scan_fds(directory, socket.inode, tracker)? else {
                return Ok(None);
            };
            // The pid may belong to another process by now. A process that has exited holds
            // nothing.
            match handle
                .filter(|handle| handle.verify_alive().is_ok())
                .map_or_else(|| open_process(host, pid), Ok)
            {
                Ok(handle) => {
                    handle.replace_socket_hints(found.others.into_iter());
                    (handle, found.descriptor)
                }
                Err(AttestError::CallerGone) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    };
    handle.record_held(descriptor);
    let process = match ProcessSnapshot::read(host, handle)
        .and_then(|process| process.read_facts_blocking(facts))
    {
        Ok(process) => process,
        Err(AttestError::CallerGone) => return Ok(None),
        Err(error) => return Err(error),
    };
    if !process.has_fd(descriptor, socket.inode) {
        return Ok(None);
    }
    let gids = process.ids().gids;
    if gids != [gids[0]; 4] {
        return Err(AttestError::IdentityChanged);
    }
    Ok(Some(SocketOwner {
        process,
        descriptor,
    }))
}

fn open_process(host: &Host, pid: u32) -> Result<Arc<ProcessHandle>, AttestError> {
    host.process(
        pid,
        sys::pidfd_open(pid).map_err(|_| AttestError::CallerGone)?,
    )
}

/// A socket in the descriptor table of a process.
struct FoundSocket {
    descriptor: u32,
    /// The inode and descriptor of each other socket that was read before it.
    others: Vec<(u32, u32)>,
}

/// Finds the socket in the process with this directory. The highest descriptors come first: a new
/// connection mostly has the last free number.
fn scan_fds(
    directory: &Path,
    inode: u32,
    tracker: &mut BudgetTracker,
) -> Result<Option<FoundSocket>, AttestError> {
    // The process has exited, or shows nothing (kernel threads, missing privilege).
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let Ok(mut open) = Dir::open(&directory.join("fd"), flags, Mode::empty()) else {
        return Ok(None);
    };
    let mut numbers: Vec<u32> = Vec::new();
    for entry in open.iter() {
        tracker.charge_fd()?;
        numbers.extend(
            entry
                .ok()
                .and_then(|entry| entry.file_name().to_str().ok()?.parse::<u32>().ok()),
        );
    }
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    let mut others = Vec::new();
    for descriptor in numbers {
        tracker.check_time()?;
        match process_cache::socket(open.as_fd(), descriptor) {
            Some(found) if found == inode => {
                return Ok(Some(FoundSocket { descriptor, others }));
            }
            Some(other) => others.push((other, descriptor)),
            None => {}
        }
    }
    Ok(None)
}

/// The cost of one search so far. Its time is CPU time, not wall time, so that a loaded machine
/// does not make searches fail.
struct BudgetTracker {
    descriptors: usize,
    steps: usize,
    /// Set at the first read of the clock, which a short search does not reach.
    deadline: Option<Duration>,
    budget: SearchBudget,
}

impl BudgetTracker {
    fn start(budget: SearchBudget) -> Self {
        Self {
            descriptors: 0,
            steps: 0,
            deadline: None,
            budget,
        }
    }

    fn charge_fd(&mut self) -> Result<(), AttestError> {
        self.descriptors += 1;
        if self.descriptors > self.budget.descriptors {
            Err(AttestError::TooManyDescriptors)
        } else {
            Ok(())
        }
    }

    /// Counts a step. Call it for each process and each descriptor that is read.
    fn check_time(&mut self) -> Result<(), AttestError> {
        self.steps += 1;
        if !self.steps.is_multiple_of(CLOCK_CHECK_EVERY) {
            return Ok(());
        }
        let now =
            sys::thread_time().map_err(|errno| AttestError::kernel("clock_gettime", errno))?;
        let deadline = *self.deadline.get_or_insert(now + self.budget.time);
        if now > deadline {
            Err(AttestError::TooManyDescriptors)
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests;

//! Finds the process behind a TCP caller's socket, among the processes of the socket's own cgroup.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::dir::Dir;
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, stat};
use nix::time::{ClockId, clock_gettime};

use crate::attest::cgroup_tree::CgroupTree;
use crate::attest::host::Host;
use crate::attest::process_cache::{self, ProcessHandle};
use crate::attest::process_snapshot::ProcessSnapshot;
use crate::attest::sock_diag::SocketInfo;
use crate::attest::sys;
use crate::caller::{AttestError, ProcessFacts};
use crate::cgroup::CgroupPath;

/// How much one search may look at. The loop is as long as the caller makes it (attack 21).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    /// Bytes in the list of the cgroup's processes.
    pub(crate) list: usize,
    /// Descriptors.
    pub(crate) descriptors: usize,
    /// Of the processor.
    pub(crate) time: Duration,
}

impl Budget {
    /// What may be spent on an I/O thread: as much as a small program needs, well under a millisecond.
    pub(crate) const INLINE: Self = Self {
        list: 1024,
        descriptors: 256,
        time: Duration::from_millis(1),
    };
    /// All that one search may spend.
    pub(crate) const OFFLOADED: Self = Self {
        list: 64 * 1024,
        descriptors: 4096,
        time: Duration::from_millis(20),
    };
}

/// Between two looks at the clock.
const CLOCK_CHECK_EVERY: usize = 64;

/// A process that holds the socket, and under which descriptor number.
#[derive(Debug)]
pub(crate) struct SocketOwner {
    pub(crate) process: ProcessSnapshot,
    pub(crate) descriptor: u32,
}

/// The process that holds `socket`, where `cgroup` is the socket's own.
///
/// Several may (a forked worker pool does): they have to agree in everything that a rule or SPIRE can see, and the oldest is
/// named. In the root cgroup only the processes of the socket's user are looked at, since all others are no neighbours.
/// This proves no exclusive ownership: a descriptor may wait in a queue or an io_uring (attack 7).
pub(crate) fn find_socket_owner(
    host: &Arc<Host>,
    cgroups: &CgroupTree,
    socket: &SocketInfo,
    cgroup: &CgroupPath,
    (looks, budget): (ProcessFacts, Budget),
) -> Result<SocketOwner, AttestError> {
    let mut spent = BudgetTracker::start(budget);
    let mut found: Option<SocketOwner> = None;
    for pid in cgroups.processes(cgroup, budget.list)? {
        // 0 is a process outside the daemon's pid namespace.
        if pid == 0 {
            return Err(AttestError::InvisibleProcess);
        }
        let directory = host.proc_root.join(pid.to_string());
        spent.check_time()?;
        if cgroup.is_root() && !stat(&directory).is_ok_and(|process| process.st_uid == socket.uid) {
            continue;
        }
        let Some(next) = process_owning(host, pid, &directory, (socket, looks), &mut spent)? else {
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

/// Looks through one process's descriptors. Order matters: pidfd, then the facts, then the descriptor once more.
fn process_owning(
    host: &Arc<Host>,
    pid: u32,
    directory: &Path,
    (socket, looks): (&SocketInfo, ProcessFacts),
    spent: &mut BudgetTracker,
) -> Result<Option<SocketOwner>, AttestError> {
    let known = host.processes.of(pid);
    let hinted = match &known {
        Some(known) => known.find_by_hint(&host.proc_root, socket.inode, || spent.charge_fd())?,
        None => None,
    };
    let (known, descriptor) = match (known, hinted) {
        (Some(known), Some(number)) => (known, number),
        (known, _) => {
            let mut others = Vec::new();
            let Some(number) = read_fd(directory, socket.inode, &mut others, spent)? else {
                return Ok(None);
            };
            // The number may be another process's by now. One that exits meanwhile holds nothing any more.
            match known
                .filter(|known| known.alive().is_ok())
                .map_or_else(|| scan_fds(host, pid), Ok)
            {
                Ok(known) => {
                    known.scanned(others.into_iter());
                    (known, number)
                }
                Err(AttestError::CallerGone) => return Ok(None),
                Err(refusal) => return Err(refusal),
            }
        }
    };
    known.record_held(descriptor);
    let process =
        match ProcessSnapshot::read_snapshot(host, known).and_then(|process| process.with(looks)) {
            Ok(process) => process,
            Err(AttestError::CallerGone) => return Ok(None),
            Err(refusal) => return Err(refusal),
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

fn scan_fds(host: &Host, pid: u32) -> Result<Arc<ProcessHandle>, AttestError> {
    host.process(
        pid,
        sys::pidfd_open(pid).map_err(|_| AttestError::CallerGone)?,
    )
}

/// The number of the descriptor that is the socket, of the process whose directory this is. The highest come first: a
/// connection that was just made has the number of the last one that was free. `others` gets the sockets before it, by inode
/// and number.
fn read_fd(
    directory: &Path,
    inode: u32,
    others: &mut Vec<(u32, u32)>,
    spent: &mut BudgetTracker,
) -> Result<Option<u32>, AttestError> {
    // A process that is gone, or (kernel threads, no privilege) shows nothing.
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let Ok(mut open) = Dir::open(&directory.join("fd"), flags, Mode::empty()) else {
        return Ok(None);
    };
    let mut numbers: Vec<u32> = Vec::new();
    for entry in open.iter() {
        spent.charge_fd()?;
        numbers.extend(
            entry
                .ok()
                .and_then(|entry| entry.file_name().to_str().ok()?.parse::<u32>().ok()),
        );
    }
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    for number in numbers {
        spent.check_time()?;
        match process_cache::socket(open.as_fd(), number) {
            Some(found) if found == inode => return Ok(Some(number)),
            Some(other) => others.push((other, number)),
            None => {}
        }
    }
    Ok(None)
}

/// What one search has cost. Its time is that of the processor: on a busy machine a search is not longer for its caller's
/// neighbours because it has to wait for its turn.
struct BudgetTracker {
    descriptors: usize,
    looks: usize,
    /// From the first look at the clock on: a short search takes none.
    deadline: Option<Duration>,
    budget: Budget,
}

impl BudgetTracker {
    fn start(budget: Budget) -> Self {
        Self {
            descriptors: 0,
            looks: 0,
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

    /// To be called for each process and each descriptor that is looked at.
    fn check_time(&mut self) -> Result<(), AttestError> {
        self.looks += 1;
        if !self.looks.is_multiple_of(CLOCK_CHECK_EVERY) {
            return Ok(());
        }
        let now = thread_time()?;
        let deadline = *self.deadline.get_or_insert(now + self.budget.time);
        if now > deadline {
            Err(AttestError::TooManyDescriptors)
        } else {
            Ok(())
        }
    }
}

fn thread_time() -> Result<Duration, AttestError> {
    let now = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_err(|_| AttestError::Kernel)?;
    Ok(Duration::from(now))
}

#[cfg(test)]
mod tests;

//! Finds the process behind a TCP caller's socket, among the processes of the socket's own cgroup.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::dir::Dir;
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, stat};
use nix::time::{ClockId, clock_gettime};

use crate::attest::cgroups::CgroupTree;
use crate::attest::host::Host;
use crate::attest::inet_diag::Socket;
use crate::attest::known::{self, Known};
use crate::attest::process::HeldProcess;
use crate::attest::sys;
use crate::caller::{Looks, Refusal};
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
    pub(crate) const SHORT: Self = Self { list: 1024, descriptors: 256, time: Duration::from_millis(1) };
    /// All that one search may spend.
    pub(crate) const LONG: Self = Self { list: 64 * 1024, descriptors: 4096, time: Duration::from_millis(20) };
}

/// Between two looks at the clock.
const LOOKS: usize = 64;

/// A process that holds the socket, and under which descriptor number.
#[derive(Debug)]
pub(crate) struct Holder {
    pub(crate) process: HeldProcess,
    pub(crate) descriptor: u32,
}

/// The process that holds `socket`, where `cgroup` is the socket's own.
///
/// Several may (a forked worker pool does): they have to agree in everything that a rule or SPIRE can see, and the oldest is
/// named. In the root cgroup only the processes of the socket's user are looked at, since all others are no neighbours.
/// This proves no exclusive ownership: a descriptor may wait in a queue or an io_uring (attack 7).
pub(crate) fn holder(
    host: &Arc<Host>,
    cgroups: &CgroupTree,
    socket: &Socket,
    cgroup: &CgroupPath,
    (looks, budget): (Looks, Budget),
) -> Result<Holder, Refusal> {
    let mut spent = Spent::begin(budget);
    let mut found: Option<Holder> = None;
    for pid in cgroups.processes(cgroup, budget.list)? {
        // 0 is a process outside the daemon's pid namespace.
        if pid == 0 {
            return Err(Refusal::InvisibleProcess);
        }
        let directory = host.proc_root.join(pid.to_string());
        spent.in_time()?;
        if cgroup.is_root() && !stat(&directory).is_ok_and(|process| process.st_uid == socket.uid) {
            continue;
        }
        let Some(next) = holding(host, pid, &directory, (socket, looks), &mut spent)? else { continue };
        if next.process.credentials().uids != [socket.uid; 4] || next.process.cgroup() != Some(cgroup) {
            return Err(Refusal::Ambiguous);
        }
        found = Some(match found {
            Some(first) if !first.process.agrees_with(&next.process) => return Err(Refusal::Ambiguous),
            Some(first) if first.process.start_time()? <= next.process.start_time()? => first,
            _ => next,
        });
    }
    found.ok_or(Refusal::NoHolder)
}

/// Looks through one process's descriptors. Order matters: pidfd, then the facts, then the descriptor once more.
fn holding(
    host: &Arc<Host>,
    pid: u32,
    directory: &Path,
    (socket, looks): (&Socket, Looks),
    spent: &mut Spent,
) -> Result<Option<Holder>, Refusal> {
    let known = host.processes.of(pid);
    let hinted = match &known {
        Some(known) => known.hinted(&host.proc_root, socket.inode, || spent.one())?,
        None => None,
    };
    let (known, descriptor) = match (known, hinted) {
        (Some(known), Some(number)) => (known, number),
        (known, _) => {
            let Some((number, others)) = descriptor(directory, socket.inode, spent)? else { return Ok(None) };
            // The number may be another process's by now. One that exits meanwhile holds nothing any more.
            match known.filter(|known| known.alive().is_ok()).map_or_else(|| opened(host, pid), Ok) {
                Ok(known) => {
                    known.scanned(others.into_iter());
                    (known, number)
                }
                Err(Refusal::Gone) => return Ok(None),
                Err(refusal) => return Err(refusal),
            }
        }
    };
    known.held(descriptor);
    let process = match HeldProcess::look(host, known).and_then(|process| process.with(looks)) {
        Ok(process) => process,
        Err(Refusal::Gone) => return Ok(None),
        Err(refusal) => return Err(refusal),
    };
    if !process.holds(descriptor, socket.inode) {
        return Ok(None);
    }
    let gids = process.credentials().gids;
    if gids != [gids[0]; 4] {
        return Err(Refusal::Changed);
    }
    Ok(Some(Holder { process, descriptor }))
}

fn opened(host: &Host, pid: u32) -> Result<Arc<Known>, Refusal> {
    host.process(pid, sys::pidfd_open(pid).map_err(|_| Refusal::Gone)?)
}

/// The number of the descriptor that is the socket, of the process whose directory this is. The highest come first: a
/// connection that was just made has the number of the last one that was free. With it the sockets that were come across before
/// it, by inode and number.
fn descriptor(directory: &Path, inode: u32, spent: &mut Spent) -> Result<Option<(u32, Vec<(u32, u32)>)>, Refusal> {
    // A process that is gone, or (kernel threads, no privilege) shows nothing.
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let Ok(mut open) = Dir::open(&directory.join("fd"), flags, Mode::empty()) else { return Ok(None) };
    let mut numbers: Vec<u32> = Vec::new();
    for entry in open.iter() {
        spent.one()?;
        numbers.extend(entry.ok().and_then(|entry| entry.file_name().to_str().ok()?.parse::<u32>().ok()));
    }
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    let mut others = Vec::new();
    for number in numbers {
        spent.in_time()?;
        match known::socket(open.as_fd(), number) {
            Some(found) if found == inode => return Ok(Some((number, others))),
            Some(other) => others.push((other, number)),
            None => {}
        }
    }
    Ok(None)
}

/// What one search has cost. Its time is that of the processor: on a busy machine a search is not longer for its caller's
/// neighbours because it has to wait for its turn.
struct Spent {
    descriptors: usize,
    looks: usize,
    /// From the first look at the clock on: a short search takes none.
    deadline: Option<Duration>,
    budget: Budget,
}

impl Spent {
    fn begin(budget: Budget) -> Self {
        Self { descriptors: 0, looks: 0, deadline: None, budget }
    }

    fn one(&mut self) -> Result<(), Refusal> {
        self.descriptors += 1;
        if self.descriptors > self.budget.descriptors { Err(Refusal::TooManyDescriptors) } else { Ok(()) }
    }

    /// To be called for each process and each descriptor that is looked at.
    fn in_time(&mut self) -> Result<(), Refusal> {
        self.looks += 1;
        if !self.looks.is_multiple_of(LOOKS) {
            return Ok(());
        }
        let now = thread_time()?;
        let deadline = *self.deadline.get_or_insert(now + self.budget.time);
        if now > deadline { Err(Refusal::TooManyDescriptors) } else { Ok(()) }
    }
}

fn thread_time() -> Result<Duration, Refusal> {
    let now = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_err(|_| Refusal::Kernel)?;
    Ok(Duration::from(now))
}

#[cfg(test)]
mod tests;

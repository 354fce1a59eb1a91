//! Processes that have been looked at before, kept open: whoever asks again and again is not opened anew each time.
//!
//! Nothing of what a process may change is remembered, but for hints.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use nix::fcntl::{self, OFlag};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;

use crate::attest::sys;
use crate::caller::AttestError;

/// How many are kept, before all are let go: each has three descriptors of the daemon's.
const MAX_PROCESSES: usize = 128;
/// Of the numbers under which a process held connections: as many as threads may well connect at a time.
const MAX_HINTS: usize = 8;
/// Of the other sockets that were come across in a process: each is looked for next, if many connect at a time.
const MAX_SOCKETS: usize = 512;

/// One process, by descriptors that are tied to it: they show nothing once it is gone, and never another process, even if
/// its number is in use again.
#[derive(Debug)]
pub(crate) struct ProcessHandle {
    pid: u32,
    pidfd: OwnedFd,
    inode: Option<u64>,
    /// `/proc/<pid>`, opened when something of it is needed.
    directory: OnceLock<OwnedFd>,
    /// `/proc/<pid>/fd`, likewise.
    descriptors: OnceLock<OwnedFd>,
    elsewhere: OnceLock<bool>,
    /// What it ran last.
    program: Mutex<Option<ExePath>>,
    hints: Mutex<FdHints>,
}

/// A file by device and inode, and the path that it was shown with.
#[derive(Debug)]
struct ExePath {
    file: (u64, u64),
    path: Arc<Path>,
}

/// Where a process may have the descriptor of a connection.
#[derive(Debug, Default)]
struct FdHints {
    /// Under which numbers it held its last connections; that of the latest comes last.
    numbers: [Option<u32>; MAX_HINTS],
    /// The numbers of sockets that were come across in searches for others, by their inodes.
    sockets: HashMap<u32, u32>,
}

impl ProcessHandle {
    /// The process behind `pidfd`, which is `pid` in the daemon's pid namespace; `inode` is the pidfd's, where no other
    /// process ever has the same.
    pub(crate) fn new(pid: u32, pidfd: OwnedFd, inode: Option<u64>) -> Self {
        Self {
            pid,
            pidfd,
            inode,
            directory: OnceLock::new(),
            descriptors: OnceLock::new(),
            elsewhere: OnceLock::new(),
            program: Mutex::default(),
            hints: Mutex::default(),
        }
    }

    /// In the daemon's pid namespace.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Names it for good.
    pub(crate) fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// Of the pidfd.
    pub(crate) fn inode(&self) -> Option<u64> {
        self.inode
    }

    /// Whether the process runs. A zombie still has its `/proc` entries, but its pidfd is readable.
    pub(crate) fn alive(&self) -> Result<(), AttestError> {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::ZERO) {
            Ok(0) => Ok(()),
            Ok(_) => Err(AttestError::CallerGone),
            Err(_) => Err(AttestError::Kernel),
        }
    }

    /// `/proc/<pid>`.
    pub(crate) fn directory(&self, proc_root: &Path) -> Result<&OwnedFd, AttestError> {
        if let Some(opened) = self.directory.get() {
            return Ok(opened);
        }
        let directory = fcntl::open(
            &proc_root.join(self.pid.to_string()),
            DIR_FLAGS,
            Mode::empty(),
        );
        let directory = directory.map_err(|_| AttestError::CallerGone)?;
        // Alive after it was opened, so that the number cannot have been another process's at that time.
        self.alive()?;
        Ok(self.directory.get_or_init(|| directory))
    }

    /// `/proc/<pid>/fd`.
    fn descriptors(&self, proc_root: &Path) -> Result<&OwnedFd, AttestError> {
        if let Some(opened) = self.descriptors.get() {
            return Ok(opened);
        }
        let opened = fcntl::openat(self.directory(proc_root)?, "fd", DIR_FLAGS, Mode::empty());
        let opened = opened.map_err(|_| AttestError::CallerGone)?;
        Ok(self.descriptors.get_or_init(|| opened))
    }

    /// The inode of the socket that is descriptor `number` of the process.
    pub(crate) fn socket(&self, proc_root: &Path, number: u32) -> Option<u32> {
        socket(self.descriptors(proc_root).ok()?.as_fd(), number)
    }

    /// Whether it lives in namespaces of its own, which `look` is asked once: a process that moves to others later keeps its
    /// user.
    pub(crate) fn in_other_namespaces(
        &self,
        look: impl FnOnce() -> Result<bool, AttestError>,
    ) -> Result<bool, AttestError> {
        match self.elsewhere.get() {
            Some(answer) => Ok(*answer),
            None => look().map(|answer| *self.elsewhere.get_or_init(|| answer)),
        }
    }

    /// The path of `file`, by device and inode, which it runs, as `look` shows it: for people, so it is asked once for each.
    pub(crate) fn exe_path(&self, file: (u64, u64), look: impl FnOnce() -> PathBuf) -> Arc<Path> {
        let mut program = lock(&self.program);
        match &*program {
            Some(ExePath { file: known, path }) if *known == file => path.clone(),
            _ => program
                .insert(ExePath {
                    file,
                    path: look().into(),
                })
                .path
                .clone(),
        }
    }

    /// The number of the descriptor that is the socket with this inode: one that was come across in a search for another, or one
    /// of those under which the process held its last connections. Whoever connects again and again mostly has one of these
    /// again, and to list the descriptors of a process costs more than all else. `look` is called before each look.
    pub(crate) fn find_by_hint(
        &self,
        proc_root: &Path,
        inode: u32,
        mut look: impl FnMut() -> Result<(), AttestError>,
    ) -> Result<Option<u32>, AttestError> {
        let (known, numbers) = {
            let mut hints = lock(&self.hints);
            (hints.sockets.remove(&inode), hints.numbers)
        };
        // The one that was found last comes last: it is in use now.
        for number in known.into_iter().chain(numbers.into_iter().flatten()) {
            look()?;
            match self.socket(proc_root, number) {
                Some(found) if found == inode => return Ok(Some(number)),
                Some(other) => self.record_hint(other, number),
                None => {}
            }
        }
        Ok(None)
    }

    fn record_hint(&self, inode: u32, number: u32) {
        let sockets = &mut lock(&self.hints).sockets;
        if sockets.len() >= MAX_SOCKETS {
            sockets.clear();
        }
        sockets.insert(inode, number);
    }

    /// Notes the sockets that a search of all descriptors came across, by inode and number, in place of those before.
    pub(crate) fn scanned(&self, sockets: impl Iterator<Item = (u32, u32)>) {
        lock(&self.hints).sockets = sockets.take(MAX_SOCKETS).collect();
    }

    /// Notes that it holds a connection under this number.
    pub(crate) fn record_held(&self, number: u32) {
        let numbers = &mut lock(&self.hints).numbers;
        let at = numbers
            .iter()
            .position(|known| *known == Some(number))
            .unwrap_or(0);
        numbers[at..].rotate_left(1);
        numbers[MAX_HINTS - 1] = Some(number);
    }
}

/// Only names a directory.
const DIR_FLAGS: OFlag = OFlag::O_DIRECTORY
    .union(OFlag::O_CLOEXEC)
    .union(OFlag::O_PATH);

/// The inode of the socket that is descriptor `number` in this `/proc/<pid>/fd`.
pub(crate) fn socket(descriptors: BorrowedFd<'_>, number: u32) -> Option<u32> {
    // Room for more than the longest of each, so that nothing is cut off.
    let (mut name, mut room) = ([0; 16], [0; 32]);
    write!(&mut name[..], "{number}\0").ok()?;
    let link = sys::read_link(
        descriptors,
        CStr::from_bytes_until_nul(&name).ok()?,
        &mut room,
    )
    .ok()?;
    std::str::from_utf8(link)
        .ok()?
        .strip_prefix("socket:[")?
        .strip_suffix(']')?
        .parse()
        .ok()
}

/// Those that were looked at last.
#[derive(Debug, Default)]
pub(crate) struct ProcessCache(Mutex<HashMap<u32, Arc<ProcessHandle>>>);

impl ProcessCache {
    /// The one that had this number when it was last looked at; it may be gone, and the number another one's.
    pub(crate) fn of(&self, pid: u32) -> Option<Arc<ProcessHandle>> {
        lock(&self.0).get(&pid).cloned()
    }

    /// Keeps it open.
    pub(crate) fn insert(&self, known: Arc<ProcessHandle>) {
        let mut processes = lock(&self.0);
        let full = processes.len() >= MAX_PROCESSES && !processes.contains_key(&known.pid);
        let all = if full {
            std::mem::take(&mut *processes)
        } else {
            HashMap::new()
        };
        processes.insert(known.pid, known);
        drop(processes);
        // Nobody waits while they are closed.
        drop(all);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;

//! A cache of open process handles (pidfd and `/proc`), so that repeated requests skip the lookups.
//!
//! It stores nothing that a process can change, except hints.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io::Write;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use lru::LruCache;
use nix::fcntl::{self, OFlag};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::Mode;
use tokio::runtime::Handle;
use tokio::time::sleep;

use crate::attest::sys;
use crate::caller::AttestError;

/// The number of cached handles, where the process may open enough descriptors. Each has up to
/// three.
const MAX_PROCESSES: u64 = 1024;
/// The number of descriptors that the process may open, for each cached handle.
const DESCRIPTORS_PER_HANDLE: u64 = 16;
/// The interval at which the handles of ended processes are evicted.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);
/// The number of hints about descriptors that held connections: as many as threads may connect at a
/// time.
const MAX_HINTS: usize = 8;
/// The number of hints about other sockets of a process. If many connect at a time, each of these
/// is searched for next.
const MAX_SOCKETS: usize = 512;

/// One process, by descriptors that are tied to it. They fail once it has exited, and never refer
/// to another process that reuses its pid.
#[derive(Debug)]
pub(crate) struct ProcessHandle {
    pid: u32,
    pidfd: OwnedFd,
    inode: Option<u64>,
    /// The directory `/proc/<pid>`, opened at the first use.
    directory: OnceLock<OwnedFd>,
    /// The directory `/proc/<pid>/fd`, opened at the first use.
    descriptors: OnceLock<OwnedFd>,
    other_namespaces: OnceLock<bool>,
    /// The file that it executed at the last read.
    program: Mutex<Option<ExePath>>,
    hints: Mutex<FdHints>,
}

/// A file by device and inode, and the path that it was shown with.
#[derive(Debug)]
struct ExePath {
    file: (u64, u64),
    path: Arc<Path>,
}

/// Hints about the descriptors with which a process may hold a connection.
#[derive(Debug, Default)]
struct FdHints {
    /// The descriptor numbers of its last connections, the latest at the end.
    numbers: [Option<u32>; MAX_HINTS],
    /// Other sockets that were found in searches: descriptor numbers by inode.
    sockets: HashMap<u32, u32>,
}

impl ProcessHandle {
    /// Creates a handle for the process behind `pidfd`, which has `pid` in the daemon's pid
    /// namespace. `inode` is that of the pidfd, where it is unique to the process.
    pub(crate) fn new(pid: u32, pidfd: OwnedFd, inode: Option<u64>) -> Self {
        Self {
            pid,
            pidfd,
            inode,
            directory: OnceLock::new(),
            descriptors: OnceLock::new(),
            other_namespaces: OnceLock::new(),
            program: Mutex::default(),
            hints: Mutex::default(),
        }
    }

    /// Returns the pid in the daemon's pid namespace.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns the pidfd, which always refers to this process.
    pub(crate) fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// Returns the inode of the pidfd, where it is unique to the process.
    pub(crate) fn inode(&self) -> Option<u64> {
        self.inode
    }

    /// Verifies that the process runs. A zombie still has its `/proc` entries, but its pidfd is
    /// readable.
    pub(crate) fn verify_alive(&self) -> Result<(), AttestError> {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::ZERO) {
            Ok(0) => Ok(()),
            Ok(_) => Err(AttestError::CallerGone),
            Err(errno) => Err(AttestError::kernel("poll of a pidfd", errno)),
        }
    }

    /// Opens `/proc/<pid>`, or returns it if it is open.
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
        // The process is alive after the open, so the pid cannot have belonged to another process
        // before.
        self.verify_alive()?;
        Ok(self.directory.get_or_init(|| directory))
    }

    /// Opens `/proc/<pid>/fd`, or returns it if it is open.
    fn descriptors(&self, proc_root: &Path) -> Result<&OwnedFd, AttestError> {
        if let Some(opened) = self.descriptors.get() {
            return Ok(opened);
        }
        let opened = fcntl::openat(self.directory(proc_root)?, "fd", DIR_FLAGS, Mode::empty());
        let opened = opened.map_err(|_| AttestError::CallerGone)?;
        Ok(self.descriptors.get_or_init(|| opened))
    }

    /// Returns the inode of the socket that is descriptor `number` of the process.
    pub(crate) fn socket(&self, proc_root: &Path, number: u32) -> Option<u32> {
        socket(self.descriptors(proc_root).ok()?.as_fd(), number)
    }

    /// Returns whether the process lives in other namespaces than the daemon. Calls `read` once: a
    /// process that enters others later keeps its user.
    pub(crate) fn in_other_namespaces(
        &self,
        read: impl FnOnce() -> Result<bool, AttestError>,
    ) -> Result<bool, AttestError> {
        match self.other_namespaces.get() {
            Some(answer) => Ok(*answer),
            None => read().map(|answer| *self.other_namespaces.get_or_init(|| answer)),
        }
    }

    /// Returns the path of the executable `file`, given by device and inode. Calls `read` once per
    /// file, since the path is only for display.
    pub(crate) fn exe_path(&self, file: (u64, u64), read: impl FnOnce() -> PathBuf) -> Arc<Path> {
        let mut program = lock(&self.program);
        match &*program {
            Some(ExePath { file: cached, path }) if *cached == file => path.clone(),
            _ => program
                .insert(ExePath {
                    file,
                    path: read().into(),
                })
                .path
                .clone(),
        }
    }

    /// Returns the descriptor number of the socket with this inode, if a hint leads to it.
    ///
    /// The hints are a socket that was found in a search for another, and the descriptors of the
    /// last connections. A process that connects repeatedly mostly reuses one of these. To list all
    /// descriptors of a process costs more than all else. `charge` is called before each read.
    pub(crate) fn find_by_hint(
        &self,
        proc_root: &Path,
        inode: u32,
        mut charge: impl FnMut() -> Result<(), AttestError>,
    ) -> Result<Option<u32>, AttestError> {
        let (hint, numbers) = {
            let mut hints = lock(&self.hints);
            (hints.sockets.remove(&inode), hints.numbers)
        };
        // The latest descriptor comes last, since it is probably in use.
        for number in hint.into_iter().chain(numbers.into_iter().flatten()) {
            charge()?;
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

    /// Replaces the hints with the sockets that a full scan found, by inode and number.
    pub(crate) fn replace_socket_hints(&self, sockets: impl Iterator<Item = (u32, u32)>) {
        lock(&self.hints).sockets = sockets.take(MAX_SOCKETS).collect();
    }

    /// Records that the process holds a connection with this descriptor.
    pub(crate) fn record_held(&self, number: u32) {
        let numbers = &mut lock(&self.hints).numbers;
        let at = numbers
            .iter()
            .position(|held| *held == Some(number))
            .unwrap_or(0);
        numbers[at..].rotate_left(1);
        numbers[MAX_HINTS - 1] = Some(number);
    }
}

/// The flags to open a directory without reading it.
const DIR_FLAGS: OFlag = OFlag::O_DIRECTORY
    .union(OFlag::O_CLOEXEC)
    .union(OFlag::O_PATH);

/// Returns the inode of the socket that is descriptor `number` in this `/proc/<pid>/fd`.
pub(crate) fn socket(descriptors: BorrowedFd<'_>, number: u32) -> Option<u32> {
    // The buffers are longer than the longest values, so nothing is cut off.
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

/// The handles that were used last, by pid. A full cache evicts the one that was not used for the
/// longest time.
#[derive(Debug)]
pub(crate) struct ProcessCache(Arc<Mutex<CachedHandles>>);

#[derive(Debug)]
struct CachedHandles {
    by_pid: LruCache<u32, Arc<ProcessHandle>>,
    /// Whether a task evicts the handles of ended processes.
    swept: bool,
}

impl ProcessCache {
    /// Creates a cache that leaves most descriptors of the process to connections.
    pub(crate) fn new() -> Self {
        let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        let capacity = MAX_PROCESSES.min(descriptors / DESCRIPTORS_PER_HANDLE);
        Self::with_capacity(usize::try_from(capacity).unwrap_or(usize::MAX))
    }

    fn with_capacity(capacity: usize) -> Self {
        let capacity = NonZeroUsize::new(capacity).unwrap_or(NonZeroUsize::MIN);
        Self(Arc::new(Mutex::new(CachedHandles {
            by_pid: LruCache::new(capacity),
            swept: false,
        })))
    }

    /// Returns the handle that had this pid when it was cached. Its process may be gone, and the
    /// pid reused.
    pub(crate) fn get(&self, pid: u32) -> Option<Arc<ProcessHandle>> {
        lock(&self.0).by_pid.get(&pid).cloned()
    }

    /// Adds a handle to the cache. Within a runtime, a task evicts it soon after its process has
    /// ended.
    pub(crate) fn insert(&self, handle: Arc<ProcessHandle>) {
        let mut cached = lock(&self.0);
        let evicted = cached.by_pid.push(handle.pid, handle);
        if !cached.swept
            && let Ok(runtime) = Handle::try_current()
        {
            cached.swept = true;
            runtime.spawn(sweep(Arc::downgrade(&self.0)));
        }
        drop(cached);
        // The descriptors are closed after the lock is released.
        drop(evicted);
    }
}

/// Evicts the handles of ended processes until the cache is empty or dropped.
async fn sweep(cache: Weak<Mutex<CachedHandles>>) {
    loop {
        sleep(SWEEP_INTERVAL).await;
        let Some(cache) = cache.upgrade() else { return };
        let mut cached = lock(&cache);
        let ended = cached.take_ended();
        cached.swept = !cached.by_pid.is_empty();
        let goes_on = cached.swept;
        drop(cached);
        drop(ended);
        if !goes_on {
            return;
        }
    }
}

impl CachedHandles {
    /// Removes and returns the handles of processes that have ended, by one system call.
    fn take_ended(&mut self) -> Vec<Arc<ProcessHandle>> {
        let handles: Vec<_> = self
            .by_pid
            .iter()
            .map(|(_, handle)| handle.clone())
            .collect();
        let mut polled: Vec<_> = handles
            .iter()
            .map(|handle| PollFd::new(handle.pidfd.as_fd(), PollFlags::POLLIN))
            .collect();
        if poll(&mut polled, PollTimeout::ZERO).is_err() {
            return Vec::new();
        }
        let has_ended = |polled: &PollFd<'_>| polled.any().unwrap_or(true);
        let ended = handles.iter().zip(&polled);
        let ended = ended.filter(|(_, polled)| has_ended(polled));
        ended
            .filter_map(|(handle, _)| self.by_pid.pop(&handle.pid))
            .collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;

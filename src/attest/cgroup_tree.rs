//! The host's cgroup v2 tree: maps ids of cgroups to paths, and lists the processes of a cgroup.

use std::collections::HashMap;
use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lru::LruCache;
use nix::errno::Errno;
use nix::fcntl::readlink;

use crate::attest::cgroup_mounts::{CgroupMounts, check_root_owned};
use crate::attest::cgroup_scan::{CgroupScanner, DirSnapshots, ScanThrottle};
use crate::attest::sys;
use crate::caller::AttestError;
use crate::cgroup::{CgroupPath, PodRoots};
use crate::limits::{FairKey, FairSemaphore};

/// The number of cached paths above which those of removed cgroups are evicted.
const MAX_PATHS: usize = 10_000;

/// The number of `cgroup.procs` files that are kept open. The one that was not read for the longest
/// time is closed for another.
const MAX_OPEN_LISTS: NonZeroUsize = NonZeroUsize::new(256).expect("it is not zero");

/// The age at which a cached path is checked again. The path of an id never changes. So until then
/// a socket that was made in a removed cgroup still gets that cgroup's path.
const PATH_RECHECK_AFTER: Duration = Duration::from_millis(100);

/// The cgroup tree: its mount point, and a cache of its directories.
///
/// The id of a cgroup is the inode number of its directory. The kernel does not reuse it until the
/// next boot.
#[derive(Debug)]
pub(crate) struct CgroupTree {
    mount: PathBuf,
    /// The path of the mounted directory, if that is not the root. Cgroups outside it are not
    /// visible.
    base: String,
    roots: PodRoots,
    /// Whether the kernel opens a directory by its id for this process. If not, an unknown id takes
    /// a scan of the tree.
    handles: bool,
    /// The number of paths at which paths of removed directories are evicted. It is set to twice
    /// the number of paths that remain, because a sweep takes a system call per path.
    sweep_at: AtomicUsize,
    paths: Mutex<HashMap<u64, CachedPath>>,
    /// The throttles for scans of the whole tree and of the kubelet's part.
    throttles: [ScanThrottle; 2],
    /// Limits the peers that wait for a scan.
    waiting: FairSemaphore<ScanKey>,
    /// The directories that the last scans found.
    snapshots: [Mutex<DirSnapshots>; 2],
    /// The open `cgroup.procs` of cgroups that were searched. The file of a removed cgroup fails to
    /// read.
    lists: Mutex<LruCache<CgroupPath, Arc<Mutex<File>>>>,
}

/// The number of peers that may wait for a scan.
const MAX_WAITING: usize = 512;
/// The number of peers of one user, or in one pod's network, that may wait for a scan. A scan never
/// finds removed cgroups, and any user can have those.
const MAX_WAITING_PER_KEY: usize = 16;
/// The lowest uid that is not a user of the host. User namespaces get blocks of as many ids.
const UID_BLOCK: u32 = 65_536;

/// The key by which peers that wait for a scan are counted, by the facts that are known before it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct ScanKey {
    /// The network namespace of a pod. All users in it belong to the pod.
    pub(crate) namespace: Option<u64>,
    pub(crate) uid: Option<u32>,
}

impl FairKey for ScanKey {
    type Group = Self;

    /// Returns one group for each block of 65,536 subordinate ids. A person usually has as many, so
    /// they are in one or two groups.
    fn group(&self) -> Self {
        let of_block = |uid: u32| match uid {
            0..UID_BLOCK => uid,
            _ => uid - uid % UID_BLOCK,
        };
        Self {
            namespace: self.namespace,
            uid: self.uid.map(of_block),
        }
    }
}

/// The part of the tree that may contain a cgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TreeScope {
    /// The whole tree, from its root.
    All,
    /// The part below the kubelet's cgroup roots.
    Pods,
}

/// A cgroup's path, and the time at which its directory was last found there.
#[derive(Debug, Clone)]
struct CachedPath {
    path: CgroupPath,
    seen: Instant,
}

/// Returns the time of the threads that find paths.
#[expect(
    clippy::disallowed_methods,
    reason = "these threads have no runtime, so that its time cannot be paused there"
)]
fn now() -> Instant {
    Instant::now()
}

impl CachedPath {
    fn new(path: CgroupPath) -> Self {
        Self { path, seen: now() }
    }
}

impl CgroupTree {
    /// Creates a tree for the directory on which the root of the hierarchy is mounted.
    pub(crate) fn at(mount: PathBuf, roots: PodRoots) -> Self {
        Self {
            mount,
            base: String::new(),
            roots,
            handles: false,
            sweep_at: AtomicUsize::new(MAX_PATHS),
            paths: Mutex::default(),
            throttles: Default::default(),
            waiting: FairSemaphore::new(MAX_WAITING, MAX_WAITING_PER_KEY),
            snapshots: Default::default(),
            lists: Mutex::new(LruCache::new(MAX_OPEN_LISTS)),
        }
    }

    /// Enables opening directories by id if CAP_DAC_READ_SEARCH is held. It tries that with the
    /// root's id.
    fn enable_handles(mut self) -> Self {
        let root = fs::metadata(&self.mount).map(|root| root.ino());
        self.handles = root.is_ok_and(|id| self.path_by_handle(id).is_ok());
        self
    }

    /// Returns the kubelet's cgroup roots.
    pub(crate) fn roots(&self) -> &PodRoots {
        &self.roots
    }

    /// Finds the v2 hierarchy. `None` on a host without one.
    pub(crate) fn find(hierarchies: &CgroupMounts, roots: PodRoots) -> Option<Self> {
        let (mount, base) = hierarchies.unified()?;
        let tree = Self {
            base: base.to_owned(),
            ..Self::at(mount.to_owned(), roots)
        };
        Some(tree.enable_handles())
    }

    /// Returns the path of the cgroup with this id, in which a process lives. So it exists, and
    /// cgroups are never renamed.
    ///
    /// `shown` reads the path that the process itself shows. It saves a scan, and is trusted only
    /// if the directory there has the id.
    pub(crate) fn path_of_live_process(
        &self,
        id: u64,
        shown: impl FnOnce() -> Result<Option<CgroupPath>, AttestError>,
    ) -> Result<CgroupPath, AttestError> {
        if let Some(cached) = self.paths().get(&id) {
            return Ok(cached.path.clone());
        }
        if let Some(found) = self.cached_path(id) {
            return found;
        }
        let path = shown()?
            .filter(|path| self.is_at(path, id))
            .ok_or(AttestError::UnreadableCgroup)?;
        self.remember(id, &path);
        Ok(path)
    }

    /// Scans this part of the tree for the cgroup with this id, and returns its path. Call it if
    /// [`CgroupTree::cached_path`] returns `None`.
    ///
    /// Fails for a removed cgroup, or one outside this part, and if too many peers wait for scans.
    pub(crate) async fn scan_for(
        self: &Arc<Self>,
        id: u64,
        scope: TreeScope,
        key: ScanKey,
    ) -> Result<CgroupPath, AttestError> {
        let waiting = self
            .waiting
            .try_acquire_evicting(&key)
            .map_err(|_| AttestError::SearchBusy)?;
        waiting.set_in_use();
        let tree = self.clone();
        let scan = self.throttles[scope as usize].run_after(move || tree.scan(scope));
        waiting.run(scan).await.ok_or(AttestError::SearchBusy)?;
        self.paths()
            .get(&id)
            .map(|cached| cached.path.clone())
            .ok_or(AttestError::UnreadableCgroup)
    }

    /// Returns the path of the cgroup with this id, in tests without throttling.
    #[cfg(test)]
    pub(crate) fn path_of_blocking(&self, id: u64) -> Result<CgroupPath, AttestError> {
        self.cached_path(id).unwrap_or_else(|| {
            self.scan(TreeScope::All);
            self.paths()
                .get(&id)
                .map(|cached| cached.path.clone())
                .ok_or(AttestError::UnreadableCgroup)
        })
    }

    /// Returns whether a removed cgroup is reported as such. If not, an unknown cgroup may also be
    /// outside the part that was scanned.
    pub(crate) fn detects_removed(&self) -> bool {
        self.handles
    }

    /// Returns the result for this id without a scan. `None` if a scan is necessary.
    pub(crate) fn cached_path(&self, id: u64) -> Option<Result<CgroupPath, AttestError>> {
        let mut paths = self.paths();
        if let Some(cached) = paths.get_mut(&id) {
            if now().duration_since(cached.seen) < PATH_RECHECK_AFTER {
                return Some(Ok(cached.path.clone()));
            }
            if self.is_at(&cached.path, id) {
                cached.seen = now();
                return Some(Ok(cached.path.clone()));
            }
            // A removed directory never reappears with this id.
            paths.remove(&id);
        }
        drop(paths);
        self.handles.then(|| {
            let path = self
                .path_by_handle(id)
                .map_err(|_| AttestError::UnreadableCgroup)?;
            self.remember(id, &path);
            Ok(path)
        })
    }

    fn remember(&self, id: u64, path: &CgroupPath) {
        let mut paths = self.paths();
        if paths.len() >= self.sweep_at.load(Ordering::Relaxed) {
            paths.retain(|id, cached| self.is_at(&cached.path, *id));
            self.sweep_at
                .store(MAX_PATHS.max(2 * paths.len()), Ordering::Relaxed);
        }
        paths.insert(id, CachedPath::new(path.clone()));
    }

    /// Scans a part of the tree and replaces its cached paths. Lookups of cached paths do not wait
    /// for it.
    fn scan(&self, scope: TreeScope) {
        let starts: Vec<_> = match scope {
            TreeScope::All => CgroupPath::parse(if self.base.is_empty() {
                "/"
            } else {
                &self.base
            })
            .into_iter()
            .collect(),
            TreeScope::Pods => self
                .roots
                .iter()
                .filter(|root| self.directory(root).is_dir())
                .cloned()
                .collect(),
        };
        let scanner = CgroupScanner {
            mount: &self.mount,
            base: &self.base,
            roots: &self.roots,
        };
        let mut snapshots = self.snapshots[scope as usize]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match scanner.scan(&starts, &mut snapshots) {
            Ok(found) => {
                let mut paths = self.paths();
                paths.retain(|_, cached| {
                    !starts.iter().any(|start| cached.path.is_at_or_below(start))
                });
                paths.extend(
                    found
                        .into_iter()
                        .map(|(id, path)| (id, CachedPath::new(path))),
                );
            }
            Err(error) => {
                tracing::warn!(%error, mount = %self.mount.display(), "cannot read the cgroup tree")
            }
        }
    }

    fn paths(&self) -> MutexGuard<'_, HashMap<u64, CachedPath>> {
        self.paths.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_at(&self, path: &CgroupPath, id: u64) -> bool {
        fs::metadata(self.directory(path)).is_ok_and(|found| found.ino() == id)
    }

    /// Finds the path in one step, whatever the size of the tree that a user made below its own
    /// cgroup. A directory outside the mounted part would read as its root, so the directory at the
    /// path found has to have the id.
    fn path_by_handle(&self, id: u64) -> nix::Result<CgroupPath> {
        let mount = File::open(&self.mount).map_err(|_| Errno::ENOENT)?;
        let found = sys::open_kernfs(mount.as_fd(), id)
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
        let shown = readlink(format!("/proc/self/fd/{}", found.as_raw_fd()).as_str())?;
        let path = Path::new(&shown)
            .strip_prefix(&self.mount)
            .ok()
            .and_then(Path::to_str);
        let path = path.and_then(|path| match (&*self.base, path) {
            (base, "") if !base.is_empty() => CgroupPath::parse(base),
            (base, path) => CgroupPath::parse(&format!("{base}/{path}")),
        });
        path.filter(|path| self.is_at(path, id))
            .ok_or(Errno::ESTALE)
    }

    /// Returns the pids in this cgroup itself. Fails if their list is longer than `bytes`, or if
    /// the cgroup cannot be listed: it is removed, or of the threaded kind.
    pub(crate) fn processes(
        &self,
        path: &CgroupPath,
        bytes: usize,
    ) -> Result<Vec<u32>, AttestError> {
        let text = match self.cached_pids(path, bytes + 1) {
            Some(text) => text,
            None => self.list(path, bytes + 1)?,
        };
        if text.len() > bytes {
            return Err(AttestError::TooManyDescriptors);
        }
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// Reads the open list of a cgroup. `None` if none is open, another thread reads it now, or the
    /// cgroup is removed.
    fn cached_pids(&self, path: &CgroupPath, most: usize) -> Option<String> {
        let list = self.lists().get(path)?.clone();
        let text = sys::read_whole(&*list.try_lock().ok()?, most);
        text.inspect_err(|_| drop(self.lists().pop(path))).ok()
    }

    /// Opens and reads the list of a cgroup, and keeps it open.
    fn list(&self, path: &CgroupPath, most: usize) -> Result<String, AttestError> {
        let file = File::open(self.directory(path).join("cgroup.procs"))
            .map_err(|_| AttestError::UnreadableCgroup)?;
        let text = sys::read_whole(&file, most).map_err(|_| AttestError::UnreadableCgroup)?;
        let evicted = self.lists().push(path.clone(), Arc::new(Mutex::new(file)));
        // The file is closed after the lock is released.
        drop(evicted);
        Ok(text)
    }

    fn lists(&self) -> MutexGuard<'_, LruCache<CgroupPath, Arc<Mutex<File>>>> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Verifies that only root can create or rename directories from the root down to this one.
    pub(crate) fn check_root_owned(&self, path: &CgroupPath) -> Result<(), AttestError> {
        let below = path
            .as_str()
            .strip_prefix(&self.base)
            .ok_or(AttestError::UnreadableCgroup)?;
        check_root_owned(
            &self.mount,
            below.split('/').filter(|segment| !segment.is_empty()),
        )
    }

    /// Returns the id of the cgroup at this path.
    pub(crate) fn id(&self, path: &CgroupPath) -> Result<u64, AttestError> {
        fs::metadata(self.directory(path))
            .map(|found| found.ino())
            .map_err(|_| AttestError::UnreadableCgroup)
    }

    /// Returns the directory of the cgroup. It does not exist for a cgroup outside the mounted
    /// part.
    pub(crate) fn directory(&self, path: &CgroupPath) -> PathBuf {
        let below = path.as_str().strip_prefix(&self.base).unwrap_or("\0");
        self.mount.join(below.trim_start_matches('/'))
    }
}

#[cfg(test)]
mod tests;

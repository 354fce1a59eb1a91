//! The host's cgroup v2 tree: which path an id stands for, and which processes a cgroup has.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::readlink;

use crate::attest::cgroup_mounts::{CgroupMounts, roots_alone};
use crate::attest::cgroup_scan::{CgroupScanner, DirSnapshots, ScanThrottle};
use crate::attest::sys;
use crate::caller::AttestError;
use crate::cgroup::{CgroupPath, PodRoots};
use crate::limits::{FairKey, FairSemaphore};

/// Paths that are remembered before those of removed cgroups are looked for and forgotten.
const MAX_PATHS: usize = 10_000;

/// Lists of processes that are kept open, before all are closed.
const MAX_OPEN_LISTS: usize = 64;

/// A directory that was there so long ago is looked for again. A path is its id's for ever, so until then a socket that was
/// made in a cgroup that is gone by now is still taken for what it is.
const PATH_RECHECK_AFTER: Duration = Duration::from_millis(100);

/// Where the tree is mounted, and what is known of its directories.
///
/// A cgroup's id is the inode number of its directory, and never used again while the machine runs.
#[derive(Debug)]
pub(crate) struct CgroupTree {
    mount: PathBuf,
    /// The path of the mounted directory, if that is not the root: nothing beside it is seen.
    base: String,
    roots: PodRoots,
    /// Whether the kernel opens a directory by its id for this process: else an unknown id takes a walk.
    handles: bool,
    /// With so many paths those of removed directories are looked for. It doubles what is left then: looking for them takes a
    /// system call for each.
    sweep_at: AtomicUsize,
    paths: Mutex<HashMap<u64, CachedPath>>,
    /// Of all of it, and of the kubelet's part.
    walks: [Arc<ScanThrottle>; 2],
    /// Those who wait for one.
    waiting: FairSemaphore<WalkKey>,
    /// What was seen in them.
    listings: [Mutex<DirSnapshots>; 2],
    /// Open `cgroup.procs` of cgroups that were searched: that of a removed one can't be read any more.
    lists: Mutex<HashMap<CgroupPath, Arc<Mutex<File>>>>,
}

/// Peers that wait for a walk ...
const MAX_WAITING: usize = 512;
/// ... and of those of one user, or in one pod's network. Removed cgroups are in no walk, and anybody can have those.
const MAX_WAITING_PER_KEY: usize = 16;

/// Whose peer waits for a walk, as far as it is known before that.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct WalkKey {
    /// That of a pod, where all users are the pod's.
    pub(crate) namespace: Option<u64>,
    pub(crate) uid: Option<u32>,
}

impl FairKey for WalkKey {
    type Group = Self;

    fn group(&self) -> Self {
        self.clone()
    }
}

/// In which part of the tree a cgroup may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TreeScope {
    /// Anywhere.
    All,
    /// Below the kubelet's cgroup roots.
    Pods,
}

/// A cgroup's path, and when its directory was last seen there.
#[derive(Debug, Clone)]
struct CachedPath {
    path: CgroupPath,
    seen: Instant,
}

impl CachedPath {
    fn now(path: CgroupPath) -> Self {
        Self {
            path,
            seen: Instant::now(),
        }
    }
}

impl CgroupTree {
    /// Takes the directory on which the hierarchy's root is mounted.
    pub(crate) fn at(mount: PathBuf, roots: PodRoots) -> Self {
        Self {
            mount,
            base: String::new(),
            roots,
            handles: false,
            sweep_at: AtomicUsize::new(MAX_PATHS),
            paths: Mutex::default(),
            walks: Default::default(),
            waiting: FairSemaphore::new(MAX_WAITING, MAX_WAITING_PER_KEY),
            listings: Default::default(),
            lists: Mutex::default(),
        }
    }

    /// Finds directories by their ids, where CAP_DAC_READ_SEARCH is held, as it shows by the root's.
    fn enable_handles(mut self) -> Self {
        let root = fs::metadata(&self.mount).map(|root| root.ino());
        self.handles = root.is_ok_and(|id| self.path_by_handle(id).is_ok());
        self
    }

    /// The kubelet's cgroup roots.
    pub(crate) fn roots(&self) -> &PodRoots {
        &self.roots
    }

    /// That of the v2 hierarchy; `None` on a host without one.
    pub(crate) fn find(hierarchies: &CgroupMounts, roots: PodRoots) -> Option<Self> {
        let (mount, base) = hierarchies.unified()?;
        let tree = Self {
            base: base.to_owned(),
            ..Self::at(mount.to_owned(), roots)
        };
        Some(tree.enable_handles())
    }

    /// The path of the cgroup with this id, in which a process lives: so it is there, and cgroups are never renamed. `shown` is
    /// what the process itself shows of its cgroup; it saves a walk, and is believed only if the directory there has the id.
    pub(crate) fn path_of_live_process(
        &self,
        id: u64,
        shown: impl FnOnce() -> Result<Option<CgroupPath>, AttestError>,
    ) -> Result<CgroupPath, AttestError> {
        if let Some(known) = self.paths().get(&id) {
            return Ok(known.path.clone());
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

    /// The path of the cgroup with this id, which is looked for in this part of the tree if it is not known. A removed one, or
    /// one outside, is a refusal. `on_wait` is called before that takes time.
    pub(crate) async fn path_of(
        self: &Arc<Self>,
        id: u64,
        (part, key): (TreeScope, WalkKey),
        on_wait: impl FnOnce(),
    ) -> Result<CgroupPath, AttestError> {
        if let Some(found) = self.cached_path(id) {
            return found;
        }
        let _waiting = self
            .waiting
            .try_acquire(&key)
            .map_err(|_| AttestError::SearchBusy)?;
        on_wait();
        let tree = self.clone();
        self.walks[part as usize]
            .run_after(move || tree.walk(part))
            .await;
        self.paths()
            .get(&id)
            .map(|known| known.path.clone())
            .ok_or(AttestError::UnreadableCgroup)
    }

    /// Without others who ask.
    #[cfg(test)]
    pub(crate) fn path_of_blocking(&self, id: u64) -> Result<CgroupPath, AttestError> {
        self.cached_path(id).unwrap_or_else(|| {
            self.walk(TreeScope::All);
            self.paths()
                .get(&id)
                .map(|known| known.path.clone())
                .ok_or(AttestError::UnreadableCgroup)
        })
    }

    /// Whether it says of a cgroup that was removed that it is not there; else that may also be one that was not looked for.
    pub(crate) fn detects_removed(&self) -> bool {
        self.handles
    }

    /// What is known, or can be asked for, without a walk; `None` if nothing is.
    fn cached_path(&self, id: u64) -> Option<Result<CgroupPath, AttestError>> {
        let mut paths = self.paths();
        if let Some(known) = paths.get_mut(&id) {
            if known.seen.elapsed() < PATH_RECHECK_AFTER {
                return Some(Ok(known.path.clone()));
            }
            if self.is_at(&known.path, id) {
                known.seen = Instant::now();
                return Some(Ok(known.path.clone()));
            }
            // Its directory is gone, and will never be there again.
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
            paths.retain(|id, known| self.is_at(&known.path, *id));
            self.sweep_at
                .store(MAX_PATHS.max(2 * paths.len()), Ordering::Relaxed);
        }
        paths.insert(id, CachedPath::now(path.clone()));
    }

    /// Notes all that is there, and forgets the rest. Nobody who is known waits meanwhile.
    fn walk(&self, part: TreeScope) {
        let starts: Vec<_> = match part {
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
        let ground = CgroupScanner {
            mount: &self.mount,
            base: &self.base,
            roots: &self.roots,
        };
        let mut listings = self.listings[part as usize]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match ground.scan(&starts, &mut listings) {
            Ok(found) => {
                let mut paths = self.paths();
                paths.retain(|_, known| {
                    !starts.iter().any(|start| known.path.is_at_or_below(start))
                });
                paths.extend(
                    found
                        .into_iter()
                        .map(|(id, path)| (id, CachedPath::now(path))),
                );
            }
            Err(error) => {
                tracing::warn!(%error, mount = %self.mount.display(), "the cgroup tree cannot be read")
            }
        }
    }

    fn paths(&self) -> MutexGuard<'_, HashMap<u64, CachedPath>> {
        self.paths.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_at(&self, path: &CgroupPath, id: u64) -> bool {
        fs::metadata(self.directory(path)).is_ok_and(|found| found.ino() == id)
    }

    /// In one step, however large the tree is that somebody has made below his own cgroup. A directory outside the mounted
    /// part of the tree would read as its root, so what was found has to have the id.
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

    /// The pids in this cgroup itself; a refusal if their list has more than `bytes`. One that can't be listed (removed, or
    /// of the threaded kind) is a refusal too.
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

    /// What the list says that is open, if there is one, nobody else reads it now, and it is not that of a cgroup that is gone.
    fn cached_pids(&self, path: &CgroupPath, most: usize) -> Option<String> {
        let list = self.lists().get(path)?.clone();
        let text = sys::read_whole(&*list.try_lock().ok()?, most);
        text.inspect_err(|_| drop(self.lists().remove(path))).ok()
    }

    /// What the list says, opened now, and kept open.
    fn list(&self, path: &CgroupPath, most: usize) -> Result<String, AttestError> {
        let file = File::open(self.directory(path).join("cgroup.procs"))
            .map_err(|_| AttestError::UnreadableCgroup)?;
        let text = sys::read_whole(&file, most).map_err(|_| AttestError::UnreadableCgroup)?;
        let mut lists = self.lists();
        let all = if lists.len() >= MAX_OPEN_LISTS {
            std::mem::take(&mut *lists)
        } else {
            HashMap::new()
        };
        lists
            .entry(path.clone())
            .or_insert_with(|| Arc::new(Mutex::new(file)));
        drop(lists);
        // Nobody waits while they are closed.
        drop(all);
        Ok(text)
    }

    fn lists(&self) -> MutexGuard<'_, HashMap<CgroupPath, Arc<Mutex<File>>>> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nobody but root can make or name a directory from the root down to this one.
    pub(crate) fn check_root_owned(&self, path: &CgroupPath) -> Result<(), AttestError> {
        let below = path
            .as_str()
            .strip_prefix(&self.base)
            .ok_or(AttestError::UnreadableCgroup)?;
        roots_alone(
            &self.mount,
            below.split('/').filter(|segment| !segment.is_empty()),
        )
    }

    /// The id of the cgroup at this path.
    pub(crate) fn id(&self, path: &CgroupPath) -> Result<u64, AttestError> {
        fs::metadata(self.directory(path))
            .map(|found| found.ino())
            .map_err(|_| AttestError::UnreadableCgroup)
    }

    /// Its directory. There is none for one that lies beside the part that is mounted.
    pub(crate) fn directory(&self, path: &CgroupPath) -> PathBuf {
        let below = path.as_str().strip_prefix(&self.base).unwrap_or("\0");
        self.mount.join(below.trim_start_matches('/'))
    }
}

#[cfg(test)]
mod tests;

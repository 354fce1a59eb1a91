//! Scans of the cgroup tree: they find the directories that exist, and are throttled.
//!
//! Where `open_by_handle_at(2)` opens a cgroup by its id, no scan runs. The call is not available
//! in two cases: the daemon lacks `CAP_DAC_READ_SEARCH`, as in the DaemonSet that names no
//! processes, or a filter forbids the call. Peers over TCP have only an id there, so only a scan
//! finds their cgroup. Without scans each daemon would need the capability, which opens every file
//! of the host for reading.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::attest::sys;
use crate::cgroup::{CgroupPath, PodRoots};

/// The number of directories that are scanned below one workload's own. Whatever the workload
/// creates there, its neighbours lose no more time than that. Only its own processes are not found.
const MAX_DIRS_PER_WORKLOAD: usize = 512;
/// The pause after a scan, as a multiple of its length. It bounds the share of one CPU that scans
/// take, whatever the number of requests. Any user can have ids that are not in the tree, with a
/// cgroup that it removes (T21).
const PAUSE_FACTOR: u32 = 9;
/// The longest pause between two scans.
pub(crate) const MAX_PAUSE: Duration = Duration::from_secs(1);

/// A scanner for the tree below `mount`, which is the directory of `base` in it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CgroupScanner<'t> {
    pub(crate) mount: &'t Path,
    pub(crate) base: &'t str,
    pub(crate) roots: &'t PodRoots,
}

/// The snapshots of directories at the last scan, by id. A directory is read again only if it has
/// changed.
pub(crate) type DirSnapshots = HashMap<u64, DirSnapshot>;

/// The children of a directory, and its link count: one per child, and two for the directory
/// itself.
#[derive(Debug, Clone)]
pub(crate) struct DirSnapshot {
    links: u64,
    children: Vec<(u64, CgroupPath)>,
}

impl DirSnapshot {
    /// Returns whether the children are complete. A file system without link counts never matches.
    fn is_complete(&self) -> bool {
        u64::try_from(self.children.len()).is_ok_and(|children| self.links == children + 2)
    }
}

/// A directory that is still to be read, and the number of directories that may still be found
/// below the workload it belongs to.
struct PendingDir {
    id: u64,
    links: u64,
    path: CgroupPath,
    left: Option<Rc<Cell<usize>>>,
}

impl CgroupScanner<'_> {
    /// Returns the ids and paths of all cgroups from `starts` down. `snapshots` holds the previous
    /// snapshots, and is replaced by the current ones.
    pub(crate) fn scan(
        self,
        starts: &[CgroupPath],
        snapshots: &mut DirSnapshots,
    ) -> io::Result<HashMap<u64, CgroupPath>> {
        let (mut found, mut current) = (HashMap::new(), DirSnapshots::new());
        let mut open = Vec::new();
        for path in starts {
            let start = fs::metadata(self.directory(path))?;
            found.insert(start.ino(), path.clone());
            open.push(PendingDir {
                id: start.ino(),
                links: start.nlink(),
                path: path.clone(),
                left: None,
            });
        }
        while let Some(PendingDir {
            id,
            links,
            path,
            left,
        }) = open.pop()
        {
            let left = left.as_ref();
            if left.is_some_and(|left| left.get() == 0) {
                continue;
            }
            let is_same = |before: &DirSnapshot| before.links == links && before.is_complete();
            let before = snapshots.remove(&id).filter(is_same);
            let same =
                before.and_then(|before| Some((self.link_counts(&before.children)?, before)));
            let same = same.filter(|(_, before)| charge(before.children.len(), left));
            let (counts, snapshot) = match same {
                Some(same) => same,
                None => {
                    let snapshot = DirSnapshot {
                        links,
                        children: self.list(&path, left),
                    };
                    (
                        snapshot
                            .children
                            .iter()
                            .map(|(id, path)| self.links(*id, path))
                            .collect(),
                        snapshot,
                    )
                }
            };
            for ((id, path), links) in snapshot.children.iter().zip(counts) {
                // A directory that was removed during the scan is skipped.
                let Some(links) = links else { continue };
                let left = left.cloned().or_else(|| {
                    self.is_workload_root(path)
                        .then(|| Rc::new(Cell::new(MAX_DIRS_PER_WORKLOAD)))
                });
                found.insert(*id, path.clone());
                open.push(PendingDir {
                    id: *id,
                    links,
                    path: path.clone(),
                    left,
                });
            }
            current.insert(id, snapshot);
        }
        *snapshots = current;
        Ok(found)
    }

    /// Reads a directory, as far as the charge allows. That costs ten times as much as to check
    /// that it exists. The kernel determines the number of its files.
    fn list(self, path: &CgroupPath, left: Option<&Rc<Cell<usize>>>) -> Vec<(u64, CgroupPath)> {
        let above = path.as_str().trim_end_matches('/');
        let is_directory = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
        let child = |entry: fs::DirEntry| {
            let path = CgroupPath::parse(&format!("{above}/{}", entry.file_name().to_str()?))?;
            Some((entry.ino(), path))
        };
        let entries = fs::read_dir(self.directory(path))
            .into_iter()
            .flatten()
            .filter_map(Result::ok);
        // A directory counts even if its name is not a valid part of a path.
        entries
            .filter(is_directory)
            .take_while(|_| charge(1, left))
            .filter_map(child)
            .collect()
    }

    /// Returns the link count of each child, if all are unchanged.
    fn link_counts(self, children: &[(u64, CgroupPath)]) -> Option<Vec<Option<u64>>> {
        children
            .iter()
            .map(|(id, path)| self.links(*id, path).map(Some))
            .collect()
    }

    /// Returns the link count of the directory, or `None` if another directory is at the path.
    fn links(self, id: u64, path: &CgroupPath) -> Option<u64> {
        let found = fs::metadata(self.directory(path)).ok()?;
        (found.ino() == id).then(|| found.nlink())
    }

    /// Returns whether everything below the path belongs to one workload.
    fn is_workload_root(self, path: &CgroupPath) -> bool {
        let leads_to_pods = self.roots.iter().any(|root| root.is_at_or_below(path));
        let in_pod = || matches!(self.roots.find(path), Ok(Some(_)));
        let is_workloads = || {
            let below = CgroupPath::parse(&format!("{path}/x"));
            below.is_some_and(|below| below.workload().0.as_str() == path.as_str())
        };
        !leads_to_pods && (in_pod() || is_workloads())
    }

    fn directory(self, path: &CgroupPath) -> std::path::PathBuf {
        let below = path
            .as_str()
            .strip_prefix(self.base)
            .unwrap_or(path.as_str());
        self.mount.join(below.trim_start_matches('/'))
    }
}

/// Charges directories to the workload's remaining number. Returns `false` if fewer are left.
fn charge(directories: usize, left: Option<&Rc<Cell<usize>>>) -> bool {
    let Some(left) = left else { return true };
    let less = left.get().checked_sub(directories);
    left.set(less.unwrap_or(left.get()));
    less.is_some()
}

/// The throttle of scans for one part of the tree. Clones share its state.
#[derive(Debug, Default, Clone)]
pub(crate) struct ScanThrottle(Arc<tokio::sync::Mutex<ScanTimes>>);

#[derive(Debug, Default)]
struct ScanTimes {
    started: Option<Instant>,
    next: Option<Instant>,
}

impl ScanThrottle {
    /// Waits until a scan that began after this call is over. One scan serves all calls before it.
    /// A scan that has begun, or is next, continues if the caller of this function is dropped, so
    /// that no caller gets around the pause.
    pub(crate) async fn run_after(&self, scan: impl FnOnce() + Send + 'static) {
        let called = Instant::now();
        let mut times = self.0.clone().lock_owned().await;
        if times.started.is_some_and(|started| started > called) {
            return;
        }
        let scan_task = tokio::spawn(async move {
            if let Some(next) = times.next {
                tokio::time::sleep_until(next).await;
            }
            let started = Instant::now();
            // A panic is logged, and the callers find nothing.
            let cpu_time = tokio::task::spawn_blocking(|| {
                let before = thread_time();
                scan();
                thread_time().saturating_sub(before)
            });
            let pause = (cpu_time.await.unwrap_or(MAX_PAUSE) * PAUSE_FACTOR).min(MAX_PAUSE);
            *times = ScanTimes {
                started: Some(started),
                next: Some(Instant::now() + pause),
            };
        });
        let _ = scan_task.await;
    }
}

/// Returns the CPU time of this thread. On a loaded machine a scan takes longer, and costs the
/// same.
fn thread_time() -> Duration {
    sys::thread_time().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const U: &str = "72f7f152-440c-66ac-9084-e0fc1d8a910c";
    const V: &str = "82f7f152-440c-66ac-9084-e0fc1d8a910c";
    const W: &str = "92f7f152-440c-66ac-9084-e0fc1d8a910c";

    /// Returns the number of directories at or below each path.
    fn count_dirs(directories: &[String], below: &[&str]) -> Vec<usize> {
        let tree = tempfile::tempdir().unwrap();
        for directory in directories {
            fs::create_dir_all(tree.path().join(directory)).unwrap();
        }
        let root = [CgroupPath::parse("/").unwrap()];
        let found = CgroupScanner {
            mount: tree.path(),
            base: "",
            roots: &PodRoots::defaults(),
        }
        .scan(&root, &mut DirSnapshots::new())
        .unwrap();
        let below = below.iter().map(|part| CgroupPath::parse(part).unwrap());
        below
            .map(|part| {
                found
                    .values()
                    .filter(|path| path.is_at_or_below(&part))
                    .count()
            })
            .collect()
    }

    #[test]
    fn scan_bounds_the_directories_of_each_workload() {
        let pod = format!("kubepods/burstable/pod{U}");
        let mut directories: Vec<_> = (0..400)
            .map(|number| format!("{pod}/hostile/{number}/{number}"))
            .collect();
        directories.extend(
            (0..400).map(|number| format!("user.slice/user-7.slice/user@7.service/{number}/x")),
        );
        directories.extend((0..300).map(|number| format!("system.slice/{number}.service/x")));
        // These are siblings, some with names that no existing cgroup has.
        directories.extend((0..900).map(|number| format!("kubepods/pod{V}/{number}")));
        directories.extend((0..900).map(|number| format!("kubepods/pod{W}/{number} (deleted)")));
        directories.extend((0..300).map(|number| format!("kubepods/pod{W}/x/{number}")));
        directories.push(format!("{pod}/honest"));
        let parts = [
            &format!("/{pod}"),
            "/user.slice",
            "/system.slice",
            &format!("/kubepods/pod{V}"),
            &format!("/{pod}/honest"),
            &format!("/kubepods/pod{W}"),
        ];
        let [hostile, user, system, wide, honest, nameless] = count_dirs(&directories, &parts)[..]
        else {
            unreachable!()
        };
        // The directories above a user's own belong to the system.
        assert_eq!(
            (hostile, user, wide),
            (
                1 + MAX_DIRS_PER_WORKLOAD,
                2 + MAX_DIRS_PER_WORKLOAD,
                1 + MAX_DIRS_PER_WORKLOAD
            )
        );
        assert_eq!((system, honest), (601, 1));
        // Directories without a path were read before it, or after it.
        assert!(nameless <= 2, "{nameless}");
    }

    #[test]
    fn scan_reuses_snapshots_and_finds_new_directories() {
        let tree = tempfile::tempdir().unwrap();
        let make = |directory: &str| fs::create_dir_all(tree.path().join(directory)).unwrap();
        ["a/b/c", "a/d", "e"].into_iter().for_each(make);
        let root = [CgroupPath::parse("/").unwrap()];
        let mut snapshots = DirSnapshots::new();
        let mut run_scan = || {
            let roots = PodRoots::defaults();
            let found = CgroupScanner {
                mount: tree.path(),
                base: "",
                roots: &roots,
            }
            .scan(&root, &mut snapshots)
            .unwrap();
            for (id, path) in &found {
                let directory = fs::metadata(tree.path().join(&path.as_str()[1..])).unwrap();
                assert_eq!(directory.ino(), *id, "{path}");
            }
            let mut paths: Vec<_> = found.values().map(ToString::to_string).collect();
            paths.sort();
            paths.join(" ")
        };
        assert_eq!(run_scan(), "/ /a /a/b /a/b/c /a/d /e");
        assert_eq!(run_scan(), "/ /a /a/b /a/b/c /a/d /e");
        make("a/b/f");
        assert_eq!(run_scan(), "/ /a /a/b /a/b/c /a/b/f /a/d /e");
        // Another directory of the same name, and one that replaced another: no counts have
        // changed.
        let kept = fs::File::open(tree.path().join("e")).unwrap();
        fs::remove_dir(tree.path().join("e")).unwrap();
        make("e");
        fs::remove_dir(tree.path().join("a/d")).unwrap();
        make("a/g");
        assert_eq!(run_scan(), "/ /a /a/b /a/b/c /a/b/f /a/g /e");
        drop(kept);
        fs::remove_dir_all(tree.path().join("a/b")).unwrap();
        assert_eq!(run_scan(), "/ /a /a/g /e");
    }

    #[tokio::test]
    async fn throttle_shares_scans_and_pauses_after_each() {
        const SCAN_TIME: Duration = Duration::from_millis(5);
        let (throttle, scans) = (
            Arc::<ScanThrottle>::default(),
            Arc::<AtomicUsize>::default(),
        );
        let request_scan = || {
            let (throttle, scans) = (throttle.clone(), scans.clone());
            async move {
                let run_scan = move || {
                    let started = thread_time();
                    while thread_time() - started < SCAN_TIME {}
                    scans.fetch_add(1, Ordering::SeqCst);
                };
                throttle.run_after(run_scan).await;
            }
        };
        let start = Instant::now();
        let all: Vec<_> = (0..1000).map(|_| tokio::spawn(request_scan())).collect();
        for one in all {
            one.await.unwrap();
        }
        assert!(scans.load(Ordering::SeqCst) <= 3, "{scans:?}");
        scans.store(0, Ordering::SeqCst);
        // The scans run one after the other, and no task waits for their end.
        let start_again = Instant::now();
        for _ in 0..3 {
            let one = tokio::spawn(request_scan());
            tokio::task::yield_now().await;
            one.abort();
            request_scan().await;
        }
        let count = u32::try_from(scans.load(Ordering::SeqCst)).unwrap();
        assert!(
            count >= 3 && start_again.elapsed() >= SCAN_TIME * (PAUSE_FACTOR + 1) * (count - 1),
            "{count} {:?}",
            start.elapsed()
        );
    }
}

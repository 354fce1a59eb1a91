//! Walks through the cgroup tree, where the kernel does not open a directory by its id for this process: which directories
//! there are, and how often that may be looked for.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use crate::cgroup::{CgroupPath, PodRoots};

/// Directories below one workload's own that are taken notice of: whatever it makes there, beside each other or below, costs its
/// neighbours no more time than that, and only its own processes are not found.
const MAX_DIRS_PER_WORKLOAD: usize = 512;
/// Walks take so much of one processor's time at most, whoever asks for them: after each there is a pause of so many times its
/// length. Anybody can have ids that are not in the tree, by a cgroup that he removes (attack 21).
const PAUSE_FACTOR: u32 = 9;
/// The longest pause.
pub(crate) const MAX_PAUSE: Duration = Duration::from_secs(1);

/// The tree below `mount`, which is the directory of `base` in it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CgroupScanner<'t> {
    pub(crate) mount: &'t Path,
    pub(crate) base: &'t str,
    pub(crate) roots: &'t PodRoots,
}

/// What directories had in them when they were looked into, by their ids: not looked into again as long as it is the same.
pub(crate) type DirSnapshots = HashMap<u64, DirSnapshot>;

/// The children of a directory, and how many of them the kernel counts, with the two names of the directory itself.
#[derive(Debug, Clone)]
pub(crate) struct DirSnapshot {
    links: u64,
    children: Vec<(u64, CgroupPath)>,
}

impl DirSnapshot {
    /// Whether these are all that there were. A file system that does not count tells nothing by it.
    fn is_whole(&self) -> bool {
        u64::try_from(self.children.len()).is_ok_and(|children| self.links == children + 2)
    }
}

/// One that is to be looked into: who it is, and how many directories may be found below, if that is one workload's.
struct PendingDir {
    id: u64,
    links: u64,
    path: CgroupPath,
    left: Option<Rc<Cell<usize>>>,
}

impl CgroupScanner<'_> {
    /// The ids and paths of all cgroups from `starts` down. `listings` is what was seen before, and then what is seen now.
    pub(crate) fn scan(
        self,
        starts: &[CgroupPath],
        listings: &mut DirSnapshots,
    ) -> io::Result<HashMap<u64, CgroupPath>> {
        let (mut found, mut seen) = (HashMap::new(), DirSnapshots::new());
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
            let is_same = |before: &DirSnapshot| before.links == links && before.is_whole();
            let before = listings.remove(&id).filter(is_same);
            let same =
                before.and_then(|before| Some((self.is_complete(&before.children)?, before)));
            let same = same.filter(|(_, before)| charge(before.children.len(), left));
            let (counts, listing) = match same {
                Some(same) => same,
                None => {
                    let listing = DirSnapshot {
                        links,
                        children: self.list(&path, left),
                    };
                    (
                        listing
                            .children
                            .iter()
                            .map(|(id, path)| self.links(*id, path))
                            .collect(),
                        listing,
                    )
                }
            };
            for ((id, path), links) in listing.children.iter().zip(counts) {
                // One that was removed meanwhile is no error.
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
            seen.insert(id, listing);
        }
        *listings = seen;
        Ok(found)
    }

    /// Reads a directory, which costs ten times as much as to see that it is there, as far as there may be directories in it.
    /// How many files there are is the kernel's doing.
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
        // Also one counts whose name is no part of a path.
        entries
            .filter(is_directory)
            .take_while(|_| charge(1, left))
            .filter_map(child)
            .collect()
    }

    /// How many links each of these has, if all are what they were.
    fn is_complete(self, children: &[(u64, CgroupPath)]) -> Option<Vec<Option<u64>>> {
        children
            .iter()
            .map(|(id, path)| self.links(*id, path).map(Some))
            .collect()
    }

    /// How many links the directory has; `None` if it is another one by now.
    fn links(self, id: u64, path: &CgroupPath) -> Option<u64> {
        let found = fs::metadata(self.directory(path)).ok()?;
        (found.ino() == id).then(|| found.nlink())
    }

    /// Whether everything below is one workload's.
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

/// Takes so many directories from what is left of those that a workload may have, if there are so many.
fn charge(directories: usize, left: Option<&Rc<Cell<usize>>>) -> bool {
    let Some(left) = left else { return true };
    let less = left.get().checked_sub(directories);
    left.set(less.unwrap_or(left.get()));
    less.is_some()
}

/// When one part of the tree was walked, and may be again.
#[derive(Debug, Default)]
pub(crate) struct ScanThrottle(tokio::sync::Mutex<ScanTimes>);

#[derive(Debug, Default)]
struct ScanTimes {
    begun: Option<Instant>,
    next: Option<Instant>,
}

impl ScanThrottle {
    /// Returns when a walk that began after this call is over. One is for all who had asked for it by then. It goes on whatever
    /// becomes of whoever asked, so that nobody gets around the pause.
    pub(crate) async fn run_after(self: &Arc<Self>, walk: impl FnOnce() + Send + 'static) {
        let (asked, walks) = (Instant::now(), self.clone());
        let walking = tokio::spawn(async move {
            let mut turn = walks.0.lock().await;
            if turn.begun.is_some_and(|begun| begun > asked) {
                return;
            }
            if let Some(next) = turn.next {
                tokio::time::sleep_until(next.into()).await;
            }
            let begun = Instant::now();
            // A panic is in the log, and whoever asked finds nothing.
            let spent = tokio::task::spawn_blocking(|| {
                let before = thread_time();
                walk();
                thread_time().saturating_sub(before)
            });
            let pause = (spent.await.unwrap_or(MAX_PAUSE) * PAUSE_FACTOR).min(MAX_PAUSE);
            *turn = ScanTimes {
                begun: Some(begun),
                next: Some(Instant::now() + pause),
            };
        });
        let _ = walking.await;
    }
}

/// What this thread has had of the processor: on a busy machine a walk takes longer, and costs the same.
fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map(Duration::from)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const U: &str = "72f7f152-440c-66ac-9084-e0fc1d8a910c";
    const V: &str = "82f7f152-440c-66ac-9084-e0fc1d8a910c";
    const W: &str = "92f7f152-440c-66ac-9084-e0fc1d8a910c";

    /// How many directories are found at or below each.
    fn walked(directories: &[String], below: &[&str]) -> Vec<usize> {
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
    fn what_one_workload_makes_costs_the_others_nothing() {
        let pod = format!("kubepods/burstable/pod{U}");
        let mut directories: Vec<_> = (0..400)
            .map(|number| format!("{pod}/hostile/{number}/{number}"))
            .collect();
        directories.extend(
            (0..400).map(|number| format!("user.slice/user-7.slice/user@7.service/{number}/x")),
        );
        directories.extend((0..300).map(|number| format!("system.slice/{number}.service/x")));
        // Beside each other, also by names that are none of a cgroup that is there.
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
        let [hostile, user, system, wide, honest, nameless] = walked(&directories, &parts)[..]
        else {
            unreachable!()
        };
        // The directories above a user's own are the system's.
        assert_eq!(
            (hostile, user, wide),
            (
                1 + MAX_DIRS_PER_WORKLOAD,
                2 + MAX_DIRS_PER_WORKLOAD,
                1 + MAX_DIRS_PER_WORKLOAD
            )
        );
        assert_eq!((system, honest), (601, 1));
        // Those without a path were read first, or with it.
        assert!(nameless <= 2, "{nameless}");
    }

    #[test]
    fn what_was_seen_before_is_looked_at_and_what_is_new_is_found() {
        let tree = tempfile::tempdir().unwrap();
        let make = |directory: &str| fs::create_dir_all(tree.path().join(directory)).unwrap();
        ["a/b/c", "a/d", "e"].into_iter().for_each(make);
        let root = [CgroupPath::parse("/").unwrap()];
        let mut listings = DirSnapshots::new();
        let mut walk = || {
            let roots = PodRoots::defaults();
            let found = CgroupScanner {
                mount: tree.path(),
                base: "",
                roots: &roots,
            }
            .scan(&root, &mut listings)
            .unwrap();
            for (id, path) in &found {
                let directory = fs::metadata(tree.path().join(&path.as_str()[1..])).unwrap();
                assert_eq!(directory.ino(), *id, "{path}");
            }
            let mut paths: Vec<_> = found.values().map(ToString::to_string).collect();
            paths.sort();
            paths.join(" ")
        };
        assert_eq!(walk(), "/ /a /a/b /a/b/c /a/d /e");
        assert_eq!(walk(), "/ /a /a/b /a/b/c /a/d /e");
        make("a/b/f");
        assert_eq!(walk(), "/ /a /a/b /a/b/c /a/b/f /a/d /e");
        // Another one of the same name, and one in the place of another: nothing that is counted has changed.
        let kept = fs::File::open(tree.path().join("e")).unwrap();
        fs::remove_dir(tree.path().join("e")).unwrap();
        make("e");
        fs::remove_dir(tree.path().join("a/d")).unwrap();
        make("a/g");
        assert_eq!(walk(), "/ /a /a/b /a/b/c /a/b/f /a/g /e");
        drop(kept);
        fs::remove_dir_all(tree.path().join("a/b")).unwrap();
        assert_eq!(walk(), "/ /a /a/g /e");
    }

    #[tokio::test]
    async fn a_walk_is_for_all_who_asked_before_it_began_and_then_there_is_a_pause() {
        const WALK: Duration = Duration::from_millis(5);
        let (walks, walked) = (
            Arc::<ScanThrottle>::default(),
            Arc::<AtomicUsize>::default(),
        );
        let ask = || {
            let (walks, walked) = (walks.clone(), walked.clone());
            async move {
                let walk = move || {
                    let begun = thread_time();
                    while thread_time() - begun < WALK {}
                    walked.fetch_add(1, Ordering::SeqCst);
                };
                walks.run_after(walk).await;
            }
        };
        let start = Instant::now();
        let all: Vec<_> = (0..1000).map(|_| tokio::spawn(ask())).collect();
        for one in all {
            one.await.unwrap();
        }
        assert!(walked.load(Ordering::SeqCst) <= 3, "{walked:?}");
        walked.store(0, Ordering::SeqCst);
        // One after the other, and of each nobody waits for the end.
        let start_again = Instant::now();
        for _ in 0..3 {
            let one = tokio::spawn(ask());
            tokio::task::yield_now().await;
            one.abort();
            ask().await;
        }
        let count = u32::try_from(walked.load(Ordering::SeqCst)).unwrap();
        assert!(
            count >= 3 && start_again.elapsed() >= WALK * (PAUSE_FACTOR + 1) * (count - 1),
            "{count} {:?}",
            start.elapsed()
        );
    }
}

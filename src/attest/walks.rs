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

use crate::cgroup::{CgroupPath, PodRoots};

/// Directories below one workload's own that are looked into: whatever it makes there costs its neighbours no more time than
/// that, and only its own processes are not found.
const BELOW: usize = 256;
/// Walks take so much of one processor's time at most, whoever asks for them: after each there is a pause of so many times its
/// length. Anybody can have ids that are not in the tree, by a cgroup that he removes (attack 21).
const PAUSES: u32 = 9;
/// The longest pause.
const PAUSE_MOST: Duration = Duration::from_secs(1);

/// The tree below `mount`, which is the directory of `base` in it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ground<'t> {
    pub(crate) mount: &'t Path,
    pub(crate) base: &'t str,
    pub(crate) roots: &'t PodRoots,
}

impl Ground<'_> {
    /// The ids and paths of all cgroups from `starts` down.
    pub(crate) fn walk(self, starts: &[CgroupPath]) -> io::Result<HashMap<u64, CgroupPath>> {
        let mut found = HashMap::new();
        let mut open: Vec<(CgroupPath, Option<Rc<Cell<usize>>>)> = Vec::new();
        for start in starts {
            found.insert(fs::metadata(self.directory(start))?.ino(), start.clone());
            open.push((start.clone(), None));
        }
        while let Some((path, left)) = open.pop() {
            if let Some(left) = &left {
                let Some(less) = left.get().checked_sub(1) else { continue };
                left.set(less);
            }
            // One that was removed since its parent was listed is no error.
            let Ok(entries) = fs::read_dir(self.directory(&path)) else { continue };
            for entry in entries.filter_map(Result::ok) {
                let name = entry.file_name();
                let (true, Some(name)) = (entry.file_type().is_ok_and(|kind| kind.is_dir()), name.to_str()) else {
                    continue;
                };
                let above = path.as_str().trim_end_matches('/');
                let Some(child) = CgroupPath::parse(&format!("{above}/{name}")) else { continue };
                let left = left.clone().or_else(|| self.begins_workload(&child).then(|| Rc::new(Cell::new(BELOW))));
                found.insert(entry.ino(), child.clone());
                open.push((child, left));
            }
        }
        Ok(found)
    }

    /// Whether everything below is one workload's.
    fn begins_workload(self, path: &CgroupPath) -> bool {
        let leads_to_pods = self.roots.iter().any(|root| root.is_at_or_below(path));
        let in_pod = || matches!(self.roots.find(path), Ok(Some(_)));
        let is_workloads = || {
            let below = CgroupPath::parse(&format!("{path}/x"));
            below.is_some_and(|below| below.workload().0.as_str() == path.as_str())
        };
        !leads_to_pods && (in_pod() || is_workloads())
    }

    fn directory(self, path: &CgroupPath) -> std::path::PathBuf {
        let below = path.as_str().strip_prefix(self.base).unwrap_or(path.as_str());
        self.mount.join(below.trim_start_matches('/'))
    }
}

/// When one part of the tree was walked, and may be again.
#[derive(Debug, Default)]
pub(crate) struct Walks(tokio::sync::Mutex<Turn>);

#[derive(Debug, Default)]
struct Turn {
    begun: Option<Instant>,
    next: Option<Instant>,
}

impl Walks {
    /// Returns when a walk that began after this call is over. One is for all who had asked for it by then. It goes on whatever
    /// becomes of whoever asked, so that nobody gets around the pause.
    pub(crate) async fn after(self: &Arc<Self>, walk: impl FnOnce() + Send + 'static) {
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
            let _ = tokio::task::spawn_blocking(walk).await;
            let pause = (begun.elapsed() * PAUSES).min(PAUSE_MOST);
            *turn = Turn { begun: Some(begun), next: Some(Instant::now() + pause) };
        });
        let _ = walking.await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const U: &str = "72f7f152-440c-66ac-9084-e0fc1d8a910c";
    const V: &str = "82f7f152-440c-66ac-9084-e0fc1d8a910c";

    /// How many directories are found at or below each.
    fn walked(directories: &[String], below: &[&str]) -> Vec<usize> {
        let tree = tempfile::tempdir().unwrap();
        for directory in directories {
            fs::create_dir_all(tree.path().join(directory)).unwrap();
        }
        let root = [CgroupPath::parse("/").unwrap()];
        let found = Ground { mount: tree.path(), base: "", roots: &PodRoots::usual() }.walk(&root).unwrap();
        let below = below.iter().map(|part| CgroupPath::parse(part).unwrap());
        below.map(|part| found.values().filter(|path| path.is_at_or_below(&part)).count()).collect()
    }

    #[test]
    fn what_one_workload_makes_costs_the_others_nothing() {
        let pod = format!("kubepods/burstable/pod{U}");
        let mut directories: Vec<_> = (0..5000).map(|number| format!("{pod}/hostile/{number}/{number}")).collect();
        directories.extend((0..5000).map(|number| format!("user.slice/user-7.slice/user@7.service/{number}/x")));
        directories.extend((0..300).map(|number| format!("system.slice/{number}.service/x")));
        directories.extend((0..300).map(|number| format!("kubepods/pod{V}/{number}")));
        directories.push(format!("{pod}/honest"));
        let parts = [
            &format!("/{pod}"),
            "/user.slice",
            "/system.slice",
            &format!("/kubepods/pod{V}"),
            &format!("/{pod}/honest"),
        ];
        let [hostile, user, system, wide, honest] = walked(&directories, &parts)[..] else { unreachable!() };
        // Those whose names were read with those of others are found as well.
        assert!((5000..5003 + BELOW).contains(&hostile), "{hostile}");
        assert!((5000..5003 + BELOW).contains(&user), "{user}");
        assert_eq!((system, wide, honest), (601, 301, 1));
    }

    #[tokio::test]
    async fn a_walk_is_for_all_who_asked_before_it_began_and_then_there_is_a_pause() {
        const WALK: Duration = Duration::from_millis(5);
        let (walks, walked) = (Arc::<Walks>::default(), Arc::<AtomicUsize>::default());
        let ask = || {
            let (walks, walked) = (walks.clone(), walked.clone());
            async move {
                let walk = move || {
                    std::thread::sleep(WALK);
                    walked.fetch_add(1, Ordering::SeqCst);
                };
                walks.after(walk).await;
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
            count >= 3 && start_again.elapsed() >= WALK * (PAUSES + 1) * (count - 1),
            "{count} {:?}",
            start.elapsed()
        );
    }
}

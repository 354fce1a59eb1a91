use super::*;
use crate::attest::cgroup_scan::MAX_PAUSE;
use crate::skip::{root, skip};

fn found(mountinfo: &str) -> Option<CgroupTree> {
    CgroupTree::find(&CgroupMounts::find(mountinfo), PodRoots::defaults())
}

/// Returns the tree of this machine, to which only root can add cgroups.
fn real_tree() -> Option<CgroupTree> {
    if !root() {
        return None;
    }
    let tree = found(&fs::read_to_string("/proc/self/mountinfo").unwrap());
    if tree.is_none() {
        skip("no cgroup v2 tree is mounted");
    }
    tree
}

#[test]
fn find_returns_the_v2_mount() {
    let hybrid = "30 24 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
                  31 30 0:27 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n\
                  32 30 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
    assert_eq!(
        found(hybrid).unwrap().mount,
        Path::new("/sys/fs/cgroup/unified")
    );
    let pure =
        "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:4 master:2 - cgroup2 cgroup2 rw,nsdelegate\n";
    assert_eq!(found(pure).unwrap().mount, Path::new("/sys/fs/cgroup"));
    let part = "35 24 0:30 /kubepods/pod72f7f152-440c-66ac-9084-e0fc1d8a910c/x /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
    assert!(found(part).is_none());
    assert!(found("32 30 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n").is_none());
}

#[test]
fn path_is_evicted_with_its_directory() {
    let root = tempfile::tempdir().unwrap();
    let unit = root.path().join("system.slice/billing.service");
    fs::create_dir_all(&unit).unwrap();
    let id = fs::metadata(&unit).unwrap().ino();
    let tree = CgroupTree::at(root.path().to_owned(), PodRoots::defaults());
    assert_eq!(
        tree.path_of_blocking(id).unwrap().as_str(),
        "/system.slice/billing.service"
    );
    assert_eq!(
        tree.path_of_blocking(fs::metadata(root.path()).unwrap().ino())
            .unwrap()
            .as_str(),
        "/"
    );
    assert_eq!(
        tree.path_of_blocking(1 << 60),
        Err(AttestError::UnreadableCgroup)
    );
    // The path was last found there longer ago than the recheck time.
    let later = || {
        tree.paths
            .lock()
            .unwrap()
            .values_mut()
            .for_each(|known| known.seen -= PATH_RECHECK_AFTER)
    };
    later();
    fs::rename(&unit, root.path().join("system.slice/other.service")).unwrap();
    assert_eq!(
        tree.path_of_blocking(id).unwrap().as_str(),
        "/system.slice/other.service"
    );
    fs::remove_dir(root.path().join("system.slice/other.service")).unwrap();
    later();
    assert_eq!(
        tree.path_of_blocking(id),
        Err(AttestError::UnreadableCgroup)
    );
}

#[test]
fn path_by_handle_works_on_the_real_tree() {
    let Some(tree) = real_tree() else {
        return;
    };
    let root = fs::metadata(&tree.mount).unwrap().ino();
    assert_eq!(tree.path_by_handle(root).unwrap().as_str(), "/");
    let (own, _) = create_cgroup(&tree, "handle");
    let id = fs::metadata(&own).unwrap().ino();
    let path = tree.path_by_handle(id).unwrap();
    assert_eq!(tree.path_of_blocking(id), Ok(path.clone()));
    fs::remove_dir(&own).unwrap();
    tree.paths
        .lock()
        .unwrap()
        .values_mut()
        .for_each(|known| known.seen -= PATH_RECHECK_AFTER);
    assert_eq!(
        path.as_str(),
        format!("/{}", own.file_name().unwrap().display())
    );
    assert_eq!(tree.path_by_handle(id), Err(Errno::ESTALE));
    assert_eq!(
        tree.path_of_blocking(id),
        Err(AttestError::UnreadableCgroup)
    );
}

/// The ids of removed cgroups are free for any user, so they would cause scans without end.
#[test]
fn unknown_id_starts_no_scan_with_handles() {
    let tree = found(&fs::read_to_string("/proc/self/mountinfo").unwrap());
    let Some(tree) = tree.filter(CgroupTree::detects_removed) else {
        return skip("cgroups cannot be opened by their id: CAP_DAC_READ_SEARCH is missing");
    };
    // `None` would start a scan.
    let unknown = tree.cached_path(u64::MAX);
    assert_eq!(unknown, Some(Err(AttestError::UnreadableCgroup)));
}

#[test]
fn listing_fails_for_unreadable_cgroups() {
    let root = tempfile::tempdir().unwrap();
    let tree = CgroupTree::at(root.path().to_owned(), PodRoots::defaults());
    let path = CgroupPath::parse("/gone").unwrap();
    assert_eq!(tree.processes(&path, 7), Err(AttestError::UnreadableCgroup));
    fs::write(root.path().join("cgroup.procs"), "12\n345\n").unwrap();
    let path = CgroupPath::parse("/").unwrap();
    assert_eq!(tree.processes(&path, 7), Ok(vec![12, 345]));
    assert_eq!(
        tree.processes(&path, 6),
        Err(AttestError::TooManyDescriptors)
    );
}

/// Creates a cgroup in the real tree where possible, and returns its directory and path.
fn create_cgroup(tree: &CgroupTree, name: &str) -> (PathBuf, CgroupPath) {
    let directory = tempfile::Builder::new()
        .prefix(&format!("awsvid-unit-test-{name}-"))
        .tempdir_in(&tree.mount)
        .unwrap()
        .keep();
    let path = format!("/{}", directory.file_name().unwrap().display());
    (directory, CgroupPath::parse(&path).unwrap())
}

fn move_to(directory: &Path, pid: u32) {
    fs::write(directory.join("cgroup.procs"), pid.to_string()).unwrap();
}

#[test]
fn open_list_returns_current_pids() {
    let Some(tree) = real_tree() else {
        return;
    };
    let (directory, path) = create_cgroup(&tree, "list");
    let mut children: Vec<_> = (0..2)
        .map(|_| {
            std::process::Command::new("cat")
                .stdin(std::process::Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    let pids: Vec<_> = children.iter().map(std::process::Child::id).collect();
    assert_eq!(tree.processes(&path, 100), Ok(Vec::new()));
    let inode = |list: &File| list.metadata().unwrap().ino();
    let open_list = || tree.lists().peek(&path).unwrap().clone();
    let kept = || inode(&open_list().lock().unwrap());
    let first = kept();
    for count in 1..=2 {
        move_to(&directory, pids[count - 1]);
        assert_eq!(tree.processes(&path, 100), Ok(pids[..count].to_vec()));
    }
    // The same holds while another thread reads the list.
    let busy = open_list();
    let busy = busy.lock().unwrap();
    assert_eq!(tree.processes(&path, 100), Ok(pids.clone()));
    drop(busy);
    children.iter_mut().for_each(|child| {
        child.kill().unwrap();
        child.wait().unwrap();
    });
    assert_eq!(
        (tree.processes(&path, 100), kept()),
        (Ok(Vec::new()), first)
    );
    fs::remove_dir(&directory).unwrap();
    assert_eq!(
        tree.processes(&path, 100),
        Err(AttestError::UnreadableCgroup)
    );
    // A new cgroup at the same path is read, and not the removed one.
    fs::create_dir(&directory).unwrap();
    assert_eq!(tree.processes(&path, 100), Ok(Vec::new()));
    assert_ne!(kept(), first);
    fs::remove_dir(&directory).unwrap();
}

#[test]
fn full_open_lists_evict_the_least_recently_used() {
    let root = tempfile::tempdir().unwrap();
    let tree = CgroupTree::at(root.path().to_owned(), PodRoots::defaults());
    let most = u32::try_from(MAX_OPEN_LISTS.get()).unwrap();
    let path_of = |number: u32| CgroupPath::parse(&format!("/{number}")).unwrap();
    for number in 0..most + 20 {
        fs::create_dir(root.path().join(number.to_string())).unwrap();
        fs::write(
            root.path().join(format!("{number}/cgroup.procs")),
            format!("{number}\n"),
        )
        .unwrap();
        // The first one is used again and again.
        for used in [0, number] {
            assert_eq!(tree.processes(&path_of(used), 10), Ok(vec![used]));
        }
    }
    let lists = tree.lists();
    assert_eq!(lists.len(), MAX_OPEN_LISTS.get());
    let is_open = |number| lists.contains(&path_of(number));
    assert!(is_open(0) && !(1..=20).any(is_open) && (21..most + 20).all(is_open));
}

/// A part of the real tree with these directories, which is removed on drop.
struct CgroupSubtree(PathBuf);

impl CgroupSubtree {
    fn of(tree: &CgroupTree, name: &str, directories: impl IntoIterator<Item = String>) -> Self {
        let (part, _) = create_cgroup(tree, name);
        for directory in directories {
            fs::create_dir_all(part.join(directory)).unwrap();
        }
        Self(part)
    }
}

impl Drop for CgroupSubtree {
    fn drop(&mut self) {
        fn remove(directory: &Path) {
            let entries = fs::read_dir(directory)
                .into_iter()
                .flatten()
                .filter_map(Result::ok);
            entries
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .for_each(|entry| remove(&entry.path()));
            let _ = fs::remove_dir(directory);
        }
        remove(&self.0);
    }
}

fn id_of(directory: &Path) -> u64 {
    fs::metadata(directory).unwrap().ino()
}

/// Finds a path as for a peer: in the cache, or by a scan.
async fn cached_or_scanned(
    tree: &Arc<CgroupTree>,
    id: u64,
    (scope, key): (TreeScope, ScanKey),
) -> Result<CgroupPath, AttestError> {
    match tree.cached_path(id) {
        Some(cached) => cached,
        None => tree.scan_for(id, scope, key).await,
    }
}

/// Returns the result for a peer that does not wait for a scan.
#[track_caller]
fn result_without_wait(
    tree: &Arc<CgroupTree>,
    id: u64,
    key: ScanKey,
) -> Result<CgroupPath, AttestError> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    let found = std::pin::pin!(cached_or_scanned(tree, id, (TreeScope::All, key)));
    match found.poll(&mut context) {
        std::task::Poll::Ready(found) => found,
        std::task::Poll::Pending => panic!("it does not wait"),
    }
}

/// Finds a path as for a peer in this pod's network.
async fn path_of(
    tree: &Arc<CgroupTree>,
    namespace: u64,
    id: u64,
) -> Result<CgroupPath, AttestError> {
    let key = ScanKey {
        namespace: Some(namespace),
        uid: None,
    };
    cached_or_scanned(tree, id, (TreeScope::Pods, key)).await
}

/// Simulates a node of 250 pods with two containers each. One pod floods the tree with ids that do
/// not exist.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_ids_cost_a_tenth_of_a_cpu_and_block_no_lookup() {
    let Some(whole) = real_tree() else {
        return;
    };
    let container = |pod: usize, number: usize| {
        format!(
            "kubepods/burstable/pod{pod:08x}-440c-66ac-9084-e0fc1d8a910c/{:064x}",
            pod * 10 + number
        )
    };
    let containers = (0..250).flat_map(|pod| (0..2).map(move |number| container(pod, number)));
    let part = CgroupSubtree::of(&whole, "node", containers);
    let tree = Arc::new(CgroupTree::at(part.0.clone(), PodRoots::defaults()));
    let start = Instant::now();
    let known = id_of(&part.0.join(container(7, 0)));
    path_of(&tree, 0, known).await.unwrap();
    let first = start.elapsed();

    let end = Instant::now() + Duration::from_secs(1);
    let hostile = (0..64_u64).map(|one| {
        let tree = tree.clone();
        tokio::spawn(async move {
            let mut requests = 0;
            while Instant::now() < end {
                let id = (1 << 60) + (one << 32) + requests;
                assert_eq!(
                    path_of(&tree, one, id).await,
                    Err(AttestError::UnreadableCgroup)
                );
                requests += 1;
            }
            requests
        })
    });
    let hostile: Vec<_> = hostile.collect();
    let (mut longest_known, mut longest_new, mut new_ones) = (Duration::ZERO, Duration::ZERO, 0);
    while Instant::now() < end {
        let start = Instant::now();
        path_of(&tree, 0, known).await.unwrap();
        longest_known = longest_known.max(start.elapsed());
        new_ones += 1;
        let directory = part.0.join(format!("kubepods/burstable/{:064x}", new_ones));
        fs::create_dir(&directory).unwrap();
        let start = Instant::now();
        path_of(&tree, 0, id_of(&directory)).await.unwrap();
        longest_new = longest_new.max(start.elapsed());
    }
    let mut requests = 0;
    for one in hostile {
        requests += one.await.unwrap();
    }
    eprintln!(
        "the first scan: {first:?}; {requests} ids that are nowhere; at most {longest_known:?} for a known one, {longest_new:?} for \
         each of {new_ones} new ones"
    );
    assert!(
        longest_known < Duration::from_millis(100) && longest_new < MAX_PAUSE * 3,
        "{longest_known:?} {longest_new:?}"
    );
}

/// Returns a tree, and the id of a cgroup in it that no scan has found yet.
fn tree_with_unknown_cgroup() -> (tempfile::TempDir, Arc<CgroupTree>, u64) {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("new")).unwrap();
    let tree = Arc::new(CgroupTree::at(
        folder.path().to_owned(),
        PodRoots::defaults(),
    ));
    let id = id_of(&folder.path().join("new"));
    (folder, tree, id)
}

/// Covers T33: peers that wait for a scan in vain block others neither from being accepted nor from
/// a scan.
#[tokio::test]
async fn waiters_for_scans_are_limited_per_user_and_pod() {
    let (_folder, tree, id) = tree_with_unknown_cgroup();
    let hostile = ScanKey {
        namespace: None,
        uid: Some(7),
    };
    let held: Vec<_> = (0..MAX_WAITING_PER_KEY)
        .map(|_| tree.waiting.try_acquire(&hostile).unwrap())
        .collect();
    let rejected = result_without_wait(&tree, id, hostile);
    assert_eq!(rejected, Err(AttestError::SearchBusy));
    for (namespace, uid) in [(None, Some(8)), (Some(1), None)] {
        let waits = tree.cached_path(id).is_none();
        let key = ScanKey { namespace, uid };
        let found = cached_or_scanned(&tree, id, (TreeScope::All, key)).await;
        assert_eq!(found.unwrap().as_str(), "/new");
        // The first peer had to wait for a scan, and the next one finds the path in the cache.
        assert_eq!(waits, namespace.is_none());
    }
    drop(held);
}

/// Covers T29: a person with subordinate ids fills the queue for scans.
#[tokio::test]
async fn waiters_with_subordinate_ids_give_way_to_others() {
    let (_folder, tree, id) = tree_with_unknown_cgroup();
    let key = |uid| ScanKey {
        namespace: None,
        uid: Some(uid),
    };
    // The permit in use of an honest user is not one of those.
    let mut held = Vec::new();
    let mut hold = |uid| {
        let permit = tree.waiting.try_acquire_evicting(&key(uid)).unwrap();
        permit.set_in_use();
        held.push(permit);
    };
    hold(8);
    (0..511).for_each(|number| hold(100_000 + number));
    let is_evicted = |permit: &crate::limits::FairPermit<ScanKey>| {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        std::pin::pin!(permit.evicted())
            .poll(&mut context)
            .is_ready()
    };
    let (honest, hostile) = held.split_first().unwrap();
    // One more of those ids takes no permit of another.
    let rejected = result_without_wait(&tree, id, key(130_000));
    assert_eq!(rejected, Err(AttestError::SearchBusy));
    let found = cached_or_scanned(&tree, id, (TreeScope::All, key(9))).await;
    assert_eq!(found.unwrap().as_str(), "/new");
    assert_eq!(
        hostile.iter().filter(|permit| is_evicted(permit)).count(),
        1
    );
    assert!(!is_evicted(honest));
}

#[tokio::test]
async fn evicted_waiter_is_rejected() {
    let folder = tempfile::tempdir().unwrap();
    let tree = Arc::new(CgroupTree::at(
        folder.path().to_owned(),
        PodRoots::defaults(),
    ));
    // A scan runs, and does not end.
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let throttle = tree.throttles[TreeScope::All as usize].clone();
    let scan = tokio::spawn(async move {
        throttle
            .run_after(move || {
                let _ = ended.recv();
            })
            .await;
    });
    tokio::task::yield_now().await;
    let mut waiting = tokio::task::JoinSet::new();
    for number in 0..MAX_WAITING {
        let (tree, uid) = (tree.clone(), 100_000 + u32::try_from(number).unwrap());
        waiting.spawn(async move {
            let key = ScanKey {
                namespace: None,
                uid: Some(uid),
            };
            cached_or_scanned(&tree, 1, (TreeScope::All, key)).await
        });
    }
    tokio::task::yield_now().await;
    let honest = ScanKey {
        namespace: None,
        uid: Some(9),
    };
    let permit = tree.waiting.try_acquire_evicting(&honest);
    let evicted = tokio::time::timeout(Duration::from_secs(60), waiting.join_next()).await;
    let evicted = evicted.expect("one gives way").unwrap().unwrap();
    assert_eq!(evicted, Err(AttestError::SearchBusy));
    drop((permit, end));
    scan.await.unwrap();
}

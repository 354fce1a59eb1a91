//! Finds a process of a pod, for an agent that attests processes only.

use std::fs;
use std::path::Path;

use crate::attest::cgroup_mounts::CgroupMounts;
use crate::attest::cgroup_tree::CgroupTree;
use crate::cgroup::{CgroupPath, PodRoots, PodUid};

/// The name of the process that container runtimes start first in each pod. An agent that compares
/// containers waits for it in vain, because the kubelet does not list its container.
const SANDBOX: &str = "pause";
/// Bounds the directories that are read: a container may create as many as it likes.
const MAX_DIRS: usize = 4096;
/// Bounds the list of one cgroup's processes, in bytes.
const MAX_LIST_BYTES: usize = 65_536;

/// Returns the pid of a process of this pod, below the kubelet's cgroup `roots`. `None` if the pod
/// has none, or none that is visible in the pid namespace of `proc_root`.
///
/// The process may end at any time. So it is for reports, and decides about no credentials.
pub fn find_process_of_pod(proc_root: &Path, roots: PodRoots, uid: &PodUid) -> Option<u32> {
    let mountinfo = fs::read_to_string(proc_root.join("self/mountinfo")).ok()?;
    let tree = CgroupTree::find(&CgroupMounts::find(&mountinfo), roots)?;
    let pids = processes(&tree, uid);
    let is_sandbox = |pid: &u32| {
        let name = fs::read_to_string(proc_root.join(pid.to_string()).join("comm"));
        name.is_ok_and(|name| name.trim_end() == SANDBOX)
    };
    let first = pids.iter().find(|pid| !is_sandbox(pid));
    first.or(pids.first()).copied()
}

/// Returns the pids of a pod's processes, in ascending order.
fn processes(tree: &CgroupTree, uid: &PodUid) -> Vec<u32> {
    let mut open: Vec<CgroupPath> = tree.roots().iter().cloned().collect();
    let (mut pids, mut left) = (Vec::new(), MAX_DIRS);
    while let Some(path) = open.pop() {
        match tree.roots().find(&path) {
            Ok(Some(segment)) if segment.pod.uid == *uid => {
                // A removed or threaded cgroup has no list.
                pids.extend(tree.processes(&path, MAX_LIST_BYTES).unwrap_or_default());
            }
            Ok(None) => {}
            _ => continue,
        }
        let entries = fs::read_dir(tree.directory(&path)).into_iter().flatten();
        let directories = entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        for directory in directories.take(left) {
            left -= 1;
            let name = directory.file_name();
            let child = format!("{path}/{}", name.to_string_lossy());
            open.extend(CgroupPath::parse(&child));
        }
    }
    // A process of another pid namespace is listed as 0.
    pids.retain(|pid| *pid != 0);
    pids.sort_unstable();
    pids
}

#[cfg(test)]
mod tests {
    use super::*;

    const C: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn processes_of_all_containers_of_one_pod_are_listed() {
        let folder = tempfile::tempdir().unwrap();
        let own = "72f7f152-440c-66ac-9084-e0fc1d8a910c";
        let other = "72f7f152-440c-66ac-9084-e0fc1d8a910d";
        for (cgroup, list) in [
            ("system.slice".to_owned(), "7\n"),
            (format!("kubepods/burstable/pod{own}/{C}"), "12\n0\n"),
            (format!("kubepods/burstable/pod{own}/other/init"), "11\n"),
            (
                format!("kubepods/burstable/pod{other}/{C}/pod{own}"),
                "13\n",
            ),
            (format!("kubepods/pod{other}/{C}"), "14\n"),
        ] {
            let directory = folder.path().join(cgroup);
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("cgroup.procs"), list).unwrap();
        }
        let tree = CgroupTree::at(folder.path().to_owned(), PodRoots::defaults());
        let uid = |text: &str| PodUid::parse(text).unwrap();
        assert_eq!(processes(&tree, &uid(own)), [11, 12]);
        assert_eq!(processes(&tree, &uid(other)), [13, 14]);
        let absent = "72f7f152-440c-66ac-9084-e0fc1d8a910e";
        assert_eq!(processes(&tree, &uid(absent)), [0; 0]);
    }
}

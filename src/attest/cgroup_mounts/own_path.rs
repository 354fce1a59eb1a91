//! Finds the daemon's own cgroup in a mount of the tree above it. In a cgroup namespace the kernel
//! does not report that path.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The number of directories of which a search reads the metadata: 0.1 s of work.
const MAX_DIRECTORIES: usize = 32_768;

/// A directory that may lead to the own_id one. The least is searched first.
///
/// A user with a delegated cgroup can make any number of cgroups in it (T25). Those do not delay
/// the search, since root owns each directory on the way to the daemon's own. Root in a container
/// can do the same. Kernfs counts subdirectories as links, so a full directory is searched last.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct CgroupDirectory {
    is_users: bool,
    links: u64,
    /// The number of levels below the mount.
    level: usize,
    path: String,
}

/// Finds the path from `mount` down to the directory that is mounted at `own_root`, `levels` below
/// it. `None` if it is not among the first [`MAX_DIRECTORIES`].
pub(super) fn own_path(mount: &Path, own_root: &Path, levels: usize) -> Option<String> {
    let own_id = fs::metadata(own_root).ok()?.ino();
    let mut directories = BinaryHeap::from([Reverse(CgroupDirectory {
        is_users: false,
        links: 0,
        level: 0,
        path: String::new(),
    })]);
    let mut left = MAX_DIRECTORIES;
    while let Some(Reverse(CgroupDirectory { level, path, .. })) = directories.pop() {
        let level = level + 1;
        for entry in subdirectories(&mount.join(path.trim_start_matches('/'))) {
            left = left.checked_sub(1)?;
            let (Ok(found), Ok(name)) = (entry.metadata(), entry.file_name().into_string()) else {
                continue;
            };
            let path = format!("{path}/{name}");
            if level < levels {
                directories.push(Reverse(CgroupDirectory {
                    is_users: found.uid() != 0,
                    links: found.nlink(),
                    level,
                    path,
                }));
            } else if found.ino() == own_id {
                return Some(path);
            }
        }
    }
    None
}

fn subdirectories(directory: &Path) -> impl Iterator<Item = fs::DirEntry> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::chown;

    use super::*;

    /// Makes a tree in memory, where a directory has as many links as in kernfs.
    fn tree() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").unwrap()
    }

    fn fill(directory: &Path, count: usize) {
        for number in 0..count {
            fs::create_dir_all(directory.join(number.to_string())).unwrap();
        }
    }

    #[test]
    fn own_path_is_found_whatever_number_of_cgroups_a_user_has() {
        if !crate::skip::root() {
            return;
        }
        let tree = tree();
        let users = tree.path().join("a/user");
        let each = MAX_DIRECTORIES / 200 + 1;
        (0..200).for_each(|number| fill(&users.join(number.to_string()), each));
        chown(&users, Some(1001), None).unwrap();
        // Root's directory has more links than each of the user's.
        let parent = tree.path().join("z/y/x");
        fill(&parent, 300);
        let own = own_path(tree.path(), &parent.join("7"), 4);
        assert_eq!(own.as_deref(), Some("/z/y/x/7"));
    }

    #[test]
    fn search_is_bounded_and_reads_full_directories_last() {
        let tree = tree();
        let full = tree.path().join("a/full");
        fill(&full, MAX_DIRECTORIES);
        fill(&tree.path().join("z/y"), 1);
        let own = own_path(tree.path(), &tree.path().join("z/y/0"), 3);
        assert_eq!(own.as_deref(), Some("/z/y/0"));
        let last = fs::read_dir(&full).unwrap().last().unwrap().unwrap();
        assert_eq!(own_path(tree.path(), &last.path(), 3), None);
    }
}

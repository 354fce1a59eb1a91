//! The host's cgroup v2 tree: which path an id stands for, and which processes a cgroup has.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::caller::Refusal;
use crate::cgroup::CgroupPath;

/// Where the tree is mounted, and what is known of its directories.
///
/// A cgroup's id is the inode number of its directory, and never used again while the machine runs.
#[derive(Debug)]
pub(crate) struct CgroupTree {
    mount: PathBuf,
    paths: Mutex<HashMap<u64, CgroupPath>>,
}

impl CgroupTree {
    /// Takes the directory on which the hierarchy's root is mounted.
    pub(crate) fn at(mount: PathBuf) -> Self {
        Self { mount, paths: Mutex::default() }
    }

    /// Finds the mount in the text of `/proc/self/mountinfo`; `None` on a host without cgroup v2.
    ///
    /// Only one whose root is the hierarchy's own: paths below another one mean something else.
    pub(crate) fn find(mountinfo: &str) -> Option<Self> {
        mountinfo.lines().find_map(|line| {
            let (mount, filesystem) = line.split_once(" - ")?;
            let is_cgroup2 = filesystem.split(' ').next() == Some("cgroup2");
            let mut fields = mount.split(' ').skip(3);
            let (root, point) = (fields.next()?, fields.next()?);
            (is_cgroup2 && root == "/").then(|| Self::at(PathBuf::from(point)))
        })
    }

    /// The path of the cgroup with this id. A removed one, or one outside the tree, is a refusal.
    pub(crate) fn path_of(&self, id: u64) -> Result<CgroupPath, Refusal> {
        let mut paths = self.paths.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let still_there = |path: &&CgroupPath| fs::metadata(self.directory(path)).is_ok_and(|found| found.ino() == id);
        if let Some(known) = paths.get(&id).filter(still_there) {
            return Ok(known.clone());
        }
        // Walked anew as a whole, so that removed directories are forgotten too. The lock is held meanwhile: a caller
        // with another unknown id finds it in this walk instead of starting a second one.
        let walked = self.walk().map_err(|error| {
            tracing::warn!(%error, mount = %self.mount.display(), "the cgroup tree cannot be read");
            Refusal::UnreadableCgroup
        })?;
        *paths = walked;
        paths.get(&id).cloned().ok_or(Refusal::UnreadableCgroup)
    }

    fn walk(&self) -> io::Result<HashMap<u64, CgroupPath>> {
        let mut found = HashMap::new();
        let mut open = vec![(fs::metadata(&self.mount)?.ino(), "/".to_owned())];
        while let Some((id, path)) = open.pop() {
            let Some(cgroup) = CgroupPath::parse(&path) else { continue };
            // One that was removed since its parent was listed is no error.
            let Ok(entries) = fs::read_dir(self.directory(&cgroup)) else { continue };
            for entry in entries.filter_map(Result::ok) {
                let name = entry.file_name().into_string();
                if let (true, Ok(name)) = (entry.file_type().is_ok_and(|kind| kind.is_dir()), name) {
                    open.push((entry.ino(), format!("{}/{name}", path.trim_end_matches('/'))));
                }
            }
            found.insert(id, cgroup);
        }
        Ok(found)
    }

    /// The pids in this cgroup itself; a refusal if their list has more than `bytes`. One that can't be listed (removed, or
    /// of the threaded kind) is a refusal too.
    pub(crate) fn processes(&self, path: &CgroupPath, bytes: u64) -> Result<Vec<u32>, Refusal> {
        let mut text = String::new();
        let file = File::open(self.directory(path).join("cgroup.procs"));
        let read = file.and_then(|file| file.take(bytes + 1).read_to_string(&mut text));
        if read.map_err(|_| Refusal::UnreadableCgroup)? as u64 > bytes {
            return Err(Refusal::TooManyDescriptors);
        }
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    fn directory(&self, path: &CgroupPath) -> PathBuf {
        self.mount.join(Path::new(path.as_str().trim_start_matches('/')))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found() {
        let hybrid = "30 24 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
                      31 30 0:27 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n\
                      32 30 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        assert_eq!(CgroupTree::find(hybrid).unwrap().mount, Path::new("/sys/fs/cgroup/unified"));
        let pure = "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:4 master:2 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(CgroupTree::find(pure).unwrap().mount, Path::new("/sys/fs/cgroup"));
        let part = "35 24 0:30 /kubepods/pod1 /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        assert!(CgroupTree::find(part).is_none());
        assert!(CgroupTree::find("32 30 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n").is_none());
    }

    #[test]
    fn ids_become_paths_and_are_forgotten_with_their_directory() {
        let root = tempfile::tempdir().unwrap();
        let unit = root.path().join("system.slice/billing.service");
        fs::create_dir_all(&unit).unwrap();
        let id = fs::metadata(&unit).unwrap().ino();
        let tree = CgroupTree::at(root.path().to_owned());
        assert_eq!(tree.path_of(id).unwrap().as_str(), "/system.slice/billing.service");
        assert_eq!(tree.path_of(fs::metadata(root.path()).unwrap().ino()).unwrap().as_str(), "/");
        assert_eq!(tree.path_of(1 << 60), Err(Refusal::UnreadableCgroup));
        fs::rename(&unit, root.path().join("system.slice/other.service")).unwrap();
        assert_eq!(tree.path_of(id).unwrap().as_str(), "/system.slice/other.service");
        fs::remove_dir(root.path().join("system.slice/other.service")).unwrap();
        assert_eq!(tree.path_of(id), Err(Refusal::UnreadableCgroup));
    }

    #[test]
    fn a_cgroup_that_cannot_be_listed_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let tree = CgroupTree::at(root.path().to_owned());
        let path = CgroupPath::parse("/gone").unwrap();
        assert_eq!(tree.processes(&path, 7), Err(Refusal::UnreadableCgroup));
        fs::write(root.path().join("cgroup.procs"), "12\n345\n").unwrap();
        let path = CgroupPath::parse("/").unwrap();
        assert_eq!(tree.processes(&path, 7), Ok(vec![12, 345]));
        assert_eq!(tree.processes(&path, 6), Err(Refusal::TooManyDescriptors));
    }
}

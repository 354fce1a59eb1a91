//! Whether a process's cgroups can be believed by an agent that reads them: SPIRE takes the name of a container from any
//! place in any of them, so a user to whom a part of a hierarchy was delegated could show it another's (attack 2).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::caller::Refusal;
use crate::cgroup::{self, CgroupPath, ContainerName};

/// Where the cgroup hierarchies of this machine are mounted.
#[derive(Debug, Default)]
pub(crate) struct Hierarchies(Vec<Hierarchy>);

#[derive(Debug, PartialEq, Eq)]
struct Hierarchy {
    /// The controllers of a v1 hierarchy, or `name=systemd`; none for v2's.
    names: Vec<String>,
    mount: PathBuf,
}

impl Hierarchies {
    /// Takes them from the text of `/proc/self/mountinfo`. Only mounts of a hierarchy's own root: paths below another one
    /// mean something else.
    pub(crate) fn find(mountinfo: &str) -> Self {
        Self(mountinfo.lines().filter_map(hierarchy).collect())
    }

    /// Refuses what an agent could be misled by: `text` is that of `/proc/<pid>/cgroup`.
    ///
    /// Every directory on the way has to be root's. Where one is another user's, he can make and name directories below it
    /// and move the process there and back, and nothing shows that he did. A container is named once, and by all
    /// hierarchies that name one alike.
    pub(crate) fn check(&self, text: &str) -> Result<(), Refusal> {
        let mut seen = ContainerName::default();
        for (names, path) in cgroup::lines(text) {
            let path = CgroupPath::parse(path).ok_or(Refusal::UnreadableCgroup)?;
            let name = path.container().map_err(|_| Refusal::NestedContainer)?;
            if name != ContainerName::default() {
                if seen != ContainerName::default() && seen != name {
                    return Err(Refusal::NestedContainer);
                }
                seen = name;
            }
            if !path.is_root() {
                let mount = self.mount_of(names).ok_or(Refusal::UnreadableCgroup)?;
                roots_alone(mount, path.segments())?;
            }
        }
        Ok(())
    }

    /// Where the v2 hierarchy is mounted, if there is one.
    pub(crate) fn unified(&self) -> Option<&Path> {
        self.mount_of("")
    }

    fn mount_of(&self, names: &str) -> Option<&Path> {
        let names: Vec<&str> = names.split(',').filter(|name| !name.is_empty()).collect();
        let is = |hierarchy: &&Hierarchy| {
            hierarchy.names.is_empty() == names.is_empty()
                && names.iter().all(|name| hierarchy.names.iter().any(|known| known == name))
        };
        self.0.iter().find(is).map(|hierarchy| hierarchy.mount.as_path())
    }
}

/// One line of mountinfo: proc_pid_mountinfo(5).
fn hierarchy(line: &str) -> Option<Hierarchy> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut fields = mount.split(' ').skip(3);
    let (root, point) = (fields.next()?, fields.next()?);
    let mut fields = filesystem.split(' ');
    let (kind, options) = (fields.next()?, fields.nth(1)?);
    let names = match kind {
        "cgroup2" => Vec::new(),
        "cgroup" => options.split(',').map(str::to_owned).collect(),
        _ => return None,
    };
    (root == "/").then(|| Hierarchy { names, mount: PathBuf::from(point) })
}

/// Whether nobody but root can make or name a directory from the mount down to the one that `segments` lead to.
pub(crate) fn roots_alone<'s>(mount: &Path, segments: impl Iterator<Item = &'s str>) -> Result<(), Refusal> {
    let mut directory = mount.to_owned();
    for segment in segments {
        directory.push(segment);
        let found = fs::symlink_metadata(&directory).map_err(|_| Refusal::UnreadableCgroup)?;
        let others_write = found.mode() & 0o022 != 0;
        if found.uid() != 0 || others_write {
            return Err(Refusal::DelegatedCgroup);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;

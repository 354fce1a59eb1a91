//! Checks whether an agent that reads a process's cgroups can be misled by them.
//!
//! SPIRE takes the name of a container from any level of any hierarchy. So a user with a delegated
//! part of a hierarchy could show the container of another (T2).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::caller::AttestError;
use crate::cgroup::{self, CgroupPath, ContainerName};

mod own_path;

use own_path::own_path;

/// The mounts of the cgroup hierarchies on this machine.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct CgroupMounts(Vec<CgroupMount>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct CgroupMount {
    /// The controllers of a v1 hierarchy, or `name=systemd`. Empty for v2.
    names: Vec<String>,
    mount: PathBuf,
    /// The path of the mounted directory. Empty if that is the root.
    base: String,
    /// The number of levels between the mount and the root of this process's own cgroup namespace.
    /// The kernel reports paths relative to that root.
    above: usize,
    /// A mount of that root.
    own_root: Option<PathBuf>,
    /// The path of that root, where it is known.
    own: Option<String>,
}

impl CgroupMount {
    /// Returns whether both are the same mount, whatever is known of the own path.
    fn is_same(&self, other: &Self) -> bool {
        let without_path = |mount: &Self| Self {
            own: None,
            ..mount.clone()
        };
        without_path(self) == without_path(other)
    }

    /// Finds the path of this process's own cgroup, or keeps the one that is known. The namespace's
    /// root never changes, so the path is that of the same mount before.
    fn locate_own(&mut self, before: Option<&Self>) {
        let (1.., Some(own_root)) = (self.above, &self.own_root) else {
            return;
        };
        let before = before.filter(|before| before.is_same(self));
        let known = before.and_then(|before| before.own.clone());
        self.own = known.or_else(|| own_path(&self.mount, own_root, self.above));
        if self.own.is_none() && before.is_none() {
            tracing::warn!(
                mount = %self.mount.display(),
                "the daemon's own cgroup is not found: callers in cgroups near it are rejected (unreadable_cgroup)"
            );
        }
    }
}

impl CgroupMounts {
    /// Parses the text of `/proc/self/mountinfo`, and selects the mount of each hierarchy that
    /// shows the most of it. A container may have several: its own part, and the host's tree at a
    /// path that its manifest chose.
    pub(crate) fn find(mountinfo: &str) -> Self {
        Self::default().find_again(mountinfo)
    }

    /// Does the same later. Keeps the own path of each mount that is still the same, because the
    /// search for it is long where a user has made many cgroups (T25).
    pub(crate) fn find_again(&self, mountinfo: &str) -> Self {
        let mut found: Vec<CgroupMount> = Vec::new();
        for next in mountinfo.lines().filter_map(hierarchy) {
            let Some(best) = found.iter_mut().find(|known| known.names == next.names) else {
                found.push(next);
                continue;
            };
            let own_root = best.own_root.take().or_else(|| next.own_root.clone());
            if next.above > best.above
                || (next.above == best.above && next.base.len() < best.base.len())
            {
                *best = next;
            }
            best.own_root = own_root;
        }
        for mount in &mut found {
            mount.locate_own(self.0.iter().find(|known| known.names == mount.names));
        }
        // A part of unknown position is useful only for the kubelet's own.
        Self(found)
    }

    /// Rejects cgroups that could mislead an agent. `text` is that of `/proc/<pid>/cgroup`.
    ///
    /// Root has to own every directory on the path. The owner of a directory could create and name
    /// directories below it, and move the process there and back without a trace. At most one
    /// container may be named, and all hierarchies that name one have to agree.
    pub(crate) fn check(&self, text: &str) -> Result<(), AttestError> {
        let mut first = ContainerName::default();
        for (names, path) in cgroup::lines(text) {
            let path = self
                .path(names, path)
                .ok_or(AttestError::UnreadableCgroup)?;
            let name = path.container().map_err(|_| AttestError::NestedContainer)?;
            if name != ContainerName::default() {
                if first != ContainerName::default() && first != name {
                    return Err(AttestError::NestedContainer);
                }
                first = name;
            }
            if !path.is_root() {
                let hierarchy = self.get(names).ok_or(AttestError::UnreadableCgroup)?;
                let below = path
                    .as_str()
                    .strip_prefix(&hierarchy.base)
                    .ok_or(AttestError::UnreadableCgroup)?;
                check_root_owned(
                    &hierarchy.mount,
                    below.split('/').filter(|segment| !segment.is_empty()),
                )?;
            }
        }
        Ok(())
    }

    /// Returns the mount point of the v2 hierarchy, if there is one, and the path of the mounted
    /// directory.
    pub(crate) fn unified(&self) -> Option<(&Path, &str)> {
        self.get("")
            .map(|hierarchy| (hierarchy.mount.as_path(), hierarchy.base.as_str()))
    }

    /// Returns whether this v1 controller is mounted.
    pub(crate) fn has(&self, controller: &str) -> bool {
        self.0
            .iter()
            .any(|hierarchy| hierarchy.names.iter().any(|name| name == controller))
    }

    /// Translates `shown`, a path in `/proc/<pid>/cgroup`, to a path below the mount. In a cgroup
    /// namespace the kernel reports relative paths: `/../x` is a sibling of the namespace's root.
    pub(crate) fn path(&self, names: &str, shown: &str) -> Option<CgroupPath> {
        let Some(CgroupMount {
            above: above @ 1..,
            own,
            ..
        }) = self.get(names)
        else {
            return CgroupPath::parse(shown);
        };
        let mut rest = shown;
        let mut up = 0;
        while let Some(below) = rest
            .strip_prefix("/..")
            .filter(|below| below.is_empty() || below.starts_with('/'))
        {
            (rest, up) = (below, up + 1);
        }
        let count = above.checked_sub(up)?;
        let own = match count {
            0 => String::new(),
            _ => own
                .as_ref()?
                .split('/')
                .skip(1)
                .take(count)
                .map(|segment| format!("/{segment}"))
                .collect(),
        };
        let path = format!("{own}{}", rest.trim_end_matches('/'));
        CgroupPath::parse(if path.is_empty() { "/" } else { &path })
    }

    fn get(&self, names: &str) -> Option<&CgroupMount> {
        let names: Vec<&str> = names.split(',').filter(|name| !name.is_empty()).collect();
        let is = |hierarchy: &&CgroupMount| {
            hierarchy.names.is_empty() == names.is_empty()
                && names
                    .iter()
                    .all(|name| hierarchy.names.iter().any(|known| known == name))
        };
        self.0.iter().find(is)
    }
}

/// Parses one line of mountinfo (proc_pid_mountinfo(5)).
fn hierarchy(line: &str) -> Option<CgroupMount> {
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
    let ups = root
        .split('/')
        .skip(1)
        .take_while(|segment| *segment == "..")
        .count();
    let base = if root == "/" || ups > 0 {
        String::new()
    } else {
        root.to_owned()
    };
    // The mount is outside the namespace, or a part of a v1 hierarchy. Paths have another meaning
    // there.
    let is_aside = ups > 0 && root.len() != 3 * ups;
    if is_aside
        || (!base.is_empty()
            && (kind == "cgroup" || CgroupPath::parse(&base).is_none_or(|base| is_in_pod(&base))))
    {
        return None;
    }
    Some(CgroupMount {
        names,
        mount: PathBuf::from(point),
        base,
        above: ups,
        own_root: (root == "/").then(|| PathBuf::from(point)),
        own: None,
    })
}

/// Returns whether a mounted directory is that of a pod or part of one, as a container mounts its
/// own.
fn is_in_pod(base: &CgroupPath) -> bool {
    base.container().ok() != Some(ContainerName::default())
}

/// Verifies that only root can create or rename directories from the mount down to the one that
/// `segments` lead to.
pub(crate) fn check_root_owned<'s>(
    mount: &Path,
    segments: impl Iterator<Item = &'s str>,
) -> Result<(), AttestError> {
    let mut directory = mount.to_owned();
    for segment in segments {
        directory.push(segment);
        let found = fs::symlink_metadata(&directory).map_err(|_| AttestError::UnreadableCgroup)?;
        let others_write = found.mode() & 0o022 != 0;
        if found.uid() != 0 || others_write {
            return Err(AttestError::DelegatedCgroup);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;

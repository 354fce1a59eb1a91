//! Whether a process's cgroups can be believed by an agent that reads them: SPIRE takes the name of a container from any
//! place in any of them, so a user to whom a part of a hierarchy was delegated could show it another's (attack 2).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::caller::AttestError;
use crate::cgroup::{self, CgroupPath, ContainerName};

/// Where the cgroup hierarchies of this machine are mounted.
#[derive(Debug, Default)]
pub(crate) struct CgroupMounts(Vec<CgroupMount>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct CgroupMount {
    /// The controllers of a v1 hierarchy, or `name=systemd`; none for v2's.
    names: Vec<String>,
    mount: PathBuf,
    /// The path of the directory that is mounted; empty if that is the root.
    base: String,
    /// How far it lies above the root of this process's own cgroup namespace, by which the kernel tells paths ...
    above: usize,
    /// ... and the path of that, where it is known.
    own: Option<String>,
}

impl CgroupMounts {
    /// Takes them from the text of `/proc/self/mountinfo`: of each hierarchy the mount that shows most of it. In a container
    /// several may be there, its own part, and the host's tree at a place that its manifest chose.
    pub(crate) fn find(mountinfo: &str) -> Self {
        let mut found: Vec<CgroupMount> = Vec::new();
        for (next, is_own_root) in mountinfo.lines().filter_map(hierarchy) {
            let Some(best) = found.iter_mut().find(|known| known.names == next.names) else {
                found.push(next);
                continue;
            };
            // The way from the root of the namespace to the mount that was found first, or the other way around.
            let own_root = if is_own_root {
                next.mount.clone()
            } else {
                best.mount.clone()
            };
            if next.above > best.above
                || (next.above == best.above && next.base.len() < best.base.len())
            {
                *best = next;
            }
            if best.above > 0 && best.own.is_none() {
                best.own = own_path(&best.mount, &own_root, best.above);
            }
        }
        // A part without its place among the rest is of no use but for the kubelet's own.
        Self(found)
    }

    /// Refuses what an agent could be misled by: `text` is that of `/proc/<pid>/cgroup`.
    ///
    /// Every directory on the way has to be root's. Where one is another user's, he can make and name directories below it
    /// and move the process there and back, and nothing shows that he did. A container is named once, and by all
    /// hierarchies that name one alike.
    pub(crate) fn check(&self, text: &str) -> Result<(), AttestError> {
        let mut seen = ContainerName::default();
        for (names, path) in cgroup::lines(text) {
            let path = self
                .path(names, path)
                .ok_or(AttestError::UnreadableCgroup)?;
            let name = path.container().map_err(|_| AttestError::NestedContainer)?;
            if name != ContainerName::default() {
                if seen != ContainerName::default() && seen != name {
                    return Err(AttestError::NestedContainer);
                }
                seen = name;
            }
            if !path.is_root() {
                let hierarchy = self.of(names).ok_or(AttestError::UnreadableCgroup)?;
                let below = path
                    .as_str()
                    .strip_prefix(&hierarchy.base)
                    .ok_or(AttestError::UnreadableCgroup)?;
                roots_alone(
                    &hierarchy.mount,
                    below.split('/').filter(|segment| !segment.is_empty()),
                )?;
            }
        }
        Ok(())
    }

    /// Where the v2 hierarchy is mounted, if there is one, and which directory of it.
    pub(crate) fn unified(&self) -> Option<(&Path, &str)> {
        self.of("")
            .map(|hierarchy| (hierarchy.mount.as_path(), hierarchy.base.as_str()))
    }

    /// Whether this v1 controller is mounted.
    pub(crate) fn has(&self, controller: &str) -> bool {
        self.0
            .iter()
            .any(|hierarchy| hierarchy.names.iter().any(|name| name == controller))
    }

    /// The path of a cgroup that the kernel calls `told` in `/proc/<pid>/cgroup`, as it is below what is mounted. That is relative
    /// to this process's own cgroup namespace, where it has one: `/../x` lies beside it.
    pub(crate) fn path(&self, names: &str, told: &str) -> Option<CgroupPath> {
        let Some(CgroupMount {
            above: above @ 1..,
            own,
            ..
        }) = self.of(names)
        else {
            return CgroupPath::parse(told);
        };
        let mut rest = told;
        let mut up = 0;
        while let Some(below) = rest
            .strip_prefix("/..")
            .filter(|below| below.is_empty() || below.starts_with('/'))
        {
            (rest, up) = (below, up + 1);
        }
        let kept = above.checked_sub(up)?;
        let own = match kept {
            0 => String::new(),
            _ => own
                .as_ref()?
                .split('/')
                .skip(1)
                .take(kept)
                .map(|segment| format!("/{segment}"))
                .collect(),
        };
        let path = format!("{own}{}", rest.trim_end_matches('/'));
        CgroupPath::parse(if path.is_empty() { "/" } else { &path })
    }

    fn of(&self, names: &str) -> Option<&CgroupMount> {
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

/// One line of mountinfo (proc_pid_mountinfo(5)), and whether it mounts the root of this process's cgroup namespace.
fn hierarchy(line: &str) -> Option<(CgroupMount, bool)> {
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
    // Beside the namespace, or in a part of a v1 hierarchy: paths there mean something else.
    let is_aside = ups > 0 && root.len() != 3 * ups;
    if is_aside
        || (!base.is_empty()
            && (kind == "cgroup" || CgroupPath::parse(&base).is_none_or(|base| is_in_pod(&base))))
    {
        return None;
    }
    Some((
        CgroupMount {
            names,
            mount: PathBuf::from(point),
            base,
            above: ups,
            own: None,
        },
        root == "/",
    ))
}

/// Whether a mounted directory is that of a pod or of something smaller, as a container has its own mounted.
fn is_in_pod(base: &CgroupPath) -> bool {
    base.container().ok() != Some(ContainerName::default())
}

/// The path from `mount` down to the directory that is mounted at `own_root`, which lies so many levels below it.
fn own_path(mount: &Path, own_root: &Path, levels: usize) -> Option<String> {
    let wanted = fs::metadata(own_root).ok()?.ino();
    let mut level = vec![(mount.to_owned(), String::new())];
    for _ in 0..levels {
        let mut next = Vec::new();
        for (directory, path) in level {
            for entry in fs::read_dir(directory)
                .into_iter()
                .flatten()
                .filter_map(Result::ok)
            {
                if let (true, Ok(name)) = (
                    entry.file_type().is_ok_and(|kind| kind.is_dir()),
                    entry.file_name().into_string(),
                ) {
                    next.push((entry.path(), format!("{path}/{name}")));
                }
            }
        }
        level = next;
    }
    let is_it = |(directory, _): &&(PathBuf, String)| {
        fs::metadata(directory).is_ok_and(|found| found.ino() == wanted)
    };
    level.iter().find(is_it).map(|(_, path)| path.clone())
}

/// Whether nobody but root can make or name a directory from the mount down to the one that `segments` lead to.
pub(crate) fn roots_alone<'s>(
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

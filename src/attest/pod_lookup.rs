//! The pod that a caller's cgroup belongs to, and whether it still exists.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use crate::attest::cgroup_tree::CgroupTree;
use crate::caller::{AttestError, PodAge};
use crate::cgroup::{CgroupPath, MisplacedPod, Pod, PodSegment};
use crate::clock::Clock;

/// A lookup of pods by cgroup.
#[derive(Debug)]
pub(crate) struct PodLookup {
    tree: Arc<CgroupTree>,
}

/// A pod that was found, identified by its directory. The directory is removed with the pod, and
/// its inode is never reused.
#[derive(Debug, Clone)]
pub(crate) struct ResolvedPod {
    pub(crate) pod: Pod,
    directory: PathBuf,
    inode: u64,
    container: Option<PathBuf>,
}

impl PodLookup {
    pub(crate) fn new(tree: Arc<CgroupTree>) -> Self {
        Self { tree }
    }

    /// Returns the kubelet's cgroup roots that exist.
    pub(crate) fn discover_roots(&self) -> Vec<CgroupPath> {
        self.tree
            .roots()
            .iter()
            .filter(|root| self.tree.directory(root).is_dir())
            .cloned()
            .collect()
    }

    /// Returns the pod of a process or socket in this cgroup, or `None` if it is outside all pods.
    ///
    /// Root has to own every directory down to the pod's own; otherwise another user could have
    /// named it. If root owns the pod's directory, root has also named the container's.
    pub(crate) fn of(&self, cgroup: &CgroupPath) -> Result<Option<ResolvedPod>, AttestError> {
        let segment = self.tree.roots().find(cgroup).map_err(|MisplacedPod| {
            match self.tree.check_root_owned(cgroup) {
                Err(AttestError::DelegatedCgroup) => AttestError::DelegatedCgroup,
                // Root made it: the kubelet has another root, or it is a container of root's own.
                _ => AttestError::MisplacedPod,
            }
        })?;
        let Some(PodSegment {
            pod,
            directory,
            container,
        }) = segment
        else {
            return Ok(None);
        };
        let part = |end: usize| CgroupPath::parse(&cgroup.as_str()[..end]);
        let own = part(directory).ok_or(AttestError::UnreadableCgroup)?;
        self.tree.check_root_owned(&own)?;
        let directory = self.tree.directory(&own);
        let inode = fs::metadata(&directory)
            .map_err(|_| AttestError::UnreadableCgroup)?
            .ino();
        let container = container
            .and_then(part)
            .map(|container| self.tree.directory(&container));
        Ok(Some(ResolvedPod {
            pod,
            directory,
            inode,
            container,
        }))
    }
}

impl ResolvedPod {
    /// Returns whether the pod is certainly gone.
    pub(crate) fn is_gone(&self) -> bool {
        match fs::metadata(&self.directory) {
            Ok(found) => found.ino() != self.inode,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }

    /// Returns whether both are the same directory of the same pod.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.inode == other.inode && self.pod.uid == other.pod.uid
    }

    /// Verifies that the pod exists, and returns its age.
    pub(crate) fn verify_exists(&self) -> Result<PodAge, AttestError> {
        let found = fs::metadata(&self.directory)
            .ok()
            .filter(|found| found.ino() == self.inode);
        let pod = age(&found.ok_or(AttestError::CallerGone)?);
        let container = self
            .container
            .as_ref()
            .and_then(|container| fs::metadata(container).ok());
        Ok(PodAge {
            pod,
            container: container.map_or(pod, |found| age(&found)),
        })
    }
}

fn age(directory: &fs::Metadata) -> Duration {
    let created =
        UNIX_EPOCH + Duration::from_secs(directory.ctime().try_into().unwrap_or_default());
    Clock::system()
        .now()
        .duration_since(created)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests;

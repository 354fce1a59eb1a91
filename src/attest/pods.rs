//! The pod that a caller's cgroup is in, and whether that is there still.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::attest::cgroups::CgroupTree;
use crate::caller::{Ages, Refusal};
use crate::cgroup::{CgroupPath, Misplaced, Pod, PodPlace};

/// Finds the pods of cgroups.
#[derive(Debug)]
pub(crate) struct Pods {
    tree: Arc<CgroupTree>,
}

/// A pod that was found, by its directory: that goes with the pod, and no other ever has its inode.
#[derive(Debug, Clone)]
pub(crate) struct Housed {
    pub(crate) pod: Pod,
    directory: PathBuf,
    inode: u64,
    container: Option<PathBuf>,
}

impl Pods {
    pub(crate) fn new(tree: Arc<CgroupTree>) -> Self {
        Self { tree }
    }

    /// Which of the kubelet's cgroup roots are there.
    pub(crate) fn roots_found(&self) -> Vec<&CgroupPath> {
        self.tree.roots().iter().filter(|root| self.tree.directory(root).is_dir()).collect()
    }

    /// The pod of a process or socket in this cgroup; `None` if it is in none. Every directory down to the pod's own has to be
    /// root's, else somebody else could have named it; with the pod's, root has named the container's too.
    pub(crate) fn of(&self, cgroup: &CgroupPath) -> Result<Option<Housed>, Refusal> {
        let place = self.tree.roots().find(cgroup).map_err(|Misplaced| match self.tree.roots_alone(cgroup) {
            Err(Refusal::DelegatedCgroup) => Refusal::DelegatedCgroup,
            // Root's doing: a kubelet with a place of its own, or a container that is root's own.
            _ => Refusal::MisplacedPod,
        })?;
        let Some(PodPlace { pod, directory, container }) = place else { return Ok(None) };
        let part = |end: usize| CgroupPath::parse(&cgroup.as_str()[..end]);
        let own = part(directory).ok_or(Refusal::UnreadableCgroup)?;
        self.tree.roots_alone(&own)?;
        let directory = self.tree.directory(&own);
        let inode = fs::metadata(&directory).map_err(|_| Refusal::UnreadableCgroup)?.ino();
        let container = container.and_then(part).map(|container| self.tree.directory(&container));
        Ok(Some(Housed { pod, directory, inode, container }))
    }
}

impl Housed {
    /// Whether the pod is gone for good; not, where that can't be seen.
    pub(crate) fn is_gone(&self) -> bool {
        match fs::metadata(&self.directory) {
            Ok(found) => found.ino() != self.inode,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }

    /// Whether this is the same directory of the same pod.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.inode == other.inode && self.pod.uid == other.pod.uid
    }

    /// Whether the pod is there, and since when.
    pub(crate) fn is_there(&self) -> Result<Ages, Refusal> {
        let found = fs::metadata(&self.directory).ok().filter(|found| found.ino() == self.inode);
        let pod = age(&found.ok_or(Refusal::Gone)?);
        let container = self.container.as_ref().and_then(|container| fs::metadata(container).ok());
        Ok(Ages { pod, container: container.map_or(pod, |found| age(&found)) })
    }
}

fn age(directory: &fs::Metadata) -> Duration {
    let made = UNIX_EPOCH + Duration::from_secs(directory.ctime().try_into().unwrap_or_default());
    SystemTime::now().duration_since(made).unwrap_or_default()
}

#[cfg(test)]
mod tests;

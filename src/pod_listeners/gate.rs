//! The state of the pod listeners, for readiness.

use std::fs;
use std::path::{Path, PathBuf};

use tokio::sync::watch;
use tokio::time::timeout;

use crate::file_threads::FileThreads;
use crate::netns::NamespaceId;
use crate::pod_listeners::netns_directory::CALL_TIMEOUT;
use crate::pod_listeners::netns_watch::receives_mounts;

/// The condition on which readiness and the pod listeners wait for each other.
#[derive(Debug, Clone)]
pub struct TakeoverGate {
    pub(super) directory: PathBuf,
    pub(super) own: NamespaceId,
    /// The cookie of `own`, where the kernel has cookies.
    pub(super) own_cookie: Option<u64>,
    /// Reads the directory, whose file system may not respond.
    pub(super) threads: FileThreads,
    pub(super) could_serve: watch::Sender<bool>,
    pub(super) first_scan: watch::Receiver<bool>,
    pub(super) coverage: watch::Receiver<Coverage>,
}

/// The pods' namespaces after the latest scan.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Coverage {
    pub(super) served: usize,
    pub(super) unserved: usize,
}

impl TakeoverGate {
    /// Returns why a new pod would have no listener, as far as the directory of namespaces shows
    /// it. `is_in_pod` is set if this process itself is in a pod.
    pub async fn missing_for_new_pods(&self, is_in_pod: bool) -> Option<String> {
        // Outside a pod the directory may appear with the first one.
        if !is_in_pod {
            return None;
        }
        let directory = self.directory.display();
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        if !receives_mounts(&mountinfo, &self.directory) {
            return Some(format!(
                "[pods] netns_dir {directory} does not receive the mounts of new pods; set mountPropagation: \
                 HostToContainer on the directory's volumeMount"
            ));
        }
        // The namespace of this process's own pod is there before its containers start. A pod with
        // hostNetwork has none.
        if self.own.is_initial(self.own_cookie) {
            return None;
        }
        let (path, own) = (self.directory.clone(), self.own);
        let found = self
            .threads
            .run(&self.directory, move || has_namespace(&path, own));
        match timeout(CALL_TIMEOUT, found)
            .await
            .unwrap_or_else(|elapsed| Err(elapsed.into()))
        {
            Ok(true) => None,
            Ok(false) => Some(format!(
                "[pods] netns_dir {directory} has no network namespace, not even that of awsvid's own pod; mount the \
                 directory in which the container runtime mounts them"
            )),
            Err(error) => Some(format!(
                "[pods] netns_dir {directory} does not respond: {error}; unmount the file system that hangs there"
            )),
        }
    }

    /// Returns a text if no namespace of the present pods can be served.
    pub fn without_served_pod(&self) -> Option<String> {
        let Coverage { served, unserved } = *self.coverage.borrow();
        (served == 0 && unserved > 0).then(|| {
            format!(
                "none of the {unserved} network namespaces of pods can be served; see the log for each cause"
            )
        })
    }

    /// Reports that all other dependencies answered, so that the listeners can be taken over.
    /// Returns when pods are served.
    pub async fn pass(&mut self) {
        self.could_serve.send_replace(true);
        // An error means that the daemon ends.
        let _ = self.first_scan.wait_for(|first_scan| *first_scan).await;
    }
}

fn has_namespace(directory: &Path, own: NamespaceId) -> bool {
    let files = fs::read_dir(directory).into_iter().flatten();
    files
        .filter_map(Result::ok)
        .any(|file| matches!(NamespaceId::at(&file.path(), own), Ok(Some(_))))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The initial namespace has the same cookie on every kernel, and not the same inode.
    #[tokio::test]
    async fn pod_without_a_network_of_its_own_is_not_missing() {
        for (inode, own_cookie, is_missing) in [
            (0xF000_0008, Some(1), false),
            (0xF000_0008, Some(2), true),
            (0xF000_0008, None, true),
            (0xEFFF_FFF9, None, false),
        ] {
            let own = ((4_u128 << 64) | inode).to_ne_bytes();
            let gate = TakeoverGate {
                // No mount point is above a relative path.
                directory: PathBuf::from("no-namespaces"),
                own: NamespaceId::from_bytes(own),
                own_cookie,
                threads: FileThreads::default(),
                could_serve: watch::Sender::new(false),
                first_scan: watch::Sender::new(false).subscribe(),
                coverage: watch::Sender::new(Coverage::default()).subscribe(),
            };
            let missing = gate.missing_for_new_pods(true).await;
            assert_eq!(missing.is_some(), is_missing, "{inode:x} {own_cookie:?}");
            let words = "not even that of awsvid's own pod";
            assert!(missing.is_none_or(|text| text.contains(words)));
        }
    }
}

//! Finds the pod of a cgroup path, by its position below the kubelet's cgroup root.
//!
//! The path is parsed from the front. A container may name directories below its own. A name like a
//! pod's anywhere else is a forgery, or belongs to the kubelet of a nested cluster (T2).

use std::fmt;
use std::sync::Arc;

use super::{CgroupPath, pod_uid};

/// The paths below which kubelets create pods by default, with either cgroup driver. The second
/// pair is that of kind, and of other distributions that keep the kubelet's own processes next to
/// its pods.
const DEFAULT_ROOTS: [&str; 4] = [
    "/kubepods",
    "/kubepods.slice",
    "/kubelet/kubepods",
    "/kubelet.slice/kubelet-kubepods.slice",
];
/// The directories for pods of the other classes than guaranteed.
const CLASSES: [&str; 2] = ["burstable", "besteffort"];
/// The number of hex digits in a container's id.
const ID: usize = 64;
/// The lengths of the groups of a UID.
const GROUPS: [usize; 5] = [8, 4, 4, 4, 12];

/// A pod's UID in the spelling of its Kubernetes object: in groups with dashes.
///
/// The UID of a static pod is a hash of 32 digits without dashes, which only the kubelet knows. Its
/// mirror pod in the API server has another UID.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodUid(Arc<str>);

/// A pod, and one of its containers if that is known.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pod {
    pub uid: PodUid,
    /// The id of the container: 64 hex digits.
    pub container: Option<Arc<str>>,
}

/// The position of a pod in a cgroup path.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSegment {
    pub pod: Pod,
    /// The length of the path of the pod's own directory, in bytes.
    pub directory: usize,
    /// The length of the path of the container's directory, in bytes.
    pub container: Option<usize>,
}

/// The error for a path that names a pod where the node's kubelet creates none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MisplacedPod;

/// The directories below which the kubelet creates those of its pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodRoots(Vec<CgroupPath>);

impl PodRoots {
    /// Returns the default roots. Only root can create them, so roots that do not exist are
    /// harmless.
    pub fn defaults() -> Self {
        Self(
            DEFAULT_ROOTS
                .iter()
                .filter_map(|root| CgroupPath::parse(root))
                .collect(),
        )
    }

    /// Returns a single root, for a kubelet with another cgroup root.
    pub fn at(root: CgroupPath) -> Self {
        Self(vec![root])
    }

    /// Returns the path of each root.
    pub fn iter(&self) -> impl Iterator<Item = &CgroupPath> {
        self.0.iter()
    }

    /// Returns the pod that `path` belongs to, or `None` if it is outside all pods. Fails for a pod
    /// outside the kubelet's roots.
    pub fn find(&self, path: &CgroupPath) -> Result<Option<PodSegment>, MisplacedPod> {
        for root in &self.0 {
            let below = path
                .as_str()
                .strip_prefix(root.as_str())
                .filter(|below| below.starts_with('/'));
            if let Some(below) = below {
                return find_under(root, path.as_str().len() - below.len(), path);
            }
        }
        reject_named(path).map(|()| None)
    }
}

/// Fails if any part of the path is like a pod's name.
fn reject_named(path: &CgroupPath) -> Result<(), MisplacedPod> {
    if path.segments().any(|segment| pod_uid(segment).is_some()) {
        Err(MisplacedPod)
    } else {
        Ok(())
    }
}

fn find_under(
    root: &CgroupPath,
    from: usize,
    path: &CgroupPath,
) -> Result<Option<PodSegment>, MisplacedPod> {
    let slice = root
        .segments()
        .last()
        .and_then(|last| last.strip_suffix(".slice"));
    let mut end = from;
    let mut segments = path.as_str()[from..].split('/').skip(1);
    let mut next = || {
        let segment = segments.next()?;
        end += 1 + segment.len();
        Some((segment, end))
    };
    let Some(first) = next() else { return Ok(None) };
    let class = CLASSES.into_iter().find(|class| match slice {
        Some(stem) => first.0.strip_prefix(stem) == Some(&format!("-{class}.slice")),
        None => first.0 == *class,
    });
    let pod = if class.is_some() { next() } else { Some(first) };
    let Some((segment, directory)) = pod else {
        return Ok(None);
    };
    let stem =
        slice.map(|stem| class.map_or_else(|| stem.to_owned(), |class| format!("{stem}-{class}")));
    let Some(uid) = PodUid::of_segment(segment, stem.as_deref()) else {
        return reject_named(path).map(|()| None);
    };
    let container = next().and_then(|(segment, end)| Some((container_of(segment)?, end)));
    let (container, container_end) = container.unzip();
    Ok(Some(PodSegment {
        pod: Pod { uid, container },
        directory,
        container: container_end,
    }))
}

impl PodUid {
    /// Returns the text of the UID.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns whether it belongs to a static pod, which has another UID in the API server.
    pub fn is_static(&self) -> bool {
        !self.0.contains('-')
    }

    /// Parses a UID in the spelling of a Kubernetes object.
    pub fn parse(text: &str) -> Option<Self> {
        let is_hex = |text: &str| {
            text.bytes()
                .all(|c| c.is_ascii_digit() || matches!(c, b'a'..=b'f'))
        };
        let groups = || {
            text.split('-')
                .map(|group| is_hex(group).then_some(group.len()))
        };
        let is_static = text.len() == 32 && is_hex(text);
        (is_static || groups().eq(GROUPS.map(Some))).then(|| Self(text.into()))
    }

    /// Parses the name of a pod's directory. `stem` is the beginning of the name if systemd manages
    /// the directory.
    fn of_segment(segment: &str, stem: Option<&str>) -> Option<Self> {
        match stem {
            None => Self::parse(segment.strip_prefix("pod")?),
            Some(stem) => {
                let uid = segment
                    .strip_prefix(stem)?
                    .strip_prefix("-pod")?
                    .strip_suffix(".slice")?;
                // The kubelet writes underscores, since a dash would mean a nested slice.
                if uid.contains('-') {
                    None
                } else {
                    Self::parse(&uid.replace('_', "-"))
                }
            }
        }
    }
}

/// Returns the id of the container that has this directory: bare, or after the runtime's name. The
/// directory of a monitor process (conmon) contains the same digits and is skipped.
fn container_of(segment: &str) -> Option<Arc<str>> {
    let name = segment.strip_suffix(".scope").unwrap_or(segment);
    let (runtime, id) = name.rsplit_once('-').unwrap_or(("", name));
    let is_id = id.len() == ID
        && id
            .bytes()
            .all(|c| c.is_ascii_digit() || matches!(c, b'a'..=b'f'));
    (is_id && !runtime.ends_with("conmon")).then(|| id.into())
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests;

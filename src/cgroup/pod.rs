//! Whose pod a cgroup path is, by its place below the kubelet's cgroup root.
//!
//! Read from the front: what lies below a container's own directory may be named by the container, and a name that looks like
//! a pod's anywhere else is somebody's forgery, or the kubelet of a nested cluster (attack 2).

use std::fmt;
use std::sync::Arc;

use super::{CgroupPath, pod_uid};

/// Where kubelets put their pods, with either cgroup driver, unless they are told otherwise. The second pair is that of kind,
/// and of others who keep the kubelet's own processes beside its pods.
const DEFAULT_ROOTS: [&str; 4] = [
    "/kubepods",
    "/kubepods.slice",
    "/kubelet/kubepods",
    "/kubelet.slice/kubelet-kubepods.slice",
];
/// How a pod that is no guaranteed one stands below the root.
const CLASSES: [&str; 2] = ["burstable", "besteffort"];
/// Hex digits of a container's id.
const ID: usize = 64;
/// The lengths of the groups of a UID.
const GROUPS: [usize; 5] = [8, 4, 4, 4, 12];

/// A pod's UID in the spelling of its Kubernetes object: in groups with dashes. That of a static pod is a hash of 32 digits
/// without any, by which the kubelet knows it; the mirror of it that the API server shows has another one.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodUid(Arc<str>);

/// A pod, and which of its containers, if it is known.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pod {
    /// Which pod.
    pub uid: PodUid,
    /// The container's id: 64 hex digits.
    pub container: Option<Arc<str>>,
}

/// Where in a path its pod is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSegment {
    /// Which pod.
    pub pod: Pod,
    /// The pod's own directory: the first so many bytes of the path.
    pub directory: usize,
    /// The container's, likewise.
    pub container: Option<usize>,
}

/// The path names a pod where no kubelet of this node puts one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MisplacedPod;

/// The directories below which the kubelet makes those of its pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodRoots(Vec<CgroupPath>);

impl PodRoots {
    /// The usual places. Nobody but root can make them, so it does no harm that most of them are not there.
    pub fn defaults() -> Self {
        Self(
            DEFAULT_ROOTS
                .iter()
                .filter_map(|root| CgroupPath::parse(root))
                .collect(),
        )
    }

    /// This one alone, as for a kubelet with a cgroup root of its own.
    pub fn at(root: CgroupPath) -> Self {
        Self(vec![root])
    }

    /// Each.
    pub fn iter(&self) -> impl Iterator<Item = &CgroupPath> {
        self.0.iter()
    }

    /// The pod that `path` is in; `None` if in none.
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

/// Nothing, if no part of the path looks like a pod's.
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
    /// As it is.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is that of a static pod, which the API server knows by another one.
    pub fn is_static(&self) -> bool {
        !self.0.contains('-')
    }

    /// In the spelling of a Kubernetes object.
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

    /// Of the directory of a pod; `stem` is the beginning of its name where the directory is systemd's.
    fn of_segment(segment: &str, stem: Option<&str>) -> Option<Self> {
        match stem {
            None => Self::parse(segment.strip_prefix("pod")?),
            Some(stem) => {
                let uid = segment
                    .strip_prefix(stem)?
                    .strip_prefix("-pod")?
                    .strip_suffix(".slice")?;
                // A dash would mean a slice within another, so the kubelet writes them so.
                if uid.contains('-') {
                    None
                } else {
                    Self::parse(&uid.replace('_', "-"))
                }
            }
        }
    }
}

/// The id of the container whose directory this is: bare or behind the runtime's name. That of a process that only watches
/// over a container has the same digits in it.
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

//! Cgroup paths, and the facts that they contain about processes. This module parses text only;
//! `attest` reads it from the kernel.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

mod pod;

pub use pod::{MisplacedPod, Pod, PodRoots, PodSegment, PodUid};

/// A path in the cgroup v2 hierarchy from the host's root, for example
/// `/system.slice/billing.service`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct CgroupPath {
    text: Arc<str>,
    names_container: bool,
    /// The length of the prefix that belongs to one workload, and its kind.
    workload: (usize, WorkloadKind),
}

/// The prefix of a path that belongs to one workload. It is the same for all paths that begin with
/// it, and shares their text.
#[derive(Clone)]
pub struct WorkloadCgroup {
    path: Arc<str>,
    end: usize,
}

/// The kind of a prefix that belongs to one workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WorkloadKind {
    /// The directory of a pod.
    Pod,
    /// The directory of a container, by its name.
    Container,
    /// A person's `user-N.slice`, with all sessions, user units and rootless containers.
    Person,
    /// An outermost systemd unit, or any other directory that is neither a slice nor a runtime's.
    /// Each of its users is a workload.
    Unit,
}

impl CgroupPath {
    /// Parses an absolute path. Returns `None` for a path relative to a foreign cgroup namespace
    /// (`/../..`), which names no cgroup.
    pub fn parse(path: &str) -> Option<Self> {
        let absolute = path.starts_with('/') && !path.split('/').any(|segment| segment == "..");
        // The kernel marks the path of a removed cgroup like this. No name ends so by accident.
        let removed = path.ends_with(" (deleted)");
        (absolute && !removed).then(|| Self {
            text: Arc::from(path),
            names_container: names_container(path),
            workload: workload(path),
        })
    }

    /// Returns the text of the path.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Returns whether it is the root of the hierarchy.
    pub fn is_root(&self) -> bool {
        &*self.text == "/"
    }

    /// Returns whether it equals `part`, or is below it.
    pub fn is_at_or_below(&self, part: &Self) -> bool {
        let below = self.text.strip_prefix(&*part.text);
        part.is_root() || below.is_some_and(|below| below.is_empty() || below.starts_with('/'))
    }

    /// Returns the names of its directories, from the root down.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        segments(&self.text)
    }

    /// Returns the outermost systemd unit that is not a slice.
    ///
    /// Directories below it may be delegated, and named by their owner.
    /// `user@1002.service/billing.service` belongs to user 1002, and is not the system's
    /// `billing.service` (T2).
    pub fn systemd_unit(&self) -> Option<&str> {
        let first = self
            .segments()
            .find(|segment| !segment.ends_with(".slice"))?;
        [".service", ".scope"]
            .iter()
            .any(|suffix| first.ends_with(suffix))
            .then_some(first)
    }

    /// Returns whether sockets that were made here belong to the service manager, which passes them
    /// to services of other users. Pid 1 of systemd is in `init.scope`, and a `.socket` unit's
    /// directory has no other use (T24).
    pub fn is_service_managers(&self) -> bool {
        self.segments()
            .any(|segment| segment == "init.scope" || segment.ends_with(".socket"))
    }

    /// Returns the prefix of the path that belongs to one workload, and its kind.
    ///
    /// It ends at the pod's own directory, the person's slice or the outermost unit, whichever
    /// comes first. Otherwise it ends at the first directory that is neither a slice nor a
    /// runtime's. Limits per workload count by it. The workload may name the directories below, so
    /// they are ignored.
    pub fn workload(&self) -> (WorkloadCgroup, WorkloadKind) {
        let (end, kind) = self.workload;
        (
            WorkloadCgroup {
                path: self.text.clone(),
                end,
            },
            kind,
        )
    }

    /// Returns the pod and the container that the path names, each in one spelling. Fails if it
    /// names several of a kind, or a pod below a container. That is a container within another, or
    /// made by a user that may name cgroups (T2).
    pub fn container(&self) -> Result<ContainerName, NestedContainer> {
        let mut name = ContainerName::default();
        for segment in self.segments() {
            let (pod, id) = (pod_uid(segment), container_id(segment));
            if (pod.is_some() && (name.pod.is_some() || name.id.is_some()))
                || (id.is_some() && name.id.is_some())
            {
                return Err(NestedContainer);
            }
            name = ContainerName {
                pod: pod.or(name.pod),
                id: id.or(name.id),
            };
        }
        Ok(name)
    }

    /// Returns whether any part of the path is like a container's or a pod's.
    ///
    /// A false positive costs a rejection. A false negative would return a host user's credentials
    /// to a container. So any name that a container runtime is known to use counts, at any level.
    pub fn names_container(&self) -> bool {
        self.names_container
    }
}

/// The names of a pod and a container in a cgroup path, in lower case. Both are `None` outside
/// containers.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContainerName {
    /// The UID of the pod, without dashes.
    pub pod: Option<String>,
    pub id: Option<String>,
}

/// The error for a path that names more than one container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NestedContainer;

/// Parses `/proc/<pid>/cgroup`. Returns the controllers (empty for v2) and the path of each line. A
/// line has three fields separated by `:`, and the last may contain more of these.
pub(crate) fn lines(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines()
        .filter_map(|line| line.split_once(':')?.1.split_once(':'))
}

/// Returns the path in cgroup v2, by `/proc/<pid>/cgroup`.
pub(crate) fn unified(text: &str) -> Option<&str> {
    lines(text).find_map(|(controllers, path)| controllers.is_empty().then_some(path))
}

fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|segment| !segment.is_empty())
}

fn names_container(path: &str) -> bool {
    segments(path).any(|segment| {
        segment.contains("kubepods")
            || segment.starts_with("lxc")
            || segment.starts_with("libpod")
            || matches!(segment, "machine.slice" | "docker" | "garden" | "buildkit")
            || container_id(segment).is_some()
            || pod_uid(segment).is_some()
    })
}

/// Finds the prefix that [`CgroupPath::workload`] describes.
fn workload(path: &str) -> (usize, WorkloadKind) {
    let kind = |end: usize| match names_container(&path[..end]) {
        true => WorkloadKind::Container,
        false => WorkloadKind::Unit,
    };
    let mut end = 0;
    for segment in path.split('/').skip(1) {
        let is_below_users = &path[..end] == "/user.slice";
        end += 1 + segment.len();
        if pod_uid(segment).is_some() {
            return (end, WorkloadKind::Pod);
        }
        if is_below_users && is_user_slice(segment) {
            return (end, WorkloadKind::Person);
        }
        let is_above = segment.is_empty()
            || segment.ends_with(".slice")
            || segment.contains("kubepods")
            || matches!(
                segment,
                "kubelet" | "burstable" | "besteffort" | "guaranteed" | "docker"
            );
        if !is_above {
            return (end, kind(end));
        }
    }
    (path.len(), kind(path.len()))
}

/// Returns whether the name is like `user-1000.slice`, which systemd's login manager uses for a
/// person.
fn is_user_slice(segment: &str) -> bool {
    let uid = segment
        .strip_prefix("user-")
        .and_then(|rest| rest.strip_suffix(".slice"));
    uid.is_some_and(|uid| !uid.is_empty() && uid.bytes().all(|c| c.is_ascii_digit()))
}

/// Returns a container id in the name: exactly 64 hex digits.
fn container_id(segment: &str) -> Option<String> {
    let mut words = segment.split(|c: char| !c.is_ascii_alphanumeric());
    words
        .find(|word| word.len() == 64 && word.bytes().all(|c| c.is_ascii_hexdigit()))
        .map(str::to_ascii_lowercase)
}

/// Returns a pod's UID in the name: `pod` as a word, and the UID. Its groups are separated by
/// dashes, underscores or (static pods) nothing.
fn pod_uid(segment: &str) -> Option<String> {
    let begins = |at: &usize| !segment[..*at].ends_with(|c: char| c.is_ascii_alphanumeric());
    segment
        .match_indices("pod")
        .map(|(at, _)| at)
        .filter(begins)
        .find_map(|at| {
            let digits = segment[at + 3..]
                .chars()
                .filter(|c| !matches!(c, '-' | '_'));
            let uid: String = digits
                .take_while(char::is_ascii_hexdigit)
                .take(32)
                .collect();
            (uid.len() == 32).then(|| uid.to_ascii_lowercase())
        })
}

impl WorkloadCgroup {
    /// Returns the text of the path.
    pub fn as_str(&self) -> &str {
        &self.path[..self.end]
    }
}

impl PartialEq for WorkloadCgroup {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

impl Eq for WorkloadCgroup {}

impl Hash for WorkloadCgroup {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
    }
}

impl fmt::Debug for WorkloadCgroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for CgroupPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for CgroupPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests;

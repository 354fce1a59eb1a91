//! The workload of a caller, as limits count it (T29).

use crate::cgroup::{CgroupPath, Pod, PodUid, WorkloadCgroup, WorkloadKind};

/// The key by which per-workload limits count (T20, T29).
///
/// It is the pod if there is one, or else the container, whatever users it has. For a person it is
/// the `user-N.slice`, which contains all sessions, user units and rootless containers. For any
/// other process it is the user within the outermost systemd unit.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WorkloadKey {
    scope: WorkloadScope,
    /// `None` where the scope is one workload, whatever users it has.
    uid: Option<u32>,
}

/// A set of workloads that one party can multiply, such as the users of one unit. Where a shared
/// limit is reached, permits of the scope that holds the most are evicted first.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum WorkloadScope {
    /// One pod, whatever its containers.
    Pod(PodUid),
    /// A container, a `user-N.slice`, or an outermost systemd unit.
    Cgroup(WorkloadCgroup),
    /// The whole machine, where no cgroup is known.
    Machine,
}

impl WorkloadKey {
    pub(super) fn at(uid: u32, cgroup: Option<&CgroupPath>, pod: Option<&Pod>) -> Self {
        if let Some(pod) = pod {
            return Self {
                scope: WorkloadScope::Pod(pod.uid.clone()),
                uid: None,
            };
        }
        let Some(cgroup) = cgroup else {
            return Self::user(uid);
        };
        let (workload, kind) = cgroup.workload();
        Self {
            scope: WorkloadScope::Cgroup(workload),
            uid: (kind == WorkloadKind::Unit).then_some(uid),
        }
    }

    /// Returns the key of a user's processes, where no cgroup is known.
    pub fn user(uid: u32) -> Self {
        Self {
            scope: WorkloadScope::Machine,
            uid: Some(uid),
        }
    }

    /// Returns the key of peers without a known user. They share the limits of one workload.
    pub fn unknown() -> Self {
        Self {
            scope: WorkloadScope::Machine,
            uid: None,
        }
    }

    /// Returns the scope that this key belongs to.
    pub fn scope(&self) -> &WorkloadScope {
        &self.scope
    }
}

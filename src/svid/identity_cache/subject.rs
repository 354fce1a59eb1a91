//! The process or pod that an agent's reply is about.

use std::path::Path;

use crate::caller::{AttestError, Caller, GroupDetail, Process, ProcessFacts};
use crate::cgroup::{CgroupPath, PodUid};
use crate::svid::SourceError;

/// Process or pod that a query is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(in crate::svid) enum Subject {
    /// One process, with all facts that its identity may depend on. A change of any of them makes
    /// another subject.
    Process {
        uid: u32,
        cgroup: Option<CgroupPath>,
        /// All facts that were read.
        process: Process,
    },
    /// A pod, with any of its processes as the caller.
    Pod(PodUid),
}

/// Facts that distinguish one process from another for an agent.
pub(in crate::svid) const FACTS_FOR_AGENT: ProcessFacts = ProcessFacts {
    groups: GroupDetail::Digest,
    program: true,
    started: true,
};

impl Subject {
    /// Returns the subject of a caller: its pod if it is in one and `pods` is true, otherwise its
    /// process. Fails if the facts of the process were not read.
    pub(in crate::svid) fn of(caller: &Caller, pods: bool) -> Result<Self, SourceError> {
        if let Some(pod) = caller.peer.pod.as_ref().filter(|_| pods) {
            return Ok(Self::Pod(pod.uid.clone()));
        }
        if !has_all_facts(caller.process.as_ref()) {
            return Err(SourceError::Reloaded);
        }
        let mut process = caller.process.clone().ok_or(SourceError::Reloaded)?;
        let exe = process
            .program
            .as_mut()
            .and_then(|program| program.exe.as_mut())
            .ok_or(AttestError::ExecUnobservable)?;
        // The file is what counts. Its path is only what the process shows, and changes when an
        // upgrade replaces the file.
        (exe.changed, exe.path) = ((0, 0), Path::new("").into());
        Ok(Self::Process {
            uid: caller.peer.uid,
            cgroup: caller.peer.cgroup.clone(),
            process,
        })
    }

    /// Returns true if the subject still exists. `caller` is that process, or one in that pod.
    pub(super) fn is_alive(&self, caller: &Caller) -> bool {
        match self {
            Self::Process { .. } => caller.proof.is_alive(),
            Self::Pod(_) => caller.proof.verify_pod().is_ok(),
        }
    }
}

/// Returns true if all facts of the process that a subject needs are known.
pub(in crate::svid) fn has_all_facts(process: Option<&Process>) -> bool {
    let cached = |process: &Process| {
        process.groups.is_some() && process.program.is_some() && process.started.is_some()
    };
    process.is_some_and(cached)
}

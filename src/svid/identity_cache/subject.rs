//! The process or pod that an agent's answer is about.

use std::path::Path;

use crate::caller::{AttestError, Caller, GroupDetail, Process, ProcessFacts};
use crate::cgroup::{CgroupPath, PodUid};
use crate::svid::SourceError;

/// Whom an agent was asked about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(in crate::svid) enum Subject {
    /// One process, with everything of it that may decide what it is: whoever changes any of it is another subject.
    Process {
        /// The user id.
        uid: u32,
        /// Its cgroup.
        cgroup: Option<CgroupPath>,
        /// All that was looked at.
        process: Process,
    },
    /// A pod, whichever of its processes asks.
    Pod(PodUid),
}

/// What an agent has to be told apart by.
pub(in crate::svid) const FACTS_FOR_AGENT: ProcessFacts = ProcessFacts {
    groups: GroupDetail::Digest,
    program: true,
    started: true,
};

impl Subject {
    /// Of a caller; of its pod if it is in one and `pods` says that the agent is told of those, else of its process, which was
    /// looked at then.
    pub(in crate::svid) fn of(caller: &Caller, pods: bool) -> Result<Self, SourceError> {
        if let Some(pod) = caller.pod.as_ref().filter(|_| pods) {
            return Ok(Self::Pod(pod.uid.clone()));
        }
        if !is_known(caller) {
            return Err(SourceError::Reloaded);
        }
        let mut process = caller.process.clone().ok_or(SourceError::Reloaded)?;
        let exe = process
            .program
            .as_mut()
            .and_then(|program| program.exe.as_mut())
            .ok_or(AttestError::ExecUnobservable)?;
        // The file is what counts. Its path is what the process shows, and reads otherwise once an upgrade has replaced it.
        (exe.changed, exe.path) = ((0, 0), Path::new("").into());
        Ok(Self::Process {
            uid: caller.uid,
            cgroup: caller.cgroup.clone(),
            process,
        })
    }

    /// Whether it is there still, as `caller` shows, who is it or in it.
    pub(super) fn is_alive(&self, caller: &Caller) -> bool {
        match self {
            Self::Process { .. } => caller.evidence.is_alive(),
            Self::Pod(_) => caller.evidence.verify_pod().is_ok(),
        }
    }
}

/// Whether everything is known of the caller's process that a subject is made of.
pub(in crate::svid) fn is_known(caller: &Caller) -> bool {
    let known = |process: &Process| {
        process.groups.is_some() && process.program.is_some() && process.started.is_some()
    };
    caller.process.as_ref().is_some_and(known)
}

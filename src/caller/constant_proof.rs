//! Callers for tests, which never change.

use async_trait::async_trait;

use super::{AttestError, Caller, ListenerKind, PeerFacts, PeerProof, Process};
use crate::cgroup::CgroupPath;

/// The proof of a caller that never changes.
#[derive(Debug)]
pub(crate) struct ConstantProof;

#[async_trait]
impl PeerProof for ConstantProof {
    async fn verify_unchanged(&self) -> Result<(), AttestError> {
        Ok(())
    }
}

/// Returns a caller without a pod, in the cgroup at this path if there is one.
pub(crate) fn constant_caller(
    listener: ListenerKind,
    uid: u32,
    cgroup: Option<&str>,
    process: Option<Process>,
) -> Caller {
    let cgroup = cgroup.map(|path| CgroupPath::parse(path).unwrap());
    Caller {
        listener,
        peer: PeerFacts {
            cgroup,
            ..PeerFacts::of_user(uid)
        },
        process,
        proof: Box::new(ConstantProof),
    }
}

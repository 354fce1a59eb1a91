//! The rejection of a peer.

use crate::caller::{AttestError, PeerFacts, WorkloadKey};

/// The reason why a peer is not attested, with the facts that its socket had shown by then.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    pub error: AttestError,
    /// The facts of the socket, if they were read.
    pub peer: Option<PeerFacts>,
}

impl Rejection {
    pub(crate) fn of(error: AttestError, peer: &PeerFacts) -> Self {
        Self {
            error,
            peer: Some(peer.clone()),
        }
    }

    /// Returns the key by which limits count the peer. Peers without facts share one.
    pub fn workload_key(&self) -> WorkloadKey {
        self.peer
            .as_ref()
            .map_or_else(WorkloadKey::unknown, PeerFacts::workload_key)
    }
}

impl From<AttestError> for Rejection {
    fn from(error: AttestError) -> Self {
        Self { error, peer: None }
    }
}

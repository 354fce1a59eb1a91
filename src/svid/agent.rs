//! What sources B and D have in common: an agent that attests workloads itself, by the number of their process or the UID of
//! their pod.

use std::fmt;

use async_trait::async_trait;
use zeroize::Zeroizing;

use super::SourceError;
use crate::cgroup::PodUid;
use crate::socket_endpoint::Endpoint;

/// An agent that attests workloads itself. It is asked about a process by its number, and looks at whatever has that
/// number then: whoever asks has to see to it that this is the right one, before and after.
#[async_trait]
pub trait AttestingAgent: Send + Sync + fmt::Debug {
    /// The SVIDs of the process `pid`, for `audience` alone. [`SourceError::Denied`] if the agent has none for it.
    async fn fetch_for_pid(&self, pid: u32, audience: &str) -> Result<Vec<AgentSvid>, SourceError>;

    /// Whether it is told of callers in pods by their pod, for which no process has to be known.
    fn supports_pod_references(&self) -> bool {
        false
    }

    /// The SVIDs of a pod, likewise.
    async fn fetch_for_pod(
        &self,
        _pod: &PodUid,
        _audience: &str,
    ) -> Result<Vec<AgentSvid>, SourceError> {
        Err(SourceError::Misconfigured(
            "this agent is not told of pods".to_owned(),
        ))
    }

    /// The daemon's own identities, as they are now.
    async fn fetch_own(&self, audience: &str) -> Result<Vec<String>, SourceError> {
        own_by_process(self.fetch_for_pid(std::process::id(), audience).await)
    }

    /// Whether it answers, and lets the daemon ask.
    async fn ready(&self, audience: &str) -> Result<(), SourceError> {
        self.fetch_own(audience).await.map(drop)
    }

    /// Where it listens.
    fn endpoint(&self) -> &Endpoint;

    /// Makes a connection, if there is none, and so finds out whether it is of any use: `Misconfigured` if not.
    async fn connect(&self) -> Result<(), SourceError>;
}

/// The daemon's own identities, by what the agent says of its process.
pub(super) fn own_by_process(
    said: Result<Vec<AgentSvid>, SourceError>,
) -> Result<Vec<String>, SourceError> {
    match said {
        Ok(svids) => Ok(svids.into_iter().map(|svid| svid.spiffe_id).collect()),
        Err(SourceError::Denied(said)) => Err(SourceError::Unavailable(format!(
            "the SPIFFE agent has no identity for awsvid itself: register one for its process, by its user and executable \
             ({said})"
        ))),
        Err(error) => Err(error),
    }
}

/// One of a workload's JWT-SVIDs as the agent gave it: unchecked.
pub struct AgentSvid {
    /// Whose it is said to be.
    pub spiffe_id: String,
    /// The token.
    pub token: Zeroizing<String>,
    /// The operator's name for the identity, if it has one.
    pub hint: Option<String>,
}

impl fmt::Debug for AgentSvid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("spiffe_id", &self.spiffe_id)
            .field("hint", &self.hint)
            .finish_non_exhaustive()
    }
}

impl AgentSvid {
    pub(super) fn new(spiffe_id: String, token: String, hint: String) -> Self {
        Self {
            spiffe_id,
            token: Zeroizing::new(token),
            hint: Some(hint).filter(|hint| !hint.is_empty()),
        }
    }
}

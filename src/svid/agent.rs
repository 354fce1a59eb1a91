//! The interface of `spire-delegated` and `spiffe-broker`: an agent that attests workloads itself,
//! by process ID or pod UID.

use std::fmt;

use async_trait::async_trait;
use zeroize::Zeroizing;

use super::{ReceivedX509Svid, SourceError, non_empty};
use crate::cgroup::PodUid;
use crate::socket_endpoint::Endpoint;

/// Agent that attests workloads itself. It reads whatever process has the given number at that
/// moment. So the daemon has to verify before and after the call that this is the right process.
#[async_trait]
pub trait AttestingAgent: Send + Sync + fmt::Debug {
    /// Returns the SVIDs of the process `pid`, for `audience` alone. Fails with
    /// [`SourceError::Denied`] if the agent has none for it.
    async fn fetch_for_pid(&self, pid: u32, audience: &str) -> Result<Vec<AgentSvid>, SourceError>;

    /// Returns true if the agent attests callers in pods by their pod. Then no process has to be
    /// known.
    fn supports_pod_references(&self) -> bool {
        false
    }

    /// Returns the SVIDs of a pod, with the same errors.
    async fn fetch_for_pod(
        &self,
        _pod: &PodUid,
        _audience: &str,
    ) -> Result<Vec<AgentSvid>, SourceError> {
        Err(SourceError::Misconfigured(
            "this agent does not support references to pods".to_owned(),
        ))
    }

    /// Returns the X.509-SVIDs of the process `pid` with their keys, with the same errors.
    async fn fetch_x509_for_pid(&self, _pid: u32) -> Result<Vec<ReceivedX509Svid>, SourceError> {
        Err(no_x509())
    }

    /// Returns the X.509-SVIDs of a pod, with the same errors.
    async fn fetch_x509_for_pod(
        &self,
        _pod: &PodUid,
    ) -> Result<Vec<ReceivedX509Svid>, SourceError> {
        Err(no_x509())
    }

    /// Returns the daemon's own identities, fetched now.
    async fn fetch_own(&self, audience: &str) -> Result<Vec<String>, SourceError> {
        own_by_process(self.fetch_for_pid(std::process::id(), audience).await)
    }

    /// Checks that the agent responds, and accepts the daemon's queries.
    async fn ready(&self, audience: &str) -> Result<(), SourceError> {
        self.fetch_own(audience).await.map(drop)
    }

    /// Returns the agent's address, for messages.
    fn endpoint(&self) -> &Endpoint;

    /// Connects unless there is a connection. Fails with `Misconfigured` if the connection is
    /// unusable.
    async fn connect(&self) -> Result<(), SourceError>;
}

fn no_x509() -> SourceError {
    SourceError::Misconfigured("this agent does not have X.509-SVIDs of workloads".to_owned())
}

/// Converts the agent's reply about the daemon's process to the daemon's own identities.
pub(super) fn own_by_process(
    reply: Result<Vec<AgentSvid>, SourceError>,
) -> Result<Vec<String>, SourceError> {
    match reply {
        Ok(svids) => Ok(svids.into_iter().map(|svid| svid.spiffe_id).collect()),
        Err(SourceError::Denied(reply)) => Err(SourceError::Unavailable(format!(
            "the SPIFFE agent has no identity for awsvid itself: register one for its process, by its user and executable \
             ({reply})"
        ))),
        Err(error) => Err(error),
    }
}

/// One JWT-SVID of a workload as the agent sent it, not checked.
pub struct AgentSvid {
    /// The SPIFFE ID that the agent claims for the token.
    pub spiffe_id: String,
    /// The token, which is a secret.
    pub token: Zeroizing<String>,
    /// The operator's name for the identity, if it has one.
    pub hint: Option<String>,
}

impl fmt::Debug for AgentSvid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AgentSvid")
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
            hint: non_empty(hint),
        }
    }
}

//! Identity source `spire-delegated`: SPIRE's Delegated Identity API. The agent attests the
//! caller's process itself, and workloads keep their ordinary registration entries.
//!
//! Reference: <https://github.com/spiffe/spire/blob/main/doc/spire_agent.md>, "Delegated Identity
//! API". Queries by pid need SPIRE 1.10.2.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::agent::{AgentSvid, AttestingAgent};
use super::channel::{
    CallError, Connector, ReconnectingChannel, first_message, is_broken, open, unreachable,
};
use super::proto::spire::api::agent::delegatedidentity::v1::delegated_identity_client::DelegatedIdentityClient;
use super::proto::spire::api::agent::delegatedidentity::v1::{
    FetchJwtsviDsRequest, SubscribeToX509sviDsRequest,
};
use super::{ReceivedX509Svid, SourceError, one_line};
use crate::attest::shares_pid_namespace_with_peer;
use crate::caller::AttestError;
use crate::socket_endpoint::Endpoint;

/// Maximum size of a reply, which has a token for each identity of one workload.
const MAX_REPLY_BYTES: usize = 1024 * 1024;
/// Timeout of the probe that checks whether a socket is an admin socket.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// Client of a SPIRE agent's admin socket.
pub struct SpireDelegated {
    endpoint: Endpoint,
    connection: ReconnectingChannel<AdminConnector>,
    deadline: Duration,
}

struct AdminConnector(PathBuf);

impl fmt::Debug for SpireDelegated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delegated")
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

impl SpireDelegated {
    /// Creates a client of the agent with this `admin_socket_path`. `deadline` bounds each call.
    pub fn new(socket: &Path, deadline: Duration) -> Self {
        let endpoint = Endpoint::Unix(socket.to_owned());
        Self {
            endpoint,
            connection: ReconnectingChannel::new(socket, AdminConnector(socket.to_owned())),
            deadline,
        }
    }

    /// Converts the agent's rejection to an error with a fix. The texts are those of SPIRE 1.10 to
    /// 1.15.
    fn error_of(&self, status: &Status) -> SourceError {
        let (reply, endpoint) = (one_line(status.message()), &self.endpoint);
        if is_broken(status) {
            return SourceError::Unavailable(format!(
                "the SPIRE agent at {endpoint} gave no answer: {reply}"
            ));
        }
        match status.code() {
            Code::PermissionDenied if reply.contains("authorized delegate") => {
                SourceError::Misconfigured(format!(
                    "the SPIRE agent does not accept awsvid as a delegate: add awsvid's own SPIFFE ID to \
                 `authorized_delegates` in the agent's configuration ({reply})"
                ))
            }
            Code::PermissionDenied | Code::NotFound => SourceError::Denied(format!(
                "no registration entry of the SPIRE agent at {endpoint} matches this process, or the agent is older than \
                 1.10.2, which sends this for every process ({reply})"
            )),
            Code::InvalidArgument => SourceError::Misconfigured(format!(
                "the SPIRE agent at {endpoint} accepts no query about a process: upgrade SPIRE to 1.10.2 or newer ({reply})"
            )),
            Code::Unimplemented => SourceError::Misconfigured(format!(
                "{endpoint} is not the admin socket of a SPIRE agent: set `admin_socket` in [identity] to its \
                 `admin_socket_path` ({reply})"
            )),
            _ => SourceError::Unavailable(format!(
                "the SPIRE agent at {endpoint} gave no answer: {reply}"
            )),
        }
    }

    async fn call_in_time<T, F>(
        &self,
        send: impl Fn(Channel) -> F + Send + Sync,
    ) -> Result<T, SourceError>
    where
        F: Future<Output = Result<T, Status>> + Send,
    {
        let reply = timeout(self.deadline, self.connection.call(send))
            .await
            .map_err(|_| {
                let (endpoint, deadline) = (&self.endpoint, self.deadline);
                SourceError::Unavailable(format!(
                    "the SPIRE agent at {endpoint} did not answer within {deadline:?}"
                ))
            })?;
        reply.map_err(|failed| self.failed(failed))
    }

    fn failed(&self, failed: CallError) -> SourceError {
        match failed {
            CallError::Unconnected(error) => error,
            CallError::Answered(status) => self.error_of(&status),
        }
    }
}

#[async_trait]
impl Connector for AdminConnector {
    async fn open(&self) -> Result<Channel, SourceError> {
        let endpoint = Endpoint::Unix(self.0.clone());
        let stream = UnixStream::connect(&self.0).await;
        let stream = stream
            .map_err(|error| SourceError::Unavailable(admin_socket_error(&endpoint, &error)))?;
        if !shares_pid_namespace_with_peer(&stream) {
            return Err(SourceError::Misconfigured(pid_namespace_error(&endpoint)));
        }
        let channel = open(std::future::ready(Ok(stream))).await;
        channel.map_err(|error| {
            SourceError::Unavailable(unreachable(&endpoint, "admin_socket", &error))
        })
    }
}

/// Describes a failed connection. The socket has mode 0770, and exists only if the agent's
/// configuration enables it.
fn admin_socket_error(endpoint: &Endpoint, error: &std::io::Error) -> String {
    let text = unreachable(endpoint, "admin_socket", error);
    match error.kind() {
        std::io::ErrorKind::NotFound => {
            format!("{text} (the agent makes it where `admin_socket_path` is set)")
        }
        std::io::ErrorKind::PermissionDenied => {
            format!(
                "{text} (the agent makes it with mode 0770: awsvid has to run as root or in the agent's group)"
            )
        }
        _ => text,
    }
}

/// Returns the error for an agent in another pid namespace. It would attest another process with
/// the same number.
pub(super) fn pid_namespace_error(endpoint: &Endpoint) -> String {
    format!(
        "the SPIFFE agent at {endpoint} lives in another pid namespace than awsvid, so it would take one process for \
         another: run both in the host's (Kubernetes: hostPID: true)"
    )
}

#[async_trait]
impl AttestingAgent for SpireDelegated {
    async fn fetch_for_pid(&self, pid: u32, audience: &str) -> Result<Vec<AgentSvid>, SourceError> {
        let pid = i32::try_from(pid).map_err(|_| AttestError::CallerGone)?;
        let send = |channel: Channel| {
            let mut client =
                DelegatedIdentityClient::new(channel).max_decoding_message_size(MAX_REPLY_BYTES);
            let audience = vec![audience.to_owned()];
            let mut request = Request::new(FetchJwtsviDsRequest {
                audience,
                selectors: Vec::new(),
                pid,
            });
            // Lets the agent end the call when no request waits any more. tonic's own timeout would
            // be later, since its error is like that of a broken connection.
            request.set_timeout(self.deadline + Duration::from_secs(1));
            async move { client.fetch_jwtsvi_ds(request).await }
        };
        let reply = self.call_in_time(send).await?;
        let svids = reply.into_inner().svids.into_iter().map(|svid| {
            let id = svid.id.unwrap_or_default();
            AgentSvid::new(id.text(), svid.token, svid.hint)
        });
        Ok(svids.collect())
    }

    async fn fetch_x509_for_pid(&self, pid: u32) -> Result<Vec<ReceivedX509Svid>, SourceError> {
        let pid = i32::try_from(pid).map_err(|_| AttestError::CallerGone)?;
        let send = |channel: Channel| {
            let mut client =
                DelegatedIdentityClient::new(channel).max_decoding_message_size(MAX_REPLY_BYTES);
            let mut request = Request::new(SubscribeToX509sviDsRequest {
                selectors: Vec::new(),
                pid,
            });
            request.set_timeout(self.deadline + Duration::from_secs(1));
            async move { first_message(client.subscribe_to_x509svi_ds(request).await).await }
        };
        let reply = self.call_in_time(send).await?;
        // Each is converted, so that each key is cleared.
        Ok(reply.x509_svids.into_iter().map(Into::into).collect())
    }

    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    async fn connect(&self) -> Result<(), SourceError> {
        self.connection
            .connect()
            .await
            .map_err(|failed| self.failed(failed))?;
        // Every agent with an admin socket rejects a request without an audience before it attests
        // a process. The kind of an agent that hangs stays unknown.
        let send = |channel: Channel| async move {
            let mut request = Request::new(FetchJwtsviDsRequest::default());
            request.set_timeout(PROBE_TIMEOUT);
            DelegatedIdentityClient::new(channel)
                .fetch_jwtsvi_ds(request)
                .await
        };
        match self.connection.call(send).await {
            Err(CallError::Answered(status)) if status.code() == Code::Unimplemented => {
                Err(self.error_of(&status))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;

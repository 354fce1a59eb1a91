//! Source D: the SPIFFE Broker API. The agent attests the caller's process itself, as with the Delegated Identity API, but
//! the daemon proves who it is by its own X.509-SVID, and has no way to ask for a workload that the agent does not see.
//!
//! Standards: SPIFFE_Broker_API.md and SPIFFE_Broker_Endpoint.md (incubating). SPIRE has it from 1.15.2 on, as an
//! experiment: <https://github.com/spiffe/spire/blob/main/doc/spire_agent.md>, "SPIFFE Broker API".

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use prost::Message;
use prost_types::Any;
use tokio::time::timeout;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::agent::{Agent, Svid};
use super::dial::{Failed, Kept, is_broken};
use super::own::OwnIdentity;
use super::proto::broker::api_client::ApiClient;
use super::proto::broker::{FetchJwtsvidRequest, FetchJwtsvidResponse, WorkloadPidReference, WorkloadReference};
use super::{SourceError, one_line};
use crate::caller::Refusal;
use crate::endpoint::Endpoint;
use crate::identity::SpiffeIdPattern;

mod connection;
mod server;

use connection::Broker;

/// An answer holds a token for each identity of one workload.
const ANSWER_MAX: usize = 1024 * 1024;
/// How a reference to a process is told from others.
const PID_REFERENCE: &str = "type.googleapis.com/spiffe.broker.WorkloadPIDReference";
/// How long [`Agent::connect`] waits for the daemon's first SVID: an agent that knows the daemon gives it at once.
const FIRST_SVID: Duration = Duration::from_secs(5);

/// A SPIFFE agent's broker socket.
pub struct BrokerApi {
    endpoint: Endpoint,
    own: Arc<OwnIdentity>,
    connection: Kept<Broker>,
    deadline: Duration,
}

impl fmt::Debug for BrokerApi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BrokerApi")
            .field("endpoint", &self.endpoint)
            .field("own", &self.own.latest().ok())
            .finish_non_exhaustive()
    }
}

impl BrokerApi {
    /// The agent that listens at `socket`, asked as `own`, if its SPIFFE ID is one that `server` covers: by default, that of
    /// any SPIRE agent of the daemon's own trust domain. No call lasts longer than `deadline`.
    pub fn new(socket: &Path, own: OwnIdentity, server: Option<SpiffeIdPattern>, deadline: Duration) -> Self {
        let own = Arc::new(own);
        let broker = Broker { socket: socket.to_owned(), own: own.clone(), server };
        Self { endpoint: Endpoint::Unix(socket.to_owned()), own, connection: Kept::new(socket, broker), deadline }
    }

    async fn ask(&self, pid: i32, audience: &str) -> Result<FetchJwtsvidResponse, SourceError> {
        let reference = Any { type_url: PID_REFERENCE.to_owned(), value: WorkloadPidReference { pid }.encode_to_vec() };
        let ask = |channel: Channel| {
            let mut client = ApiClient::new(channel).max_decoding_message_size(ANSWER_MAX);
            let mut request = Request::new(FetchJwtsvidRequest {
                reference: Some(WorkloadReference { reference: Some(reference.clone()) }),
                audience: vec![audience.to_owned()],
                spiffe_id: String::new(),
            });
            // The standard's guard against request forgery. SPIRE refuses a request that has it twice.
            request.metadata_mut().insert("broker.spiffe.io", MetadataValue::from_static("true"));
            // Tells the agent when nobody waits any more. tonic would end the call at that time too, and it would look as
            // if the connection had broken.
            request.set_timeout(self.deadline + Duration::from_secs(1));
            async move { client.fetch_jwtsvid(request).await }
        };
        match self.connection.call(ask).await {
            Ok(answer) => Ok(answer.into_inner()),
            Err(Failed::Unconnected(error)) => Err(error),
            Err(Failed::Answered(status)) => {
                if is_unknown_to_it(&status) {
                    self.connection.forget().await;
                }
                Err(self.refused(&status))
            }
        }
    }

    /// What the agent's refusal means. The texts are those of SPIRE 1.15.
    fn refused(&self, status: &Status) -> SourceError {
        let (text, said, endpoint) = (status.message(), one_line(status.message()), &self.endpoint);
        let no_answer = || SourceError::Unavailable(format!("the SPIFFE agent at {endpoint} gave no answer: {said}"));
        if is_broken(status) {
            return no_answer();
        }
        // These stand in the text of whatever code the agent makes of the errors of all its attestors.
        if text.contains("broker configuration missing")
            || (text.contains("broker \"") && text.contains("not configured"))
        {
            return SourceError::Misconfigured(format!(
                "the SPIFFE agent at {endpoint} does not attest pods for awsvid: its plugin WorkloadAttestor \"k8s\" needs \
                 a block `experimental {{ broker {{ ... }} }}` of its own, with awsvid's SPIFFE ID in `brokers` ({said})"
            ));
        }
        match status.code() {
            Code::PermissionDenied if text.contains("reference type") => SourceError::Misconfigured(format!(
                "the SPIFFE agent at {endpoint} does not let awsvid name processes: add {{ type_url = \"{PID_REFERENCE}\" }} \
                 to awsvid's `allowed_reference_types` in the agent's `experimental {{ broker {{ ... }} }}` block ({said})"
            )),
            Code::PermissionDenied if text.contains("impersonate-via-spire") => SourceError::Denied(format!(
                "Kubernetes does not let awsvid ask for this pod: give the user that is named like awsvid's SPIFFE ID the \
                 verb impersonate-via-spire on pods ({said})"
            )),
            Code::PermissionDenied | Code::NotFound => SourceError::Denied(format!(
                "no registration entry of the SPIFFE agent at {endpoint} matches this process ({said})"
            )),
            Code::InvalidArgument => SourceError::Misconfigured(format!(
                "the SPIFFE agent at {endpoint} finds the request invalid: is its SPIRE newer than this awsvid? ({said})"
            )),
            Code::Unimplemented if text.contains("workload attestor") => SourceError::Misconfigured(format!(
                "the SPIFFE agent at {endpoint} has no plugin that attests processes, as WorkloadAttestor \"unix\" does \
                 ({said})"
            )),
            Code::Unimplemented => SourceError::Misconfigured(format!(
                "the server at {endpoint} has no SPIFFE Broker API: write the `socket_path` of the agent's `experimental \
                 {{ broker {{ ... }} }}` block as `broker_socket` in [identity] ({said})"
            )),
            Code::OutOfRange => SourceError::Misconfigured(format!(
                "the answer of the SPIFFE agent at {endpoint} is far longer than the tokens of one workload ({said})"
            )),
            _ => no_answer(),
        }
    }
}

/// Whether the server has forgotten whose connection this is. SPIRE uses the same code where an attestor fails.
fn is_unknown_to_it(status: &Status) -> bool {
    status.code() == Code::Unauthenticated && !status.message().contains("workload attestation failed")
}

#[async_trait]
impl Agent for BrokerApi {
    async fn svids(&self, pid: u32, audience: &str) -> Result<Vec<Svid>, SourceError> {
        let pid = i32::try_from(pid).map_err(|_| Refusal::Gone)?;
        let answer = timeout(self.deadline, self.ask(pid, audience)).await.map_err(|_| {
            let (endpoint, deadline) = (&self.endpoint, self.deadline);
            SourceError::Unavailable(format!("the SPIFFE agent at {endpoint} did not answer within {deadline:?}"))
        })??;
        Ok(answer.svids.into_iter().map(|svid| Svid::new(svid.spiffe_id, svid.svid, svid.hint)).collect())
    }

    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    async fn connect(&self) -> Result<(), SourceError> {
        let connected = self.connection.connect().await;
        // In another pid namespace the daemon is attested by nobody, and its SVID never comes.
        let connected = match connected {
            Err(Failed::Unconnected(SourceError::Unavailable(_))) => {
                // What becomes of it is seen when the connection is made.
                let _ = self.own.first(FIRST_SVID).await;
                self.connection.connect().await
            }
            connected => connected,
        };
        connected.map_err(|failed| match failed {
            Failed::Unconnected(error) => error,
            Failed::Answered(status) => self.refused(&status),
        })
    }
}

#[cfg(test)]
mod tests;

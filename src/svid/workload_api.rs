//! Source A: the SPIFFE Workload API. The daemon is registered for every identity it serves, and its own rules say
//! which caller has which.
//!
//! Standard: SPIFFE_Workload_API.md, sections 4 to 6, and SPIFFE_Workload_Endpoint.md.

use std::future::{Future, ready};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Uri};
use tonic::{Code, Request, Status};

use super::proto::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use super::proto::{JwtsvidRequest, JwtsvidResponse};
use super::{IdentitySource, JwtSvid, SourceError, one_line};
use crate::caller::Caller;
use crate::clock::Clock;
use crate::endpoint::Endpoint;
use crate::identity::SpiffeId;
use crate::role::Identity;
use crate::rule::{Decision, Rule, decide};

/// SPIRE's agent itself waits up to 30 s for its server, and then still answers with a token from its cache.
pub const DEADLINE: Duration = Duration::from_secs(35);
/// A local agent accepts at once or not at all.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);
/// An answer holds one token of at most 20 kB; some providers add the daemon's other identities.
const ANSWER_MAX: usize = 1024 * 1024;

/// A SPIFFE Workload API and the rules that map callers to its identities.
#[derive(Debug)]
pub struct WorkloadApi {
    endpoint: Endpoint,
    rules: Arc<[Rule]>,
    clock: Clock,
    deadline: Duration,
}

impl WorkloadApi {
    /// Connects only when a token is asked for, and anew each time: tokens are needed a few times an hour, and so an
    /// agent that was restarted, or replaced at the same path while the old one lives on, is never missed.
    pub fn new(endpoint: Endpoint, rules: impl Into<Arc<[Rule]>>, clock: Clock) -> Self {
        Self { endpoint, rules: rules.into(), clock, deadline: DEADLINE }
    }

    /// With another deadline for a whole call than [`DEADLINE`].
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// A token for one of the daemon's identities, whoever it is for.
    pub async fn fetch(&self, id: &SpiffeId, audience: &str) -> Result<JwtSvid, SourceError> {
        let Ok(answer) = timeout(self.deadline, self.ask(id, audience)).await else {
            let text = format!("the SPIFFE agent at {} did not answer within {:?}", self.endpoint, self.deadline);
            return Err(SourceError::Unavailable(text));
        };
        // SPIRE filters by the ID; a provider that doesn't also sends others, which are not for this caller.
        let svids = answer?.svids.into_iter().filter(|svid| svid.spiffe_id == id.as_str());
        let Some(svid) = svids.into_iter().find(|svid| !svid.svid.is_empty()) else {
            let text =
                format!("the SPIFFE agent answered without a token for {id}: register that ID for awsvid itself");
            return Err(SourceError::Denied(text));
        };
        Ok(JwtSvid::check(svid.svid, id, audience, self.clock.now())?)
    }

    async fn ask(&self, id: &SpiffeId, audience: &str) -> Result<JwtsvidResponse, SourceError> {
        let channel = self.connect().await?;
        let mut client = SpiffeWorkloadApiClient::new(channel).max_decoding_message_size(ANSWER_MAX);
        let audience = vec![audience.to_owned()];
        let mut request = Request::new(JwtsvidRequest { audience, spiffe_id: id.to_string() });
        // The standard's guard against request forgery. SPIRE refuses a request that has it twice.
        request.metadata_mut().insert("workload.spiffe.io", MetadataValue::from_static("true"));
        // Tells the agent when nobody waits any more. tonic would end the call at that time too, in words of its own.
        request.set_timeout(self.deadline + Duration::from_secs(1));
        let answer = client.fetch_jwtsvid(request).await;
        answer.map(tonic::Response::into_inner).map_err(|status| self.refused(id, &status))
    }

    async fn connect(&self) -> Result<Channel, SourceError> {
        let channel = match &self.endpoint {
            Endpoint::Unix(path) => open(UnixStream::connect(path)).await,
            Endpoint::Tcp(address) => open(TcpStream::connect(address)).await,
        };
        channel.map_err(|error| SourceError::Unavailable(self.unreachable(&error)))
    }

    /// What went wrong between the daemon and the agent's socket, and what to do about it.
    fn unreachable(&self, error: &io::Error) -> String {
        let endpoint = &self.endpoint;
        match error.kind() {
            io::ErrorKind::NotFound => {
                format!("there is no socket at {endpoint}: start the SPIFFE agent, or correct `socket` in [identity]")
            }
            io::ErrorKind::PermissionDenied => format!(
                "awsvid may not open {endpoint}: give uid {} write access to the socket and search access to its \
                 directories",
                nix::unistd::geteuid()
            ),
            io::ErrorKind::ConnectionRefused => format!(
                "nobody listens at {endpoint}: start the SPIFFE agent (one that stopped leaves its socket behind)"
            ),
            io::ErrorKind::WouldBlock => {
                format!("the SPIFFE agent at {endpoint} takes no more connections: it hangs or has too many clients")
            }
            _ => format!("no connection to the SPIFFE agent at {endpoint}: {}", one_line(&error.to_string())),
        }
    }

    /// What the agent's refusal means: the table of SPIFFE_Workload_API.md, section 6, and what lies outside it.
    fn refused(&self, id: &SpiffeId, status: &Status) -> SourceError {
        let said = one_line(status.message());
        let trouble =
            || SourceError::Unavailable(format!("the SPIFFE agent at {} gave no token: {said}", self.endpoint));
        // Made by the client out of a broken connection; whatever code that got, the agent has not said it.
        if std::error::Error::source(status).is_some() {
            return trouble();
        }
        match status.code() {
            Code::PermissionDenied | Code::NotFound => SourceError::Denied(format!(
                "the SPIFFE agent does not give {id} to awsvid: register that ID for the daemon itself, and give no \
                 two of its registrations the same hint ({said})"
            )),
            Code::InvalidArgument => SourceError::Misconfigured(format!(
                "the SPIFFE agent finds the request for {id} invalid: correct the ID or the audience ({said})"
            )),
            Code::Unimplemented => SourceError::Misconfigured(format!(
                "the server at {} has no JWT-SVIDs to give: is it a SPIFFE Workload API? ({said})",
                self.endpoint
            )),
            Code::OutOfRange => SourceError::Misconfigured(format!(
                "the answer of the SPIFFE agent at {} is not one token but far more ({said})",
                self.endpoint
            )),
            // Unknown is what Teleport's tbot answers for every error without a code of its own, lasting or not.
            // Unauthenticated concerns the daemon, not the workload.
            Code::Unknown
            | Code::Unavailable
            | Code::DeadlineExceeded
            | Code::ResourceExhausted
            | Code::Unauthenticated
            | Code::Internal
            | Code::Cancelled
            | Code::Aborted
            | Code::FailedPrecondition
            | Code::AlreadyExists
            | Code::DataLoss
            | Code::Ok => trouble(),
        }
    }
}

/// One HTTP/2 connection over the stream that `connecting` gives.
async fn open<S>(connecting: impl Future<Output = io::Result<S>>) -> io::Result<Channel>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let stream = timeout(CONNECT_DEADLINE, connecting).await??;
    let mut stream = Some(TokioIo::new(stream));
    // tonic would connect again if this connection broke; there is nothing more for it to take.
    let connector = tower::service_fn(move |_: Uri| {
        ready(stream.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)))
    });
    // The authority of the requests; nothing resolves it.
    let over = tonic::transport::Endpoint::from_static("http://localhost");
    over.connect_with_connector(connector).await.map_err(io::Error::other)
}

#[async_trait]
impl IdentitySource for WorkloadApi {
    async fn identify(&self, caller: &Caller) -> Result<Vec<Identity>, SourceError> {
        match decide(&self.rules, caller) {
            Decision::Matched(rule) => Ok(vec![Identity { spiffe_id: rule.spiffe_id.clone(), hint: None }]),
            Decision::NoMatch => Ok(Vec::new()),
            // Whoever attested the caller has looked at the process where a rule needed it then.
            Decision::NeedsProcess => Err(SourceError::Reloaded),
        }
    }

    async fn token(&self, _caller: &Caller, id: &SpiffeId, audience: &str) -> Result<JwtSvid, SourceError> {
        self.fetch(id, audience).await
    }

    /// The agent knows only the daemon.
    fn needs_caller(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests;

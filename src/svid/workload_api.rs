//! Source A: the SPIFFE Workload API. The daemon is registered for every identity it serves, and its own rules say
//! which caller has which.
//!
//! Standard: SPIFFE_Workload_API.md, sections 4 to 6, and SPIFFE_Workload_Endpoint.md.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, timeout};
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::dial::{is_broken, open, unreachable};
use super::proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use super::proto::workload::{JwtsvidRequest, JwtsvidResponse};
use super::{CALL_TIMEOUT, IdentityBasis, IdentitySource, JwtSvid, SourceError, one_line};
use crate::accounts::{LiveRules, Undecided};
use crate::caller::{AttestError, Caller, ProcessFacts};
use crate::clock::Clock;
use crate::endpoint::Endpoint;
use crate::identity::SpiffeId;
use crate::metrics::{CallLabel, Metrics, UpstreamCall};
use crate::role::Identity;

/// An answer holds one token of at most 20 kB; some providers add the daemon's other identities.
const ANSWER_MAX: usize = 1024 * 1024;

/// So many identities are tried until one is given, before the daemon is ready.
const READY_IDS: usize = 8;

/// A SPIFFE Workload API and the rules that map callers to its identities.
#[derive(Debug)]
pub struct WorkloadApi {
    endpoint: Endpoint,
    rules: LiveRules,
    clock: Clock,
    metrics: Metrics,
    deadline: Duration,
}

impl WorkloadApi {
    /// Connects only when a token is asked for, and anew each time: tokens are needed a few times an hour, and so an
    /// agent that was restarted, or replaced at the same path while the old one lives on, is never missed.
    pub fn new(
        endpoint: Endpoint,
        rules: impl Into<LiveRules>,
        clock: Clock,
        metrics: Metrics,
    ) -> Self {
        Self {
            endpoint,
            rules: rules.into(),
            clock,
            metrics,
            deadline: CALL_TIMEOUT,
        }
    }

    /// With another deadline for a whole call than [`CALL_TIMEOUT`].
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// A token for one of the daemon's identities, whoever it is for.
    pub async fn fetch(&self, id: &SpiffeId, audience: &str) -> Result<JwtSvid, SourceError> {
        let start = Instant::now();
        let result = self.fetch_checked(id, audience).await;
        self.metrics.source_call(UpstreamCall {
            name: self.endpoint.to_string(),
            result: CallLabel::of(&result, SourceError::reason),
            error: SourceError::of_source(&result),
            took: start.elapsed(),
            at: self.clock.now(),
        });
        result
    }

    async fn fetch_checked(&self, id: &SpiffeId, audience: &str) -> Result<JwtSvid, SourceError> {
        let Ok(answer) = timeout(self.deadline, self.ask(id, audience)).await else {
            let text = format!(
                "the SPIFFE agent at {} did not answer within {:?}",
                self.endpoint, self.deadline
            );
            return Err(SourceError::Unavailable(text));
        };
        // SPIRE filters by the ID. Other providers may also return other IDs, which are not for this caller. An ID with several
        // entries comes several times.
        let svids = answer?
            .svids
            .into_iter()
            .filter(|svid| svid.spiffe_id == id.as_str() && !svid.svid.is_empty());
        let token =
            JwtSvid::check_any(svids.map(|svid| svid.svid), id, audience, self.clock.now())?;
        token.ok_or_else(|| {
            let text =
                format!("the SPIFFE agent answered without a token for {id}: register that ID for awsvid itself");
            SourceError::Denied(text)
        })
    }

    async fn ask(&self, id: &SpiffeId, audience: &str) -> Result<JwtsvidResponse, SourceError> {
        let channel = self.connect().await?;
        let mut client =
            SpiffeWorkloadApiClient::new(channel).max_decoding_message_size(ANSWER_MAX);
        let audience = vec![audience.to_owned()];
        let mut request = Request::new(JwtsvidRequest {
            audience,
            spiffe_id: id.to_string(),
        });
        // The standard's guard against request forgery. SPIRE refuses a request that has it twice.
        request
            .metadata_mut()
            .insert("workload.spiffe.io", MetadataValue::from_static("true"));
        // Tells the agent when nobody waits any more. tonic would end the call at that time too, in words of its own.
        request.set_timeout(self.deadline + Duration::from_secs(1));
        let answer = client.fetch_jwtsvid(request).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| self.refused(id, &status))
    }

    async fn connect(&self) -> Result<Channel, SourceError> {
        let channel = match &self.endpoint {
            Endpoint::Unix(path) => open(UnixStream::connect(path)).await,
            Endpoint::Tcp(address) => open(TcpStream::connect(address)).await,
        };
        channel.map_err(|error| {
            SourceError::Unavailable(unreachable(&self.endpoint, "socket", &error))
        })
    }

    /// What the agent's refusal means: the table of SPIFFE_Workload_API.md, section 6, and what lies outside it.
    fn refused(&self, id: &SpiffeId, status: &Status) -> SourceError {
        let said = one_line(status.message());
        let trouble = || {
            SourceError::Unavailable(format!(
                "the SPIFFE agent at {} gave no token: {said}",
                self.endpoint
            ))
        };
        if is_broken(status) {
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

#[async_trait]
impl IdentitySource for WorkloadApi {
    async fn identify(&self, caller: &Arc<Caller>) -> Result<Vec<Identity>, SourceError> {
        match self.rules.identify(caller).await {
            Ok(id) => Ok(id
                .map(|spiffe_id| Identity {
                    spiffe_id,
                    hint: None,
                })
                .into_iter()
                .collect()),
            // The caller was attested by other rules, which did not need its process.
            Err(Undecided::NeedsProcess) => Err(SourceError::Reloaded),
            Err(Undecided::UnknownAccount(_)) => Err(SourceError::UnknownAccount),
            Err(Undecided::Unresponsive) => Err(AttestError::ProcessUnresponsive.into()),
        }
    }

    async fn token(
        &self,
        _caller: &Arc<Caller>,
        id: &SpiffeId,
        audience: &str,
    ) -> Result<JwtSvid, SourceError> {
        self.fetch(id, audience).await
    }

    fn facts_needed(&self, caller: &Caller) -> Option<ProcessFacts> {
        self.rules.facts_needed(caller)
    }

    fn basis(&self, id: &SpiffeId) -> IdentityBasis {
        IdentityBasis::Rules(self.rules.of(id))
    }

    /// By a token for the identity of a rule. That of the first one may be registered on other nodes alone.
    async fn ready(&self, audience: &str) -> Result<(), SourceError> {
        let mut denied = Ok(());
        for id in self.rules.ids().into_iter().take(READY_IDS) {
            match self.fetch(id, audience).await {
                Err(error @ SourceError::Denied(_)) => denied = denied.and(Err(error)),
                other => return other.map(drop),
            }
        }
        denied
    }

    /// The agent knows only the daemon.
    fn requires_live_caller(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests;

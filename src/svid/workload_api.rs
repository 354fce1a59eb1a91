//! Identity source `workload-api`: the SPIFFE Workload API. The daemon is registered for every
//! identity that it serves, and its own rules assign them to callers.
//!
//! Standard: SPIFFE_Workload_API.md, sections 4 to 6, and SPIFFE_Workload_Endpoint.md.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::{Instant, timeout};
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Status};

use super::channel::{CallError, is_broken};
use super::own_svid::{connect, subscribe};
use super::proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use super::proto::workload::{JwtsvidRequest, JwtsvidResponse};
use super::{
    CALL_TIMEOUT, IdentityBasis, IdentitySource, JwtSvid, ReceivedX509Svid, SourceError, X509Svid,
    one_line,
};
use crate::accounts::{IdentifyError, LiveRules};
use crate::caller::{AttestError, Caller, CallerFacts, ProcessFacts};
use crate::clock::Clock;
use crate::identity::SpiffeId;
use crate::metrics::{CallLabel, Metrics, UpstreamCall};
use crate::role::Identity;
use crate::socket_endpoint::Endpoint;

/// Maximum size of a reply. It has one token of at most 20 kB, and some providers add the daemon's
/// other identities.
const MAX_REPLY_BYTES: usize = 1024 * 1024;

/// Maximum number of identities that a readiness check tries.
const READY_IDS: usize = 8;

/// Client of a SPIFFE Workload API, with the rules that map callers to its identities.
#[derive(Debug)]
pub struct WorkloadApi {
    endpoint: Endpoint,
    rules: LiveRules,
    clock: Clock,
    metrics: Metrics,
    deadline: Duration,
}

impl WorkloadApi {
    /// Creates a client. Each call opens a new connection, since tokens are needed a few times an
    /// hour. So an agent that restarted, or was replaced at the same path while the old one still
    /// runs, is always found.
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

    /// Sets another deadline than [`CALL_TIMEOUT`] for a whole call.
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Fetches a token for one of the daemon's identities, for any caller. Fails if the agent
    /// rejects, does not answer, or sends a token that is not valid for this ID.
    pub async fn fetch(&self, id: &SpiffeId, audience: &str) -> Result<JwtSvid, SourceError> {
        let start = Instant::now();
        let result = self.fetch_checked(id, audience).await;
        self.count(&result, start);
        result
    }

    /// Fetches the X.509-SVID of one of the daemon's identities, for any caller, with the same
    /// errors. The agent sends those of all identities; the keys of the others are cleared at once.
    pub async fn fetch_x509(&self, id: &SpiffeId) -> Result<X509Svid, SourceError> {
        let start = Instant::now();
        let result = match timeout(self.deadline, self.fetch_x509_checked(id)).await {
            Ok(result) => result,
            Err(_) => Err(self.timeout_error()),
        };
        self.count(&result, start);
        result
    }

    async fn fetch_x509_checked(&self, id: &SpiffeId) -> Result<X509Svid, SourceError> {
        let mut stream = subscribe(&self.endpoint)
            .await
            .map_err(|failed| match failed {
                CallError::Unconnected(error) => error,
                CallError::Answered(status) => self.error_of(id, &status),
            })?;
        let first = stream
            .message()
            .await
            .map_err(|status| self.error_of(id, &status))?;
        // The first message is the full state. The agent ends its part of a stream that is dropped.
        drop(stream);
        let svids = first.map(|message| message.svids).unwrap_or_default();
        // All of them are converted before the first is checked, so that each key is cleared.
        let received: Vec<_> = svids.into_iter().map(ReceivedX509Svid::from).collect();
        X509Svid::check_any(received, id, self.clock.now())?.ok_or_else(|| {
            let text = format!(
                "the SPIFFE agent returned no X.509-SVID for {id}; register that ID for awsvid itself"
            );
            SourceError::Denied(text)
        })
    }

    fn count<T>(&self, result: &Result<T, SourceError>, start: Instant) {
        self.metrics.source_call(UpstreamCall {
            name: self.endpoint.to_string(),
            result: CallLabel::of(result, SourceError::reason),
            error: SourceError::of_source(result),
            took: start.elapsed(),
            at: self.clock.now(),
        });
    }

    fn timeout_error(&self) -> SourceError {
        SourceError::Unavailable(format!(
            "the SPIFFE agent at {} did not answer within {:?}",
            self.endpoint, self.deadline
        ))
    }

    async fn fetch_checked(&self, id: &SpiffeId, audience: &str) -> Result<JwtSvid, SourceError> {
        let Ok(reply) = timeout(self.deadline, self.send(id, audience)).await else {
            return Err(self.timeout_error());
        };
        // SPIRE filters by the ID. Other providers may also return other IDs, which are not for
        // this caller. An ID with several entries is returned several times.
        let svids = reply?
            .svids
            .into_iter()
            .filter(|svid| svid.spiffe_id == id.as_str() && !svid.svid.is_empty());
        let token =
            JwtSvid::check_any(svids.map(|svid| svid.svid), id, audience, self.clock.now())?;
        token.ok_or_else(|| {
            let text = format!(
                "the SPIFFE agent returned no token for {id}; register that ID for awsvid itself"
            );
            SourceError::Denied(text)
        })
    }

    async fn send(&self, id: &SpiffeId, audience: &str) -> Result<JwtsvidResponse, SourceError> {
        let channel = connect(&self.endpoint).await?;
        let mut client =
            SpiffeWorkloadApiClient::new(channel).max_decoding_message_size(MAX_REPLY_BYTES);
        let audience = vec![audience.to_owned()];
        let mut request = Request::new(JwtsvidRequest {
            audience,
            spiffe_id: id.to_string(),
        });
        // The standard's protection against request forgery. SPIRE rejects a request that has it
        // twice.
        request
            .metadata_mut()
            .insert("workload.spiffe.io", MetadataValue::from_static("true"));
        // Lets the agent end the call when no request waits any more. tonic's own timeout is later,
        // since its error is unclear.
        request.set_timeout(self.deadline + Duration::from_secs(1));
        let reply = client.fetch_jwtsvid(request).await;
        reply
            .map(tonic::Response::into_inner)
            .map_err(|status| self.error_of(id, &status))
    }

    /// Converts the agent's rejection: the table of SPIFFE_Workload_API.md, section 6, and further
    /// codes.
    fn error_of(&self, id: &SpiffeId, status: &Status) -> SourceError {
        let reply = one_line(status.message());
        let failure = || {
            SourceError::Unavailable(format!(
                "the SPIFFE agent at {} gave no SVID: {reply}",
                self.endpoint
            ))
        };
        if is_broken(status) {
            return failure();
        }
        match status.code() {
            Code::PermissionDenied | Code::NotFound => SourceError::Denied(format!(
                "the SPIFFE agent does not give {id} to awsvid: register that ID for the daemon itself, and give no \
                 two of its registrations the same hint ({reply})"
            )),
            Code::InvalidArgument => SourceError::Misconfigured(format!(
                "the SPIFFE agent finds the request for {id} invalid: correct the ID or the audience ({reply})"
            )),
            Code::Unimplemented => SourceError::Misconfigured(format!(
                "the server at {} does not offer this kind of SVID; check that it is a SPIFFE Workload API ({reply})",
                self.endpoint
            )),
            Code::OutOfRange => SourceError::Misconfigured(format!(
                "the SPIFFE agent at {} sent far more than one SVID; check that it is a SPIFFE Workload API ({reply})",
                self.endpoint
            )),
            // Teleport's tbot sends Unknown for every error without a code of its own, lasting or
            // not. Unauthenticated concerns the daemon, not the workload.
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
            | Code::Ok => failure(),
        }
    }
}

#[async_trait]
impl IdentitySource for WorkloadApi {
    async fn identify(&self, caller: &Arc<Caller>) -> Result<Vec<Identity>, SourceError> {
        match self.rules.identify(caller.facts()).await {
            Ok(id) => Ok(id
                .map(|spiffe_id| Identity {
                    spiffe_id,
                    hint: None,
                })
                .into_iter()
                .collect()),
            // The caller was attested by other rules, which did not need its process.
            Err(IdentifyError::NeedsProcess) => Err(SourceError::Reloaded),
            Err(IdentifyError::UnknownAccount(_)) => Err(SourceError::UnknownAccount),
            Err(IdentifyError::Unresponsive) => Err(AttestError::ProcessUnresponsive.into()),
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

    async fn x509_svid(
        &self,
        _caller: &Arc<Caller>,
        id: &SpiffeId,
    ) -> Result<X509Svid, SourceError> {
        self.fetch_x509(id).await
    }

    fn facts_needed(&self, caller: CallerFacts<'_>) -> Option<ProcessFacts> {
        self.rules.facts_needed(caller)
    }

    fn basis(&self, id: &SpiffeId) -> IdentityBasis {
        IdentityBasis::Rules(self.rules.of(id))
    }

    fn identity_fix(&self) -> &'static str {
        "add a [[workload]] rule for it"
    }

    /// Fetches a token for the identity of a rule. The first identity may be registered on other
    /// nodes alone.
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

    /// Returns false, because the agent attests only the daemon.
    fn requires_live_caller(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests;

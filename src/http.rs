//! The container credential endpoint and the instance metadata service: one connection, one
//! request, one answer.
//!
//! hyper parses the request. Each rejection has a reason of its own, which is counted, and audited
//! once the head is complete.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::sync::Notify;

use crate::attest::Attestor;
use crate::audit::{Audit, Outcome};
use crate::caller::WorkloadKey;
use crate::credential_service::CredentialService;
use crate::imds::Imds;
use crate::limits::FairSemaphore;
use crate::metrics::Metrics;
use crate::protocol::Protocol;

mod connection;
mod connection_bounds;
mod error_response;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod guarded_stream;
mod kernel_failures;
mod metadata_request;
mod metadata_response;
mod own_probe;
mod request;
mod request_validation;

pub use kernel_failures::KernelFailures;
pub use own_probe::OwnProbe;
pub use request_validation::{Authorization, RequestHead};

use connection_bounds::DropReason;
use error_response::RequestError;
use metadata_response::MetadataAnswer;

/// The endpoint that serves the connections of all listeners.
#[derive(Debug)]
pub struct CredentialEndpoint {
    /// Attests the caller of a connection.
    pub attestor: Arc<Attestor>,
    /// Selects the role, and returns the credentials.
    pub service: Arc<CredentialService>,
    /// The destination of a record for each request.
    pub audit: Arc<Audit>,
    /// The metrics of connections and requests.
    pub metrics: Metrics,
    /// The header that callers over TCP have to send.
    pub authorization: Authorization,
    /// Is notified when a request over TCP lacks the header, or has another token.
    pub token_needed: Arc<Notify>,
    /// The instance metadata service, if it is served.
    pub imds: Option<Imds>,
    /// The mark of the daemon's own requests.
    pub own_probe: OwnProbe,
    /// The limit of connections, in total and for each workload.
    pub connections: FairSemaphore<WorkloadKey>,
    /// The log of queries to the kernel that failed.
    pub kernel_failures: KernelFailures,
}

/// Returns the outcome and the reason of each way in which a request ends without credentials.
pub fn ends_without_credentials(protocol: Protocol) -> BTreeSet<(&'static str, &'static str)> {
    let failures = RequestError::samples(protocol).into_iter();
    let failures = failures.map(|error| (error.outcome().name(), error.reason()));
    let answers = MetadataAnswer::REASONS.iter();
    let answers = answers.filter(|_| protocol == Protocol::Imds);
    failures
        .chain(answers.map(|reason| (Outcome::Answered.name(), *reason)))
        .collect()
}

/// Returns the reasons for which a connection of a workload ends without an answer.
pub fn drop_reasons() -> impl Iterator<Item = &'static str> {
    DropReason::ALL.into_iter().map(DropReason::reason)
}

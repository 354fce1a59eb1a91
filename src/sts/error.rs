//! Classification of failed STS calls: the table of STS's errors, in one function.

use std::error::Error;
use std::fmt;

use aws_sdk_sts::error::SdkError;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use thiserror::Error;

use super::advice::{self, StsDestination};
use super::error_response;
use super::reason::StsReason;
use super::redaction::without_secrets;
use crate::credentials::Credentials;
use crate::identity::RoleArn;
use crate::role::Grant;
use crate::svid::{JwtSvid, connection_text, one_line};

/// Length from which an external ID is removed from texts of STS. A shorter one would be found
/// within other words.
const MIN_EXTERNAL_ID_CHARS: usize = 8;

/// The action after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RetryPolicy {
    /// Retry once with a new token. If STS rejects that too, treat it as `Never`.
    NewToken,
    /// Retry later with backoff. The failure may pass by itself.
    Later,
    /// Do not retry. An operator has to change something first.
    Never,
}

/// Reason why STS returned no credentials.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub struct StsError {
    /// The action after this failure.
    pub retry: RetryPolicy,
    /// The reason, for advice, metrics and audit records.
    pub reason: StsReason,
    /// STS's own code, as on the wire. Empty without a response, or if the response has no code.
    pub code: String,
    /// One-line description. The workload may see it and the advice. They name its own role and
    /// SPIFFE ID, the host and the response, and never the token.
    pub what: String,
    /// Advice for the operator, if there is one.
    pub fix: Option<String>,
}

impl fmt::Display for StsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        match &self.fix {
            Some(fix) => write!(f, "; {fix}"),
            None => Ok(()),
        }
    }
}

/// Everything that can fail in a call.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// STS rejected, or a server that answers instead of it.
    Rejected {
        code: Option<String>,
        status: u16,
        message: String,
    },
    /// A response of status 2xx without usable credentials.
    InvalidResponse(String),
    /// No response, or only a part of one.
    Unreachable(String),
    /// The request cannot be built: the endpoint or the region is invalid.
    InvalidRequest(String),
    /// There are no certificates to verify the server with.
    Untrusted(String),
    /// Too many other calls were waiting.
    Busy,
}

/// An exchange that failed, for its error text.
#[derive(Clone, Copy)]
pub(crate) struct FailedCall<'a> {
    pub(super) grant: &'a Grant,
    pub(super) proof: CallProof<'a>,
}

/// The proof that a call was made with.
#[derive(Clone, Copy)]
pub(crate) enum CallProof<'a> {
    Token(&'a JwtSvid),
    /// The credentials of the session before it in the chain.
    Session(&'a Credentials),
}

impl<'a> FailedCall<'a> {
    /// Returns the call for the first role of `grant`.
    pub(super) fn with_token(grant: &'a Grant, token: &'a JwtSvid) -> Self {
        let proof = CallProof::Token(token);
        Self { grant, proof }
    }

    /// Returns the call for the last role of `grant`.
    pub(super) fn with_session(grant: &'a Grant, previous: &'a Credentials) -> Self {
        let proof = CallProof::Session(previous);
        Self { grant, proof }
    }

    /// Returns the ARN of the role that the call is for.
    pub(super) fn role_arn(&self) -> &'a RoleArn {
        match self.proof {
            CallProof::Token(_) => &self.grant.role_arn,
            CallProof::Session(_) => self.grant.issued_role_arn(),
        }
    }

    /// Returns the external ID of the call, if it is long enough to be found in a text.
    fn external_id(&self) -> Option<&'a str> {
        let session = match self.proof {
            CallProof::Token(_) => None,
            CallProof::Session(_) => self.grant.chain().last(),
        };
        let id = session?.external_id.as_deref();
        id.filter(|id| id.len() >= MIN_EXTERNAL_ID_CHARS)
    }

    fn secrets(&self) -> Vec<&'a str> {
        match self.proof {
            CallProof::Token(token) => vec![token.secret()],
            CallProof::Session(session) => {
                vec![&session.session_token, &session.secret_access_key]
            }
        }
    }
}

impl Failure {
    /// Converts the SDK's error. Its `Debug` is never used, since that of a dispatch failure may
    /// hold the request.
    pub(super) fn of<E>(error: &SdkError<E, HttpResponse>) -> Self {
        match error {
            SdkError::ServiceError(rejected) => {
                let status = rejected.raw().status();
                match error_response::read(rejected.raw()) {
                    None if status.is_success() => {
                        Self::InvalidResponse("the response is not readable".to_owned())
                    }
                    rejection => {
                        let error_response::StsErrorResponse { code, message } =
                            rejection.unwrap_or_default();
                        Self::Rejected {
                            code,
                            status: status.as_u16(),
                            message,
                        }
                    }
                }
            }
            SdkError::DispatchFailure(failure) => match failure.as_connector_error() {
                Some(error) if error.is_user() => Self::InvalidRequest(causes(error)),
                Some(error) => Self::Unreachable(causes(error)),
                None => Self::Unreachable("the connection failed".to_owned()),
            },
            SdkError::ResponseError(_) => {
                Self::Unreachable("the connection broke during the response".to_owned())
            }
            SdkError::TimeoutError(_) => Self::Unreachable("no response in time".to_owned()),
            // The SDK may add kinds. None of them is a response of STS.
            SdkError::ConstructionFailure(_) => Self::InvalidRequest(
                "the request is invalid; correct `region` or `endpoint` in [sts]".to_owned(),
            ),
            _ => Self::Unreachable("the call failed".to_owned()),
        }
    }

    /// Returns the action and the reason: the one table of both.
    fn classify(&self) -> (RetryPolicy, StsReason) {
        match self {
            Self::Rejected {
                code,
                status,
                message,
            } => match code {
                Some(code) => classify_code(code, *status, message),
                None => classify_status(*status),
            },
            Self::InvalidResponse(_) => (RetryPolicy::Later, StsReason::BadAnswer),
            Self::Unreachable(_) => (RetryPolicy::Later, StsReason::Unreachable),
            Self::InvalidRequest(_) => (RetryPolicy::Never, StsReason::Misconfigured),
            Self::Untrusted(_) => (RetryPolicy::Later, StsReason::NoCa),
            Self::Busy => (RetryPolicy::Later, StsReason::Busy),
        }
    }
}

/// Classifies a failure by the code on the wire. The SDK's shapes have other names
/// (`IdpCommunicationErrorException` for `IDPCommunicationError`). Other implementations of STS use
/// either, so the suffix is ignored.
fn classify_code(code: &str, status: u16, message: &str) -> (RetryPolicy, StsReason) {
    match code.strip_suffix("Exception").unwrap_or(code) {
        "ExpiredToken" => (RetryPolicy::NewToken, StsReason::ExpiredToken),
        // STS fetches the issuer's keys during the call, with a timeout of seconds.
        "InvalidIdentityToken"
            if message
                .to_ascii_lowercase()
                .contains("retrieve verification key") =>
        {
            (RetryPolicy::Later, StsReason::IssuerUnreachable)
        }
        "IDPCommunicationError" => (RetryPolicy::Later, StsReason::IssuerUnreachable),
        // The key may have been withdrawn after the signature. The agent drops such tokens.
        "InvalidIdentityToken" | "IDPRejectedClaim" | "InvalidToken" | "InvalidClientTokenId" => {
            (RetryPolicy::NewToken, StsReason::InvalidToken)
        }
        "AccessDenied" => (RetryPolicy::Never, StsReason::AccessDenied),
        "RegionDisabled" => (RetryPolicy::Never, StsReason::RegionDisabled),
        "MalformedPolicyDocument" | "PackedPolicyTooLarge" => {
            (RetryPolicy::Never, StsReason::BadPolicy)
        }
        "ValidationError"
        | "Validation"
        | "InvalidArgument"
        | "InvalidParameterValue"
        | "InvalidParameterCombination"
        | "InvalidRequest"
        | "MissingParameter"
        | "ResourceNotFound"
        | "ServiceLinkedRoleLockClient"
        | "NoSuchEntity" => (RetryPolicy::Never, StsReason::BadRequest),
        // Codes of an S3, or of a service that needs a signature. This call has none.
        "AuthorizationHeaderMalformed"
        | "InvalidAccessKeyId"
        | "InvalidAction"
        | "MethodNotAllowed"
        | "MissingAuthenticationToken"
        | "NotImplemented"
        | "SignatureDoesNotMatch"
        | "UnknownOperation" => (RetryPolicy::Never, StsReason::Misconfigured),
        "BandwidthLimitExceeded"
        | "EC2Throttled"
        | "LimitExceeded"
        | "PriorRequestNotComplete"
        | "ProvisionedThroughputExceeded"
        | "RequestLimitExceeded"
        | "RequestThrottled"
        | "SlowDown"
        | "SlowDownRead"
        | "SlowDownWrite"
        | "Throttled"
        | "Throttling"
        | "TooManyRequests"
        | "TransactionInProgress" => (RetryPolicy::Later, StsReason::Throttled),
        "RequestTimeout"
        | "InternalFailure"
        | "InternalError"
        | "ServiceLinkedRoleLockService"
        | "ServiceUnavailable" => (RetryPolicy::Later, StsReason::Unavailable),
        _ => classify_status(status),
    }
}

/// Classifies a failure without a known code, such as HTML from a proxy in front of STS.
fn classify_status(status: u16) -> (RetryPolicy, StsReason) {
    match status {
        429 => (RetryPolicy::Later, StsReason::Throttled),
        405 | 501 => (RetryPolicy::Never, StsReason::Misconfigured),
        408 | 500..=599 => (RetryPolicy::Later, StsReason::Unavailable),
        _ => (RetryPolicy::Never, StsReason::Refused),
    }
}

impl StsError {
    /// All policies and reasons of errors. STS may reject a second token, which is then retried
    /// later.
    const KINDS: [(RetryPolicy, StsReason); 19] = [
        (RetryPolicy::Later, StsReason::BadAnswer),
        (RetryPolicy::Later, StsReason::Busy),
        (RetryPolicy::Later, StsReason::ExpiredToken),
        (RetryPolicy::Later, StsReason::InvalidToken),
        (RetryPolicy::Later, StsReason::IssuerUnreachable),
        (RetryPolicy::Later, StsReason::NoCa),
        (RetryPolicy::Later, StsReason::Throttled),
        (RetryPolicy::Later, StsReason::Unavailable),
        (RetryPolicy::Later, StsReason::Unreachable),
        (RetryPolicy::Never, StsReason::AccessDenied),
        (RetryPolicy::Never, StsReason::BadPolicy),
        (RetryPolicy::Never, StsReason::BadRequest),
        (RetryPolicy::Never, StsReason::ExpiredToken),
        (RetryPolicy::Never, StsReason::InvalidToken),
        (RetryPolicy::Never, StsReason::Misconfigured),
        (RetryPolicy::Never, StsReason::Refused),
        (RetryPolicy::Never, StsReason::RegionDisabled),
        (RetryPolicy::NewToken, StsReason::ExpiredToken),
        (RetryPolicy::NewToken, StsReason::InvalidToken),
    ];

    /// Returns an error of each kind, for their labels.
    pub fn samples() -> Vec<Self> {
        let sample = |(retry, reason)| Self {
            retry,
            reason,
            code: String::new(),
            what: String::new(),
            fix: None,
        };
        Self::KINDS.map(sample).into()
    }

    /// Creates the error of a call to `at`. `call` is the exchange that failed.
    pub(crate) fn new(
        failure: &Failure,
        at: &StsDestination,
        call: Option<FailedCall<'_>>,
    ) -> Self {
        let (retry, reason) = failure.classify();
        let sts = &at.name;
        let secrets = call.map(|call| call.secrets()).unwrap_or_default();
        let external_id = call.and_then(|call| call.external_id());
        let clean = |text: &str| {
            let text = without_secrets(text, &secrets);
            one_line(&match external_id {
                Some(id) => text.replace(id, "[external_id]"),
                None => text,
            })
        };
        let what = match failure {
            Failure::Rejected {
                code,
                status,
                message,
            } => {
                let code = code
                    .clone()
                    .unwrap_or_else(|| format!("HTTP {status}, without an STS error code"));
                let what =
                    call.map(|call| format!(" {} to {}", call.role_arn(), call.grant.spiffe_id));
                let parts = [clean(&code), clean(message)]
                    .into_iter()
                    .filter(|text| !text.is_empty());
                format!(
                    "{sts} rejected{}: {}",
                    what.unwrap_or_default(),
                    parts.collect::<Vec<_>>().join(": ")
                )
            }
            Failure::InvalidResponse(text) => {
                format!("{sts} sent an invalid response: {}", clean(text))
            }
            Failure::Unreachable(text) => match &at.proxy {
                Some(proxy) => format!("{sts} did not answer through {proxy}: {}", clean(text)),
                None => format!("{sts} did not answer: {}", clean(text)),
            },
            Failure::InvalidRequest(text) => format!("{sts} cannot be called: {}", clean(text)),
            Failure::Untrusted(text) => format!("{sts} cannot be verified: {}", clean(text)),
            Failure::Busy => format!("too many calls are waiting for {sts}"),
        };
        let (code, fragments) = match failure {
            Failure::Rejected { code, message, .. } => {
                (clean(code.as_deref().unwrap_or_default()), clean(message))
            }
            Failure::InvalidResponse(_)
            | Failure::Unreachable(_)
            | Failure::InvalidRequest(_)
            | Failure::Untrusted(_)
            | Failure::Busy => Default::default(),
        };
        let fix = advice::of(reason, &format!("{code} {fragments}"), at, call);
        Self {
            retry,
            reason,
            code,
            what,
            fix,
        }
    }
}

/// Returns the texts of an error's causes, each once. Some of the SDK's causes print the request
/// even with `Display`. So texts that contain a brace are left out.
pub(super) fn causes(error: &dyn Error) -> String {
    let mut texts: Vec<String> = Vec::new();
    let mut next = error.source();
    while let Some(error) = next {
        let text = connection_text(error);
        if !text.contains('{') && !texts.iter().any(|previous| previous.contains(&text)) {
            texts.push(text);
        }
        next = error.source();
    }
    if texts.is_empty() {
        "the connection failed".to_owned()
    } else {
        texts.join(": ")
    }
}

#[cfg(test)]
mod tests;

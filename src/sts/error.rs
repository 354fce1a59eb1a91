//! What a failed call means: the table of STS's errors, in one function.

use std::error::Error;
use std::fmt;

use aws_sdk_sts::error::SdkError;
use aws_sdk_sts::operation::assume_role_with_web_identity::AssumeRoleWithWebIdentityError;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use thiserror::Error;

use super::advice::{self, StsDestination};
use super::refusal;
use crate::role::Grant;
use crate::svid::{JwtSvid, one_line};

/// What to do after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RetryPolicy {
    /// Try once more with a new token. If that is refused too, the same as `Never`.
    NewToken,
    /// Try again later, with backoff: it passes by itself.
    Later,
    /// Somebody has to change something first.
    Never,
}

/// Why STS gave no credentials.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub struct StsError {
    /// What to do about it.
    pub again: RetryPolicy,
    /// The label in metrics and audit records.
    pub reason: &'static str,
    /// What STS itself calls it, as on the wire; empty if STS has not answered, or in no words that can be read.
    pub code: String,
    /// What happened, in one line. The workload may see it, and the advice: they have its own role and SPIFFE ID, the host that was
    /// called and its answer, and never the token.
    pub what: String,
    /// What an operator can do about it, if that is known.
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

/// Everything that can go wrong with a call.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// STS refused, or something that answers in its place.
    Refused {
        code: Option<String>,
        status: u16,
        message: String,
    },
    /// An answer of status 2xx without credentials that can be used.
    Garbled(String),
    /// No answer, or only a part of one.
    NoAnswer(String),
    /// There is no request to send: the endpoint or the region is none.
    Unsendable(String),
    /// There are no certificates to verify the server by.
    Untrusted(String),
    /// Too many other calls were waiting.
    Busy,
}

type CallError = SdkError<AssumeRoleWithWebIdentityError, HttpResponse>;

impl Failure {
    /// What the SDK's error says. Its `Debug` is never used: that of a dispatch failure may hold the request.
    pub(super) fn of(error: &CallError) -> Self {
        match error {
            SdkError::ServiceError(refused) => {
                let status = refused.raw().status();
                match refusal::read(refused.raw()) {
                    None if status.is_success() => Self::Garbled("it could not be read".to_owned()),
                    refusal => {
                        let refusal::StsErrorResponse { code, message } =
                            refusal.unwrap_or_default();
                        Self::Refused {
                            code,
                            status: status.as_u16(),
                            message,
                        }
                    }
                }
            }
            SdkError::DispatchFailure(failure) => match failure.as_connector_error() {
                Some(error) if error.is_user() => Self::Unsendable(causes(error)),
                Some(error) => Self::NoAnswer(causes(error)),
                None => Self::NoAnswer("the connection failed".to_owned()),
            },
            SdkError::ResponseError(_) => {
                Self::NoAnswer("the connection broke during the answer".to_owned())
            }
            SdkError::TimeoutError(_) => Self::NoAnswer("no answer in time".to_owned()),
            // The SDK may add kinds; whatever they are, nothing came back from STS.
            SdkError::ConstructionFailure(_) => {
                Self::Unsendable("is `region` an AWS region, and `endpoint` a URL?".to_owned())
            }
            _ => Self::NoAnswer("the call failed".to_owned()),
        }
    }

    /// **The** table: what to do, and the reason's label.
    fn classify(&self) -> (RetryPolicy, &'static str) {
        match self {
            Self::Refused {
                code,
                status,
                message,
            } => match code {
                Some(code) => classify_code(code, *status, message),
                None => classify_status(*status),
            },
            Self::Garbled(_) => (RetryPolicy::Later, "sts_bad_answer"),
            Self::NoAnswer(_) => (RetryPolicy::Later, "sts_unreachable"),
            Self::Unsendable(_) => (RetryPolicy::Never, "sts_misconfigured"),
            Self::Untrusted(_) => (RetryPolicy::Later, "sts_no_ca"),
            Self::Busy => (RetryPolicy::Later, "sts_busy"),
        }
    }
}

/// By the code on the wire. Shapes in the SDK have names of their own (`IdpCommunicationErrorException` for
/// `IDPCommunicationError`), and other makers' STS use now one, now the other, so the ending doesn't count.
fn classify_code(code: &str, status: u16, message: &str) -> (RetryPolicy, &'static str) {
    match code.strip_suffix("Exception").unwrap_or(code) {
        "ExpiredToken" => (RetryPolicy::NewToken, "sts_expired_token"),
        // STS fetches the issuer's keys during the call, and gives up after seconds.
        "InvalidIdentityToken"
            if message
                .to_ascii_lowercase()
                .contains("retrieve verification key") =>
        {
            (RetryPolicy::Later, "sts_issuer_unreachable")
        }
        "IDPCommunicationError" => (RetryPolicy::Later, "sts_issuer_unreachable"),
        // Perhaps signed with a key that has been withdrawn since; the agent drops such tokens.
        "InvalidIdentityToken" | "IDPRejectedClaim" | "InvalidToken" | "InvalidClientTokenId" => {
            (RetryPolicy::NewToken, "sts_invalid_token")
        }
        "AccessDenied" => (RetryPolicy::Never, "sts_access_denied"),
        "RegionDisabled" => (RetryPolicy::Never, "sts_region_disabled"),
        "MalformedPolicyDocument" | "PackedPolicyTooLarge" => {
            (RetryPolicy::Never, "sts_bad_policy")
        }
        "ValidationError"
        | "Validation"
        | "InvalidArgument"
        | "InvalidParameterValue"
        | "InvalidParameterCombination"
        | "InvalidRequest"
        | "MissingParameter"
        | "NoSuchEntity" => (RetryPolicy::Never, "sts_bad_request"),
        // From an S3, or a service that wants a signature; this call has none.
        "AuthorizationHeaderMalformed"
        | "InvalidAccessKeyId"
        | "InvalidAction"
        | "MethodNotAllowed"
        | "MissingAuthenticationToken"
        | "NotImplemented"
        | "SignatureDoesNotMatch"
        | "UnknownOperation" => (RetryPolicy::Never, "sts_misconfigured"),
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
        | "TransactionInProgress" => (RetryPolicy::Later, "sts_throttled"),
        "RequestTimeout" | "InternalFailure" | "InternalError" | "ServiceUnavailable" => {
            (RetryPolicy::Later, "sts_unavailable")
        }
        _ => classify_status(status),
    }
}

/// For codes that nobody knows, and answers in HTML from whatever stands between here and STS.
fn classify_status(status: u16) -> (RetryPolicy, &'static str) {
    match status {
        429 => (RetryPolicy::Later, "sts_throttled"),
        405 | 501 => (RetryPolicy::Never, "sts_misconfigured"),
        408 | 500..=599 => (RetryPolicy::Later, "sts_unavailable"),
        _ => (RetryPolicy::Never, "sts_refused"),
    }
}

impl StsError {
    /// All policies and labels of errors. A refusal of a second token may become one to retry later.
    const KINDS: [(RetryPolicy, &'static str); 17] = [
        (RetryPolicy::Later, "sts_bad_answer"),
        (RetryPolicy::Later, "sts_busy"),
        (RetryPolicy::Later, "sts_expired_token"),
        (RetryPolicy::Later, "sts_invalid_token"),
        (RetryPolicy::Later, "sts_issuer_unreachable"),
        (RetryPolicy::Later, "sts_no_ca"),
        (RetryPolicy::Later, "sts_throttled"),
        (RetryPolicy::Later, "sts_unavailable"),
        (RetryPolicy::Later, "sts_unreachable"),
        (RetryPolicy::Never, "sts_access_denied"),
        (RetryPolicy::Never, "sts_bad_policy"),
        (RetryPolicy::Never, "sts_bad_request"),
        (RetryPolicy::Never, "sts_misconfigured"),
        (RetryPolicy::Never, "sts_refused"),
        (RetryPolicy::Never, "sts_region_disabled"),
        (RetryPolicy::NewToken, "sts_expired_token"),
        (RetryPolicy::NewToken, "sts_invalid_token"),
    ];

    /// Returns an error of each kind, for their labels.
    pub fn samples() -> Vec<Self> {
        let sample = |(again, reason)| Self {
            again,
            reason,
            code: String::new(),
            what: String::new(),
            fix: None,
        };
        Self::KINDS.map(sample).into()
    }

    /// `at`: the STS; `call`: the exchange that failed.
    pub(super) fn new(
        failure: &Failure,
        at: &StsDestination,
        call: Option<(&Grant, &JwtSvid)>,
    ) -> Self {
        let (again, reason) = failure.classify();
        let sts = &at.name;
        let clean = |text: &str| one_line(&without_token(text, call.map(|(_, token)| token)));
        let what = match failure {
            Failure::Refused {
                code,
                status,
                message,
            } => {
                let code = code
                    .clone()
                    .unwrap_or_else(|| format!("HTTP {status}, without a code of an STS"));
                let what =
                    call.map(|(grant, _)| format!(" {} to {}", grant.role_arn, grant.spiffe_id));
                let said = [clean(&code), clean(message)]
                    .into_iter()
                    .filter(|text| !text.is_empty());
                format!(
                    "{sts} refused{}: {}",
                    what.unwrap_or_default(),
                    said.collect::<Vec<_>>().join(": ")
                )
            }
            Failure::Garbled(text) => {
                format!("{sts} gave an answer that cannot be used: {}", clean(text))
            }
            Failure::NoAnswer(text) => match &at.proxy {
                Some(proxy) => format!("{sts} did not answer through {proxy}: {}", clean(text)),
                None => format!("{sts} did not answer: {}", clean(text)),
            },
            Failure::Unsendable(text) => format!("{sts} cannot be called: {}", clean(text)),
            Failure::Untrusted(text) => format!("{sts} cannot be verified: {}", clean(text)),
            Failure::Busy => format!("too many calls are waiting for {sts}"),
        };
        let (code, words) = match failure {
            Failure::Refused { code, message, .. } => {
                (clean(code.as_deref().unwrap_or_default()), clean(message))
            }
            _ => Default::default(),
        };
        let fix = advice::of(reason, &format!("{code} {words}"), at, call);
        Self {
            again,
            reason,
            code,
            what,
            fix,
        }
    }
}

/// What the causes of an error say, each once. Some of the SDK's print the request even where they are displayed, so
/// whatever looks like a printed structure is left out.
fn causes(error: &dyn Error) -> String {
    let mut texts: Vec<String> = Vec::new();
    let mut next = error.source();
    while let Some(error) = next {
        let text = error.to_string();
        if !text.contains('{') && !texts.iter().any(|seen| seen.contains(&text)) {
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

/// `text` without anything of the token: AWS's validation errors quote the values that they complain about.
///
/// A fragment of twice `WINDOW` is always found: it has a window in it that begins at a multiple of `WINDOW` of its
/// word.
fn without_token(text: &str, token: Option<&JwtSvid>) -> String {
    const WINDOW: usize = 16;
    const TEXT_MAX: usize = 8192;
    let Some(token) = token else {
        return text.to_owned();
    };
    let text: String = text.chars().take(TEXT_MAX).collect();
    let in_token = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let mut clean = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let word = rest.find(|c| !in_token(c)).unwrap_or(rest.len());
        let (word, other) = rest.split_at(word);
        // ASCII only, so it can be cut anywhere.
        let quoted = word.as_bytes().chunks_exact(WINDOW).any(|window| {
            std::str::from_utf8(window).is_ok_and(|window| token.secret().contains(window))
        });
        clean.push_str(if quoted { "[token]" } else { word });
        let next = other.find(in_token).unwrap_or(other.len());
        clean.push_str(&other[..next]);
        rest = &other[next..];
    }
    clean
}

#[cfg(test)]
mod tests;

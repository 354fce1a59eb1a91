//! From a reason to what the client is told: status, code, words. One place, every case.

use serde::Serialize;

use crate::audit::{Outcome, RequestId};
use crate::broker::ServiceError;
use crate::cache::CacheError;
use crate::caller::{AttestError, Caller};
use crate::issue::ExchangeError;
use crate::role::RoleDenied;
use crate::svid::SourceError;

/// Why a request gets no credentials, with what the client may know of it.
#[derive(Debug)]
pub(crate) enum RequestError {
    /// The caller was not attested, or is no longer what it was.
    Caller(AttestError),
    /// `Host` is missing, twice there, or not loopback.
    Host,
    /// A browser asks.
    Browser,
    /// A proxy asks for somebody.
    Proxied,
    /// What came is no head of HTTP/1.
    Malformed,
    /// The head is over a bound.
    HeadTooLarge,
    /// Not GET.
    Method,
    /// A body, which no GET of an SDK has.
    Body,
    /// No such path.
    Path,
    /// The ARN in the path is none.
    BadArn,
    /// No `Authorization` header.
    NoAuthorization,
    /// Not the token.
    WrongToken,
    /// No rule matches; with what the caller is, which it knows itself.
    NoIdentity(String),
    /// No role.
    Denied(RoleDenied),
    /// The source or STS failed or refused.
    Issue(ExchangeError),
    /// Still under way.
    Pending,
    /// The cache's bound.
    Full,
    /// The cache's bound for one SPIFFE ID.
    TooManyRoles,
    /// The audit record can't be written, and the configuration requires it.
    NotAudited,
}

/// Both spellings, since SDKs read one or the other.
#[derive(Serialize)]
struct ErrorBody<'a> {
    code: &'a str,
    message: &'a str,
    #[serde(rename = "Code")]
    code_too: &'a str,
    #[serde(rename = "Message")]
    message_too: &'a str,
}

impl RequestError {
    /// Returns an error of each kind, for their labels.
    pub(super) fn samples() -> Vec<Self> {
        let own = [
            Self::Host,
            Self::Browser,
            Self::Proxied,
            Self::Malformed,
            Self::HeadTooLarge,
            Self::Method,
            Self::Body,
            Self::Path,
            Self::BadArn,
            Self::NoAuthorization,
            Self::WrongToken,
            Self::NoIdentity(String::new()),
            Self::Pending,
            Self::Full,
            Self::TooManyRoles,
            Self::NotAudited,
        ];
        let callers = AttestError::ALL.map(Self::Caller);
        let denials = RoleDenied::ALL.map(Self::Denied);
        // An exchange that fails because of its caller ends as an error of that caller.
        let is_of_caller =
            |error: &ExchangeError| matches!(error, ExchangeError::Source(SourceError::Caller(_)));
        let exchanges = ExchangeError::samples();
        let exchanges = exchanges.into_iter().filter(|error| !is_of_caller(error));
        let own = own.into_iter().chain(callers).chain(denials);
        own.chain(exchanges.map(Self::Issue)).collect()
    }

    pub(super) fn broker(error: ServiceError, caller: &Caller) -> Self {
        match error {
            ServiceError::Refused(refusal) => Self::Caller(refusal),
            ServiceError::NoIdentity => Self::NoIdentity(describe(caller)),
            // The process that the source was asked about is the caller, or one that waits with it.
            ServiceError::Source(SourceError::Caller(refusal))
            | ServiceError::Cache(CacheError::Issue(ExchangeError::Source(SourceError::Caller(
                refusal,
            )))) => Self::Caller(refusal),
            ServiceError::Source(error) => Self::Issue(ExchangeError::Source(error)),
            ServiceError::Denied(denied) => Self::Denied(denied),
            ServiceError::Cache(CacheError::Issue(error)) => Self::Issue(error),
            ServiceError::Cache(CacheError::Pending) => Self::Pending,
            ServiceError::Cache(CacheError::Full) => Self::Full,
            ServiceError::Cache(CacheError::TooManyRoles) => Self::TooManyRoles,
        }
    }

    /// The label in metrics and audit records.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::Caller(refusal) => refusal.reason(),
            Self::Host => "host",
            Self::Browser => "browser",
            Self::Proxied => "proxied",
            Self::Malformed => "bad_request",
            Self::HeadTooLarge => "head_too_large",
            Self::Method => "method",
            Self::Body => "body",
            Self::Path => "path",
            Self::BadArn => "bad_arn",
            Self::NoAuthorization => "no_authorization",
            Self::WrongToken => "wrong_token",
            Self::NoIdentity(_) => "no_identity",
            Self::Denied(denied) => denied.reason(),
            Self::Issue(error) => error.reason(),
            Self::Pending => "pending",
            Self::Full => "cache_full",
            Self::TooManyRoles => "too_many_roles",
            Self::NotAudited => "not_audited",
        }
    }

    fn is_transient(&self) -> bool {
        match self {
            Self::Issue(error) => error.is_transient(),
            Self::Caller(refusal) => refusal.is_transient(),
            Self::Pending | Self::Full | Self::TooManyRoles | Self::NotAudited => true,
            Self::Host
            | Self::Browser
            | Self::Proxied
            | Self::Malformed
            | Self::HeadTooLarge
            | Self::Method
            | Self::Body
            | Self::Path
            | Self::BadArn
            | Self::NoAuthorization
            | Self::WrongToken
            | Self::NoIdentity(_)
            | Self::Denied(_) => false,
        }
    }

    pub(super) fn outcome(&self) -> Outcome {
        if self.is_transient() {
            Outcome::Failed
        } else {
            Outcome::Refused
        }
    }

    /// Transient is 503, which SDKs try again; never 429, which some don't.
    pub(super) fn status(&self) -> u16 {
        match self {
            Self::Path => 404,
            Self::Method => 405,
            Self::HeadTooLarge => 431,
            Self::Host | Self::Malformed | Self::Body | Self::BadArn => 400,
            other if other.is_transient() => 503,
            _ => 403,
        }
    }

    /// Seconds.
    pub(super) fn retry_after(&self) -> Option<u64> {
        self.is_transient().then_some(1)
    }

    /// RFC 9110, section 15.5.6: whoever is told that a method is wrong is told which are right.
    pub(super) fn allow(&self) -> Option<&'static str> {
        matches!(self, Self::Method).then_some("GET")
    }

    /// What happened, why, and what to do: nothing of other workloads, nothing secret.
    fn message(&self) -> String {
        let asks = "Ask with the variables that `awsvid` documents: the URI is http://127.0.0.1:<port>/v1/credentials";
        match self {
            Self::Caller(refusal) => format!("The caller was not recognized: {refusal}. Connect anew and ask again; if this repeats, the node's log has the details"),
            Self::Host => "The Host header must be one, and a loopback address or localhost: requests for other names are refused because of DNS rebinding".to_owned(),
            Self::Browser => "This endpoint does not answer browsers".to_owned(),
            Self::Proxied => "The request came through a proxy or takes this endpoint for one, so the one who asks is not the one who is attested. Set NO_PROXY=127.0.0.1,localhost".to_owned(),
            Self::Malformed => "This is no request of HTTP/1.1 that can be understood. Plain HTTP is spoken here, neither TLS nor HTTP/2".to_owned(),
            Self::HeadTooLarge => "The head of the request is larger than 16 KiB or has more than 64 headers".to_owned(),
            Self::Method => "Only GET is answered here".to_owned(),
            Self::Body => "The request has a body, which is not read here; ask without one".to_owned(),
            Self::Path => format!("There is nothing at this path. {asks}, or /v1/credentials/<role>"),
            Self::BadArn => "The role ARN in the path is none; it has the form arn:aws:iam::123456789012:role/name, percent-encoded once".to_owned(),
            Self::NoAuthorization => "The Authorization header is missing. Set AWS_CONTAINER_AUTHORIZATION_TOKEN to any value, or AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE to the node's token file".to_owned(),
            Self::WrongToken => "The Authorization header is missing or is not this node's token. Set AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE to the node's token file".to_owned(),
            Self::NoIdentity(caller) => format!("No identity is configured on this node for {caller}. Whoever runs the node can add a [[workload]] rule or, where SPIRE attests workloads, a registration entry for it"),
            Self::Denied(denied) => format!("{}. Whoever runs the node can add or widen a [[role]]", sentence(&denied.to_string())),
            Self::Issue(error) => sentence(&error.to_string()),
            Self::Pending => "The credentials are being issued; ask again".to_owned(),
            Self::Full => "This node holds as many credentials as it may; raise [cache] max_entries".to_owned(),
            Self::TooManyRoles => "Credentials for 16 roles of this workload are being issued at this moment; ask again".to_owned(),
            Self::NotAudited => "The audit record could not be written, and this node hands out nothing without one".to_owned(),
        }
    }

    /// `request` is `None` where there is no audit record.
    pub(super) fn body(&self, request: Option<RequestId>) -> Vec<u8> {
        let request = request
            .map(|id| format!(" (request {id})"))
            .unwrap_or_default();
        let message = format!("awsvid: {}.{request}", self.message());
        let code = self.reason();
        let body = ErrorBody {
            code,
            message: &message,
            code_too: code,
            message_too: &message,
        };
        // Strings: writing them to memory cannot fail.
        serde_json::to_vec(&body).unwrap_or_default()
    }

    /// The whole answer to a head that hyper did not understand, and so doesn't answer in our words.
    pub(super) fn raw_response(&self) -> Vec<u8> {
        let status =
            hyper::StatusCode::from_u16(self.status()).unwrap_or(hyper::StatusCode::BAD_REQUEST);
        let body = self.body(None);
        let length = body.len();
        let mut answer = format!(
            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncache-control: no-store\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
        )
        .into_bytes();
        answer.extend(body);
        answer
    }
}

/// What the caller is, as it knows itself.
fn describe(caller: &Caller) -> String {
    let unit = caller
        .cgroup
        .as_ref()
        .and_then(|cgroup| cgroup.systemd_unit());
    match (unit, caller.in_container()) {
        (_, Some(true)) => format!("uid {} in a container", caller.uid),
        (Some(unit), _) => format!("uid {} in {unit}", caller.uid),
        (None, _) => format!("uid {}", caller.uid),
    }
}

fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(letters).collect()
    })
}

#[cfg(test)]
mod tests;

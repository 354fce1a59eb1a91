//! The answers to requests without credentials: status, code and message of each reason.

use std::fmt;

use serde::Serialize;

use crate::audit::{Outcome, RequestId};
use crate::cache::CacheError;
use crate::caller::{AttestError, Caller};
use crate::credential_service::ServiceError;
use crate::exchange::ExchangeError;
use crate::identity::SpiffeId;
use crate::protocol::Protocol;
use crate::role::{RequestedRole, RoleDenied};
use crate::svid::SourceError;

/// The reason for which a request gets no credentials, with the facts that its caller may see.
#[derive(Debug)]
pub(crate) enum RequestError {
    /// The caller was not attested, or has changed since.
    Caller(AttestError),
    /// The header `Host` is missing, is there twice, or is not loopback.
    Host,
    /// The headers are those of a browser.
    Browser,
    /// The request came through a proxy, or takes this endpoint for one.
    Proxied,
    /// The bytes are not a head of HTTP/1.
    Malformed,
    /// The head is larger than its bound.
    HeadTooLarge,
    /// The method is not GET.
    Method,
    /// The request has a body, which no GET of an SDK has.
    Body,
    /// The path does not exist.
    Path,
    /// The path contains an invalid ARN.
    BadArn,
    /// The header `Authorization` is missing.
    NoAuthorization,
    /// The header `Authorization` is not the token.
    WrongToken,
    /// The header with the lifetime of a metadata token is missing, or out of bounds.
    MetadataTtl,
    /// The metadata token is missing, or is not valid here.
    MetadataToken,
    /// The caller has no identity.
    NoIdentity {
        /// Description of the caller.
        caller: String,
        fix: &'static str,
    },
    /// No role is for this caller.
    Denied(Denial),
    /// The source or STS failed, or rejected the exchange.
    Exchange(ExchangeError),
    /// The exchange has not ended yet.
    Pending,
    /// The cache is at its bound.
    Full,
    /// The cache is at its bound for this SPIFFE ID.
    TooManyRoles,
    /// The audit record could not be written, and the configuration requires it.
    NotAudited,
}

/// A denial, with the caller's own facts.
#[derive(Debug)]
pub(crate) struct Denial {
    denied: RoleDenied,
    spiffe_ids: Vec<SpiffeId>,
    requested: Option<String>,
}

/// The SPIFFE IDs in one answer, which a person reads. The audit record has more of them.
const MAX_SHOWN_SPIFFE_IDS: usize = 4;

/// An error body with both spellings, since SDKs read one or the other.
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
    /// Returns an error of each kind that this protocol has, for their labels.
    pub(super) fn samples(protocol: Protocol) -> Vec<Self> {
        let of_protocol = match protocol {
            Protocol::Container => vec![
                Self::Malformed,
                Self::HeadTooLarge,
                Self::BadArn,
                Self::NoAuthorization,
                Self::WrongToken,
            ],
            Protocol::Imds => vec![Self::MetadataTtl, Self::MetadataToken],
        };
        let own = [
            Self::Host,
            Self::Browser,
            Self::Proxied,
            Self::Method,
            Self::Body,
            Self::Path,
            Self::NoIdentity {
                caller: String::new(),
                fix: "",
            },
            Self::Pending,
            Self::Full,
            Self::TooManyRoles,
            Self::NotAudited,
        ];
        let callers = AttestError::ALL.map(Self::Caller);
        let denials = RoleDenied::ALL.map(|denied| {
            Self::Denied(Denial {
                denied,
                spiffe_ids: Vec::new(),
                requested: None,
            })
        });
        // An exchange that fails because of its caller ends as an error of that caller.
        let is_of_caller =
            |error: &ExchangeError| matches!(error, ExchangeError::Source(SourceError::Caller(_)));
        let exchanges = ExchangeError::samples();
        let exchanges = exchanges.into_iter().filter(|error| !is_of_caller(error));
        let own = own.into_iter().chain(of_protocol);
        let own = own.chain(callers).chain(denials);
        own.chain(exchanges.map(Self::Exchange)).collect()
    }

    pub(super) fn from_service(
        error: ServiceError,
        caller: &Caller,
        requested: &RequestedRole,
    ) -> Self {
        match error {
            ServiceError::Rejected(error) => Self::Caller(error),
            ServiceError::NoIdentity { fix } => Self::NoIdentity {
                caller: describe(caller),
                fix,
            },
            // The source attested the caller, or a process that waits with it.
            ServiceError::Source(SourceError::Caller(error))
            | ServiceError::Cache(CacheError::Exchange(ExchangeError::Source(
                SourceError::Caller(error),
            ))) => Self::Caller(error),
            ServiceError::Source(error) => Self::Exchange(ExchangeError::Source(error)),
            ServiceError::Denied { denied, spiffe_ids } => Self::Denied(Denial {
                denied,
                spiffe_ids,
                requested: requested.name().map(str::to_owned),
            }),
            ServiceError::Cache(CacheError::Exchange(error)) => Self::Exchange(error),
            ServiceError::Cache(CacheError::Pending) => Self::Pending,
            ServiceError::Cache(CacheError::Full) => Self::Full,
            ServiceError::Cache(CacheError::TooManyRoles) => Self::TooManyRoles,
        }
    }

    /// Returns the label in metrics and audit records.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::Caller(error) => error.reason(),
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
            Self::MetadataTtl => "imds_ttl",
            Self::MetadataToken => "imds_token",
            Self::NoIdentity { .. } => "no_identity",
            Self::Denied(denial) => denial.denied.reason(),
            Self::Exchange(error) => error.reason(),
            Self::Pending => "pending",
            Self::Full => "cache_full",
            Self::TooManyRoles => "too_many_roles",
            Self::NotAudited => "not_audited",
        }
    }

    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Exchange(error) => error.is_transient(),
            Self::Caller(error) => error.is_transient(),
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
            | Self::MetadataTtl
            | Self::MetadataToken
            | Self::NoIdentity { .. }
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

    /// Returns 503 for a transient error, which SDKs retry; never 429, which some do not.
    pub(super) fn status(&self) -> u16 {
        match self {
            Self::Path => 404,
            Self::Method => 405,
            Self::HeadTooLarge => 431,
            Self::Host | Self::Malformed | Self::Body | Self::BadArn | Self::MetadataTtl => 400,
            Self::MetadataToken => 401,
            Self::Caller(error) => retry_or_reject(error.is_transient()),
            Self::Exchange(error) => retry_or_reject(error.is_transient()),
            Self::Pending | Self::Full | Self::TooManyRoles | Self::NotAudited => 503,
            Self::Browser
            | Self::Proxied
            | Self::NoAuthorization
            | Self::WrongToken
            | Self::NoIdentity { .. }
            | Self::Denied(_) => 403,
        }
    }

    /// Returns the value of `Retry-After` in seconds.
    pub(super) fn retry_after(&self) -> Option<u64> {
        self.is_transient().then_some(1)
    }

    /// Returns the methods that are right, which RFC 9110, section 15.5.6, requires of a 405.
    pub(super) fn allow(&self) -> Option<&'static str> {
        matches!(self, Self::Method).then_some("GET")
    }

    /// Returns the cause and the fix. It contains no secret and no fact about other workloads.
    pub(super) fn message(&self) -> String {
        let uri =
            "set AWS_CONTAINER_CREDENTIALS_FULL_URI to http://127.0.0.1:<port>/v1/credentials";
        match self {
            Self::Caller(error) => match error.fix() {
                Some(fix) => format!("caller not attested: {error}; {fix}"),
                None => format!("caller not attested: {error}"),
            },
            Self::Host => "invalid Host header: other names than localhost and loopback addresses are rejected because of DNS rebinding; send one Host header with such a name".to_owned(),
            Self::Browser => "request of a browser: this endpoint serves AWS SDKs only; use an SDK or the AWS CLI".to_owned(),
            Self::Proxied => "request through a proxy: awsvid would attest the proxy instead of the caller; set NO_PROXY=127.0.0.1,localhost".to_owned(),
            Self::Malformed => "malformed request: it is not HTTP/1.1; use plain HTTP, neither TLS nor HTTP/2".to_owned(),
            Self::HeadTooLarge => "request head too large: the bounds are 16 KiB and 64 headers; send fewer or shorter headers".to_owned(),
            Self::Method => "method not allowed: this endpoint serves GET only; send a GET request".to_owned(),
            Self::Body => "unexpected body: this endpoint reads none; send the request without one".to_owned(),
            Self::Path => format!("unknown path: this endpoint serves only credentials; {uri}, or to /v1/credentials/<role>"),
            Self::BadArn => "invalid role ARN in the path: it is not of the form arn:aws:iam::123456789012:role/name; correct it, and percent-encode it once".to_owned(),
            Self::NoAuthorization => "missing Authorization header: it is required over TCP; set AWS_CONTAINER_AUTHORIZATION_TOKEN to any value, or AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE to the node's token file".to_owned(),
            Self::WrongToken => "wrong Authorization header: it is not this node's token; set AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE to the node's token file".to_owned(),
            Self::MetadataTtl => "missing or invalid X-aws-ec2-metadata-token-ttl-seconds header: it takes 1 to 21600 seconds; use an SDK that knows IMDSv2".to_owned(),
            Self::MetadataToken => "no valid metadata token: version 1 of this service is not served; send PUT /latest/api/token first, or clear the SDK's cached token".to_owned(),
            Self::NoIdentity { caller, fix } => format!("no SPIFFE identity: this node has none for {caller}; {fix}"),
            Self::Denied(denial) => format!("{denial}; {}", denial.fix()),
            Self::Exchange(error) => error.to_string(),
            Self::Pending => CacheError::Pending.to_string(),
            Self::Full => CacheError::Full.to_string(),
            Self::TooManyRoles => CacheError::TooManyRoles.to_string(),
            Self::NotAudited => "audit record not written: this node serves no credentials without one; retry, and see the node's log if this repeats".to_owned(),
        }
    }

    /// Returns the JSON body of the answer.
    pub(super) fn body(&self, id: RequestId) -> Vec<u8> {
        let message = format!("awsvid: {}. (request {id})", self.message());
        let code = self.reason();
        let body = ErrorBody {
            code,
            message: &message,
            code_too: code,
            message_too: &message,
        };
        // Serializing strings into memory cannot fail.
        serde_json::to_vec(&body).unwrap_or_default()
    }

    /// Returns the whole answer for a head that hyper rejects, because hyper's own answer has no
    /// body.
    pub(super) fn raw_response(&self, id: RequestId) -> Vec<u8> {
        let status =
            hyper::StatusCode::from_u16(self.status()).unwrap_or(hyper::StatusCode::BAD_REQUEST);
        let body = self.body(id);
        let length = body.len();
        let mut answer = format!(
            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncache-control: no-store\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
        )
        .into_bytes();
        answer.extend(body);
        answer
    }
}

impl Denial {
    fn fix(&self) -> &'static str {
        match self.denied {
            RoleDenied::InvalidParameter(_) => "correct that parameter of the [[role]] on the node",
            RoleDenied::NoRole
            | RoleDenied::NotThisRole
            | RoleDenied::ArnNotAllowed
            | RoleDenied::SeveralIdentities => "add or widen a [[role]] on the node",
        }
    }
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.denied)?;
        let ids: Vec<_> = self.spiffe_ids.iter().map(SpiffeId::as_str).collect();
        if !ids.is_empty() {
            let shown = ids.len().min(MAX_SHOWN_SPIFFE_IDS);
            write!(f, ": it has {}", ids[..shown].join(" and "))?;
            if shown < ids.len() {
                write!(f, " and {} more SPIFFE IDs", ids.len() - shown)?;
            }
        }
        match &self.requested {
            Some(role) => write!(f, ", and requested {role}"),
            None => Ok(()),
        }
    }
}

/// Returns the status of an error that other modules classify.
fn retry_or_reject(is_transient: bool) -> u16 {
    if is_transient { 503 } else { 403 }
}

/// Describes the caller by facts that it knows itself.
fn describe(caller: &Caller) -> String {
    let unit = caller
        .peer
        .cgroup
        .as_ref()
        .and_then(|cgroup| cgroup.systemd_unit());
    match (unit, caller.facts().in_container()) {
        (_, Some(true)) => format!("uid {} in a container", caller.peer.uid),
        (Some(unit), _) => format!("uid {} in {unit}", caller.peer.uid),
        (None, _) => format!("uid {}", caller.peer.uid),
    }
}

#[cfg(test)]
mod tests;

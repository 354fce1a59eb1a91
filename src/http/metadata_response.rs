//! The answers to requests for metadata, with the statuses and bodies that SDKs understand.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use hyper::header::{ALLOW, HeaderValue};

use crate::audit::{CacheResult, OK, RequestId};
use crate::cache::CachedCredentials;
use crate::http::error_response::RequestError;
use crate::http::request::{HttpResponse, response, set_retry_after};
use crate::imds::{MetadataPath, TTL_HEADER, TokenTtl, body};
use crate::role::Role;

const TEXT: &str = "text/plain";
const JSON: &str = "application/json";

/// The answer to a request for metadata. `left` is the remaining lifetime of its metadata token.
#[derive(Debug)]
pub(super) enum MetadataAnswer {
    /// A new metadata token.
    Token { token: String, ttl: TokenTtl },
    /// A fact of the caller's first role.
    OfRole {
        role: Arc<Role>,
        fact: RoleFact,
        left: Duration,
    },
    /// The credentials of a role.
    Credentials {
        issued: Arc<CachedCredentials>,
        cache: CacheResult,
        extended: bool,
        left: Duration,
    },
}

/// A fact of a role that the configuration has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RoleFact {
    /// The name of the role.
    Name,
    /// The region of the role.
    Region,
    /// A zone of its region.
    Zone,
    /// A document with its region.
    Document,
}

impl From<MetadataPath<'_>> for RoleFact {
    fn from(path: MetadataPath<'_>) -> Self {
        match path {
            MetadataPath::Region => Self::Region,
            MetadataPath::Zone => Self::Zone,
            MetadataPath::Document => Self::Document,
            MetadataPath::Token
            | MetadataPath::RoleName
            | MetadataPath::Role { .. }
            | MetadataPath::Unknown => Self::Name,
        }
    }
}

impl MetadataAnswer {
    /// The reasons of all answers without credentials.
    pub(super) const REASONS: [&'static str; 5] =
        ["token", "role_name", "region", "zone", "document"];

    /// Returns the label in metrics and audit records.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::Token { .. } => "token",
            Self::OfRole { fact, .. } => match fact {
                RoleFact::Name => "role_name",
                RoleFact::Region => "region",
                RoleFact::Zone => "zone",
                RoleFact::Document => "document",
            },
            Self::Credentials { .. } => OK,
        }
    }

    /// Returns the answer. The name of a role ends without a line feed, because some SDKs take the
    /// whole body for the name.
    pub(super) fn response(self) -> HttpResponse {
        let (answer, seconds) = match self {
            Self::Token { token, ttl } => {
                let seconds = u64::from(ttl.seconds());
                (response(200, TEXT, Bytes::from(token)), seconds)
            }
            Self::OfRole { role, fact, left } => {
                let region = &role.sts.region;
                let (kind, body) = match fact {
                    RoleFact::Name => (TEXT, role.name.clone().into_bytes()),
                    RoleFact::Region => (TEXT, region.clone().into_bytes()),
                    // SDKs remove the last letter.
                    RoleFact::Zone => (TEXT, format!("{region}a").into_bytes()),
                    RoleFact::Document => (JSON, body::document(region)),
                };
                (response(200, kind, Bytes::from(body)), left.as_secs())
            }
            Self::Credentials {
                issued,
                extended,
                left,
                ..
            } => {
                let body = Bytes::from_owner(body::credentials(&issued, extended));
                (response(200, JSON, body), left.as_secs())
            }
        };
        let mut answer = answer;
        answer
            .headers_mut()
            .insert(TTL_HEADER, HeaderValue::from(seconds));
        answer
    }
}

/// Returns the answer to a request that fails.
pub(super) fn error_response(
    error: &RequestError,
    path: MetadataPath<'_>,
    (id, now): (RequestId, SystemTime),
) -> HttpResponse {
    let message = format!("awsvid: {}. (request {id})", message(error));
    let mut answer = match status(error, path) {
        200 => response(200, JSON, Bytes::from(body::rejection(&message, now))),
        status => response(status, TEXT, Bytes::from(message)),
    };
    set_retry_after(&mut answer, error);
    if matches!(error, RequestError::Method) {
        let methods = match path {
            MetadataPath::Token => "PUT",
            _ => "GET",
        };
        answer
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static(methods));
    }
    answer
}

/// Returns the status that SDKs understand: 404 for a caller without a role, and for credentials
/// that STS rejects 200, whose body then has the reason.
fn status(error: &RequestError, path: MetadataPath<'_>) -> u16 {
    match error {
        _ if error.is_transient() => 503,
        RequestError::Exchange(_) if matches!(path, MetadataPath::Role { .. }) => 200,
        RequestError::Caller(_)
        | RequestError::Exchange(_)
        | RequestError::NoIdentity { .. }
        | RequestError::Denied(_) => 404,
        other => other.status(),
    }
}

/// Returns the message, with the fix of this protocol.
fn message(error: &RequestError) -> String {
    match error {
        RequestError::Host => "invalid Host header: other names than that of this address are rejected because of DNS rebinding; send one Host header with it".to_owned(),
        RequestError::Proxied => "request through a proxy: awsvid would attest the proxy instead of the caller; set NO_PROXY=127.0.0.1,localhost,169.254.169.254".to_owned(),
        RequestError::Method => "method not allowed: PUT is for /latest/api/token, and GET for all else; use an SDK that knows IMDSv2".to_owned(),
        RequestError::Path => "unknown path: this service has only the credentials of a role, its region and a zone; use another source for other metadata".to_owned(),
        other => other.message(),
    }
}

#[cfg(test)]
mod tests;

//! One request for metadata, from its head to the answer.
//!
//! The order of the checks matters. Neither the rejection of a deputy nor that of a token depends
//! on the caller, so that a request without a token does not show whether it has a role.

use std::sync::Arc;
use std::time::Duration;

use hyper::header::{HeaderMap, TRANSFER_ENCODING, USER_AGENT};
use hyper::{Method, Request};
use tokio::time::timeout;

use crate::attest::Rejection;
use crate::audit::{IssuedFields, OK, Outcome, Record, RequestId};
use crate::caller::Caller;
use crate::credential_service::ServiceError;
use crate::http::connection::MetadataListener;
use crate::http::error_response::RequestError;
use crate::http::metadata_response::{self, MetadataAnswer};
use crate::http::request::HttpResponse;
use crate::http::request_validation::{HostRule, check_deputies};
use crate::http::{CredentialEndpoint, RequestHead};
use crate::imds::{Imds, MetadataPath, TOKEN_HEADER, TokenTtl};
use crate::role::RequestedRole;

/// The time that a request is held while its credentials are not there. SDKs wait a second for an
/// answer, some of them with the connect, and many try once. So do programs without a `User-Agent`.
const HOLD: Duration = Duration::from_millis(900);
/// The hold for the SDK that waits half a second for the head of an answer.
const SHORT_HOLD: Duration = Duration::from_millis(400);
/// The product in `User-Agent` of that SDK. Some programs put their own name in front of it.
const IMPATIENT_SDK: &[u8] = b"aws-sdk-go-v2/";

impl CredentialEndpoint {
    /// Answers one request for metadata, and records it.
    pub(super) async fn answer_metadata<B: hyper::body::Body>(
        &self,
        (imds, at): (&Imds, MetadataListener),
        request: &Request<B>,
        (id, caller): (RequestId, Result<Arc<Caller>, Rejection>),
        mut record: Record,
    ) -> HttpResponse {
        let head = RequestHead::of(request);
        let path = MetadataPath::parse(head.path, head.query);
        let found = self
            .find_metadata((imds, at), (&head, path), caller, &mut record)
            .await;
        let error = match found {
            Ok(answer) => {
                let released = match &answer {
                    MetadataAnswer::Credentials { issued, cache, .. } => {
                        let fields = IssuedFields {
                            access_key_id: &issued.access_key_id,
                            first_session_name: issued.first_session_name(),
                            expiration: issued.expiration,
                            cache_result: *cache,
                        };
                        record.finish(Outcome::Issued, OK, Some(fields)).await
                    }
                    other => record.finish(Outcome::Answered, other.reason(), None).await,
                };
                if released {
                    return answer.response();
                }
                RequestError::NotAudited
            }
            Err(error) => {
                self.kernel_failures.log(&error);
                record.finish(error.outcome(), error.reason(), None).await;
                error
            }
        };
        metadata_response::error_response(&error, path, (id, imds.clock.now()))
    }

    async fn find_metadata(
        &self,
        (imds, at): (&Imds, MetadataListener),
        (head, path): (&RequestHead<'_>, MetadataPath<'_>),
        caller: Result<Arc<Caller>, Rejection>,
        record: &mut Record,
    ) -> Result<MetadataAnswer, RequestError> {
        validate(head, path, at.host_rule)?;
        let now = imds.clock.now();
        if path == MetadataPath::Token {
            let ttl = TokenTtl::parse(head.headers).ok_or(RequestError::MetadataTtl)?;
            // A rejected caller gets a token too: SDKs take another status for version 1, or give
            // up without the reason that the next answer has.
            if let Ok(caller) = caller {
                self.service.start_exchange(caller, RequestedRole::Default);
            }
            let token = imds.tokens.issue(ttl, at.netns, now);
            return Ok(MetadataAnswer::Token { token, ttl });
        }
        let token = only_header(head.headers).ok_or(RequestError::MetadataToken)?;
        let left = imds.tokens.verify(token, at.netns, now);
        let left = left.ok_or(RequestError::MetadataToken)?;
        let caller = caller.map_err(|rejection| RequestError::Caller(rejection.error))?;
        let requested = match path {
            MetadataPath::Token | MetadataPath::Unknown => return Err(RequestError::Path),
            MetadataPath::Region | MetadataPath::Zone | MetadataPath::Document
                if !imds.serves_region =>
            {
                return Err(RequestError::Path);
            }
            MetadataPath::Role { name, .. } => RequestedRole::ByName(name.to_owned()),
            MetadataPath::RoleName
            | MetadataPath::Region
            | MetadataPath::Zone
            | MetadataPath::Document => RequestedRole::Default,
        };
        let held = timeout(
            hold(head.headers),
            self.metadata_of((&caller, &requested), (path, left), record),
        );
        let Ok(found) = held.await else {
            record.set_requested_role(&requested);
            // The source may still answer, and the next request finds that.
            self.service.start_exchange(caller, requested);
            return Err(RequestError::Pending);
        };
        found.map_err(|error| {
            record.set_requested_role(&requested);
            RequestError::from_service(error, &caller, &requested)
        })
    }

    /// Returns what the path has for this caller.
    async fn metadata_of(
        &self,
        (caller, requested): (&Arc<Caller>, &RequestedRole),
        (path, left): (MetadataPath<'_>, Duration),
        record: &mut Record,
    ) -> Result<MetadataAnswer, ServiceError> {
        if let MetadataPath::Role { extended, .. } = path {
            let found = self.service.credentials_for(caller, requested, record);
            let (issued, cache) = found.await?;
            return Ok(MetadataAnswer::Credentials {
                issued,
                cache,
                extended,
                left,
            });
        }
        let role = self.service.first_role(caller, record).await?;
        Ok(MetadataAnswer::OfRole {
            role,
            fact: path.into(),
            left,
        })
    }
}

/// Rejects deputies, and other methods than that of the path.
fn validate(
    head: &RequestHead<'_>,
    path: MetadataPath<'_>,
    host_rule: HostRule,
) -> Result<(), RequestError> {
    check_deputies(head, host_rule)?;
    let method = match path {
        MetadataPath::Token => Method::PUT,
        _ => Method::GET,
    };
    if *head.method != method {
        return Err(RequestError::Method);
    }
    // s3fs sends its PUT in chunks, of which there is none, and EC2's service answers it. Neither
    // reads them.
    let in_chunks = path == MetadataPath::Token && head.headers.contains_key(TRANSFER_ENCODING);
    match head.has_body && !in_chunks {
        true => Err(RequestError::Body),
        false => Ok(()),
    }
}

/// Returns the metadata token, if there is exactly one.
fn only_header(headers: &HeaderMap) -> Option<&[u8]> {
    let mut values = headers.get_all(TOKEN_HEADER).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => Some(value.as_bytes()),
        _ => None,
    }
}

/// Returns how long a request of this SDK is held.
fn hold(headers: &HeaderMap) -> Duration {
    let agent = headers.get(USER_AGENT);
    let agent = agent.map_or(&b""[..], |agent| agent.as_bytes());
    let mut products = agent.split(|byte| *byte == b' ');
    match products.any(|product| product.starts_with(IMPATIENT_SDK)) {
        true => SHORT_HOLD,
        false => HOLD,
    }
}

#[cfg(test)]
mod tests;

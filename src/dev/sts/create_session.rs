//! `CreateSession` of IAM Roles Anywhere, with real verification of the certificate and of the
//! signature.
//!
//! Wire format: IAM Roles Anywhere User Guide, "Signing process", and AWS's
//! rolesanywhere-credential-helper.

use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Request, StatusCode};
use rustls::pki_types::CertificateDer;
use serde::Deserialize;
use serde_json::json;

use super::StsState;
use super::answer::rfc3339;
use super::sessions::{Session, SessionFacts};
use crate::dev::loopback_http::{self, LoopbackResponse};
use crate::identity::{InvalidName, RoleArn, SessionName, SpiffeId, SpiffeIdPattern};
use crate::role::parameters::check_source_identity;

mod proof;

use proof::Proof;

/// Bounds of `durationSeconds`, in seconds.
const DURATION: std::ops::RangeInclusive<u64> = 900..=43_200;
/// Duration of a request without `durationSeconds`.
const DEFAULT_DURATION: u64 = 3600;

/// A trust anchor and its only profile.
#[derive(Debug, Clone)]
pub struct DevTrustAnchor {
    /// ARN of the trust anchor.
    pub arn: String,
    /// ARN of the profile.
    pub profile_arn: String,
    /// CAs of the trust anchor.
    pub certificates: Vec<CertificateDer<'static>>,
    /// `acceptRoleSessionName` of the profile.
    pub accepts_session_name: bool,
    /// The roles that the profile lists, with their trust policies.
    pub roles: Vec<CertifiedRole>,
}

/// A role that trusts IAM Roles Anywhere.
#[derive(Debug, Clone)]
pub struct CertifiedRole {
    /// ARN of the role.
    pub arn: RoleArn,
    /// The condition on `aws:PrincipalTag/x509SAN/URI`: one of these patterns.
    pub subjects: Vec<SpiffeIdPattern>,
    /// `MaxSessionDuration` of the role.
    pub max_duration: Duration,
}

/// Error response of a rejected request.
#[derive(Debug)]
struct DevSessionRejection {
    code: &'static str,
    status: StatusCode,
    message: String,
}

impl DevSessionRejection {
    fn denied(message: impl Into<String>) -> Self {
        Self {
            code: "AccessDeniedException",
            status: StatusCode::FORBIDDEN,
            message: message.into(),
        }
    }

    fn invalid(message: impl Into<String>) -> Self {
        Self {
            code: "ValidationException",
            status: StatusCode::BAD_REQUEST,
            message: message.into(),
        }
    }

    fn missing(message: impl Into<String>) -> Self {
        Self {
            code: "ResourceNotFoundException",
            status: StatusCode::NOT_FOUND,
            message: message.into(),
        }
    }

    fn response(&self) -> LoopbackResponse {
        let (code, message) = (self.code, &self.message);
        tracing::debug!(code, message, "dev: CreateSession rejected a request");
        let mut response = json_response(self.status, &json!({ "message": message }));
        response
            .headers_mut()
            .insert("x-amzn-errortype", HeaderValue::from_static(code));
        response
    }
}

fn json_response(status: StatusCode, body: &serde_json::Value) -> LoopbackResponse {
    let mut response = loopback_http::empty(status);
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    *response.body_mut() = Full::from(body.to_string());
    response
}

/// The body. The ARNs stand in it or in the query: each of AWS's own clients has its way.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct DevSessionRequest {
    duration_seconds: Option<u64>,
    role_session_name: Option<String>,
    trust_anchor_arn: Option<String>,
    profile_arn: Option<String>,
    role_arn: Option<String>,
}

impl StsState {
    /// Answers a request for a session.
    pub(super) fn create_session(&self, request: &Request<Bytes>) -> LoopbackResponse {
        match self.created_session(request) {
            Ok((session, role)) => created(&session, &role),
            Err(rejection) => rejection.response(),
        }
    }

    fn created_session(
        &self,
        request: &Request<Bytes>,
    ) -> Result<(Session, RoleArn), DevSessionRejection> {
        let now = self.clock.now();
        let query: Vec<(String, String)> =
            form_urlencoded::parse(request.uri().query().unwrap_or_default().as_bytes())
                .into_owned()
                .collect();
        let parameters: DevSessionRequest = serde_json::from_slice(request.body())
            .map_err(|_| DevSessionRejection::invalid("The body is not JSON"))?;
        let anchor = arn(&query, "trustAnchorArn", &parameters.trust_anchor_arn)?;
        let profile = arn(&query, "profileArn", &parameters.profile_arn)?;
        let role = arn(&query, "roleArn", &parameters.role_arn)?;
        let proof = Proof::of(request, &query, &self.account.region, now)?;
        let anchor = self
            .account
            .trust_anchors
            .iter()
            .find(|known| known.arn == anchor && known.profile_arn == profile)
            .ok_or_else(|| DevSessionRejection::missing("Trust anchor or profile not found"))?;
        proof.verify_chain(&anchor.certificates, now)?;
        let role = role_of(anchor, role, proof.spiffe_id())?;
        let seconds = parameters.duration_seconds.unwrap_or(DEFAULT_DURATION);
        if !DURATION.contains(&seconds) || Duration::from_secs(seconds) > role.max_duration {
            return Err(DevSessionRejection::invalid(
                "durationSeconds is outside of its bounds",
            ));
        }
        let name = session_name(&parameters, anchor, &proof)?;
        let caller = self.caller(&role.arn, &name);
        let facts = SessionFacts {
            source_identity: source_identity(&proof)?,
            ..SessionFacts::of(&role.arn)
        };
        let duration = Duration::from_secs(seconds);
        let session = self
            .sessions
            .issue(caller, facts, now, duration)
            .map_err(|error| DevSessionRejection {
                code: "InternalServerException",
                status: StatusCode::INTERNAL_SERVER_ERROR,
                message: error.to_string(),
            })?;
        self.record_accepted(proof.canonical_request);
        Ok((session, role.arn.clone()))
    }
}

/// Returns an ARN of the request, from its query or from its body.
fn arn<'a>(
    query: &'a [(String, String)],
    name: &str,
    in_body: &'a Option<String>,
) -> Result<&'a str, DevSessionRejection> {
    let in_query = query.iter().find(|(key, _)| key == name);
    in_query
        .map(|(_, value)| value)
        .or(in_body.as_ref())
        .map(String::as_str)
        .ok_or_else(|| DevSessionRejection::invalid(format!("{name} is missing")))
}

/// Returns the role if the profile lists it and the role trusts this identity. Both have the same
/// error.
fn role_of<'a>(
    anchor: &'a DevTrustAnchor,
    arn: &str,
    spiffe_id: &SpiffeId,
) -> Result<&'a CertifiedRole, DevSessionRejection> {
    let role = anchor.roles.iter().find(|role| role.arn.as_str() == arn);
    role.filter(|role| {
        let mut subjects = role.subjects.iter();
        subjects.any(|subject| subject.matches(spiffe_id))
    })
    .ok_or_else(|| DevSessionRejection::denied("Unable to assume role"))
}

/// Returns the session's name: that of the request if the profile accepts one, else the serial
/// number.
fn session_name(
    parameters: &DevSessionRequest,
    anchor: &DevTrustAnchor,
    proof: &Proof,
) -> Result<SessionName, DevSessionRejection> {
    let name = match &parameters.role_session_name {
        None => proof.serial_in_hex(),
        Some(_) if !anchor.accepts_session_name => {
            return Err(DevSessionRejection::denied(
                "Not authorized to set roleSessionName",
            ));
        }
        Some(name) => name.clone(),
    };
    SessionName::parse(&name)
        .map_err(|_| DevSessionRejection::invalid("roleSessionName is invalid"))
}

/// Returns the common name of the certificate, which is the source identity of the session and of
/// those that it starts.
fn source_identity(proof: &Proof) -> Result<Option<String>, DevSessionRejection> {
    let Some(name) = proof.common_name() else {
        return Ok(None);
    };
    match check_source_identity(name) {
        Ok(()) => Ok(Some(name.to_owned())),
        Err(InvalidName(error)) => Err(DevSessionRejection::denied(format!(
            "The common name cannot be the source identity: {error}"
        ))),
    }
}

fn created(session: &Session, role: &RoleArn) -> LoopbackResponse {
    let credentials = &session.credentials;
    let body = json!({
        "credentialSet": [{
            "assumedRoleUser": {
                "arn": session.caller.arn,
                "assumedRoleId": session.caller.user_id,
            },
            "credentials": {
                "accessKeyId": credentials.access_key_id,
                "secretAccessKey": credentials.secret_access_key.as_str(),
                "sessionToken": credentials.session_token.as_str(),
                "expiration": rfc3339(credentials.expiration),
            },
            "packedPolicySize": 0,
            "roleArn": role.as_str(),
            "sourceIdentity": session.facts.source_identity.as_deref().unwrap_or_default(),
        }],
        "subjectArn": format!("arn:aws:rolesanywhere:::subject/{}", session.caller.user_id),
    });
    json_response(StatusCode::CREATED, &body)
}

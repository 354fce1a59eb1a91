//! Responses of the STS: XML of its query protocol, for success and for each error.

use std::fmt::Write;
use std::time::SystemTime;

use http_body_util::Full;
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderValue};

use super::rejection::DevRejection;
use super::sessions::Session;
use super::token::DevTokenClaims;
use crate::credentials::Credentials;
use crate::dev::loopback_http::{self, LoopbackResponse};

const NAMESPACE: &str = "https://sts.amazonaws.com/doc/2011-06-15/";

/// Returns the response for a rejected request.
pub(super) fn rejected(rejection: &DevRejection, request_id: &str) -> LoopbackResponse {
    let (code, status) = rejection.code.wire();
    let side = if status.is_server_error() {
        "Receiver"
    } else {
        "Sender"
    };
    let message = rejection.message();
    let body = format!(
        "<ErrorResponse xmlns=\"{NAMESPACE}\"><Error><Type>{side}</Type><Code>{code}</Code><Message>{}</Message>\
         </Error><RequestId>{request_id}</RequestId></ErrorResponse>",
        escape(message)
    );
    tracing::debug!(code, message, "dev: STS rejected a request");
    xml(status, body)
}

/// Returns the credentials and the user of a session.
fn session_elements(credentials: &Credentials, session: &DevCaller) -> String {
    let fields = [
        ("AccessKeyId", credentials.access_key_id.as_str()),
        ("SecretAccessKey", credentials.secret_access_key.as_str()),
        ("SessionToken", credentials.session_token.as_str()),
        ("Expiration", &rfc3339(credentials.expiration)),
    ];
    let role = [
        ("AssumedRoleId", session.user_id.as_str()),
        ("Arn", session.arn.as_str()),
    ];
    format!(
        "<Credentials>{}</Credentials><AssumedRoleUser>{}</AssumedRoleUser>",
        elements(&fields),
        elements(&role)
    )
}

/// Returns the response of `AssumeRole`.
pub(super) fn assumed_by_session(
    session: &Session,
    packed_percent: usize,
    request_id: &str,
) -> LoopbackResponse {
    let packed = packed_percent.to_string();
    let mut rest = vec![("PackedPolicySize", packed.as_str())];
    let source = session.facts.source_identity.as_deref();
    rest.extend(source.map(|source| ("SourceIdentity", source)));
    let session = session_elements(&session.credentials, &session.caller);
    let result = format!("{session}{}", elements(&rest));
    success("AssumeRole", &result, request_id)
}

/// Returns the response of `AssumeRoleWithWebIdentity`.
pub(super) fn assumed(
    credentials: &Credentials,
    session: &DevCaller,
    claims: &DevTokenClaims,
    request_id: &str,
) -> LoopbackResponse {
    let rest = [
        ("SubjectFromWebIdentityToken", claims.sub.as_str()),
        ("Audience", claims.audience.as_str()),
        ("Provider", claims.issuer.as_str()),
    ];
    let session = session_elements(credentials, session);
    let result = format!("{session}{}", elements(&rest));
    success("AssumeRoleWithWebIdentity", &result, request_id)
}

/// Identity of a session, as `GetCallerIdentity` returns it.
#[derive(Debug, Clone)]
pub(super) struct DevCaller {
    /// ARN of the session: `arn:aws:sts::<account>:assumed-role/<role>/<session>`.
    pub(super) arn: String,
    /// User id of the session: `AROA...:<session>`.
    pub(super) user_id: String,
    pub(super) account: String,
}

/// Returns the response of `GetCallerIdentity`.
pub(super) fn identity(caller: &DevCaller, request_id: &str) -> LoopbackResponse {
    let fields = [
        ("Arn", caller.arn.as_str()),
        ("UserId", &caller.user_id),
        ("Account", &caller.account),
    ];
    success("GetCallerIdentity", &elements(&fields), request_id)
}

fn success(action: &str, result: &str, request_id: &str) -> LoopbackResponse {
    let body = format!(
        "<{action}Response xmlns=\"{NAMESPACE}\"><{action}Result>{result}</{action}Result>\
         <ResponseMetadata><RequestId>{request_id}</RequestId></ResponseMetadata></{action}Response>"
    );
    xml(StatusCode::OK, body)
}

fn xml(status: StatusCode, body: String) -> LoopbackResponse {
    let mut response = loopback_http::empty(status);
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("text/xml"));
    *response.body_mut() = Full::from(body);
    response
}

fn elements(fields: &[(&str, &str)]) -> String {
    fields.iter().fold(String::new(), |mut xml, (name, value)| {
        // Writing to memory cannot fail.
        let _ = write!(xml, "<{name}>{}</{name}>", escape(value));
        xml
    })
}

/// Escapes text as XML 1.0 character data. Characters that XML cannot contain become U+FFFD.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\n' | '\t' => escaped.push(character),
            '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            control if control.is_control() => escaped.push('\u{fffd}'),
            other => escaped.push(other),
        }
    }
    escaped
}

pub(super) fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

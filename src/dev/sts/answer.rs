//! How STS writes: XML of its query protocol, for success and for each refusal.

use std::fmt::Write;
use std::time::SystemTime;

use http_body_util::Full;
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderValue};

use super::token::Claims;
use crate::credentials::Credentials;
use crate::dev::loopback::{self, Answer};

const NAMESPACE: &str = "https://sts.amazonaws.com/doc/2011-06-15/";
/// Of a value that a message repeats.
const QUOTED_LENGTH: usize = 128;

/// The codes that this STS refuses with; `code()` is what stands on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    /// The trust policy does not let this token in, or there is no such role.
    AccessDenied,
    /// The credentials that signed the request have expired.
    ExpiredToken,
    /// The web identity token has expired.
    ExpiredWebIdentity,
    /// A signature that can't be read.
    IncompleteSignature,
    /// Something failed here.
    InternalFailure,
    /// No such action.
    InvalidAction,
    /// An access key that was never issued, or not with this session token.
    InvalidClientTokenId,
    /// The web identity token is not one of the provider's for this audience.
    InvalidIdentityToken,
    /// A session policy that is none.
    MalformedPolicyDocument,
    /// No signature.
    MissingAuthenticationToken,
    /// Another signature than signing again gives.
    SignatureDoesNotMatch,
    /// A parameter is missing or out of its bounds.
    ValidationError,
}

impl Code {
    /// `<Code>` and the HTTP status, as STS pairs them.
    fn wire(self) -> (&'static str, StatusCode) {
        match self {
            Self::AccessDenied => ("AccessDenied", StatusCode::FORBIDDEN),
            Self::ExpiredToken => ("ExpiredToken", StatusCode::FORBIDDEN),
            Self::ExpiredWebIdentity => ("ExpiredTokenException", StatusCode::BAD_REQUEST),
            Self::IncompleteSignature => ("IncompleteSignature", StatusCode::BAD_REQUEST),
            Self::InternalFailure => ("InternalFailure", StatusCode::INTERNAL_SERVER_ERROR),
            Self::InvalidAction => ("InvalidAction", StatusCode::BAD_REQUEST),
            Self::InvalidClientTokenId => ("InvalidClientTokenId", StatusCode::FORBIDDEN),
            Self::InvalidIdentityToken => ("InvalidIdentityToken", StatusCode::BAD_REQUEST),
            Self::MalformedPolicyDocument => ("MalformedPolicyDocument", StatusCode::BAD_REQUEST),
            Self::MissingAuthenticationToken => ("MissingAuthenticationToken", StatusCode::FORBIDDEN),
            Self::SignatureDoesNotMatch => ("SignatureDoesNotMatch", StatusCode::FORBIDDEN),
            Self::ValidationError => ("ValidationError", StatusCode::BAD_REQUEST),
        }
    }
}

/// A refusal; its message never holds a token or a secret.
#[derive(Debug)]
pub(super) struct Refusal {
    code: Code,
    message: String,
}

impl Refusal {
    pub(super) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// A parameter that breaks a constraint, in the words of AWS's own validation.
    pub(super) fn parameter(name: &str, value: Option<&str>, constraint: &str) -> Self {
        let value = match value {
            Some(value) => format!("'{}'", value.chars().take(QUOTED_LENGTH).collect::<String>()),
            None => "null".to_owned(),
        };
        let message = format!(
            "1 validation error detected: Value {value} at '{name}' failed to satisfy constraint: Member must {constraint}"
        );
        Self::new(Code::ValidationError, message)
    }

    pub(super) fn internal(error: &impl std::error::Error) -> Self {
        Self::new(Code::InternalFailure, error.to_string())
    }

    /// As it goes out.
    pub(super) fn answer(&self, request_id: &str) -> Answer {
        let (code, status) = self.code.wire();
        let side = if status.is_server_error() { "Receiver" } else { "Sender" };
        let body = format!(
            "<ErrorResponse xmlns=\"{NAMESPACE}\"><Error><Type>{side}</Type><Code>{code}</Code><Message>{}</Message>\
             </Error><RequestId>{request_id}</RequestId></ErrorResponse>",
            escape(&self.message)
        );
        tracing::debug!(code, message = self.message, "dev: STS refused");
        xml(status, body)
    }
}

/// What `AssumeRoleWithWebIdentity` gives.
pub(super) fn assumed(credentials: &Credentials, session: &Caller, claims: &Claims, request_id: &str) -> Answer {
    let fields = [
        ("AccessKeyId", credentials.access_key_id.as_str()),
        ("SecretAccessKey", credentials.secret_access_key.as_str()),
        ("SessionToken", credentials.session_token.as_str()),
        ("Expiration", &rfc3339(credentials.expiration)),
    ];
    let role = [("AssumedRoleId", session.user_id.as_str()), ("Arn", session.arn.as_str())];
    let rest = [
        ("SubjectFromWebIdentityToken", claims.sub.as_str()),
        ("Audience", claims.audience.as_str()),
        ("Provider", claims.issuer.as_str()),
    ];
    let result = format!(
        "<Credentials>{}</Credentials><AssumedRoleUser>{}</AssumedRoleUser>{}",
        elements(&fields),
        elements(&role),
        elements(&rest)
    );
    success("AssumeRoleWithWebIdentity", &result, request_id)
}

/// Who a session is, as `GetCallerIdentity` shows it.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    /// `arn:aws:sts::<account>:assumed-role/<role>/<session>`.
    pub(super) arn: String,
    /// `AROA...:<session>`.
    pub(super) user_id: String,
    /// The account's number.
    pub(super) account: String,
}

/// What `GetCallerIdentity` gives.
pub(super) fn identity(caller: &Caller, request_id: &str) -> Answer {
    let fields = [("Arn", caller.arn.as_str()), ("UserId", &caller.user_id), ("Account", &caller.account)];
    success("GetCallerIdentity", &elements(&fields), request_id)
}

fn success(action: &str, result: &str, request_id: &str) -> Answer {
    let body = format!(
        "<{action}Response xmlns=\"{NAMESPACE}\"><{action}Result>{result}</{action}Result>\
         <ResponseMetadata><RequestId>{request_id}</RequestId></ResponseMetadata></{action}Response>"
    );
    xml(StatusCode::OK, body)
}

fn xml(status: StatusCode, body: String) -> Answer {
    let mut response = loopback::empty(status);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/xml"));
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

/// Text as XML 1.0 character data; what XML can't hold at all becomes U+FFFD.
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

fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

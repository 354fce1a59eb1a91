//! Why this STS refuses, in the codes and words of AWS's.

use hyper::StatusCode;

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
    pub(super) fn wire(self) -> (&'static str, StatusCode) {
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
            Self::MissingAuthenticationToken => {
                ("MissingAuthenticationToken", StatusCode::FORBIDDEN)
            }
            Self::SignatureDoesNotMatch => ("SignatureDoesNotMatch", StatusCode::FORBIDDEN),
            Self::ValidationError => ("ValidationError", StatusCode::BAD_REQUEST),
        }
    }
}

/// A refusal; its message never holds a token or a secret.
#[derive(Debug)]
pub(super) struct DevRefusal {
    pub(super) code: Code,
    message: String,
}

impl DevRefusal {
    pub(super) fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// A parameter that breaks a constraint, in the words of AWS's own validation.
    pub(super) fn parameter(name: &str, value: Option<&str>, constraint: &str) -> Self {
        let value = match value {
            Some(value) => format!(
                "'{}'",
                value.chars().take(QUOTED_LENGTH).collect::<String>()
            ),
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

    pub(super) fn message(&self) -> &str {
        &self.message
    }
}

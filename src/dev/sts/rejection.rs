//! Errors of this STS, with the codes and messages of AWS's.

use hyper::StatusCode;

/// Maximum length of a value that a message repeats, in characters.
const MAX_QUOTED_LENGTH: usize = 128;

/// Error codes of this STS. `wire()` returns them as they are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    /// The trust policy does not admit this token, or the role does not exist.
    AccessDenied,
    /// The credentials that signed the request have expired.
    ExpiredToken,
    /// The web identity token has expired.
    ExpiredWebIdentity,
    /// The signature cannot be parsed.
    IncompleteSignature,
    /// An operation of this STS failed.
    InternalFailure,
    /// The action does not exist.
    InvalidAction,
    /// The access key was never issued, or not with this session token.
    InvalidClientTokenId,
    /// A parameter contradicts another one, or the calling session.
    InvalidParameterValue,
    /// The web identity token is not one of the provider's for this audience.
    InvalidIdentityToken,
    /// The session policy is not a policy.
    MalformedPolicyDocument,
    /// The request has no signature.
    MissingAuthenticationToken,
    /// Session policies and tags together are too large.
    PackedPolicyTooLarge,
    /// Signing the request again gives another signature.
    SignatureDoesNotMatch,
    /// A parameter is missing or out of its bounds.
    ValidationError,
}

impl Code {
    /// Returns `<Code>` and the HTTP status, paired as in STS.
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
            Self::InvalidParameterValue => ("InvalidParameterValue", StatusCode::BAD_REQUEST),
            Self::PackedPolicyTooLarge => ("PackedPolicyTooLarge", StatusCode::BAD_REQUEST),
            Self::MalformedPolicyDocument => ("MalformedPolicyDocument", StatusCode::BAD_REQUEST),
            Self::MissingAuthenticationToken => {
                ("MissingAuthenticationToken", StatusCode::FORBIDDEN)
            }
            Self::SignatureDoesNotMatch => ("SignatureDoesNotMatch", StatusCode::FORBIDDEN),
            Self::ValidationError => ("ValidationError", StatusCode::BAD_REQUEST),
        }
    }
}

/// An error response. Its message never contains a token or a secret.
#[derive(Debug)]
pub(super) struct DevRejection {
    pub(super) code: Code,
    message: String,
}

impl DevRejection {
    pub(super) fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// Returns the error for a parameter that breaks a constraint, with the text of AWS's own
    /// validation.
    pub(super) fn parameter(name: &str, value: Option<&str>, constraint: &str) -> Self {
        let value = match value {
            Some(value) => format!(
                "'{}'",
                value.chars().take(MAX_QUOTED_LENGTH).collect::<String>()
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

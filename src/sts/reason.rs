//! The reasons of failed STS calls.

/// Reason why STS returned no credentials, as metrics and audit records have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StsReason {
    /// The trust policy of the role rejects the token.
    AccessDenied,
    /// The response is not readable, or its credentials are not usable.
    BadAnswer,
    /// A session policy is invalid or too large.
    BadPolicy,
    /// A parameter of the call is invalid.
    BadRequest,
    /// Too many other calls are waiting.
    Busy,
    /// STS takes the token for expired.
    ExpiredToken,
    /// STS does not accept the token's issuer, key, audience or claims.
    InvalidToken,
    /// STS cannot fetch the issuer's keys.
    IssuerUnreachable,
    /// The endpoint or the region is wrong, or the server is not an STS.
    Misconfigured,
    /// There are no certificates to verify the server with.
    NoCa,
    /// An unknown server or code rejects the call.
    Refused,
    /// STS is not active in the region.
    RegionDisabled,
    /// STS limits the rate of calls.
    Throttled,
    /// STS has an internal error.
    Unavailable,
    /// STS did not respond.
    Unreachable,
}

impl StsReason {
    /// Returns the label in metrics and audit records.
    pub fn label(self) -> &'static str {
        match self {
            Self::AccessDenied => "sts_access_denied",
            Self::BadAnswer => "sts_bad_answer",
            Self::BadPolicy => "sts_bad_policy",
            Self::BadRequest => "sts_bad_request",
            Self::Busy => "sts_busy",
            Self::ExpiredToken => "sts_expired_token",
            Self::InvalidToken => "sts_invalid_token",
            Self::IssuerUnreachable => "sts_issuer_unreachable",
            Self::Misconfigured => "sts_misconfigured",
            Self::NoCa => "sts_no_ca",
            Self::Refused => "sts_refused",
            Self::RegionDisabled => "sts_region_disabled",
            Self::Throttled => "sts_throttled",
            Self::Unavailable => "sts_unavailable",
            Self::Unreachable => "sts_unreachable",
        }
    }
}

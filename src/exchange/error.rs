//! Reasons why an exchange failed.

use std::mem::discriminant;

use thiserror::Error;

use crate::caller::AttestError;
use crate::identity::RoleArn;
use crate::role::Grant;
use crate::sts::{RetryPolicy, StsError, StsReason};
use crate::svid::{BadToken, SourceError};

/// Reason why an exchange failed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ExchangeError {
    /// The source returned no usable token.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// STS returned no credentials for the token.
    #[error(transparent)]
    Sts(#[from] StsError),
    /// This SPIFFE ID has started too many exchanges in a short time, or has too many calls that
    /// wait.
    #[error("too many exchanges for this workload; retry in a few seconds, and for fewer roles")]
    TooOften,
    /// The credentials expire too soon to be served.
    #[error(
        "STS returned credentials that expire within a minute; compare this node's clock with STS's, and \
         raise the JWT-SVID lifetime if this STS ends sessions with the token"
    )]
    TooShort,
    /// A part of the daemon or a library panicked. The panic itself is in the log.
    #[error("exchange ended by an internal error; see the panic in awsvid's log")]
    Panicked,
    /// A session of the chain failed.
    #[error("hop {hop} ({role_arn}): {error}")]
    Hop {
        /// Number of the session in its chain, from 1.
        hop: usize,
        /// ARN of the role of that session.
        role_arn: RoleArn,
        /// The failure of that session.
        error: Box<ExchangeError>,
    },
}

impl ExchangeError {
    /// Returns an error of each kind, for their labels.
    pub fn samples() -> Vec<Self> {
        let callers = AttestError::ALL.map(|error| Self::Source(SourceError::Caller(error)));
        let sources = SourceError::samples().into_iter().map(Self::Source);
        let sts = StsError::samples().into_iter().map(Self::Sts);
        let own = [Self::TooOften, Self::TooShort, Self::Panicked];
        sources.chain(callers).chain(sts).chain(own).collect()
    }

    /// Returns the error with the number of the session that failed, if it is one of a chain.
    pub fn at_hop(self, grant: &Grant) -> Self {
        if !grant.is_chained() || matches!(self, Self::Hop { .. }) {
            return self;
        }
        Self::Hop {
            hop: grant.hop_number(),
            role_arn: grant.issued_role_arn().clone(),
            error: Box::new(self),
        }
    }

    /// Returns the failure of the session itself, without its number.
    pub fn cause(&self) -> &Self {
        match self {
            Self::Hop { error, .. } => error.cause(),
            error => error,
        }
    }

    /// Returns the number of the session that failed, if it is one of a chain.
    fn hop(&self) -> Option<usize> {
        match self {
            Self::Hop { hop, .. } => Some(*hop),
            _ => None,
        }
    }

    /// Returns true if the failure may pass by itself: an outage or a rate limit, not a rejection.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Hop { error, .. } => error.is_transient(),
            Self::Source(error) => error.is_transient(),
            Self::Sts(error) => match error.retry {
                RetryPolicy::Later => true,
                // The exchange has already retried with a new token.
                RetryPolicy::NewToken | RetryPolicy::Never => false,
            },
            Self::TooOften | Self::TooShort | Self::Panicked => true,
        }
    }

    /// Returns true if the token or STS was not available, so that another exchange may succeed. A
    /// rejection is not such a failure, and neither is a limit of this node.
    pub(super) fn is_outage_of_tokens(&self) -> bool {
        match self {
            Self::Source(
                SourceError::Unavailable(_) | SourceError::BadToken(BadToken::Expiring(_)),
            ) => true,
            Self::Sts(error) => {
                error.retry == RetryPolicy::Later && error.reason != StsReason::Busy
            }
            Self::Source(_)
            | Self::TooOften
            | Self::TooShort
            | Self::Panicked
            | Self::Hop { .. } => false,
        }
    }

    /// Returns whether both are failures of one kind, whatever their texts.
    pub fn is_same_kind(&self, other: &Self) -> bool {
        if self.hop() != other.hop() {
            return false;
        }
        match (self.cause(), other.cause()) {
            (Self::Source(one), Self::Source(other)) => discriminant(one) == discriminant(other),
            (Self::Sts(one), Self::Sts(other)) => one.reason == other.reason,
            (one, other) => discriminant(one) == discriminant(other),
        }
    }

    /// Returns the label in metrics and audit records.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Source(error) => error.reason(),
            Self::Sts(error) => error.reason.label(),
            Self::TooOften => "too_many_exchanges",
            Self::TooShort => StsReason::BadAnswer.label(),
            Self::Panicked => "internal_error",
            Self::Hop { error, .. } => error.reason(),
        }
    }

    /// Returns whether STS does not accept the credentials that signed the call, or the session
    /// that they belong to.
    pub fn rejects_previous_session(&self) -> bool {
        let Self::Sts(error) = self.cause() else {
            return false;
        };
        error.retry == RetryPolicy::NewToken || error.reason == StsReason::AccessDenied
    }

    /// Returns whether STS does not permit the call.
    pub fn is_access_denied(&self) -> bool {
        matches!(self.cause(), Self::Sts(error) if error.reason == StsReason::AccessDenied)
    }
}

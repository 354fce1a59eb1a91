//! Identity sources: which SPIFFE ID a caller has, and the JWT-SVID that proves it.
//!
//! [`workload_api`] asks any SPIFFE provider for the identities that the daemon itself is registered for, by its own
//! `[[workload]]` rules. [`jwt`] is the check that every token goes through, whoever gave it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use thiserror::Error;

use crate::caller::{AttestError, Caller, ProcessFacts};
use crate::endpoint::Endpoint;
use crate::health::LastError;
use crate::identity::SpiffeId;
use crate::role::Identity;
use crate::rule::NamedRule;

pub mod agent;
pub mod attesting;
pub mod broker_api;
pub mod delegated;
mod dial;
pub mod jwt;
mod log_limit;
mod memory;
pub mod own;
pub mod proto;
pub mod workload_api;

pub use attesting::AgentSource;
pub use delegated::SpireDelegated;
pub(crate) use dial::unreachable as agent_unreachable;
pub use jwt::{BadToken, JwtSvid, TTL_FIX};
pub use workload_api::WorkloadApi;

/// SPIRE's agent itself waits up to 30 s for its server, and then still answers with a token from its cache; in Kubernetes it
/// waits as long for a container to be told of.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(35);

/// Somebody who knows which identities the workloads of this node have.
#[async_trait]
pub trait IdentitySource: Send + Sync + fmt::Debug {
    /// The identities of `caller`; none if the source has none for it, which is an answer, not an error.
    async fn identify(&self, caller: &Arc<Caller>) -> Result<Vec<Identity>, SourceError>;

    /// A JWT-SVID of `caller` for the identity `id`, meant for `audience` alone, checked by [`JwtSvid::check`].
    async fn token(
        &self,
        caller: &Arc<Caller>,
        id: &SpiffeId,
        audience: &str,
    ) -> Result<JwtSvid, SourceError>;

    /// What has to be known of this caller's process to identify it; `None` if what is known is enough.
    fn facts_needed(&self, caller: &Caller) -> Option<ProcessFacts>;

    /// On what it rests that a caller has the identity `id`. Two sources for which that is equal give it to the same
    /// callers, so what was issued by the one may be handed out by the other.
    fn basis(&self, id: &SpiffeId) -> IdentityBasis;

    /// Whether the source answers, and knows this daemon; a token is asked for with this `audience`.
    async fn ready(&self, audience: &str) -> Result<(), SourceError>;

    /// Whether tokens are given only for a caller that lives. Then the cache remembers the latest caller of each identity,
    /// to renew its credentials with; else it keeps none, and passes [`Caller::synthetic`] when it renews.
    fn requires_live_caller(&self) -> bool {
        true
    }
}

/// See [`IdentitySource::basis`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdentityBasis {
    /// These rules of the configuration; without any, nobody has the identity.
    Rules(Vec<NamedRule>),
    /// What is registered at this agent.
    Agent(Endpoint),
}

/// Why a source gave no identity or no token. What the caller of the source has to do decides the variant; the text is
/// for operators and never holds a token.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SourceError {
    /// The source says no. Registrations spread slowly, and a part of the source that fails for a moment looks the
    /// same, so ask again, with backoff, and never remember it for more than seconds.
    #[error("{0}")]
    Denied(String),
    /// The source did not answer, or can't now. Ask again, with backoff.
    #[error("{0}")]
    Unavailable(String),
    /// The source will never answer this request. Asking again is of no use; somebody has to change something.
    #[error("{0}")]
    Misconfigured(String),
    /// The process that the source was to be asked about is gone, has changed, or must not be named to it. Another caller
    /// of the same identity may still get a token.
    #[error(transparent)]
    Caller(#[from] AttestError),
    /// More is asked of the source than it can do. Ask again in a moment.
    #[error(
        "more new processes ask for credentials than the SPIFFE agent can attest; ask again in a moment"
    )]
    Busy,
    /// What the decision depends on is not known of this caller, since the rules were others when it was attested. Another
    /// connection will do.
    #[error("the configuration was reloaded after this connection was made")]
    Reloaded,
    /// The decision depends on a user or group whose number is not known.
    #[error(
        "the name service of this node has not given the number of a user or group that a [[workload]] rule names; retry"
    )]
    UnknownAccount,
    /// The source gave a token that must not be used.
    #[error("the identity source gave a token that cannot be used: {0}")]
    BadToken(#[from] BadToken),
}

impl SourceError {
    /// For [`crate::health`]. What is about one caller is nothing of the source's.
    fn of_source<T>(result: &Result<T, Self>) -> Option<LastError> {
        let error = result.as_ref().err()?;
        Some(LastError {
            text: error.to_string(),
            reason: error.reason(),
            outage: error.is_outage(),
        })
    }

    /// Returns whether the error concerns all callers, and not one of them.
    pub fn is_outage(&self) -> bool {
        matches!(
            self,
            Self::Unavailable(_) | Self::Misconfigured(_) | Self::Busy
        )
    }

    /// Returns an error of each kind but [`SourceError::Caller`], for their labels.
    pub fn samples() -> Vec<Self> {
        let text = String::new;
        vec![
            Self::Denied(text()),
            Self::Unavailable(text()),
            Self::Misconfigured(text()),
            Self::Busy,
            Self::Reloaded,
            Self::UnknownAccount,
            Self::BadToken(BadToken::Expiring(text())),
            Self::BadToken(BadToken::Wrong(text())),
        ]
    }

    /// Whether it may pass without anybody doing anything, so that credentials issued before are still right.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unavailable(_)
            | Self::Caller(_)
            | Self::Busy
            | Self::Reloaded
            | Self::UnknownAccount => true,
            // Agents answer from their cache while their server is down, until the second that the token expires.
            Self::BadToken(bad) => matches!(bad, BadToken::Expiring(_)),
            Self::Denied(_) | Self::Misconfigured(_) => false,
        }
    }

    /// The label in metrics and audit records.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Denied(_) => "source_denied",
            Self::Unavailable(_) => "source_unavailable",
            Self::Misconfigured(_) => "source_misconfigured",
            Self::Caller(refusal) => refusal.reason(),
            Self::Busy => "source_busy",
            Self::Reloaded => "reloaded",
            Self::UnknownAccount => "unknown_account",
            Self::BadToken(_) => "bad_token",
        }
    }
}

/// Somebody else's words, fit for one line of a log: no control characters, at most 300 characters.
pub(crate) fn one_line(text: &str) -> String {
    const MAX_MESSAGE_CHARS: usize = 300;
    let mut line: String = text
        .chars()
        .take(MAX_MESSAGE_CHARS)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if text.chars().count() > MAX_MESSAGE_CHARS {
        line.push_str("...");
    }
    line.trim().to_owned()
}

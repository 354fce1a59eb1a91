//! Identity sources: the SPIFFE IDs of a caller, and the SVIDs that prove them.
//!
//! [`workload_api`] fetches the identities of the daemon itself from any SPIFFE provider, and
//! assigns them to callers by `[[workload]]` rules. [`spire_delegated`] and [`spiffe_broker`] query
//! an agent that attests the caller. [`agent_source`] caches and revalidates its replies. [`jwt`]
//! checks every token, and [`X509Svid`] every certificate, from every source.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use thiserror::Error;

use crate::caller::{AttestError, Caller, CallerFacts, ProcessFacts};
use crate::identity::SpiffeId;
use crate::limits::KeyedLogQuota;
use crate::role::Identity;
use crate::socket_endpoint::Endpoint;
use crate::upstream_status::LastError;
use crate::workload_rule::NamedRule;

pub mod agent;
pub mod agent_source;
mod certificate_text;
mod channel;
mod identity_cache;
pub mod jwt;
pub mod own_svid;
pub mod proto;
pub mod spiffe_broker;
pub mod spire_delegated;
pub mod workload_api;
mod x509;

#[cfg(any(test, fuzzing))]
pub(crate) use own_svid::fuzzing;

pub use agent_source::AgentSource;
pub(crate) use certificate_text::{certificate_text, connection_text};
pub(crate) use channel::unreachable as agent_unreachable;
pub use jwt::{BadToken, JwtSvid, TTL_FIX};
pub use spire_delegated::SpireDelegated;
pub use workload_api::WorkloadApi;
pub use x509::{ReceivedX509Svid, X509Svid};

/// Timeout of one call to an agent. SPIRE's agent waits up to 30 s for its server, and then still
/// sends a cached token. In Kubernetes it waits as long for the kubelet to report a container.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(35);
/// A denial counts as final when a second one follows at least this much later with no success in
/// between. A single one may be a registration entry that has not spread yet, or an attestor that
/// failed for a moment.
pub(crate) const DENIAL_CONFIRMATION: Duration = Duration::from_secs(10);

/// Minimum interval between two log lines with the same text.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Distinct texts within [`LOG_INTERVAL`]. Further ones are not logged.
const MAX_LOGGED_TEXTS: usize = 64;

/// Returns the limit of a source's log lines.
fn log_quota() -> KeyedLogQuota {
    KeyedLogQuota::new(MAX_LOGGED_TEXTS, LOG_INTERVAL)
}

/// Source of the identities that the workloads of this node have.
#[async_trait]
pub trait IdentitySource: Send + Sync + fmt::Debug {
    /// Returns the identities of `caller`. An empty list is a valid result: the source has none for
    /// it.
    async fn identify(&self, caller: &Arc<Caller>) -> Result<Vec<Identity>, SourceError>;

    /// Returns a JWT-SVID of `caller` for `id` and `audience` alone, checked by [`JwtSvid::check`].
    async fn token(
        &self,
        caller: &Arc<Caller>,
        id: &SpiffeId,
        audience: &str,
    ) -> Result<JwtSvid, SourceError>;

    /// Returns the X.509-SVID of `caller` for `id`, with its key, checked by [`X509Svid::check`].
    /// Only roles that are assumed by a certificate need it.
    async fn x509_svid(
        &self,
        _caller: &Arc<Caller>,
        _id: &SpiffeId,
    ) -> Result<X509Svid, SourceError> {
        Err(SourceError::Misconfigured(
            "this identity source does not have X.509-SVIDs".to_owned(),
        ))
    }

    /// Returns the process facts that `identify` needs. `None` means that the known facts suffice.
    fn facts_needed(&self, caller: CallerFacts<'_>) -> Option<ProcessFacts>;

    /// Returns the basis on which callers have the identity `id`. Two sources with equal bases give
    /// it to the same callers. So credentials of the one may be served by the other.
    fn basis(&self, id: &SpiffeId) -> IdentityBasis;

    /// Returns the way to give a caller its first identity, as an imperative.
    fn identity_fix(&self) -> &'static str {
        "add a registration entry for it at the SPIFFE provider"
    }

    /// Checks that the source responds and knows this daemon, by a token for `audience`.
    async fn ready(&self, audience: &str) -> Result<(), SourceError>;

    /// Returns true if tokens need a caller that is alive. Then the cache keeps the latest caller
    /// of each identity for refreshes. Otherwise it keeps none, and refreshes with
    /// [`Caller::synthetic`].
    fn requires_live_caller(&self) -> bool {
        true
    }
}

/// Basis of an identity; see [`IdentitySource::basis`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdentityBasis {
    /// These rules of the configuration. With an empty list no caller has the identity.
    Rules(Vec<NamedRule>),
    /// The registration entries of this agent.
    Agent(Endpoint),
}

/// Reason why a source returned no identity or no token. The variants differ in what the caller of
/// the source does next. The text is for operators and never holds a token.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SourceError {
    /// The source denies it. Registration entries spread slowly, and a part of the source that
    /// fails for a moment causes the same reply. So retry with backoff, and cache it for seconds at
    /// most.
    #[error("{0}")]
    Denied(String),
    /// The source did not respond, or cannot now. Retry with backoff.
    #[error("{0}")]
    Unavailable(String),
    /// The source can never serve this request. A retry is useless until an operator changes
    /// something.
    #[error("{0}")]
    Misconfigured(String),
    /// The caller's process is gone, has changed, or must not be named to the source. Another
    /// caller of the same identity may still get a token.
    #[error(transparent)]
    Caller(#[from] AttestError),
    /// The source is at its limit of queries. Retry in a moment.
    #[error(
        "more new processes request credentials than the SPIFFE agent can attest; retry in a moment"
    )]
    Busy,
    /// A fact that the decision needs is unknown, since other rules applied when the caller was
    /// attested. A new connection succeeds.
    #[error("the configuration was reloaded after this connection was made")]
    Reloaded,
    /// The decision needs the number of a user or group, which is not known.
    #[error(
        "the name service of this node has not given the number of a user or group that a [[workload]] rule names; retry"
    )]
    UnknownAccount,
    /// The query panicked. The cause is a defect of awsvid, and not the state of the source.
    #[error("query ended by an internal error; see the panic in awsvid's log")]
    Panicked,
    /// The source returned an SVID that must not be used.
    #[error("the identity source gave an SVID that cannot be used: {0}")]
    BadToken(#[from] BadToken),
}

impl SourceError {
    /// Returns the error for [`crate::upstream_status`]. Errors that concern one caller are not an
    /// outage.
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
        match self {
            Self::Unavailable(_) | Self::Misconfigured(_) | Self::Busy => true,
            Self::Denied(_)
            | Self::Caller(_)
            | Self::Reloaded
            | Self::UnknownAccount
            | Self::Panicked
            | Self::BadToken(_) => false,
        }
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
            Self::Panicked,
            Self::BadToken(BadToken::Expiring(text())),
            Self::BadToken(BadToken::Wrong(text())),
        ]
    }

    /// Returns true if the failure may pass by itself, so that cached credentials are still right.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unavailable(_)
            | Self::Caller(_)
            | Self::Busy
            | Self::Reloaded
            | Self::UnknownAccount
            | Self::Panicked
            // While their server is down, agents reply from their cache until the second that the
            // token expires.
            | Self::BadToken(BadToken::Expiring(_)) => true,
            Self::Denied(_) | Self::Misconfigured(_) | Self::BadToken(BadToken::Wrong(_)) => false,
        }
    }

    /// Returns the label in metrics and audit records.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Denied(_) => "source_denied",
            Self::Unavailable(_) => "source_unavailable",
            Self::Misconfigured(_) => "source_misconfigured",
            Self::Caller(error) => error.reason(),
            Self::Busy => "source_busy",
            Self::Reloaded => "reloaded",
            Self::UnknownAccount => "unknown_account",
            Self::Panicked => "internal_error",
            Self::BadToken(_) => "bad_token",
        }
    }
}

/// Returns the SVID that expires last of those that passed their check, or `None` without one. If
/// none passed, the error is that of the first.
fn last_to_expire<T>(
    checked: impl IntoIterator<Item = Result<T, BadToken>>,
    expires: impl Fn(&T) -> SystemTime,
) -> Result<Option<T>, BadToken> {
    let mut best: Option<Result<T, BadToken>> = None;
    for svid in checked {
        best = match (best, svid) {
            (None, svid) => Some(svid),
            (Some(Ok(best)), Ok(other)) if expires(&best) < expires(&other) => Some(Ok(other)),
            (Some(Err(_)), Ok(other)) => Some(Ok(other)),
            (best, _) => best,
        };
    }
    best.transpose()
}

/// Returns a field of an agent's message, which is empty where the agent has no value.
fn non_empty(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

/// Converts text of another program to one log line: no control characters, at most 300 characters.
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

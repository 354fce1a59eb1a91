//! What a failure means: for how long it is remembered, when the next try is due, and what it says of what is there.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use crate::exchange::ExchangeError;
use crate::svid::SourceError;

/// Waits between tries to refresh double from this ...
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
/// ... to this, in as many steps. Each is jittered by half of it.
const BACKOFF_STEPS: u32 = 6;
/// Two denials of the source this far apart, without a success in between, are its last word: one alone may be a
/// registration that has not spread yet, or a part of the source that has just started.
pub(super) const DENIAL_CONFIRMATION: Duration = Duration::from_secs(10);

/// What a failure says about credentials that were issued before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FailureKind {
    /// Nothing: an outage, or too many calls.
    Outage,
    /// Nothing, but without another caller there is no use in trying.
    CallerGone,
    /// That the source does not give this identity to the caller any more.
    Denied,
    /// That they would not be issued now: STS refuses, or the source's answer can't be used.
    Refused,
}

impl FailureKind {
    pub(super) fn of(error: &ExchangeError) -> Self {
        match error {
            ExchangeError::Source(SourceError::Caller(_)) => Self::CallerGone,
            ExchangeError::Source(SourceError::Denied(_)) => Self::Denied,
            error if error.is_transient() => Self::Outage,
            _ => Self::Refused,
        }
    }
}

/// **The** table of how long a failure is remembered where nothing is cached. SDKs repeat even a refused request three to
/// six times within seconds; what may pass at any time is remembered no longer than clients are told to wait.
pub(super) fn negative_ttl(error: &ExchangeError) -> Duration {
    Duration::from_secs(match error {
        error if error.is_transient() => 1,
        // Somebody may be registering it right now.
        ExchangeError::Source(SourceError::Denied(_)) => 3,
        ExchangeError::Source(_)
        | ExchangeError::Sts(_)
        | ExchangeError::TooOften
        | ExchangeError::TooShort => 5,
    })
}

/// What has failed since the last success.
#[derive(Debug)]
pub(super) struct FailureState {
    pub(super) error: ExchangeError,
    pub(super) at: Instant,
    pub(super) time: SystemTime,
    /// No refresh begins earlier.
    pub(super) retry_at: Instant,
    tries: u32,
    /// The first refusal. An outage that comes after it does not make it undone.
    pub(super) refused_since: Option<(Instant, SystemTime)>,
    denied_since: Option<Instant>,
    /// The source has denied it often enough.
    pub(super) withdrawn: bool,
    /// Whether this kind of failure is in the log.
    pub(super) logged: bool,
}

impl FailureState {
    /// After another failure.
    pub(super) fn record(
        before: Option<&Self>,
        error: &ExchangeError,
        at: Instant,
        time: SystemTime,
    ) -> Self {
        let class = FailureKind::of(error);
        let since = before.and_then(|before| before.refused_since);
        let refused_since = if class == FailureKind::Refused {
            since.or(Some((at, time)))
        } else {
            since
        };
        let since = before.and_then(|before| before.denied_since);
        let denied_since = if class == FailureKind::Denied {
            since.or(Some(at))
        } else {
            since
        };
        let asked_again =
            denied_since.is_some_and(|since| at.duration_since(since) >= DENIAL_CONFIRMATION);
        let tries = before.map_or(0, |before| before.tries);
        Self {
            error: error.clone(),
            at,
            time,
            retry_at: match (class, denied_since) {
                // The second question, which decides.
                (FailureKind::Denied, Some(since)) if !asked_again => {
                    since + DENIAL_CONFIRMATION + BACKOFF_FIRST.mul_f64(fastrand::f64())
                }
                (FailureKind::CallerGone, _) => at + BACKOFF_FIRST,
                _ => at + (BACKOFF_FIRST * (1 << tries)).mul_f64(0.5 + fastrand::f64()),
            },
            tries: (tries + 1).min(BACKOFF_STEPS),
            refused_since,
            denied_since,
            withdrawn: class == FailureKind::Denied && asked_again,
            logged: before.is_some_and(|before| before.logged),
        }
    }
}

//! Failures of exchanges: how long each is cached, when the next try is due, and its effect on
//! cached credentials.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use crate::backoff::{Backoff, Jitter};
use crate::exchange::ExchangeError;
use crate::svid::{DENIAL_CONFIRMATION, SourceError};

/// First delay between tries to refresh.
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
/// Delays between tries to refresh.
const BACKOFF: Backoff = Backoff::new(BACKOFF_FIRST, Duration::from_secs(64), Jitter::Around);

/// Kind of failure, by its effect on credentials that are already cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FailureKind {
    /// An outage or a rate limit. It has no effect.
    Outage,
    /// The caller cannot be attested again. It has no effect, but a try without another caller is
    /// useless.
    CallerUnusable,
    /// The source does not give this identity to the caller any more.
    Denied,
    /// STS rejects, or the source's reply is unusable. The credentials could not be issued now.
    Rejected,
}

impl FailureKind {
    pub(super) fn of(error: &ExchangeError) -> Self {
        match error.cause() {
            ExchangeError::Source(SourceError::Caller(_)) => Self::CallerUnusable,
            ExchangeError::Source(SourceError::Denied(_)) => Self::Denied,
            error if error.is_transient() => Self::Outage,
            ExchangeError::Source(
                SourceError::Misconfigured(_)
                | SourceError::BadToken(_)
                | SourceError::Unavailable(_)
                | SourceError::Busy
                | SourceError::Reloaded
                | SourceError::UnknownAccount
                | SourceError::Panicked,
            )
            | ExchangeError::Sts(_)
            | ExchangeError::TooOften
            | ExchangeError::TooShort
            | ExchangeError::Panicked
            | ExchangeError::Hop { .. } => Self::Rejected,
        }
    }

    /// Returns whether credentials that this failure could not renew end because of it.
    pub(super) fn is_final(self) -> bool {
        match self {
            Self::Denied | Self::Rejected => true,
            Self::Outage | Self::CallerUnusable => false,
        }
    }

    /// Returns how long a failure is cached where no credentials are. SDKs repeat even a rejected
    /// request three to six times within seconds. A transient failure is cached no longer than
    /// clients have to wait.
    pub(super) fn negative_ttl(self) -> Duration {
        Duration::from_secs(match self {
            Self::Outage | Self::CallerUnusable => 1,
            // An operator may be creating the registration entry right now.
            Self::Denied => 3,
            Self::Rejected => 5,
        })
    }
}

/// The times of an entry's last failure.
#[derive(Debug, Clone, Copy)]
pub(super) struct FailureTimes {
    /// The end of its caching where no credentials are.
    pub(super) cached_until: Instant,
    /// The earliest time of the next refresh.
    pub(super) retry_at: Instant,
}

impl FailureTimes {
    /// Returns whether requests get this failure where no credentials are.
    pub(super) fn is_cached(self, now: Instant) -> bool {
        self.cached_until > now
    }
}

/// The failures since the last success.
#[derive(Debug)]
pub(super) struct FailureState {
    pub(super) error: ExchangeError,
    pub(super) time: SystemTime,
    pub(super) times: FailureTimes,
    /// Number of failures in a row.
    failures: u32,
    /// Time of the first rejection. A later outage does not reset it.
    pub(super) refused_since: Option<(Instant, SystemTime)>,
    denied_since: Option<Instant>,
    /// True once a second denial has confirmed the first.
    pub(super) withdrawn: bool,
    /// True if this kind of failure has been logged.
    pub(super) logged: bool,
}

impl FailureState {
    /// Returns whether the source or STS has rejected the credentials since the last success.
    pub(super) fn is_rejected(&self) -> bool {
        self.refused_since.is_some() || self.denied_since.is_some()
    }

    /// Returns the state after another failure.
    pub(super) fn record(
        previous: Option<&Self>,
        error: &ExchangeError,
        at: Instant,
        time: SystemTime,
    ) -> Self {
        let kind = FailureKind::of(error);
        let since = previous.and_then(|previous| previous.refused_since);
        let refused_since = if kind == FailureKind::Rejected {
            since.or(Some((at, time)))
        } else {
            since
        };
        let since = previous.and_then(|previous| previous.denied_since);
        let denied_since = if kind == FailureKind::Denied {
            since.or(Some(at))
        } else {
            since
        };
        let confirmed =
            denied_since.is_some_and(|since| at.duration_since(since) >= DENIAL_CONFIRMATION);
        let failures = previous
            .map_or(0, |previous| previous.failures)
            .saturating_add(1);
        let retry_at = match (kind, denied_since) {
            // The second query to the source, which decides.
            (FailureKind::Denied, Some(since)) if !confirmed => {
                since + DENIAL_CONFIRMATION + BACKOFF_FIRST.mul_f64(fastrand::f64())
            }
            (FailureKind::CallerUnusable, _) => at + BACKOFF_FIRST,
            (FailureKind::Outage | FailureKind::Denied | FailureKind::Rejected, _) => {
                at + BACKOFF.delay(failures)
            }
        };
        Self {
            error: error.clone(),
            time,
            times: FailureTimes {
                cached_until: at + kind.negative_ttl(),
                retry_at,
            },
            failures,
            refused_since,
            denied_since,
            withdrawn: kind == FailureKind::Denied && confirmed,
            logged: previous.is_some_and(|previous| previous.logged),
        }
    }
}

//! What a failure means for what is cached, and what is to be done with a place, and when. Nothing here does it.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::entry::{Slot, State};
use super::{Setup, Shared};
use crate::issue::IssueError;
use crate::svid::SourceError;

/// Credentials with less than this left are not handed out any more.
pub(super) const LAST_GOOD: Duration = Duration::from_secs(60);
/// SDKs (botocore, Java, .NET) fetch again on each call what has less than this left ...
const SDKS_REFRESH: Duration = Duration::from_secs(15 * 60);
/// ... so a refresh has this long before they do ...
const BEFORE_SDKS: Duration = Duration::from_secs(90);
/// ... where the session is longer by at least this; shorter ones would be refreshed all the time.
const WORTH_IT: Duration = Duration::from_secs(5 * 60);
/// Waits between tries to refresh double from this ...
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
/// ... to this, in as many steps. Each is jittered by half of it.
const BACKOFF_STEPS: u32 = 6;
/// Two denials of the source this far apart, without a success in between, are its last word: one alone may be a
/// registration that has not spread yet, or a part of the source that has just started.
pub(super) const DENIALS_APART: Duration = Duration::from_secs(10);

/// What a failure says about credentials that were issued before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// Nothing: an outage, or too many calls.
    Outage,
    /// Nothing, but without another caller there is no use in trying.
    CallerGone,
    /// That the source does not give this identity to the caller any more.
    Denied,
    /// That they would not be issued now: STS refuses, or the source's answer can't be used.
    Refused,
}

impl Class {
    pub(super) fn of(error: &IssueError) -> Self {
        match error {
            IssueError::Source(SourceError::Caller(_)) => Self::CallerGone,
            IssueError::Source(SourceError::Denied(_)) => Self::Denied,
            error if error.is_transient() => Self::Outage,
            _ => Self::Refused,
        }
    }
}

/// **The** table of how long a failure is remembered where nothing is cached. SDKs repeat even a refused request three to
/// six times within seconds; what may pass at any time is remembered no longer than clients are told to wait.
pub(super) fn remembered(error: &IssueError) -> Duration {
    Duration::from_secs(match error {
        error if error.is_transient() => 1,
        // Somebody may be registering it right now.
        IssueError::Source(SourceError::Denied(_)) => 3,
        IssueError::Source(_) | IssueError::Sts(_) | IssueError::TooOften | IssueError::TooShort => 5,
    })
}

/// With how much left credentials of this lifetime are due for a refresh: about half, spread so that a node's identities
/// don't refresh together, and before SDKs that refresh early begin to ask for better ones.
pub(super) fn refresh_left(lifetime: Duration) -> Duration {
    let half = lifetime.mul_f64(0.45 + 0.1 * fastrand::f64());
    if lifetime < SDKS_REFRESH + WORTH_IT {
        return half;
    }
    half.max(SDKS_REFRESH + BEFORE_SDKS.mul_f64(1.0 + 0.5 * fastrand::f64()))
}

/// What has failed since the last success.
#[derive(Debug)]
pub(super) struct Trouble {
    pub(super) error: IssueError,
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

impl Trouble {
    /// After another failure.
    pub(super) fn after(before: Option<&Self>, error: &IssueError, at: Instant, time: SystemTime) -> Self {
        let class = Class::of(error);
        let since = before.and_then(|before| before.refused_since);
        let refused_since = if class == Class::Refused { since.or(Some((at, time))) } else { since };
        let since = before.and_then(|before| before.denied_since);
        let denied_since = if class == Class::Denied { since.or(Some(at)) } else { since };
        let asked_again = denied_since.is_some_and(|since| at.duration_since(since) >= DENIALS_APART);
        let tries = before.map_or(0, |before| before.tries);
        Self {
            error: error.clone(),
            at,
            time,
            retry_at: match (class, denied_since) {
                // The second question, which decides.
                (Class::Denied, Some(since)) if !asked_again => {
                    since + DENIALS_APART + BACKOFF_FIRST.mul_f64(fastrand::f64())
                }
                (Class::CallerGone, _) => at + BACKOFF_FIRST,
                _ => at + (BACKOFF_FIRST * (1 << tries)).mul_f64(0.5 + fastrand::f64()),
            },
            tries: (tries + 1).min(BACKOFF_STEPS),
            refused_since,
            denied_since,
            withdrawn: class == Class::Denied && asked_again,
            logged: before.is_some_and(|before| before.logged),
        }
    }
}

/// What to do with a place.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Take its credentials away, for this reason.
    Clear(&'static str),
    /// Take it out, for this reason.
    Remove(&'static str),
    /// Refresh it, or look again at this time at the latest if that can't be.
    Refresh(Instant),
    /// Look again.
    Wait(Instant),
}

impl Shared {
    /// **The** rule of what happens to a place, in the order of precedence.
    pub(super) fn judge(&self, slot: &Slot, state: &State, setup: &Setup) -> Next {
        let now = Instant::now();
        let trouble = state.trouble.as_deref();
        let Some(issued) = slot.current.load_full() else {
            if state.flight.is_some() {
                return Next::Wait(now + LAST_GOOD);
            }
            let forget = trouble.map_or(now, |trouble| trouble.at + remembered(&trouble.error));
            return if forget > now { Next::Wait(forget) } else { Next::Remove("empty") };
        };
        let left = issued.left(&self.clock);
        let grace = trouble.and_then(|trouble| trouble.refused_since).map(|(at, _)| at + setup.limits.revocation_grace);
        let end = grace.unwrap_or(now + left).min(now + left.saturating_sub(LAST_GOOD));
        if end <= now {
            return Next::Clear(if left <= LAST_GOOD { "expired" } else { "refused" });
        }
        if state.flight.is_some() {
            return Next::Wait(end);
        }
        if left > issued.refresh_left {
            return Next::Wait(end.min(now + (left - issued.refresh_left)));
        }
        if slot.last_used() + issued.lifetime < self.start.elapsed() {
            return Next::Remove("unused");
        }
        match trouble {
            Some(trouble) if trouble.retry_at > now => Next::Wait(end.min(trouble.retry_at)),
            _ => Next::Refresh(end),
        }
    }
}

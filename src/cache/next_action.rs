//! The rule of what is due for a cache entry, and when. It decides only, and executes nothing.

use tokio::time::Instant;

use super::cached_credentials::MIN_REMAINING;
use super::entry::{Entry, EntryState};
use super::failure::negative_ttl;
use super::{CacheInner, Generation};
use crate::metrics::EvictionReason;

/// Action that is due for an entry.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Clear the credentials, for this reason.
    Clear(EvictionReason),
    /// Remove the entry, for this reason.
    Remove(EvictionReason),
    /// Refresh now. If that is not possible, check again at this time at the latest.
    Refresh(Instant),
    /// Check again at this time.
    Wait(Instant),
}

impl CacheInner {
    /// Returns the due action of an entry. The checks are in order of precedence.
    pub(super) fn next_action(
        &self,
        entry: &Entry,
        state: &EntryState,
        generation: &Generation,
    ) -> Action {
        let now = Instant::now();
        let failure = state.failure.as_deref();
        let Some(cached) = entry.current.load_full() else {
            if state.flight.is_some() {
                return Action::Wait(now + MIN_REMAINING);
            }
            let forget = failure.map_or(now, |failure| failure.at + negative_ttl(&failure.error));
            return if forget > now {
                Action::Wait(forget)
            } else {
                // It has no credentials, so this is not counted as an eviction.
                Action::Remove(EvictionReason::Unused)
            };
        };
        let remaining = cached.remaining(&self.clock);
        let grace = failure
            .and_then(|failure| failure.refused_since)
            .map(|(at, _)| at + generation.limits.revocation_grace);
        let end = grace
            .unwrap_or(now + remaining)
            .min(now + remaining.saturating_sub(MIN_REMAINING));
        if end <= now {
            return Action::Clear(if remaining <= MIN_REMAINING {
                EvictionReason::Expired
            } else {
                EvictionReason::Refused
            });
        }
        if state.flight.is_some() {
            return Action::Wait(end);
        }
        if remaining > cached.refresh_at_remaining {
            return Action::Wait(end.min(now + (remaining - cached.refresh_at_remaining)));
        }
        if entry.last_used() + cached.lifetime < self.start.elapsed() {
            return Action::Remove(EvictionReason::Unused);
        }
        match failure {
            Some(failure) if failure.retry_at > now => Action::Wait(end.min(failure.retry_at)),
            _ => Action::Refresh(end),
        }
    }
}

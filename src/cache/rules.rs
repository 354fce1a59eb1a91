//! What is to be done with a place, and when. Nothing here does it.

use tokio::time::Instant;

use super::entry::{CachedState, Entry};
use super::issued::MIN_REMAINING;
use super::trouble::negative_ttl;
use super::{CacheInner, Generation};
use crate::metrics::EvictionReason;

/// What to do with a place.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Take its credentials away, for this reason.
    Clear(EvictionReason),
    /// Take it out, for this reason.
    Remove(EvictionReason),
    /// Refresh it, or look again at this time at the latest if that can't be.
    Refresh(Instant),
    /// Look again.
    Wait(Instant),
}

impl CacheInner {
    /// **The** rule of what happens to a place, in the order of precedence.
    pub(super) fn next_action(
        &self,
        slot: &Entry,
        state: &CachedState,
        setup: &Generation,
    ) -> Action {
        let now = Instant::now();
        let trouble = state.trouble.as_deref();
        let Some(issued) = slot.current.load_full() else {
            if state.flight.is_some() {
                return Action::Wait(now + MIN_REMAINING);
            }
            let forget = trouble.map_or(now, |trouble| trouble.at + negative_ttl(&trouble.error));
            return if forget > now {
                Action::Wait(forget)
            } else {
                // It has no credentials, so this is not counted as an eviction.
                Action::Remove(EvictionReason::Unused)
            };
        };
        let left = issued.remaining(&self.clock);
        let grace = trouble
            .and_then(|trouble| trouble.refused_since)
            .map(|(at, _)| at + setup.limits.revocation_grace);
        let end = grace
            .unwrap_or(now + left)
            .min(now + left.saturating_sub(MIN_REMAINING));
        if end <= now {
            return Action::Clear(if left <= MIN_REMAINING {
                EvictionReason::Expired
            } else {
                EvictionReason::Refused
            });
        }
        if state.flight.is_some() {
            return Action::Wait(end);
        }
        if left > issued.refresh_left {
            return Action::Wait(end.min(now + (left - issued.refresh_left)));
        }
        if slot.last_used() + issued.lifetime < self.start.elapsed() {
            return Action::Remove(EvictionReason::Unused);
        }
        match trouble {
            Some(trouble) if trouble.retry_at > now => Action::Wait(end.min(trouble.retry_at)),
            _ => Action::Refresh(end),
        }
    }
}

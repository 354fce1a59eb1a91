//! What is to be done with a place, and when. Nothing here does it.

use tokio::time::Instant;

use super::entry::{Slot, State};
use super::issued::LAST_GOOD;
use super::trouble::remembered;
use super::{Setup, Shared};

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

//! The tokens of replies, held for the exchange that follows a reply.

use std::collections::VecDeque;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::AgentSourceInner;
use crate::identity::SpiffeId;
use crate::svid::JwtSvid;
use crate::svid::identity_cache::Subject;

/// Time for which the tokens of a reply are held for the exchange that follows it.
pub(super) const TOKEN_TTL: Duration = Duration::from_secs(10);
/// Maximum number of held tokens.
const MAX_TOKENS: usize = 256;

/// A token of a reply, for the exchange that follows.
pub(super) struct HeldToken {
    subject: Subject,
    token: JwtSvid,
    at: Instant,
}

impl AgentSourceInner {
    pub(super) fn hold_token(&self, subject: &Subject, token: JwtSvid) {
        let mut tokens = self.tokens();
        while tokens.len() >= MAX_TOKENS
            || tokens
                .front()
                .is_some_and(|held| held.at.elapsed() >= TOKEN_TTL)
        {
            tokens.pop_front();
        }
        tokens.push_back(HeldToken {
            subject: subject.clone(),
            token,
            at: Instant::now(),
        });
    }

    pub(super) fn take_token(&self, subject: &Subject, id: &SpiffeId) -> Option<JwtSvid> {
        let mut tokens = self.tokens();
        let is_match = |held: &HeldToken| held.subject == *subject && held.token.spiffe_id() == id;
        let held = tokens
            .iter()
            .position(is_match)
            .and_then(|index| tokens.remove(index))?;
        // A token with a short life may have expired meanwhile.
        (held.at.elapsed() < TOKEN_TTL && held.token.check_life(self.clock.now()).is_ok())
            .then_some(held.token)
    }

    fn tokens(&self) -> MutexGuard<'_, VecDeque<HeldToken>> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

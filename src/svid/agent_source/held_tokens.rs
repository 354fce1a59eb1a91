//! The tokens of replies, held for the exchange that follows a reply.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use crate::identity::SpiffeId;
use crate::svid::JwtSvid;
use crate::svid::identity_cache::Subject;

/// Time for which the tokens of a reply are held.
pub(super) const TOKEN_TTL: Duration = Duration::from_secs(10);
/// Maximum number of held tokens.
const MAX_TOKENS: usize = 256;

/// Tokens in the order of their arrival. Each one is taken at most once.
#[derive(Default)]
pub(super) struct HeldTokens(Mutex<VecDeque<HeldToken>>);

struct HeldToken {
    subject: Subject,
    token: JwtSvid,
    at: Instant,
}

impl HeldTokens {
    /// Adds a token of `subject`. Drops those that are too old or too many.
    pub(super) fn hold(&self, subject: &Subject, token: JwtSvid) {
        let mut tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
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

    /// Removes a token of `subject` for `id`, and returns it if it is still good.
    pub(super) fn take(
        &self,
        subject: &Subject,
        id: &SpiffeId,
        now: SystemTime,
    ) -> Option<JwtSvid> {
        let mut tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_match = |held: &HeldToken| held.subject == *subject && held.token.spiffe_id() == id;
        let held = tokens
            .iter()
            .position(is_match)
            .and_then(|index| tokens.remove(index))?;
        // A token with a short life may have expired meanwhile.
        (held.at.elapsed() < TOKEN_TTL && held.token.check_life(now).is_ok()).then_some(held.token)
    }
}

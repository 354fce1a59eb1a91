//! Outages of the exchange of tokens, for roles that can use a certificate instead.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::ExchangeError;
use crate::credentials::Credentials;
use crate::identity::SpiffeId;
use crate::limits::LogQuota;
use crate::role::{Grant, StsTarget};
use crate::sts::StsReason;

/// Time for which an exchange of tokens that was unavailable is not tried first. Each try of an STS
/// that hangs takes as long as a client waits.
pub(super) const OUTAGE_RETRY: Duration = Duration::from_secs(30);
/// Maximum number of outages at once. Beyond it, a further one does not change the order.
const MAX_OUTAGES: usize = 1024;
/// Number of lines about SPIFFE IDs without tokens at first, and the interval of further ones. An
/// outage of the source concerns all of them.
const SOURCE_LINES: u32 = 8;
const SOURCE_LINE_INTERVAL: Duration = Duration::from_secs(10);

/// An upstream of the exchange of tokens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum TokenUpstream {
    /// STS, for all identities.
    Sts(StsTarget),
    /// The source of tokens, for one identity: that of another may have its token.
    Source(SpiffeId),
}

impl TokenUpstream {
    fn of(grant: &Grant) -> [Self; 2] {
        [
            Self::Sts(grant.role.sts.clone()),
            Self::Source(grant.spiffe_id.clone()),
        ]
    }
}

impl fmt::Display for TokenUpstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sts(sts) => sts.fmt(f),
            Self::Source(id) => write!(f, "identity source, for {id}"),
        }
    }
}

/// Upstreams of tokens that are unavailable, with the time of the latest failure.
#[derive(Debug)]
pub(super) struct TokenOutages {
    failed: Mutex<HashMap<TokenUpstream, Instant>>,
    source_lines: LogQuota,
}

impl TokenOutages {
    pub(super) fn new() -> Self {
        Self {
            failed: Mutex::default(),
            source_lines: LogQuota::new(SOURCE_LINES, SOURCE_LINE_INTERVAL),
        }
    }

    /// Returns whether an upstream of this grant was unavailable a short time ago.
    pub(super) fn is_recent(&self, grant: &Grant) -> bool {
        let failed = self.failed();
        let mut upstreams = TokenUpstream::of(grant).into_iter();
        upstreams.any(|upstream| failed.get(&upstream).is_some_and(is_recent))
    }

    /// Records the result of an exchange of a token. Only a response of STS ends outages: a limit
    /// of this node, or a caller that is denied, proves nothing about an upstream.
    pub(super) fn record(&self, grant: &Grant, result: &Result<Credentials, ExchangeError>) {
        let [sts, source] = TokenUpstream::of(grant);
        match result {
            Err(error @ ExchangeError::Source(_)) if error.is_outage_of_tokens() => {
                self.begin(source, error);
            }
            Err(error) if error.is_outage_of_tokens() => self.begin(sts, error),
            Err(ExchangeError::Sts(error)) if error.reason == StsReason::Busy => {}
            Ok(_) | Err(ExchangeError::Sts(_)) => {
                self.end(&sts);
                self.end(&source);
            }
            Err(_) => {}
        }
    }

    fn begin(&self, upstream: TokenUpstream, error: &ExchangeError) {
        let mut failed = self.failed();
        if let Some(at) = failed.get_mut(&upstream) {
            *at = Instant::now();
            return;
        }
        if failed.len() >= MAX_OUTAGES {
            failed.retain(|_, at| is_recent(at));
        }
        if failed.len() >= MAX_OUTAGES {
            return;
        }
        if let Some(missed) = self.missed_lines(&upstream) {
            tracing::warn!(
                %upstream, %error, missed,
                "exchange of tokens is unavailable, so IAM Roles Anywhere is used"
            );
        }
        failed.insert(upstream, Instant::now());
    }

    fn end(&self, upstream: &TokenUpstream) {
        if self.failed().remove(upstream).is_some()
            && let Some(missed) = self.missed_lines(upstream)
        {
            tracing::info!(%upstream, missed, "exchange of tokens is available again");
        }
    }

    /// Returns how many lines were left out before one about this upstream; `None` if it is left
    /// out, too.
    fn missed_lines(&self, upstream: &TokenUpstream) -> Option<u64> {
        match upstream {
            TokenUpstream::Sts(_) => Some(0),
            TokenUpstream::Source(_) => self.source_lines.take(),
        }
    }

    fn failed(&self) -> MutexGuard<'_, HashMap<TokenUpstream, Instant>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_recent(at: &Instant) -> bool {
    at.elapsed() < OUTAGE_RETRY
}

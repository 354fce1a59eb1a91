//! Credentials that are not cached: a JWT-SVID from the source, credentials from STS.

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::time::{Instant, sleep};

use crate::caller::{AttestError, Caller};
use crate::clock::Clock;
use crate::credentials::Credentials;
use crate::health::LastError;
use crate::identity::SpiffeId;
use crate::limits::{FairSemaphore, KeyedRateLimiter};
use crate::metrics::{CallLabel, Metrics, UpstreamCall};
use crate::role::Grant;
use crate::sts::{AssumeRole, RetryPolicy, StsError};
use crate::svid::{BadToken, IdentitySource, JwtSvid, SourceError, TTL_FIX};

/// No try begins later than this after the first. A client waits hardly longer, and what lasts longer than this is for
/// the cache to try again, at its pace.
const RETRY_WINDOW: Duration = Duration::from_secs(4);
/// The tries of one issue after its first ones, at the source and at STS together.
const MAX_RETRIES: u32 = 3;
/// Before the first of them; doubled before each other one, and jittered, so that a node's flights don't march in step.
const RETRY_PAUSE: Duration = Duration::from_millis(250);

/// How many calls to the source are under way at most: an agent answers most of them from its cache, and each has a
/// connection of its own ...
const MAX_SOURCE_CALLS: usize = 64;
/// ... and of those for one SPIFFE ID: a source that keeps one workload waiting (SPIRE does for up to 30 s) still has turns
/// for all others.
const MAX_SOURCE_CALLS_PER_WORKLOAD: usize = 4;
/// What one SPIFFE ID may have issued at once: its 16 cached roles, and each of them once more ...
const EXCHANGE_BURST: u32 = 32;
/// ... and after that. Renewing 16 roles of the shortest session takes one in 28 s, and an outage of hours one in 4 s; so
/// this is far above what anybody needs, and a thousandth of what STS takes from an account.
const EXCHANGE_INTERVAL: Duration = Duration::from_secs(1);

/// Issues credentials. Of what it has issued it remembers nothing but how often.
#[derive(Debug, Clone)]
pub struct TokenExchanger {
    source: Arc<dyn IdentitySource>,
    sts: Arc<dyn AssumeRole>,
    clock: Clock,
    metrics: Metrics,
    turns: FairSemaphore<SpiffeId>,
    allowance: Arc<KeyedRateLimiter>,
}

/// Why no credentials were issued.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ExchangeError {
    /// The source gave no token that may be used.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// STS gave no credentials for it.
    #[error(transparent)]
    Sts(#[from] StsError),
    /// This SPIFFE ID has had too many issued in a short time, or has too many calls waiting.
    #[error(
        "this workload asks for new credentials too often; ask again in some seconds, and for fewer roles"
    )]
    TooOften,
    /// The credentials end so soon that they are of no use.
    #[error(
        "STS gave credentials that end within a minute: compare this node's clock, and give JWT-SVIDs a longer life if this STS \
         ends credentials with the token that they were given for"
    )]
    TooShort,
}

impl ExchangeError {
    /// For a flight that ended by a panic, which is in the log.
    pub fn task_panicked() -> Self {
        Self::Source(SourceError::Unavailable(
            "an error inside awsvid ended the exchange; its log has it".to_owned(),
        ))
    }

    /// Returns an error of each kind, for their labels.
    pub fn samples() -> Vec<Self> {
        let callers = AttestError::ALL.map(|error| Self::Source(SourceError::Caller(error)));
        let sources = SourceError::samples().into_iter().map(Self::Source);
        let sts = StsError::samples().into_iter().map(Self::Sts);
        let own = [Self::TooOften, Self::TooShort];
        sources.chain(callers).chain(sts).chain(own).collect()
    }

    /// Whether it may pass without anybody doing anything: an outage, not a refusal.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Source(error) => error.is_transient(),
            Self::Sts(error) => match error.again {
                RetryPolicy::Later => true,
                // The new token has been tried by now.
                RetryPolicy::NewToken | RetryPolicy::Never => false,
            },
            Self::TooOften | Self::TooShort => true,
        }
    }

    /// The label in metrics and audit records.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Source(error) => error.reason(),
            Self::Sts(error) => error.reason,
            Self::TooOften => "too_many_exchanges",
            Self::TooShort => "sts_bad_answer",
        }
    }
}

impl TokenExchanger {
    /// Puts source and STS together.
    pub fn new(
        source: Arc<dyn IdentitySource>,
        sts: Arc<dyn AssumeRole>,
        clock: Clock,
        metrics: Metrics,
    ) -> Self {
        let turns = FairSemaphore::new(MAX_SOURCE_CALLS, MAX_SOURCE_CALLS_PER_WORKLOAD);
        let allowance = Arc::new(KeyedRateLimiter::new(EXCHANGE_BURST, EXCHANGE_INTERVAL));
        Self {
            source,
            sts,
            clock,
            metrics,
            turns,
            allowance,
        }
    }

    /// Whether a token is only to be had for a caller that lives.
    pub fn needs_caller(&self) -> bool {
        self.source.requires_live_caller()
    }

    /// Credentials for `grant`, by a token that the source gives `caller`.
    ///
    /// What passes quickly is tried again within seconds; a token that STS refuses is replaced once.
    pub async fn exchange(
        &self,
        caller: &Arc<Caller>,
        grant: &Grant,
    ) -> Result<Credentials, ExchangeError> {
        if !self.allowance.take(&grant.spiffe_id) {
            return Err(ExchangeError::TooOften);
        }
        let _running = self.metrics.exchange_started();
        let mut patience = RetryBudget::new();
        let token = self.token(caller, grant, &mut patience).await?;
        let refused = match self.assume(grant, &token, &mut patience).await {
            Err(error) if error.again == RetryPolicy::NewToken => error,
            result => return Ok(result?),
        };
        let fresh = self.token(caller, grant, &mut patience).await?;
        if fresh.is_same(&token) {
            return Err(with_note(refused, "the identity source gave the same token again").into());
        }
        match self.assume(grant, &fresh, &mut patience).await {
            Err(error) if error.again == RetryPolicy::NewToken => {
                Err(self.refused_twice(error, &fresh).into())
            }
            result => Ok(result?),
        }
    }

    async fn token(
        &self,
        caller: &Arc<Caller>,
        grant: &Grant,
        patience: &mut RetryBudget,
    ) -> Result<JwtSvid, ExchangeError> {
        let audience = &grant.role.audience;
        loop {
            let turn = self
                .turns
                .acquire(&grant.spiffe_id)
                .await
                .ok_or(ExchangeError::TooOften)?;
            let result = self.source.token(caller, &grant.spiffe_id, audience).await;
            drop(turn);
            match result {
                Err(SourceError::Unavailable(_)) if patience.pause().await => {}
                // Checked against what the source was asked for, this can only be a mistake in the source's own code.
                // It would hand one workload the account of another.
                Ok(token)
                    if *token.spiffe_id() != grant.spiffe_id || token.audience() != audience =>
                {
                    return Err(SourceError::from(BadToken::Wrong(
                        "it is not the one that was asked for".to_owned(),
                    ))
                    .into());
                }
                result => return Ok(result?),
            }
        }
    }

    /// Judges STS's refusal of a second token. If the token expired in a queue or between retries, the refusal is an outage:
    /// it says nothing about the role, and cached credentials stay valid.
    fn refused_twice(&self, error: StsError, token: &JwtSvid) -> StsError {
        match (token.check_life(self.clock.now()), token.short_life()) {
            (Err(expired), _) => StsError {
                again: RetryPolicy::Later,
                ..with_note(error, &format!("the token: {expired}"))
            },
            (Ok(()), Some(life)) => with_note(
                error,
                &format!(
                    "a new token was refused as well; it is good for only {} s: {TTL_FIX}, and compare this node's clock with \
                     STS's",
                    life.as_secs()
                ),
            ),
            (Ok(()), None) => with_note(error, "a new token was refused as well"),
        }
    }

    async fn assume(
        &self,
        grant: &Grant,
        token: &JwtSvid,
        patience: &mut RetryBudget,
    ) -> Result<Credentials, StsError> {
        loop {
            let start = Instant::now();
            let result = self.sts.assume(grant, token).await;
            self.metrics.sts_call(UpstreamCall {
                name: grant.role.sts.to_string(),
                result: CallLabel::of(&result, |error| error.reason),
                error: last_error(&result),
                took: start.elapsed(),
                at: self.clock.now(),
            });
            match result {
                Err(error) if error.again == RetryPolicy::Later => {
                    if !patience.pause().await || token.expires() <= self.clock.now() {
                        return Err(error);
                    }
                }
                result => return result,
            }
        }
    }
}

fn last_error<T>(result: &Result<T, StsError>) -> Option<LastError> {
    let error = result.as_ref().err()?;
    Some(LastError {
        text: error.to_string(),
        reason: error.reason,
        outage: error.again == RetryPolicy::Later,
    })
}

fn with_note(error: StsError, note: &str) -> StsError {
    StsError {
        what: format!("{}; {note}", error.what),
        ..error
    }
}

/// How many more tries one issue has, and until when.
struct RetryBudget {
    start: Instant,
    tries: u32,
}

impl RetryBudget {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            tries: 0,
        }
    }

    /// Waits before another try; `false`, at once, if there is to be none.
    async fn pause(&mut self) -> bool {
        let pause = RETRY_PAUSE.mul_f64(f64::from(1 << self.tries) * (0.5 + 0.5 * fastrand::f64()));
        if self.tries == MAX_RETRIES || self.start.elapsed() + pause > RETRY_WINDOW {
            return false;
        }
        self.tries += 1;
        sleep(pause).await;
        true
    }
}

#[cfg(test)]
mod tests;

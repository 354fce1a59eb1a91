//! Exchange of SVIDs for AWS credentials, without a cache: a token from the source, credentials
//! from STS; or a certificate from the source, credentials from IAM Roles Anywhere. In a chain,
//! exchange of one session's credentials for those of the next.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::backoff::{Backoff, Jitter};
use crate::caller::Caller;
use crate::clock::Clock;
use crate::credentials::Credentials;
use crate::identity::SpiffeId;
use crate::limits::{FairSemaphore, KeyedRateLimiter};
use crate::metrics::{CallLabel, Metrics, UpstreamCall};
use crate::role::{FirstExchange, Grant};
use crate::roles_anywhere::CreateSession;
use crate::sts::{AssumeRole, RetryPolicy, StsError};
use crate::svid::{BadToken, IdentitySource, JwtSvid, SourceError, TTL_FIX};
use crate::upstream_status::LastError;

mod certificate;
mod error;
mod token_outages;

pub use error::ExchangeError;

use token_outages::TokenOutages;

/// No retry begins later than this after the start. A client hardly waits longer, and the cache
/// retries longer outages at its own pace.
const RETRY_WINDOW: Duration = Duration::from_secs(4);
/// Maximum number of retries of one exchange, at the source and at STS together.
const MAX_RETRIES: u32 = 3;
/// Delay before the first retry.
const RETRY_PAUSE: Duration = Duration::from_millis(250);
/// Delays before all retries.
const BACKOFF: Backoff = Backoff::new(RETRY_PAUSE, Duration::from_secs(1), Jitter::Down);

/// Maximum number of concurrent calls to the source. An agent answers most of them from its cache,
/// and each has a connection of its own. At this limit the SPIFFE ID with the most loses its newest
/// call, unless no other one holds fewer (T29).
const MAX_SOURCE_CALLS: usize = 64;
/// The part of [`MAX_SOURCE_CALLS`] that one SPIFFE ID may use. SPIRE can delay the calls of one
/// workload for up to 30 s; permits for others remain.
const MAX_SOURCE_CALLS_PER_SPIFFE_ID: usize = 4;
/// Number of exchanges that one SPIFFE ID may start at once: its 16 cached roles, and each of them
/// once more.
const EXCHANGE_BURST: u32 = 32;
/// Interval of further exchanges. 16 roles with the shortest session need one in 28 s, and an
/// outage of hours needs one in 4 s. So it is far above any real need, and a thousandth of what STS
/// accepts from an account.
const EXCHANGE_INTERVAL: Duration = Duration::from_secs(1);
/// Number of chained sessions that one SPIFFE ID may start at once: two in each chain of 16 roles,
/// for the four pods of one SPIFFE ID where a role depends on the pod.
const CHAINED_BURST: u32 = 128;
/// Interval of further chained sessions. STS accepts hundreds of calls in a second.
const CHAINED_INTERVAL: Duration = Duration::from_millis(250);

/// Client that exchanges JWT-SVIDs at STS. It keeps no state but the counts of its limiters.
#[derive(Debug, Clone)]
pub struct TokenExchanger {
    source: Arc<dyn IdentitySource>,
    sts: Arc<dyn AssumeRole>,
    /// The client for roles that are assumed by a certificate. `None` if there are none.
    roles_anywhere: Option<Arc<dyn CreateSession>>,
    token_outages: Arc<TokenOutages>,
    clock: Clock,
    metrics: Metrics,
    source_permits: FairSemaphore<SpiffeId>,
    rate_limit: Arc<KeyedRateLimiter>,
    chained_rate_limit: Arc<KeyedRateLimiter>,
}

impl TokenExchanger {
    /// Creates an exchanger of tokens from `source` for credentials from `sts`.
    pub fn new(
        source: Arc<dyn IdentitySource>,
        sts: Arc<dyn AssumeRole>,
        clock: Clock,
        metrics: Metrics,
    ) -> Self {
        let source_permits = FairSemaphore::new(MAX_SOURCE_CALLS, MAX_SOURCE_CALLS_PER_SPIFFE_ID);
        let rate_limit = Arc::new(KeyedRateLimiter::new(EXCHANGE_BURST, EXCHANGE_INTERVAL));
        Self {
            source,
            sts,
            roles_anywhere: None,
            token_outages: Arc::new(TokenOutages::new()),
            clock,
            metrics,
            source_permits,
            rate_limit,
            chained_rate_limit: Arc::new(KeyedRateLimiter::new(CHAINED_BURST, CHAINED_INTERVAL)),
        }
    }

    /// Adds a client for roles that are assumed by a certificate.
    pub fn with_roles_anywhere(self, client: Arc<dyn CreateSession>) -> Self {
        Self {
            roles_anywhere: Some(client),
            ..self
        }
    }

    /// Exchanges an SVID that the source gives `caller` for the credentials of `grant`.
    ///
    /// Outages are retried for `RETRY_WINDOW`. A token that STS rejects is replaced once.
    pub async fn exchange(
        &self,
        caller: &Arc<Caller>,
        grant: &Grant,
    ) -> Result<Credentials, ExchangeError> {
        if !self.rate_limit.take(&grant.spiffe_id) {
            return Err(ExchangeError::TooOften);
        }
        let _running = self.metrics.exchange_started();
        match &grant.role.exchange {
            FirstExchange::WebIdentity => self.by_token(caller, grant, RetryBudget::new()).await,
            FirstExchange::RolesAnywhere(at) => self.by_certificate(caller, grant, at).await,
            FirstExchange::Both(at) => self.by_either(caller, grant, at).await,
        }
    }

    /// Fetches a token, and exchanges it at STS.
    async fn by_token(
        &self,
        caller: &Arc<Caller>,
        grant: &Grant,
        mut budget: RetryBudget,
    ) -> Result<Credentials, ExchangeError> {
        let token = self.token(caller, grant, &mut budget).await?;
        self.exchange_token(caller, grant, token, budget).await
    }

    /// Exchanges this token at STS, or one more if STS rejects it.
    async fn exchange_token(
        &self,
        caller: &Arc<Caller>,
        grant: &Grant,
        token: JwtSvid,
        mut budget: RetryBudget,
    ) -> Result<Credentials, ExchangeError> {
        let first_error = match self.assume(grant, &token, &mut budget).await {
            Err(error) if error.retry == RetryPolicy::NewToken => error,
            result => return Ok(result?),
        };
        let fresh = self.token(caller, grant, &mut budget).await?;
        if fresh.is_same(&token) {
            return Err(with_note(
                first_error,
                "the identity source returned the same token again",
            )
            .into());
        }
        match self.assume(grant, &fresh, &mut budget).await {
            Err(error) if error.retry == RetryPolicy::NewToken => {
                Err(self.second_rejection(error, &fresh).into())
            }
            result => Ok(result?),
        }
    }

    /// Exchanges the credentials of the session before it for those of `grant`, which has a chain.
    ///
    /// Outages are retried for `RETRY_WINDOW`.
    pub async fn exchange_chained(
        &self,
        grant: &Grant,
        previous: &Credentials,
    ) -> Result<Credentials, ExchangeError> {
        if !self.chained_rate_limit.take(&grant.spiffe_id) {
            return Err(ExchangeError::TooOften);
        }
        let _running = self.metrics.exchange_started();
        let mut budget = RetryBudget::new();
        loop {
            let start = Instant::now();
            let result = self.sts.assume_chained(grant, previous).await;
            let result = result.map(|credentials| Credentials {
                first_session_name: previous.first_session_name.clone(),
                ..credentials
            });
            self.record_call(grant.role.sts.to_string(), &result, start);
            match result {
                Err(error) if error.retry == RetryPolicy::Later => {
                    if !budget.pause().await || previous.expiration <= self.clock.now() {
                        return Err(error.into());
                    }
                }
                result => return Ok(result?),
            }
        }
    }

    /// Fetches a token of `caller` from the source, within its limits, and retries outages.
    async fn token(
        &self,
        caller: &Arc<Caller>,
        grant: &Grant,
        budget: &mut RetryBudget,
    ) -> Result<JwtSvid, ExchangeError> {
        let audience = &grant.role.audience;
        let fetch = || self.source.token(caller, &grant.spiffe_id, audience);
        let token = self.svid(grant, budget, fetch).await?;
        // The source has checked the token against the request, so a mismatch is a bug of the
        // source. It would give one workload the account of another.
        if *token.spiffe_id() != grant.spiffe_id || token.audience() != audience {
            return Err(SourceError::from(BadToken::Wrong(
                "the agent returned a token for another SPIFFE ID or audience".to_owned(),
            ))
            .into());
        }
        Ok(token)
    }

    /// Fetches an SVID from the source, within its limits, and retries outages.
    async fn svid<T, F>(
        &self,
        grant: &Grant,
        budget: &mut RetryBudget,
        fetch: impl Fn() -> F,
    ) -> Result<T, ExchangeError>
    where
        F: Future<Output = Result<T, SourceError>>,
    {
        loop {
            let permit = self
                .source_permits
                .acquire_evicting(&grant.spiffe_id)
                .await
                .ok_or(ExchangeError::TooOften)?;
            let Some(result) = permit.run(fetch()).await else {
                if budget.pause().await {
                    continue;
                }
                return Err(ExchangeError::TooOften);
            };
            drop(permit);
            match result {
                Err(SourceError::Unavailable(_)) if budget.pause().await => {}
                result => return Ok(result?),
            }
        }
    }

    /// Classifies STS's rejection of a second token. If the token expired in a queue or between
    /// retries, the rejection is an outage. The role may be right, so cached credentials
    /// stay valid.
    fn second_rejection(&self, error: StsError, token: &JwtSvid) -> StsError {
        match (token.check_life(self.clock.now()), token.short_life()) {
            (Err(expired), _) => StsError {
                retry: RetryPolicy::Later,
                ..with_note(error, &format!("the token: {expired}"))
            },
            (Ok(()), Some(life)) => with_note(
                error,
                &format!(
                    "STS rejected a new token as well; the token is good for only {} s: {TTL_FIX}, and compare this node's clock with \
                     STS's",
                    life.as_secs()
                ),
            ),
            (Ok(()), None) => with_note(error, "STS rejected a new token as well"),
        }
    }

    /// Exchanges the token at STS, and retries outages while the token is valid.
    async fn assume(
        &self,
        grant: &Grant,
        token: &JwtSvid,
        budget: &mut RetryBudget,
    ) -> Result<Credentials, StsError> {
        loop {
            let start = Instant::now();
            let result = self.sts.assume(grant, token).await;
            self.record_call(grant.role.sts.to_string(), &result, start);
            match result {
                Err(error) if error.retry == RetryPolicy::Later => {
                    if !budget.pause().await || token.expires() <= self.clock.now() {
                        return Err(error);
                    }
                }
                result => return result,
            }
        }
    }
}

impl TokenExchanger {
    /// Counts a call to the server with this name.
    fn record_call(&self, name: String, result: &Result<Credentials, StsError>, start: Instant) {
        self.metrics.sts_call(UpstreamCall {
            name,
            result: CallLabel::of(result, |error| error.reason.label()),
            error: last_error(result),
            took: start.elapsed(),
            at: self.clock.now(),
        });
    }
}

fn last_error<T>(result: &Result<T, StsError>) -> Option<LastError> {
    let error = result.as_ref().err()?;
    Some(LastError {
        text: error.to_string(),
        reason: error.reason.label(),
        outage: error.retry == RetryPolicy::Later,
    })
}

fn with_note(error: StsError, note: &str) -> StsError {
    StsError {
        what: format!("{}; {note}", error.what),
        ..error
    }
}

/// Number of retries of one exchange, and the time at which they end.
struct RetryBudget {
    start: Instant,
    retries: u32,
}

impl RetryBudget {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            retries: 0,
        }
    }

    /// Returns a budget without retries, for an exchange that another one can replace.
    fn none() -> Self {
        Self {
            retries: MAX_RETRIES,
            ..Self::new()
        }
    }

    /// Waits before a retry. Returns `false` at once if no retry is left.
    async fn pause(&mut self) -> bool {
        let pause = BACKOFF.delay(self.retries + 1);
        if self.retries == MAX_RETRIES || self.start.elapsed() + pause > RETRY_WINDOW {
            return false;
        }
        self.retries += 1;
        sleep(pause).await;
        true
    }
}

#[cfg(test)]
mod tests;

//! Exchange of a certificate, alone or instead of a token.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::{ExchangeError, RetryBudget, TokenExchanger};
use crate::caller::Caller;
use crate::credentials::Credentials;
use crate::role::{Grant, RolesAnywhereTarget, StsTarget};
use crate::sts::RetryPolicy;
use crate::svid::{BadToken, SourceError, X509Svid};

/// Time for which an exchange of tokens that was unavailable is not tried first. Each try of an STS
/// that hangs takes as long as a client waits.
const OUTAGE_RETRY: Duration = Duration::from_secs(30);

/// Time for an exchange of tokens that another one can replace. SPIRE's agent waits up to 30 s for
/// its server, and clients hardly wait for 5 s.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(2);

/// The STS whose exchange of tokens is unavailable, with the time of the latest failure. Clones
/// share it. The configuration bounds the number of STS.
#[derive(Debug, Clone, Default)]
pub(super) struct TokenOutages(Arc<Mutex<HashMap<StsTarget, Instant>>>);

impl TokenOutages {
    fn is_recent(&self, sts: &StsTarget) -> bool {
        let failed = self.failed().get(sts).copied();
        failed.is_some_and(|at| at.elapsed() < OUTAGE_RETRY)
    }

    fn begin(&self, sts: &StsTarget, error: &ExchangeError) {
        if self.failed().insert(sts.clone(), Instant::now()).is_none() {
            tracing::warn!(
                %sts, %error,
                "exchange of tokens is unavailable, so IAM Roles Anywhere is used"
            );
        }
    }

    fn end(&self, sts: &StsTarget) {
        if self.failed().remove(sts).is_some() {
            tracing::info!(%sts, "exchange of tokens is available again");
        }
    }

    fn failed(&self) -> MutexGuard<'_, HashMap<StsTarget, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TokenExchanger {
    /// Exchanges a certificate at IAM Roles Anywhere. Its key is cleared on return.
    pub(super) async fn by_certificate(
        &self,
        caller: &Arc<Caller>,
        grant: &Grant,
        at: &RolesAnywhereTarget,
    ) -> Result<Credentials, ExchangeError> {
        let Some(client) = &self.roles_anywhere else {
            let text = "no client of IAM Roles Anywhere is configured".to_owned();
            return Err(SourceError::Misconfigured(text).into());
        };
        let mut budget = RetryBudget::new();
        let svid = self.certificate(caller, grant, &mut budget).await?;
        loop {
            let start = Instant::now();
            let session = client.create_session(grant, at, &svid).await;
            self.record_call(at.to_string(), &session, start);
            match session {
                Err(error) if error.retry == RetryPolicy::Later => {
                    if !budget.pause().await || svid.expires() <= self.clock.now() {
                        return Err(error.into());
                    }
                }
                session => return Ok(session?),
            }
        }
    }

    /// Exchanges a token, and a certificate if that is unavailable. A token that is rejected is the
    /// result.
    pub(super) async fn by_either(
        &self,
        caller: &Arc<Caller>,
        grant: &Grant,
        at: &RolesAnywhereTarget,
    ) -> Result<Credentials, ExchangeError> {
        let sts = &grant.role.sts;
        let mut first_error = None;
        if !self.token_outages.is_recent(sts) {
            let exchange = self.by_token(caller, grant, RetryBudget::none());
            let result = timeout(TOKEN_TIMEOUT, exchange).await;
            match result.unwrap_or_else(|_| Err(no_token_in_time())) {
                Err(error) if error.is_outage_of_tokens() => {
                    self.token_outages.begin(sts, &error);
                    first_error = Some(error);
                }
                result => {
                    self.token_outages.end(sts);
                    return result;
                }
            }
        }
        match (self.by_certificate(caller, grant, at).await, first_error) {
            // The source's verdict on the caller counts for both kinds of SVIDs.
            (Err(error @ ExchangeError::Source(_)), _) => Err(error),
            // The outage is the cause: without it, the second exchange would not have been needed.
            (Err(_), Some(outage)) => Err(outage),
            (Err(ExchangeError::Sts(_)), None) => {
                let result = self.by_token(caller, grant, RetryBudget::none()).await;
                if !result
                    .as_ref()
                    .is_err_and(ExchangeError::is_outage_of_tokens)
                {
                    self.token_outages.end(sts);
                }
                result
            }
            (result, _) => result,
        }
    }

    async fn certificate(
        &self,
        caller: &Arc<Caller>,
        grant: &Grant,
        budget: &mut RetryBudget,
    ) -> Result<X509Svid, ExchangeError> {
        let fetch = || self.source.x509_svid(caller, &grant.spiffe_id);
        let svid = self.svid(grant, budget, fetch).await?;
        // As with a token: the source has checked it, so this would be a bug of the source.
        if *svid.spiffe_id() != grant.spiffe_id {
            let text = "the agent returned a certificate of another SPIFFE ID".to_owned();
            return Err(SourceError::from(BadToken::Wrong(text)).into());
        }
        Ok(svid)
    }
}

fn no_token_in_time() -> ExchangeError {
    let text = format!("the exchange of a token did not end within {TOKEN_TIMEOUT:?}");
    SourceError::Unavailable(text).into()
}

#[cfg(test)]
mod tests;

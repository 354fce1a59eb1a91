//! Exchange of a certificate, alone or instead of a token.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::{ExchangeError, RetryBudget, TokenExchanger};
use crate::caller::Caller;
use crate::credentials::Credentials;
use crate::role::{Grant, RolesAnywhereTarget, StsTarget};
use crate::sts::{RetryPolicy, StsError, StsReason};
use crate::svid::{BadToken, SourceError, X509Svid};

/// Time for an exchange of tokens that another one can replace. SPIRE's agent waits up to 30 s for
/// its server, and clients hardly wait for 5 s.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(2);

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
    ///
    /// A certificate that fails as well changes nothing: the result is that of the token. The
    /// source may have fewer certificates than tokens, so its denial of one withdraws no identity.
    pub(super) async fn by_either(
        &self,
        caller: &Arc<Caller>,
        grant: &Grant,
        at: &RolesAnywhereTarget,
    ) -> Result<Credentials, ExchangeError> {
        let mut outage = None;
        if !self.token_outages.is_recent(grant) {
            let result = self.by_token_in_time(caller, grant).await;
            self.token_outages.record(grant, &result);
            match result {
                Err(error) if error.is_outage_of_tokens() => outage = Some(error),
                result => return result,
            }
        }
        let error = match self.by_certificate(caller, grant, at).await {
            Ok(credentials) => return Ok(credentials),
            Err(error) => error,
        };
        match (error, outage) {
            // The caller may not be what the source attested, whatever the kind of the SVID.
            (error @ ExchangeError::Source(SourceError::Caller(_)), _) => Err(error),
            // The outage is the cause: without it, the second exchange would not have been needed.
            (_, Some(outage)) => Err(outage),
            (_, None) => {
                let result = self.by_token(caller, grant, RetryBudget::none()).await;
                self.token_outages.record(grant, &result);
                result
            }
        }
    }

    /// Exchanges a token once, within [`TOKEN_TIMEOUT`].
    async fn by_token_in_time(
        &self,
        caller: &Arc<Caller>,
        grant: &Grant,
    ) -> Result<Credentials, ExchangeError> {
        let (until, mut budget) = (Instant::now() + TOKEN_TIMEOUT, RetryBudget::none());
        let token = timeout_at(until, self.token(caller, grant, &mut budget)).await;
        let token = token.unwrap_or_else(|_| Err(no_token_in_time()))?;
        let exchange = self.exchange_token(caller, grant, token, budget);
        timeout_at(until, exchange)
            .await
            .unwrap_or_else(|_| Err(no_session_in_time(&grant.role.sts)))
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
    let text = format!("the identity source gave no token within {TOKEN_TIMEOUT:?}");
    SourceError::Unavailable(text).into()
}

fn no_session_in_time(sts: &StsTarget) -> ExchangeError {
    let error = StsError {
        retry: RetryPolicy::Later,
        reason: StsReason::Unreachable,
        code: String::new(),
        what: format!("{sts} did not exchange a token within {TOKEN_TIMEOUT:?}"),
        fix: None,
    };
    error.into()
}

#[cfg(test)]
mod tests;

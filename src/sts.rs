//! STS: credentials for a JWT-SVID, by `AssumeRoleWithWebIdentity`.
//!
//! The call is unsigned: the token is the proof. So the SDK is given neither credentials nor a place to find any, and
//! of the environment only what [`NetworkSettings`] holds.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use aws_sdk_sts::Client;
use aws_sdk_sts::operation::assume_role_with_web_identity::AssumeRoleWithWebIdentityOutput;
use aws_sdk_sts::operation::assume_role_with_web_identity::builders::AssumeRoleWithWebIdentityFluentBuilder;
use aws_sdk_sts::types::PolicyDescriptorType;
use tokio::time::timeout;
use tracing::instrument::WithSubscriber;
use tracing::subscriber::NoSubscriber;
use zeroize::Zeroizing;

use crate::clock::Clock;
use crate::config::is_aws_sts;
use crate::credentials::Credentials;
use crate::identity::SpiffeId;
use crate::limits::FairSemaphore;
use crate::role::{Grant, StsTarget};
use crate::svid::JwtSvid;

mod advice;
mod client;
mod error;
mod error_response;
mod network;
mod no_proxy;
mod trust;

pub use error::{RetryPolicy, StsError};
pub use network::{InvalidSetting, NetworkSettings, Proxy};

use advice::StsDestination;
use client::HttpConnector;
use error::Failure;

/// No session is asked to last longer than 12 hours, so an `Expiration` further away than that and a wide margin for
/// clocks is nonsense.
const LIFETIME_MAX: Duration = Duration::from_secs(36 * 3600);
/// What [`Sts::probe`] shows to STS: too short to be anybody's token or role.
const NO_TOKEN: &str = "none";
const NO_ROLE: &str = "arn:aws:iam::000000000000:role/none";

/// Somebody who exchanges a JWT-SVID for credentials of a role.
#[async_trait]
pub trait AssumeRole: Send + Sync + fmt::Debug {
    /// Assumes the role of `grant` once, with `token`.
    async fn assume(&self, grant: &Grant, token: &JwtSvid) -> Result<Credentials, StsError>;
}

/// `[sts]`.
#[derive(Debug, Clone)]
pub struct Settings {
    /// For one call, from connecting to the last byte of the answer.
    pub timeout: Duration,
    /// How many calls are under way at most, a quarter of them for one SPIFFE ID; others wait for their turn.
    pub max_concurrent: usize,
    /// A file of PEM certificates: the only ones that an `endpoint` which is not AWS's is trusted by. AWS's STS is trusted by the
    /// system's certificates, always.
    pub ca_file: Option<PathBuf>,
    /// Proxies and kinds of AWS endpoints.
    pub network: NetworkSettings,
}

/// STS at AWS, or another server that speaks its protocol.
pub struct Sts {
    connections: HttpConnector,
    /// One client, and with it one pool of connections, for each place.
    clients: Mutex<HashMap<StsTarget, Client>>,
    turns: FairSemaphore<SpiffeId>,
    timeout: Duration,
    clock: Clock,
}

impl Sts {
    /// Does no I/O yet.
    pub fn new(settings: Settings, clock: Clock) -> Self {
        Self {
            connections: HttpConnector::new(
                settings.network,
                settings.ca_file.as_deref(),
                settings.timeout,
            ),
            clients: Mutex::default(),
            turns: FairSemaphore::new(
                settings.max_concurrent,
                (settings.max_concurrent / 4).max(2),
            ),
            timeout: settings.timeout,
            clock,
        }
    }

    /// Checks the environment variables that calls to these targets use, and loads their CA certificates. Fails for a variable that
    /// cannot be used, and for a `ca_file` without certificates. Missing certificates are logged, and loaded when they are there.
    pub async fn prepare(&self, targets: &[&StsTarget]) -> Result<(), InvalidSetting> {
        for target in targets {
            // A file system that hangs must not hold up the start.
            if let Ok(result) = timeout(self.timeout, self.connections.prepare(target)).await {
                result?;
            }
        }
        Ok(())
    }

    /// Returns the URL that calls for `target` go to.
    pub async fn url(&self, target: &StsTarget) -> Result<String, InvalidSetting> {
        self.connections.network.sts_url(target).await
    }

    /// Whether STS answers at all, whatever it says: it is shown something that is no token. For `/readyz`.
    pub async fn probe(&self, target: &StsTarget) -> Result<(), StsError> {
        let nothing = |call: AssumeRoleWithWebIdentityFluentBuilder| {
            call.role_arn(NO_ROLE)
                .role_session_name(NO_TOKEN)
                .web_identity_token(NO_TOKEN)
        };
        match self.call(target, nothing).await {
            Ok(_) | Err(Failure::Refused { .. } | Failure::Garbled(_)) => Ok(()),
            Err(failure) => Err(StsError::new(
                &failure,
                &self.destination(target).await,
                None,
            )),
        }
    }

    /// One call, with the parameters that `fill` sets.
    async fn call(
        &self,
        target: &StsTarget,
        fill: impl FnOnce(
            AssumeRoleWithWebIdentityFluentBuilder,
        ) -> AssumeRoleWithWebIdentityFluentBuilder,
    ) -> Result<AssumeRoleWithWebIdentityOutput, Failure> {
        let call = async {
            let call = fill(self.client(target).await?.assume_role_with_web_identity()).send();
            // At its trace level the SDK logs requests and refusals whole, and with them the token.
            call.with_subscriber(NoSubscriber::new())
                .await
                .map_err(|error| Failure::of(&error))
        };
        let failure = || Failure::NoAnswer(format!("no answer within {:?}", self.timeout));
        timeout(self.timeout, call)
            .await
            .unwrap_or_else(|_| Err(failure()))
    }

    async fn client(&self, target: &StsTarget) -> Result<Client, Failure> {
        let known = self
            .clients
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(target)
            .cloned();
        if let Some(client) = known {
            return Ok(client);
        }
        let url = self
            .url(target)
            .await
            .map_err(|InvalidSetting(text)| Failure::Unsendable(text))?;
        let client = self.connections.client(target, &url).await?;
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        // Keep the client of a concurrent call, and with it one pool of connections.
        Ok(clients.entry(target.clone()).or_insert(client).clone())
    }

    async fn destination(&self, target: &StsTarget) -> StsDestination {
        let url = self.url(target).await.ok();
        let hop = url
            .as_deref()
            .and_then(|url| url.parse().ok())
            .map(|uri| self.connections.network.hop(&uri));
        StsDestination {
            name: format!("STS at {}", url.unwrap_or_else(|| target.to_string())),
            is_aws: is_aws_sts(target.endpoint.as_deref()),
            proxy: hop
                .and_then(Result::ok)
                .flatten()
                .map(|hop| hop.to_string()),
        }
    }

    fn credentials(&self, answer: AssumeRoleWithWebIdentityOutput) -> Result<Credentials, Failure> {
        // Nothing is asked of `AssumedRoleUser`: MinIO leaves it empty.
        let credentials = answer
            .credentials
            .ok_or(Failure::Garbled("it has no credentials".to_owned()))?;
        // What the answer lacks, the SDK fills with empty strings and the year 1970.
        let texts = [
            &credentials.access_key_id,
            &credentials.secret_access_key,
            &credentials.session_token,
        ];
        if texts.iter().any(|text| text.is_empty()) {
            return Err(Failure::Garbled(
                "a part of the credentials is missing or empty".to_owned(),
            ));
        }
        let now = self.clock.now();
        let expiration = SystemTime::try_from(credentials.expiration).ok();
        let expiration = expiration.filter(|at| *at > now && *at <= now + LIFETIME_MAX).ok_or_else(|| {
            let text = "the credentials' `Expiration` is missing, over or too far away: compare this node's clock";
            Failure::Garbled(text.to_owned())
        })?;
        Ok(Credentials {
            access_key_id: credentials.access_key_id,
            secret_access_key: Zeroizing::new(credentials.secret_access_key),
            session_token: Zeroizing::new(credentials.session_token),
            expiration,
        })
    }
}

#[async_trait]
impl AssumeRole for Sts {
    async fn assume(&self, grant: &Grant, token: &JwtSvid) -> Result<Credentials, StsError> {
        let target = &grant.role.sts;
        let result = match self.turns.acquire(&grant.spiffe_id).await {
            None => Err(Failure::Busy),
            Some(_turn) => {
                let answer = self
                    .call(target, |call| build_request(call, grant, token))
                    .await;
                answer.and_then(|answer| self.credentials(answer))
            }
        };
        match result {
            Ok(credentials) => Ok(credentials),
            Err(failure) => Err(StsError::new(
                &failure,
                &self.destination(target).await,
                Some((grant, token)),
            )),
        }
    }
}

/// The request's parameters. `ProviderId` stays out: it is for OAuth 2.0, and with it STS takes no OIDC token.
fn build_request(
    call: AssumeRoleWithWebIdentityFluentBuilder,
    grant: &Grant,
    token: &JwtSvid,
) -> AssumeRoleWithWebIdentityFluentBuilder {
    let policies: Vec<_> = grant
        .role
        .policy_arns
        .iter()
        .map(|arn| PolicyDescriptorType::builder().arn(arn).build())
        .collect();
    call.role_arn(grant.role_arn.as_str())
        .role_session_name(grant.session_name.as_str())
        .web_identity_token(token.secret())
        .duration_seconds(i32::try_from(grant.role.duration.as_secs()).unwrap_or(i32::MAX))
        .set_policy(grant.role.policy.clone())
        .set_policy_arns((!policies.is_empty()).then_some(policies))
}

impl fmt::Debug for Sts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sts")
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(crate) mod tests;

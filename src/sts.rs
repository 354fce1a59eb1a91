//! Client of STS: exchanges a JWT-SVID for credentials by `AssumeRoleWithWebIdentity`, and
//! credentials for those of the next role in a chain by `AssumeRole`.
//!
//! The first call is not signed, since the token is the proof. The second is signed with the
//! credentials of that call alone. The SDK has no other credentials, and no provider of them. Of
//! the environment it gets only what [`NetworkSettings`] holds.

use std::fmt;
use std::path::PathBuf;
use std::pin::pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use aws_sdk_sts::Client;
use aws_sdk_sts::error::SdkError;
use aws_sdk_sts::operation::assume_role_with_web_identity::builders::AssumeRoleWithWebIdentityFluentBuilder;
use aws_sdk_sts::types::PolicyDescriptorType;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use tokio::time::timeout;
use tracing::instrument::WithSubscriber;
use tracing::subscriber::NoSubscriber;
use zeroize::Zeroizing;

use crate::clock::Clock;
use crate::config::is_aws_sts;
use crate::credentials::Credentials;
use crate::identity::SpiffeId;
use crate::limits::{FairSemaphore, KeyedLogQuota};
use crate::role::{Grant, StsTarget};
use crate::svid::JwtSvid;

mod advice;
mod cached_clients;
mod chained;
mod client;
mod error;
mod error_response;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod network;
mod no_proxy;
mod reason;
mod redaction;
mod resolver;
mod response;
mod trust;

pub use error::{RetryPolicy, StsError};
pub use network::{InvalidSetting, NetworkSettings, Proxy};
pub use reason::StsReason;
pub use resolver::{BlockingCalls, HostResolver};

// IAM Roles Anywhere is called in the same way.
pub(crate) use advice::StsDestination;
pub(crate) use cached_clients::CachedClients;
pub(crate) use client::HttpConnector;
pub(crate) use error::Failure;
pub(crate) use response::read_response;
pub(crate) use trust::to_pem;

use error::FailedCall;

/// Maximum accepted time until `Expiration`. No session exceeds 12 hours, so a later one is invalid
/// even with a wide margin for clocks.
const MAX_LIFETIME: Duration = Duration::from_secs(36 * 3600);
/// Token that [`Sts::probe`] sends. It is too short to be a real token, and [`NO_ROLE`] is not a
/// real role.
const NO_TOKEN: &str = "none";
const NO_ROLE: &str = "arn:aws:iam::000000000000:role/none";

/// Share of the size for session policies and tags from which an operator is warned, in percent.
const PACKED_SIZE_WARNING: i32 = 80;
/// Minimum interval between two such warnings about one role.
const PACKED_SIZE_LOG_INTERVAL: Duration = Duration::from_secs(3600);
/// Number of roles with such a warning in one interval.
const MAX_PACKED_SIZE_LOGS: usize = 64;

/// Client that exchanges a JWT-SVID for the credentials of a role.
#[async_trait]
pub trait AssumeRole: Send + Sync + fmt::Debug {
    /// Assumes the first role of `grant` once, with `token`.
    async fn assume(&self, grant: &Grant, token: &JwtSvid) -> Result<Credentials, StsError>;

    /// Assumes the last role in the chain of `grant` once, with the credentials of the session
    /// before it.
    async fn assume_chained(
        &self,
        grant: &Grant,
        previous: &Credentials,
    ) -> Result<Credentials, StsError>;
}

/// Settings of the STS client, from `[sts]`.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Timeout of one call, from the connection to the last byte of the response.
    pub timeout: Duration,
    /// Maximum number of concurrent calls. One SPIFFE ID may use a quarter of them; further calls
    /// wait. At the limit the SPIFFE ID with the most loses its newest call to one with fewer.
    pub max_concurrent: usize,
    /// PEM file with the only certificates that verify an `endpoint` outside AWS. The system's
    /// certificates always verify AWS's STS.
    pub ca_file: Option<PathBuf>,
    /// Proxies and variants of AWS endpoints.
    pub network: NetworkSettings,
    /// Threads for files and host names.
    pub blocking: BlockingCalls,
}

/// Returns the permits of calls, of which one SPIFFE ID may use a quarter.
pub(crate) fn permits(max_concurrent: usize) -> FairSemaphore<SpiffeId> {
    FairSemaphore::new(max_concurrent, (max_concurrent / 4).max(2))
}

/// Client of AWS's STS, and of other servers that speak its protocol.
pub struct Sts {
    connections: HttpConnector,
    clients: CachedClients<StsTarget, Client>,
    permits: FairSemaphore<SpiffeId>,
    timeout: Duration,
    clock: Clock,
    packed_size_log: KeyedLogQuota,
}

impl Sts {
    /// Creates a client without I/O.
    pub fn new(settings: Settings, clock: Clock) -> Self {
        Self {
            connections: HttpConnector::new(
                settings.network,
                settings.ca_file.as_deref(),
                settings.timeout,
                settings.blocking,
            ),
            clients: CachedClients::new(),
            permits: permits(settings.max_concurrent),
            timeout: settings.timeout,
            clock,
            packed_size_log: KeyedLogQuota::new(MAX_PACKED_SIZE_LOGS, PACKED_SIZE_LOG_INTERVAL),
        }
    }

    /// Checks the environment variables that calls to these targets use, and loads their CA
    /// certificates. Fails for an invalid variable, and for a `ca_file` without certificates.
    /// Missing certificates are logged, and loaded once they exist.
    pub async fn prepare(&self, targets: &[&StsTarget]) -> Result<(), InvalidSetting> {
        for target in targets {
            let url = self.url(target).await?;
            let is_aws = is_aws_sts(target.endpoint.as_deref());
            // A file system that hangs must not hold up the start.
            if let Ok(result) = timeout(self.timeout, self.connections.prepare(&url, is_aws)).await
            {
                result?;
            }
        }
        Ok(())
    }

    /// Returns the URL that calls for `target` go to. Fails if the endpoint or the region is
    /// invalid.
    pub async fn url(&self, target: &StsTarget) -> Result<String, InvalidSetting> {
        self.connections.network.sts_url(target).await
    }

    /// Checks for `/readyz` whether STS responds to an invalid token. Any response of STS counts.
    /// Fails if none comes in time.
    pub async fn probe(&self, target: &StsTarget) -> Result<(), StsError> {
        let invalid_token = |call: AssumeRoleWithWebIdentityFluentBuilder| {
            call.role_arn(NO_ROLE)
                .role_session_name(NO_TOKEN)
                .web_identity_token(NO_TOKEN)
        };
        let call = |client: Client| invalid_token(client.assume_role_with_web_identity()).send();
        match self.call(target, call).await {
            Ok(_) | Err(Failure::Rejected { .. } | Failure::InvalidResponse(_)) => Ok(()),
            Err(failure) => Err(StsError::new(
                &failure,
                &self.destination(target).await,
                None,
            )),
        }
    }

    /// Sends the one call that `send` makes with a client, within the timeout.
    async fn call<T, E, F>(
        &self,
        target: &StsTarget,
        send: impl FnOnce(Client) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, SdkError<E, HttpResponse>>>,
    {
        let call = async {
            let call = send(self.client(target).await?);
            // At its trace level the SDK logs whole requests and responses, the token included.
            call.with_subscriber(NoSubscriber::new())
                .await
                .map_err(|error| Failure::of(&error))
        };
        let failure = || Failure::Unreachable(format!("no answer within {:?}", self.timeout));
        timeout(self.timeout, call)
            .await
            .unwrap_or_else(|_| Err(failure()))
    }

    /// Sends the one call for `grant` that `send` makes, once a permit of its SPIFFE ID is free.
    async fn call_for<T, E, F>(
        &self,
        grant: &Grant,
        send: impl FnOnce(Client) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, SdkError<E, HttpResponse>>>,
    {
        match self.permits.acquire_evicting(&grant.spiffe_id).await {
            None => Err(Failure::Busy),
            Some(permit) => {
                let call = pin!(self.call(&grant.role.sts, send));
                permit.run(call).await.unwrap_or(Err(Failure::Busy))
            }
        }
    }

    /// Returns the result of a call, with an error that names the call.
    async fn result(
        &self,
        call: FailedCall<'_>,
        result: Result<Credentials, Failure>,
    ) -> Result<Credentials, StsError> {
        match result {
            Ok(credentials) => Ok(credentials),
            Err(failure) => {
                let at = self.destination(&call.grant.role.sts).await;
                Err(StsError::new(&failure, &at, Some(call)))
            }
        }
    }

    async fn client(&self, target: &StsTarget) -> Result<Client, Failure> {
        let create = async {
            let url = self.url(target).await;
            let url = url.map_err(|InvalidSetting(text)| Failure::InvalidRequest(text))?;
            self.connections.client(target, &url).await
        };
        let replaced = self.connections.replaced_roots();
        self.clients.get(target, replaced, create).await
    }

    async fn destination(&self, target: &StsTarget) -> StsDestination {
        let url = self.url(target).await.ok();
        StsDestination {
            is_aws: is_aws_sts(target.endpoint.as_deref()),
            proxy: url
                .as_deref()
                .and_then(|url| self.connections.network.proxy_name(url)),
            name: format!("STS at {}", url.unwrap_or_else(|| target.to_string())),
        }
    }

    /// Warns if the session policies and tags of a session nearly reach the limit of STS. `sizes`
    /// has the share of the limit in percent, by its old and its new name.
    fn check_packed_size(&self, grant: &Grant, sizes: [Option<i32>; 2]) {
        let role_arn = grant.issued_role_arn();
        let percent = sizes.into_iter().flatten().max();
        let Some(percent) = percent.filter(|percent| *percent > PACKED_SIZE_WARNING) else {
            return;
        };
        if let Some(missed) = self.packed_size_log.take(role_arn.as_str()) {
            tracing::warn!(
                spiffe_id = %grant.spiffe_id, %role_arn, percent, missed,
                "session policies and tags nearly reach the limit of STS"
            );
        }
    }

    fn credentials(
        &self,
        credentials: Option<aws_sdk_sts::types::Credentials>,
    ) -> Result<Credentials, Failure> {
        // `AssumedRoleUser` is not required: MinIO leaves it empty.
        let credentials = credentials.ok_or(Failure::InvalidResponse(
            "the response has no credentials".to_owned(),
        ))?;
        // The SDK fills missing fields with empty strings and the year 1970.
        let expiration = SystemTime::try_from(credentials.expiration).unwrap_or(UNIX_EPOCH);
        let credentials = Credentials {
            access_key_id: credentials.access_key_id,
            secret_access_key: Zeroizing::new(credentials.secret_access_key),
            session_token: Zeroizing::new(credentials.session_token),
            expiration,
            first_session_name: None,
        };
        checked(credentials, self.clock.now())
    }
}

/// Returns credentials of a response if they can be used at `now`.
pub(crate) fn checked(credentials: Credentials, now: SystemTime) -> Result<Credentials, Failure> {
    let texts = [
        &credentials.access_key_id,
        &*credentials.secret_access_key,
        &*credentials.session_token,
    ];
    if texts.iter().any(|text| text.is_empty()) {
        return Err(Failure::InvalidResponse(
            "a part of the credentials is missing or empty".to_owned(),
        ));
    }
    let expiration = credentials.expiration;
    if expiration <= now || expiration > now + MAX_LIFETIME {
        let text = "`Expiration` of the credentials is missing, past or too late; compare this node's clock with STS's";
        return Err(Failure::InvalidResponse(text.to_owned()));
    }
    Ok(credentials)
}

#[async_trait]
impl AssumeRole for Sts {
    async fn assume(&self, grant: &Grant, token: &JwtSvid) -> Result<Credentials, StsError> {
        let build = |client: Client| {
            build_request(client.assume_role_with_web_identity(), grant, token).send()
        };
        let answer = self.call_for(grant, build).await;
        let credentials = answer.and_then(|answer| {
            #[expect(deprecated, reason = "other implementations of STS have only this one")]
            let sizes = [answer.packed_policy_size, answer.session_token_utilization];
            self.check_packed_size(grant, sizes);
            self.credentials(answer.credentials)
        });
        self.result(FailedCall::with_token(grant, token), credentials)
            .await
    }

    async fn assume_chained(
        &self,
        grant: &Grant,
        previous: &Credentials,
    ) -> Result<Credentials, StsError> {
        let failed = FailedCall::with_session(grant, previous);
        let Some(session) = grant.chain().last() else {
            let text = "the grant has no chain".to_owned();
            return self
                .result(failed, Err(Failure::InvalidRequest(text)))
                .await;
        };
        let build = |client: Client| chained::send(client, session, previous);
        let answer = self.call_for(grant, build).await;
        let credentials = answer.and_then(|answer| {
            #[expect(deprecated, reason = "other implementations of STS have only this one")]
            let sizes = [answer.packed_policy_size, answer.session_token_utilization];
            self.check_packed_size(grant, sizes);
            self.credentials(answer.credentials)
        });
        self.result(failed, credentials).await
    }
}

/// Sets the request's parameters. `ProviderId` stays out: it is for OAuth 2.0, and with it STS does
/// not accept an OIDC token.
fn build_request(
    call: AssumeRoleWithWebIdentityFluentBuilder,
    grant: &Grant,
    token: &JwtSvid,
) -> AssumeRoleWithWebIdentityFluentBuilder {
    call.role_arn(grant.role_arn.as_str())
        .role_session_name(grant.session_name.as_str())
        .web_identity_token(token.secret())
        .duration_seconds(i32::try_from(grant.role.duration.as_secs()).unwrap_or(i32::MAX))
        .set_policy(grant.details().policy.clone())
        .set_policy_arns(policy_descriptors(&grant.details().policy_arns))
}

/// Returns the parameter `PolicyArns`, which is absent for an empty list.
fn policy_descriptors(arns: &[String]) -> Option<Vec<PolicyDescriptorType>> {
    let descriptor = |arn| PolicyDescriptorType::builder().arn(arn).build();
    (!arns.is_empty()).then(|| arns.iter().map(descriptor).collect())
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

//! Client of IAM Roles Anywhere: exchanges an X.509-SVID for credentials by `CreateSession`.
//!
//! The request is signed with the key of the SVID, which is the proof. The key is used for that
//! one signature, and cleared afterwards.

use std::collections::HashMap;
use std::fmt;
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use aws_smithy_runtime_api::client::http::{HttpConnector as _, SharedHttpConnector};
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_types::body::SdkBody;
use tokio::time::{Instant, timeout};
use tracing::instrument::WithSubscriber;
use tracing::subscriber::NoSubscriber;
use zeroize::Zeroizing;

use crate::clock::Clock;
use crate::config::is_aws_roles_anywhere_host;
use crate::credentials::Credentials;
use crate::identity::SpiffeId;
use crate::limits::FairSemaphore;
use crate::role::{Grant, RolesAnywhereTarget};
use crate::sts::{
    CachedClients, Failure, HttpConnector, InvalidSetting, Settings, StsDestination, StsError,
    checked, permits, read_response,
};
use crate::svid::X509Svid;

pub mod certificate;
mod error;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod request;
mod session;
pub(crate) mod signature;
mod svid_key;

use error::is_name_rejected;
use request::SignedSessionRequest;

/// Time for which a profile that accepts no session names gets none. An operator may change it.
const NAME_RETRY: Duration = Duration::from_secs(3600);

/// Client that exchanges an X.509-SVID for the credentials of a role.
#[async_trait]
pub trait CreateSession: Send + Sync + fmt::Debug {
    /// Creates a session of the role of `grant` once, with `svid`.
    async fn create_session(
        &self,
        grant: &Grant,
        at: &RolesAnywhereTarget,
        svid: &X509Svid,
    ) -> Result<Credentials, StsError>;
}

/// Client of AWS's IAM Roles Anywhere, and of other servers that speak its protocol.
pub struct RolesAnywhere {
    connections: HttpConnector,
    connectors: CachedClients<String, SharedHttpConnector>,
    /// Profiles that have rejected the name of a session, with the time of the rejection.
    unnamed: Mutex<HashMap<String, Instant>>,
    permits: FairSemaphore<SpiffeId>,
    timeout: Duration,
    clock: Clock,
}

impl RolesAnywhere {
    /// Creates a client without I/O. `ca_file` of the settings is that of `[roles_anywhere]`.
    pub fn new(settings: Settings, clock: Clock) -> Self {
        Self {
            permits: permits(settings.max_concurrent),
            timeout: settings.timeout,
            connections: HttpConnector::new(
                settings.network,
                settings.ca_file.as_deref(),
                settings.timeout,
                settings.blocking,
            ),
            connectors: CachedClients::new(),
            unnamed: Mutex::default(),
            clock,
        }
    }

    /// Checks the environment variables that calls to these targets use, and loads their CA
    /// certificates, as [`crate::sts::Sts::prepare`] does.
    pub async fn prepare(&self, targets: &[&RolesAnywhereTarget]) -> Result<(), InvalidSetting> {
        for target in targets {
            let url = self.url(target)?;
            let prepare = self.connections.prepare(&url, is_aws_url(&url));
            // A file system that hangs must not hold up the start.
            if let Ok(result) = timeout(self.timeout, prepare).await {
                result?;
            }
        }
        Ok(())
    }

    /// Returns the URL that calls for `target` go to. Fails if the region is invalid.
    pub fn url(&self, target: &RolesAnywhereTarget) -> Result<String, InvalidSetting> {
        self.connections.network.roles_anywhere_url(target)
    }

    /// Checks for `/readyz` whether the server responds to a request without a signature. Any
    /// response counts. Fails if none comes in time.
    pub async fn probe(&self, target: &RolesAnywhereTarget) -> Result<(), StsError> {
        let sending = async {
            let url = self.url(target).map_err(invalid)?;
            let request = HttpRequest::new(SdkBody::from("{}"));
            self.send_to(&url, request, signature::SESSIONS_PATH).await
        };
        match self.in_time(sending).await {
            Ok(_) | Err(Failure::Rejected { .. } | Failure::InvalidResponse(_)) => Ok(()),
            Err(failure) => Err(StsError::new(&failure, &self.destination(target), None)),
        }
    }

    /// Creates a session, and once more without a name if the profile does not accept one.
    async fn create(
        &self,
        grant: &Grant,
        at: &RolesAnywhereTarget,
        svid: &X509Svid,
    ) -> Result<Credentials, Failure> {
        let rejected = self.unnamed().get(&at.profile_arn).copied();
        let with_name = rejected.is_none_or(|at| at.elapsed() >= NAME_RETRY);
        let session = self.in_time(self.send(grant, at, svid, with_name)).await;
        match session {
            Err(failure) if with_name && is_name_rejected(&failure) => {
                let known = self
                    .unnamed()
                    .insert(at.profile_arn.clone(), Instant::now());
                if known.is_none() {
                    tracing::warn!(
                        profile = at.profile_arn,
                        "profile of IAM Roles Anywhere accepts no session names; sessions have the certificate's serial number as \
                         name, which changes with each certificate"
                    );
                }
                self.in_time(self.send(grant, at, svid, false)).await
            }
            session => session,
        }
    }

    async fn send(
        &self,
        grant: &Grant,
        at: &RolesAnywhereTarget,
        svid: &X509Svid,
        with_name: bool,
    ) -> Result<Credentials, Failure> {
        let url = self.url(at).map_err(invalid)?;
        let host = url.split("://").nth(1).unwrap_or_default();
        let now = self.clock.now();
        let signed = SignedSessionRequest::new(grant, at, host, svid, with_name, now)
            .map_err(|error| Failure::InvalidRequest(error.to_string()))?;
        let mut request = HttpRequest::new(SdkBody::from(signed.body));
        for (name, value) in signed.headers {
            request.headers_mut().insert(name, value);
        }
        let body = self.send_to(&url, request, &signed.path).await?;
        checked(session::read(&body, &grant.session_name)?, now)
    }

    /// Sends a `POST` to a path at `url`. Returns the body of a successful response.
    async fn send_to(
        &self,
        url: &str,
        mut request: HttpRequest,
        path: &str,
    ) -> Result<Zeroizing<Vec<u8>>, Failure> {
        let unbuilt = |_| Failure::InvalidRequest("the request is invalid".to_owned());
        request.set_method("POST").map_err(unbuilt)?;
        request.set_uri(format!("{url}{path}")).map_err(unbuilt)?;
        let create = self.connections.connector(url, is_aws_url(url));
        let replaced = self.connections.replaced_roots();
        let connector = self
            .connectors
            .get(&url.to_owned(), replaced, create)
            .await?;
        // At their trace level, libraries log whole requests and responses.
        let response = connector.call(request).with_subscriber(NoSubscriber::new());
        read_response(response.await).await
    }

    async fn in_time<T>(
        &self,
        call: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let late = || Failure::Unreachable(format!("no answer within {:?}", self.timeout));
        timeout(self.timeout, call)
            .await
            .unwrap_or_else(|_| Err(late()))
    }

    fn destination(&self, target: &RolesAnywhereTarget) -> StsDestination {
        let url = self.url(target).unwrap_or_else(|_| target.to_string());
        StsDestination {
            is_aws: is_aws_url(&url),
            proxy: self.connections.network.proxy_name(&url),
            name: format!("IAM Roles Anywhere at {url}"),
        }
    }

    fn unnamed(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.unnamed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns true for a host of AWS, which the system's certificates alone verify.
fn is_aws_url(url: &str) -> bool {
    url.strip_prefix("https://")
        .is_some_and(is_aws_roles_anywhere_host)
}

fn invalid(InvalidSetting(text): InvalidSetting) -> Failure {
    Failure::InvalidRequest(text)
}

#[async_trait]
impl CreateSession for RolesAnywhere {
    async fn create_session(
        &self,
        grant: &Grant,
        at: &RolesAnywhereTarget,
        svid: &X509Svid,
    ) -> Result<Credentials, StsError> {
        let session = match self.permits.acquire_evicting(&grant.spiffe_id).await {
            None => Err(Failure::Busy),
            Some(permit) => {
                let creating = pin!(self.create(grant, at, svid));
                permit.run(creating).await.unwrap_or(Err(Failure::Busy))
            }
        };
        session.map_err(|failure| error::of(&failure, &self.destination(at), grant, at))
    }
}

impl fmt::Debug for RolesAnywhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RolesAnywhere")
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;

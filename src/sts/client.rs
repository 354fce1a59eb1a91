//! The SDK's client, with everything taken away that it would look for by itself: credentials, profiles, IMDS, retries.

use std::mem::replace;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_sts::Client;
use aws_sdk_sts::config::interceptors::BeforeDeserializationInterceptorContextMut;
use aws_sdk_sts::config::retry::RetryConfig;
use aws_sdk_sts::config::timeout::TimeoutConfig;
use aws_sdk_sts::config::{
    BehaviorVersion, ConfigBag, Intercept, Region, RuntimeComponents, SharedHttpClient,
    StalledStreamProtectionConfig,
};
use aws_sdk_sts::error::BoxError;
use aws_smithy_http_client::Connector;
use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use aws_smithy_runtime_api::client::http::{
    HttpConnectorSettings, SharedHttpConnector, http_client_fn,
};
use aws_smithy_types::body::SdkBody;
use http_body_util::Limited;
use hyper::Uri;

use super::error::Failure;
use super::network::{InvalidSetting, NetworkSettings};
use super::trust::{NoRoots, Roots};
use crate::config::is_aws_sts;
use crate::role::StsTarget;

/// The most that connecting may take of a call's time, so that an unreachable STS is told from a slow one.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Shorter than the servers and the proxies on the way keep an idle connection, so that no call meets a closing one.
const IDLE: Duration = Duration::from_secs(15);
/// Credentials and an error text are a few kilobytes.
const ANSWER_MAX: usize = 256 * 1024;

/// What all clients have in common.
pub(super) struct HttpConnector {
    pub(super) network: NetworkSettings,
    system: Arc<Roots>,
    ca_file: Option<Arc<Roots>>,
    connect_timeout: Duration,
}

impl HttpConnector {
    pub(super) fn new(network: NetworkSettings, ca_file: Option<&Path>, timeout: Duration) -> Self {
        Self {
            network,
            system: Roots::of_system(),
            ca_file: ca_file.map(Roots::of_file),
            connect_timeout: CONNECT_TIMEOUT.min(timeout),
        }
    }

    /// Checks the variables that calls for `target` use, and loads its CA certificates. Missing certificates are not an error. The
    /// system's are loaded in the background, so that a start does not wait for them.
    pub(super) async fn prepare(&self, target: &StsTarget) -> Result<(), InvalidSetting> {
        let url = self.network.sts_url(target).await?;
        if let Ok(uri) = url.parse() {
            self.network.hop(&uri)?;
        }
        let Some(roots) = self.roots(target, &url).cloned() else {
            return Ok(());
        };
        if Arc::ptr_eq(&roots, &self.system) {
            tokio::spawn(async move { roots.store().await.map(drop) });
            return Ok(());
        }
        match roots.store().await {
            Err(NoRoots::Invalid(text)) => Err(InvalidSetting(text)),
            Err(NoRoots::Missing(_)) | Ok(_) => Ok(()),
        }
    }

    /// A client for `target`, which is at `url`.
    pub(super) async fn client(&self, target: &StsTarget, url: &str) -> Result<Client, Failure> {
        // The SDK would find out too late, and say so with the whole request.
        let uri: Option<Uri> = url.parse().ok();
        let uri = uri.filter(|uri| matches!(uri.scheme_str(), Some("http" | "https")));
        let uri = uri.ok_or(Failure::Unsendable(
            "`endpoint` is no URL that begins with https://".to_owned(),
        ))?;
        let proxy = self
            .network
            .proxy(&uri)
            .map_err(|InvalidSetting(text)| Failure::Unsendable(text))?;
        let trust = match self.roots(target, url) {
            Some(roots) => roots
                .store()
                .await
                .map_err(|problem| Failure::Untrusted(problem.text().to_owned()))?,
            None => TrustStore::empty(),
        };
        let config = aws_sdk_sts::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(target.region.clone()))
            // One function decides on the host, for the daemon and for `awsvid check`.
            .endpoint_url(url)
            .http_client(self.http_client(proxy, trust)?)
            // `issue` knows when to try again, and the whole call has one deadline.
            .retry_config(RetryConfig::disabled())
            .timeout_config(TimeoutConfig::disabled())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .interceptor(LimitAnswer)
            .build();
        Ok(Client::from_conf(config))
    }

    /// The certificates that the server at `url` is verified by; `None` without TLS. AWS's STS is never verified by `ca_file`: the
    /// holder of that private key could pass for AWS.
    fn roots(&self, target: &StsTarget, url: &str) -> Option<&Arc<Roots>> {
        match &self.ca_file {
            _ if url.starts_with("http://") => None,
            Some(file) if !is_aws_sts(target.endpoint.as_deref()) => Some(file),
            _ => Some(&self.system),
        }
    }

    fn http_client(
        &self,
        proxy: ProxyConfig,
        trust: TrustStore,
    ) -> Result<SharedHttpClient, Failure> {
        let tls = TlsContext::builder().with_trust_store(trust).build();
        let tls = tls.map_err(|_| Failure::Unsendable("TLS cannot be set up".to_owned()))?;
        let timeouts = HttpConnectorSettings::builder()
            .connect_timeout(self.connect_timeout)
            .build();
        let connector = Connector::builder()
            .tls_provider(Provider::Rustls(CryptoMode::AwsLc))
            .proxy_config(proxy)
            .connector_settings(timeouts)
            .pool_idle_timeout(IDLE)
            .tls_context(tls);
        let connector = SharedHttpConnector::new(connector.build());
        Ok(http_client_fn(move |_, _| connector.clone()))
    }
}

/// The SDK reads an answer to its end, however far that is.
#[derive(Debug)]
struct LimitAnswer;

impl Intercept for LimitAnswer {
    fn name(&self) -> &'static str {
        "LimitAnswer"
    }

    fn modify_before_deserialization(
        &self,
        context: &mut BeforeDeserializationInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let body = context.response_mut().body_mut();
        *body = SdkBody::from_body_1_x(Limited::new(replace(body, SdkBody::taken()), ANSWER_MAX));
        Ok(())
    }
}

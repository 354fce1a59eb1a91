//! The SDK's client without its own sources of credentials: no profiles, no IMDS, no retries.

use std::mem::replace;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_sts::Client;
use aws_sdk_sts::config::interceptors::BeforeDeserializationInterceptorContextMut;
use aws_sdk_sts::config::retry::RetryConfig;
use aws_sdk_sts::config::timeout::TimeoutConfig;
use aws_sdk_sts::config::{
    BehaviorVersion, ConfigBag, Intercept, Region, RuntimeComponents, StalledStreamProtectionConfig,
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
use super::resolver::{BlockingCalls, HostResolver};
use super::trust::{NoRoots, Roots};
use crate::config::is_aws_sts;
use crate::role::StsTarget;

/// Maximum time for the connection, so that an unreachable STS is distinct from a slow one.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum idle time of a connection. It is shorter than that of servers and proxies, so that no
/// call meets a closing connection.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(15);
/// Maximum size of a response. Credentials and an error text are a few kilobytes.
pub(super) const MAX_RESPONSE_BYTES: usize = 256 * 1024;

/// Settings and certificates that all clients share.
pub(crate) struct HttpConnector {
    pub(crate) network: NetworkSettings,
    system: Arc<Roots>,
    ca_file: Option<Arc<Roots>>,
    hosts: HostResolver,
    connect_timeout: Duration,
}

impl HttpConnector {
    pub(crate) fn new(
        network: NetworkSettings,
        ca_file: Option<&Path>,
        timeout: Duration,
        blocking: BlockingCalls,
    ) -> Self {
        let BlockingCalls { files, hosts } = blocking;
        Self {
            network,
            system: Roots::of_system(files.clone()),
            ca_file: ca_file.map(|path| Roots::of_file(path, files)),
            hosts,
            connect_timeout: CONNECT_TIMEOUT.min(timeout),
        }
    }

    /// Checks the variables that calls to `url` use, and loads its CA certificates. Missing
    /// certificates are not an error. The system's are loaded in the background, so that the start
    /// does not wait for them. `is_aws` is whether AWS runs the server.
    pub(crate) async fn prepare(&self, url: &str, is_aws: bool) -> Result<(), InvalidSetting> {
        if let Ok(uri) = url.parse() {
            self.network.hop(&uri)?;
        }
        let Some(roots) = self.roots(url, is_aws).cloned() else {
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

    /// Creates a client for `target`, which is at `url`.
    pub(super) async fn client(&self, target: &StsTarget, url: &str) -> Result<Client, Failure> {
        let is_aws = is_aws_sts(target.endpoint.as_deref());
        let connector = self.connector(url, is_aws).await?;
        let config = aws_sdk_sts::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(target.region.clone()))
            // One function selects the host, for the daemon and for `awsvid check`.
            .endpoint_url(url)
            .http_client(http_client_fn(move |_, _| connector.clone()))
            // `TokenExchanger` retries, and the whole call has one deadline.
            .retry_config(RetryConfig::disabled())
            .timeout_config(TimeoutConfig::disabled())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .interceptor(LimitResponse)
            .build();
        Ok(Client::from_conf(config))
    }

    /// Creates a pool of connections to the server at `url`, through the proxy for it. `is_aws` is
    /// whether AWS runs the server, so that the system's certificates verify it.
    pub(crate) async fn connector(
        &self,
        url: &str,
        is_aws: bool,
    ) -> Result<SharedHttpConnector, Failure> {
        // The SDK finds an invalid URL late, and its error quotes the whole request.
        let uri: Option<Uri> = url.parse().ok();
        let uri = uri.filter(|uri| matches!(uri.scheme_str(), Some("http" | "https")));
        let uri = uri.ok_or(Failure::InvalidRequest(
            "`endpoint` is not a URL that begins with https://; correct it in [sts]".to_owned(),
        ))?;
        let proxy = self
            .network
            .proxy(&uri)
            .map_err(|InvalidSetting(text)| Failure::InvalidRequest(text))?;
        let trust = match self.roots(url, is_aws) {
            Some(roots) => roots
                .store()
                .await
                .map_err(|problem| Failure::Untrusted(problem.text().to_owned()))?,
            None => TrustStore::empty(),
        };
        self.connector_with(proxy, trust)
    }

    /// Returns the number of times that certificates were replaced. Clients that were created
    /// before the latest time are outdated.
    pub(crate) fn replaced_roots(&self) -> usize {
        let roots = [Some(&self.system), self.ca_file.as_ref()];
        roots
            .into_iter()
            .flatten()
            .map(|roots| roots.replaced())
            .sum()
    }

    /// Returns the certificates that verify the server at `url`, or `None` without TLS. `ca_file`
    /// never verifies a server of AWS: the holder of that private key could pass for AWS.
    fn roots(&self, url: &str, is_aws: bool) -> Option<&Arc<Roots>> {
        match &self.ca_file {
            _ if url.starts_with("http://") => None,
            Some(file) if !is_aws => Some(file),
            _ => Some(&self.system),
        }
    }

    fn connector_with(
        &self,
        proxy: ProxyConfig,
        trust: TrustStore,
    ) -> Result<SharedHttpConnector, Failure> {
        let tls = TlsContext::builder().with_trust_store(trust).build();
        let tls = tls.map_err(|_| Failure::InvalidRequest("TLS setup failed".to_owned()))?;
        let timeouts = HttpConnectorSettings::builder()
            .connect_timeout(self.connect_timeout)
            .build();
        let connector = Connector::builder()
            .tls_provider(Provider::Rustls(CryptoMode::AwsLc))
            .proxy_config(proxy)
            .connector_settings(timeouts)
            .pool_idle_timeout(POOL_IDLE_TIMEOUT)
            .tls_context(tls);
        let connector = connector.build_with_resolver(self.hosts.clone());
        Ok(SharedHttpConnector::new(connector))
    }
}

/// Interceptor that limits the size of a response. The SDK itself reads without a limit.
#[derive(Debug)]
struct LimitResponse;

impl Intercept for LimitResponse {
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
        *body = SdkBody::from_body_1_x(Limited::new(
            replace(body, SdkBody::taken()),
            MAX_RESPONSE_BYTES,
        ));
        Ok(())
    }
}

//! The SDK's client, with everything taken away that it would look for by itself: credentials, profiles, IMDS, retries.

use std::fmt;
use std::mem::replace;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use aws_sdk_sts::Client;
use aws_sdk_sts::config::interceptors::BeforeDeserializationInterceptorContextMut;
use aws_sdk_sts::config::retry::RetryConfig;
use aws_sdk_sts::config::timeout::TimeoutConfig;
use aws_sdk_sts::config::{
    BehaviorVersion, ConfigBag, Intercept, Region, RuntimeComponents, SharedHttpClient, StalledStreamProtectionConfig,
};
use aws_sdk_sts::error::BoxError;
use aws_smithy_http_client::Connector;
use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use aws_smithy_runtime_api::client::http::{HttpConnectorSettings, SharedHttpConnector, http_client_fn};
use aws_smithy_types::body::SdkBody;
use http_body_util::Limited;
use hyper::Uri;
use hyper::header::HeaderValue;
use hyper_util::client::proxy::matcher::Matcher;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use thiserror::Error;

use super::error::Failure;
use crate::role::StsTarget;

/// The most that connecting may take of a call's time, so that an unreachable STS is told from a slow one.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Shorter than the servers and the proxies on the way keep an idle connection, so that no call meets a closing one.
const IDLE: Duration = Duration::from_secs(15);
/// Credentials and an error text are a few kilobytes.
const ANSWER_MAX: usize = 256 * 1024;

/// A setting that STS can't be called with. The text is for the operator.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct InvalidSetting(pub String);

/// How the network is to be used, as the environment variables say that all SDKs share.
#[derive(Clone, Default)]
pub struct Network {
    https_proxy: Option<String>,
    http_proxy: Option<String>,
    no_proxy: Option<String>,
    fips: bool,
    dual_stack: bool,
}

impl Network {
    /// Reads `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY` (or in small letters), `AWS_USE_FIPS_ENDPOINT` and
    /// `AWS_USE_DUALSTACK_ENDPOINT`. `lookup` gives a variable's value.
    pub fn from_env(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, InvalidSetting> {
        let text = |name: &str| {
            let value = lookup(name).or_else(|| lookup(&name.to_ascii_lowercase()));
            value.filter(|value| !value.trim().is_empty())
        };
        let proxy = |name: &str| text(name).map(|value| proxy_url(name, &value)).transpose();
        let switch = |name: &str| match lookup(name).unwrap_or_default().to_ascii_lowercase().as_str() {
            "" | "false" => Ok(false),
            "true" => Ok(true),
            _ => Err(InvalidSetting(format!("the environment variable {name} is neither true nor false"))),
        };
        let any = proxy("ALL_PROXY")?;
        Ok(Self {
            https_proxy: proxy("HTTPS_PROXY")?.or_else(|| any.clone()),
            http_proxy: proxy("HTTP_PROXY")?.or(any),
            no_proxy: text("NO_PROXY"),
            fips: switch("AWS_USE_FIPS_ENDPOINT")?,
            dual_stack: switch("AWS_USE_DUALSTACK_ENDPOINT")?,
        })
    }

    /// The proxy on the way to `to`, for who goes there without the SDK.
    pub fn hop(&self, to: &Uri) -> Option<Hop> {
        let matcher = Matcher::builder().all(self.url(to)?).no(self.no_proxy.as_deref().unwrap_or_default()).build();
        let found = matcher.intercept(to)?;
        let uri = found.uri();
        Some(Hop {
            secure: uri.scheme_str() == Some("https"),
            host: uri.host()?.trim_matches(['[', ']']).to_owned(),
            port: uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 }),
            authorization: found.basic_auth().cloned(),
        })
    }

    /// Of the proxy that would be on the way to `endpoint` if it were no exception.
    fn url(&self, endpoint: &Uri) -> Option<&str> {
        let proxy = if endpoint.scheme_str() == Some("http") { &self.http_proxy } else { &self.https_proxy };
        // A proxy's loopback is not this node's.
        proxy.as_deref().filter(|_| !is_loopback(endpoint.host().unwrap_or_default()))
    }

    /// The proxy on the way to `endpoint`, if there is one.
    fn proxy(&self, endpoint: &Uri) -> ProxyConfig {
        // The URL was parsed before, so there is no error to lose.
        match self.url(endpoint).and_then(|url| ProxyConfig::all(url).ok()) {
            Some(proxy) => proxy.no_proxy(self.no_proxy.as_deref().unwrap_or_default()),
            None => ProxyConfig::disabled(),
        }
    }
}

/// A proxy to go through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hop {
    /// Whether it wants TLS itself.
    pub secure: bool,
    /// Its name or address.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// What it wants in `Proxy-Authorization`; marked as sensitive, so that no debug output shows it.
    pub authorization: Option<HeaderValue>,
}

/// A proxy's URL may hold a password.
impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network")
            .field("https_proxy", &self.https_proxy.is_some())
            .field("http_proxy", &self.http_proxy.is_some())
            .field("no_proxy", &self.no_proxy)
            .field("fips", &self.fips)
            .field("dual_stack", &self.dual_stack)
            .finish()
    }
}

/// The URL of a proxy; like curl, without a scheme it is HTTP. The error never quotes it.
fn proxy_url(name: &str, value: &str) -> Result<String, InvalidSetting> {
    let url = if value.contains("://") { value.to_owned() } else { format!("http://{value}") };
    match ProxyConfig::all(url.as_str()) {
        Ok(_) => Ok(url),
        Err(_) => Err(InvalidSetting(format!(
            "the environment variable {name} is not the URL of an HTTP proxy, as in http://proxy.example.org:3128"
        ))),
    }
}

fn is_loopback(host: &str) -> bool {
    let address: Result<IpAddr, _> = host.trim_start_matches('[').trim_end_matches(']').parse();
    host == "localhost" || host.ends_with(".localhost") || address.is_ok_and(|address| address.is_loopback())
}

/// What all clients have in common.
pub(super) struct Connections {
    network: Network,
    ca: Option<Vec<u8>>,
    connect_timeout: Duration,
}

impl Connections {
    pub(super) fn new(network: Network, ca_file: Option<&Path>, timeout: Duration) -> Result<Self, InvalidSetting> {
        let ca = ca_file.map(read_ca).transpose()?;
        Ok(Self { network, ca, connect_timeout: CONNECT_TIMEOUT.min(timeout) })
    }

    /// A client for one place.
    pub(super) fn client(&self, target: &StsTarget) -> Result<Client, Failure> {
        let endpoint = target.endpoint.as_deref().unwrap_or("https://sts.amazonaws.com");
        // The SDK would find out too late, and say so with the whole request.
        let uri: Option<Uri> = endpoint.parse().ok();
        let uri = uri.filter(|uri| matches!(uri.scheme_str(), Some("http" | "https")));
        let uri = uri.ok_or(Failure::Unsendable("`endpoint` is no URL that begins with https://".to_owned()))?;
        let builder = aws_sdk_sts::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(target.region.clone()))
            .http_client(self.http_client(target, &uri))
            // `issue` knows when to try again, and the whole call has one deadline.
            .retry_config(RetryConfig::disabled())
            .timeout_config(TimeoutConfig::disabled())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .interceptor(LimitAnswer);
        Ok(Client::from_conf(match &target.endpoint {
            Some(endpoint) => builder.endpoint_url(endpoint).build(),
            None => builder.use_fips(self.network.fips).use_dual_stack(self.network.dual_stack).build(),
        }))
    }

    fn http_client(&self, target: &StsTarget, endpoint: &Uri) -> SharedHttpClient {
        let trust = match (&target.endpoint, &self.ca) {
            _ if endpoint.scheme_str() == Some("http") => TrustStore::empty(),
            // Whoever holds the key of a private CA could otherwise pass for AWS.
            (Some(_), Some(ca)) => TrustStore::empty().with_pem_certificate(ca.clone()),
            _ => TrustStore::default(),
        };
        let timeouts = HttpConnectorSettings::builder().connect_timeout(self.connect_timeout).build();
        let connector = Connector::builder()
            .tls_provider(Provider::Rustls(CryptoMode::AwsLc))
            .proxy_config(self.network.proxy(endpoint))
            .connector_settings(timeouts)
            .pool_idle_timeout(IDLE);
        let connector = match TlsContext::builder().with_trust_store(trust).build() {
            Ok(tls) => connector.tls_context(tls),
            Err(_) => connector,
        };
        let connector = SharedHttpConnector::new(connector.build());
        http_client_fn(move |_, _| connector.clone())
    }
}

/// The certificates in a file, every one of them usable: the SDK panics at one that isn't.
fn read_ca(path: &Path) -> Result<Vec<u8>, InvalidSetting> {
    let invalid = |text: &str| InvalidSetting(format!("`ca_file` {}: {text}", path.display()));
    let pem = std::fs::read(path).map_err(|error| invalid(&error.to_string()))?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let certificates = certificates.map_err(|_| invalid("it is no valid PEM file"))?;
    if certificates.is_empty() {
        return Err(invalid("there is no certificate in it (`-----BEGIN CERTIFICATE-----`)"));
    }
    let mut store = RootCertStore::empty();
    for certificate in certificates {
        store.add(certificate).map_err(|_| invalid("one of its certificates cannot be read"))?;
    }
    Ok(pem)
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

#[cfg(test)]
mod tests;

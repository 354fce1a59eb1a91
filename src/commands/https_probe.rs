//! GET requests as STS sends them to an issuer: over TLS, without redirects, with a time limit.
//!
//! An untrusted certificate chain is a finding here and not an error. No secret is sent, and the
//! content behind it can be checked too.

mod error;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzzing;
mod server_chain;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Empty;
use hyper::body::Bytes;
use hyper::header::{AUTHORIZATION, DATE, HOST, LOCATION, PROXY_AUTHORIZATION};
use hyper::http::uri::Authority;
use hyper::{Request, Uri};
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tower::{ServiceExt, service_fn};
use zeroize::Zeroizing;

use crate::http_client;
use crate::sts::{NetworkSettings, Proxy};
pub(super) use error::ProbeError;
pub(super) use server_chain::ServerChain;
use server_chain::{CertCapture, tls};

/// Maximum size of a body. An issuer's documents have a few kilobytes.
const MAX_BODY: usize = 1024 * 1024;

/// Response of the server.
pub(super) struct HttpProbeResponse {
    pub(super) status: u16,
    pub(super) location: Option<String>,
    pub(super) date: Option<String>,
    pub(super) body: Zeroizing<Vec<u8>>,
    pub(super) took: Duration,
    /// The server's chain, if the request used https.
    pub(super) chain: Option<ServerChain>,
}

/// An address to connect to instead of the resolved one, like curl's `--resolve`:
/// `host:port:address`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Resolve {
    host: String,
    port: u16,
    address: std::net::IpAddr,
}

impl std::str::FromStr for Resolve {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str = "write HOST:PORT:ADDRESS, as in oidc.example.org:443:192.0.2.1";
        let (host, rest) = text.split_once(':').ok_or(FORM)?;
        let (port, address) = rest.split_once(':').ok_or(FORM)?;
        let address = address
            .trim_start_matches('[')
            .trim_end_matches(']')
            .parse()
            .map_err(|_| FORM)?;
        Ok(Self {
            host: host.to_ascii_lowercase(),
            port: port.parse().map_err(|_| FORM)?,
            address,
        })
    }
}

/// Client settings of a probe.
#[derive(Clone)]
pub(super) struct HttpProbe {
    pub(super) resolve: Vec<Resolve>,
    /// Settings with the proxies to use. `None`: connects directly.
    pub(super) network: Option<NetworkSettings>,
    pub(super) deadline: Duration,
}

impl HttpProbe {
    /// Returns the response, with any status. Fails without one within the deadline.
    pub(super) async fn get(&self, url: &str) -> Result<HttpProbeResponse, ProbeError> {
        self.get_with(url, None).await
    }

    /// Does the same with an `Authorization` header, which is sent over plain HTTP to loopback
    /// only.
    pub(super) async fn get_with(
        &self,
        url: &str,
        authorization: Option<&str>,
    ) -> Result<HttpProbeResponse, ProbeError> {
        match timeout(self.deadline, self.exchange(url, authorization)).await {
            Ok(answer) => answer,
            Err(_) => Err(ProbeError::TimedOut(self.deadline)),
        }
    }

    async fn exchange(
        &self,
        url: &str,
        authorization: Option<&str>,
    ) -> Result<HttpProbeResponse, ProbeError> {
        let start = Instant::now();
        let target = HttpTarget::parse(url)?;
        let HttpTarget {
            uri, host, port, ..
        } = &target;
        // With an address of the operator's, proxies would hide that address.
        let hop = match self
            .network
            .as_ref()
            .filter(|_| self.forced(host, *port).is_none())
        {
            Some(network) => network.hop(uri)?,
            None => None,
        };
        let mut request = Request::get(uri.path_and_query().map_or("/", |path| path.as_str()));
        let stream = match &hop {
            Some(hop) if target.secure => self.tunnel(hop, &target).await?,
            Some(hop) => {
                request = Request::get(uri.clone());
                if let Some(value) = &hop.authorization {
                    request = request.header(PROXY_AUTHORIZATION, value);
                }
                self.to_proxy(hop).await?
            }
            None => self.connect(host, *port).await?,
        };
        let is_near = hop.is_none() && stream.peer_addr().is_ok_and(|peer| peer.ip().is_loopback());
        if let Some(text) = authorization.filter(|_| is_near) {
            request = request.header(AUTHORIZATION, text);
        }
        let request = request
            .header(HOST, target.authority.as_str())
            .body(Empty::<Bytes>::new())?;
        if target.secure {
            answer_over_tls(host, stream, request, start).await
        } else {
            answer(stream, request, start).await
        }
    }

    async fn to_proxy(&self, hop: &Proxy) -> Result<TcpStream, ProbeError> {
        if hop.secure {
            return Err(ProbeError::ProxyNeedsTls(hop.to_string()));
        }
        let connected = self.connect(&hop.host, hop.port).await;
        connected.map_err(|error| ProbeError::Proxy {
            hop: hop.to_string(),
            error: Box::new(error),
        })
    }

    async fn tunnel(&self, hop: &Proxy, target: &HttpTarget) -> Result<TcpStream, ProbeError> {
        let mut connected = Some(TokioIo::new(self.to_proxy(hop).await?));
        // The service is called once. Its own error would be that of a second call.
        let connect = service_fn(move |_: Uri| {
            let stream = connected.take().ok_or(std::io::ErrorKind::NotConnected);
            async move { Ok::<_, std::io::Error>(stream?) }
        });
        let mut tunnel = Tunnel::new(Uri::default(), connect);
        if let Some(value) = &hop.authorization {
            tunnel = tunnel.with_auth(value.clone());
        }
        let opened = tunnel.oneshot(target.uri.clone()).await;
        let opened = opened.map_err(|error| ProbeError::Tunnel {
            hop: hop.to_string(),
            target: format!("{}:{}", target.authority.host(), target.port),
            error: Box::new(error),
        })?;
        Ok(opened.into_inner())
    }

    fn forced(&self, host: &str, port: u16) -> Option<&Resolve> {
        self.resolve
            .iter()
            .find(|forced| forced.host.eq_ignore_ascii_case(host) && forced.port == port)
    }

    async fn connect(&self, host: &str, port: u16) -> Result<TcpStream, ProbeError> {
        let addresses: Vec<SocketAddr> = match self.forced(host, port) {
            Some(forced) => vec![SocketAddr::new(forced.address, port)],
            None => {
                let found = tokio::net::lookup_host((host, port)).await;
                let unresolved = |error| ProbeError::Unresolved(host.to_owned(), error);
                found.map_err(unresolved)?.collect()
            }
        };
        TcpStream::connect(&addresses[..])
            .await
            .map_err(|error| ProbeError::NotConnected(format!("{host}:{port}"), error))
    }
}

/// A URL, and the parts of it that a connection needs.
struct HttpTarget {
    uri: Uri,
    authority: Authority,
    secure: bool,
    /// The host without the brackets of an IPv6 address.
    host: String,
    port: u16,
}

impl HttpTarget {
    fn parse(url: &str) -> Result<Self, ProbeError> {
        let uri: Uri = url.parse().map_err(|_| ProbeError::InvalidUrl)?;
        let authority = uri.authority().ok_or(ProbeError::WithoutHost)?.clone();
        let secure = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(ProbeError::OtherScheme),
        };
        let host = authority
            .host()
            .trim_start_matches('[')
            .trim_end_matches(']')
            .to_owned();
        if host.is_empty() {
            return Err(ProbeError::WithoutHost);
        }
        // `Uri` also accepts a name with an address in brackets behind it.
        if host.contains(['[', ']']) {
            return Err(ProbeError::InvalidUrl);
        }
        let port = authority
            .port_u16()
            .unwrap_or(if secure { 443 } else { 80 });
        Ok(Self {
            uri,
            authority,
            secure,
            host,
            port,
        })
    }
}

async fn answer_over_tls(
    host: &str,
    stream: TcpStream,
    request: Request<Empty<Bytes>>,
    start: Instant,
) -> Result<HttpProbeResponse, ProbeError> {
    let capture = Arc::new(CertCapture::default());
    let connector = TlsConnector::from(Arc::new(tls(&capture)?));
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| ProbeError::InvalidName(host.to_owned()))?;
    let stream = connector
        .connect(name, stream)
        .await
        .map_err(ProbeError::Tls)?;
    let mut answer = answer(stream, request, start).await?;
    answer.chain = capture.take();
    Ok(answer)
}

async fn answer<S>(
    stream: S,
    request: Request<Empty<Bytes>>,
    start: Instant,
) -> Result<HttpProbeResponse, ProbeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let response = http_client::send(stream, request, MAX_BODY).await?;
    let text = |name| {
        let value = response.headers.get(name);
        value.and_then(|value| value.to_str().ok().map(str::to_owned))
    };
    Ok(HttpProbeResponse {
        status: response.status,
        location: text(LOCATION),
        date: text(DATE),
        body: response.body,
        took: start.elapsed(),
        chain: None,
    })
}

#[cfg(test)]
mod tests;

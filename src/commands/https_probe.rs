//! GET requests as STS sends them to an issuer: over TLS, without redirects, with a time limit.
//!
//! An untrusted certificate chain is a finding here and not an error. No secret is sent, and the
//! content behind it can be checked too.

#![expect(
    clippy::disallowed_methods,
    reason = "a command is a process of its own, without a runtime"
)]

mod tunnel;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::header::{AUTHORIZATION, DATE, HOST, LOCATION, PROXY_AUTHORIZATION};
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::sts::{NetworkSettings, Proxy};

/// Maximum size of a body. An issuer's documents have a few kilobytes.
const MAX_BODY: usize = 1024 * 1024;

/// Response of the server.
pub(super) struct HttpProbeResponse {
    pub(super) status: u16,
    pub(super) location: Option<String>,
    pub(super) date: Option<String>,
    pub(super) body: Bytes,
    pub(super) took: Duration,
    /// The server's chain, if the request used https.
    pub(super) chain: Option<ServerChain>,
}

/// The certificates that a server sent.
pub(super) struct ServerChain {
    /// Reason why this machine would not trust them.
    pub(super) distrust: Option<String>,
    /// IAM's thumbprint: the SHA-1 of the last certificate that the server sends, in hex.
    pub(super) thumbprint: String,
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
    /// Returns the response, with any status, or an error text for an operator.
    pub(super) async fn get(&self, url: &str) -> Result<HttpProbeResponse, String> {
        self.get_with(url, None).await
    }

    /// Does the same with an `Authorization` header, which is sent over plain HTTP to loopback
    /// only.
    pub(super) async fn get_with(
        &self,
        url: &str,
        authorization: Option<&str>,
    ) -> Result<HttpProbeResponse, String> {
        match timeout(self.deadline, self.exchange(url, authorization)).await {
            Ok(answer) => answer,
            Err(_) => Err(format!("no answer within {:?}", self.deadline)),
        }
    }

    async fn exchange(
        &self,
        url: &str,
        authorization: Option<&str>,
    ) -> Result<HttpProbeResponse, String> {
        let start = Instant::now();
        let uri: Uri = url.parse().map_err(|_| "not a URL".to_owned())?;
        let authority = uri.authority().ok_or("it has no host")?.clone();
        let secure = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err("it begins neither with https:// nor with http://".to_owned()),
        };
        let host = authority
            .host()
            .trim_start_matches('[')
            .trim_end_matches(']')
            .to_owned();
        let port = authority
            .port_u16()
            .unwrap_or(if secure { 443 } else { 80 });
        // With an address of the operator's, proxies would hide that address.
        let hop = match self
            .network
            .as_ref()
            .filter(|_| self.forced(&host, port).is_none())
        {
            Some(network) => network.hop(&uri).map_err(|error| error.to_string())?,
            None => None,
        };
        let mut request = Request::get(uri.path_and_query().map_or("/", |path| path.as_str()));
        let stream = match &hop {
            Some(hop) if secure => self.tunnel(hop, &host, port).await?,
            Some(hop) => {
                request = Request::get(uri.clone());
                if let Some(value) = &hop.authorization {
                    request = request.header(PROXY_AUTHORIZATION, value);
                }
                self.to_proxy(hop).await?
            }
            None => self.connect(&host, port).await?,
        };
        let is_near = hop.is_none() && stream.peer_addr().is_ok_and(|peer| peer.ip().is_loopback());
        if let Some(text) = authorization.filter(|_| is_near) {
            request = request.header(AUTHORIZATION, text);
        }
        let request = request
            .header(HOST, authority.as_str())
            .body(Empty::<Bytes>::new())
            .map_err(|error| error.to_string())?;
        if !secure {
            return answer(stream, request, start).await;
        }
        let capture = Arc::new(CertCapture::default());
        let connector = TlsConnector::from(Arc::new(tls(&capture)?));
        let name = ServerName::try_from(host.clone())
            .map_err(|_| format!("{host} is not the name of a server"))?;
        let stream = connector
            .connect(name, stream)
            .await
            .map_err(|error| format!("TLS: {error}"))?;
        let mut answer = answer(stream, request, start).await?;
        answer.chain = capture
            .chain
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        Ok(answer)
    }

    async fn to_proxy(&self, hop: &Proxy) -> Result<TcpStream, String> {
        if hop.secure {
            let what = "needs TLS, which awsvid check does not support; try it with curl";
            return Err(format!("{hop} {what}"));
        }
        self.connect(&hop.host, hop.port)
            .await
            .map_err(|error| format!("through {hop}: {error}"))
    }

    async fn tunnel(&self, hop: &Proxy, host: &str, port: u16) -> Result<TcpStream, String> {
        let mut stream = self.to_proxy(hop).await?;
        let opened = tunnel::open(&mut stream, host, port, hop.authorization.as_ref()).await;
        opened.map_err(|error| format!("{hop}: {error}"))?;
        Ok(stream)
    }

    fn forced(&self, host: &str, port: u16) -> Option<&Resolve> {
        self.resolve
            .iter()
            .find(|forced| forced.host.eq_ignore_ascii_case(host) && forced.port == port)
    }

    async fn connect(&self, host: &str, port: u16) -> Result<TcpStream, String> {
        let addresses: Vec<SocketAddr> = match self.forced(host, port) {
            Some(forced) => vec![SocketAddr::new(forced.address, port)],
            None => {
                let found = tokio::net::lookup_host((host, port)).await;
                found
                    .map_err(|error| format!("the name {host} does not resolve: {error}"))?
                    .collect()
            }
        };
        TcpStream::connect(&addresses[..])
            .await
            .map_err(|error| format!("no connection to {host}:{port}: {error}"))
    }
}

async fn answer<S>(
    stream: S,
    request: Request<Empty<Bytes>>,
    start: Instant,
) -> Result<HttpProbeResponse, String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| format!("no HTTP: {error}"))?;
    let exchange = async {
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| format!("no HTTP answer: {error}"))?;
        let text = |name| {
            response
                .headers()
                .get(name)
                .and_then(|value| value.to_str().ok())
                .map(str::to_owned)
        };
        let (status, location, date) = (response.status().as_u16(), text(LOCATION), text(DATE));
        let body = Limited::new(response.into_body(), MAX_BODY).collect().await;
        let body = body
            .map_err(|error| format!("the response ended early, or is over a megabyte: {error}"))?
            .to_bytes();
        Ok(HttpProbeResponse {
            status,
            location,
            date,
            body,
            took: start.elapsed(),
            chain: None,
        })
    };
    // The connection progresses only while it is polled. The exchange decides when both end.
    tokio::pin!(connection);
    tokio::pin!(exchange);
    tokio::select! {
        answer = &mut exchange => answer,
        _ = &mut connection => exchange.await,
    }
}

fn tls(capture: &Arc<CertCapture>) -> Result<ClientConfig, String> {
    let provider = Arc::new(default_provider());
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|_| {
            "this machine trusts no CA certificates; install its package of CA certificates"
                .to_owned()
        })?;
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(RecordingVerifier {
            verifier,
            capture: capture.clone(),
        }))
        .with_no_client_auth();
    Ok(config)
}

#[derive(Default)]
struct CertCapture {
    chain: Mutex<Option<ServerChain>>,
}

impl std::fmt::Debug for CertCapture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Seen").finish_non_exhaustive()
    }
}

/// Accepts every server, and records the result of the real verification. Only for reading public
/// documents.
#[derive(Debug)]
struct RecordingVerifier {
    verifier: Arc<WebPkiServerVerifier>,
    capture: Arc<CertCapture>,
}

impl ServerCertVerifier for RecordingVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified = self.verifier.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        );
        let last = digest(
            &SHA1_FOR_LEGACY_USE_ONLY,
            intermediates.last().unwrap_or(end_entity),
        );
        let chain = ServerChain {
            distrust: verified.err().map(|error| error.to_string()),
            thumbprint: last
                .as_ref()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
        };
        *self
            .capture
            .chain
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(chain);
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests;

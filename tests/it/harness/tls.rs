//! TLS in front of a counterpart that has none, at an address of any network namespace.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{CertificateParams, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;

use super::counterparts::process::run;
use super::forward::Network;

/// Bounds steps that take milliseconds.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A name in the certificate that no name service has, for clients that use a proxy.
pub(crate) const PROXIED_NAME: &str = "sts.behind-the-proxy.invalid";

/// A TLS proxy that ends when this is dropped.
pub(crate) struct TlsFront {
    certificate: String,
    address: SocketAddr,
    _runtime: Runtime,
}

impl TlsFront {
    /// Listens in `network` at `address`, with a certificate of its own, and forwards to `target`
    /// in the test's network.
    pub(crate) fn start(network: Network, address: SocketAddr, target: SocketAddr) -> Self {
        let listener = network.bind(address);
        let address = listener.local_addr().expect("its own address");
        listener
            .set_nonblocking(true)
            .expect("a listener that does not block");
        let key = KeyPair::generate().expect("a key");
        let names = [
            address.ip().to_string(),
            "localhost".into(),
            PROXIED_NAME.into(),
        ];
        let params = CertificateParams::new(names).expect("an address and two names");
        let certificate = params.self_signed(&key).expect("a certificate");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config =
            ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
        let config = config
            .expect("TLS")
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key);
        let acceptor = TlsAcceptor::from(Arc::new(config.expect("a key that fits")));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("a listener");
            while let Ok((client, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let mut client = acceptor.accept(client).await?;
                    let mut server = TcpStream::connect(target).await?;
                    copy_bidirectional(&mut client, &mut server).await
                });
            }
        });
        Self {
            certificate: certificate.pem(),
            address,
            _runtime: runtime,
        }
    }

    /// Returns the certificate by which clients verify it.
    pub(crate) fn certificate(&self) -> &str {
        &self.certificate
    }

    /// Returns the certificate's thumbprint in IAM's sense, as OpenSSL computes it.
    pub(crate) fn thumbprint(&self) -> String {
        let mut command = Command::new("openssl");
        command.args(["x509", "-noout", "-fingerprint", "-sha1"]);
        let output = run(command, self.certificate.as_bytes(), TIMEOUT).success("openssl x509");
        output
            .trim()
            .rsplit('=')
            .next()
            .expect("a fingerprint")
            .replace(':', "")
            .to_lowercase()
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn url(&self) -> String {
        format!("https://{}", self.address)
    }
}

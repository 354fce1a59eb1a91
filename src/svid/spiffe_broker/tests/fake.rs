//! A fake broker socket, as strict as SPIRE's, with certificates and replies that the test chooses.

use std::future::pending;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig,
    SignatureScheme, client::danger::HandshakeSignatureValid, crypto::aws_lc_rs::default_provider,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status};

use crate::svid::own_svid::id_of;
use crate::svid::own_svid::tests::fake::{Authority, TestCertificate};
use crate::svid::proto::broker::api_server::{Api, ApiServer};
use crate::svid::proto::broker::{FetchJwtsvidRequest, FetchJwtsvidResponse};

/// A request that arrived.
#[derive(Clone)]
pub(super) struct BrokerRequest {
    pub(super) metadata: MetadataMap,
    pub(super) request: FetchJwtsvidRequest,
    /// Number of the connection, from 0.
    pub(super) connection: usize,
    /// The certificate that the client presented.
    pub(super) presented: CertificateDer<'static>,
}

/// A reply, or `None` for no reply at all.
pub(super) type BrokerReply = Option<Result<FetchJwtsvidResponse, Status>>;
type BrokerScript =
    dyn Fn(BrokerRequest) -> Pin<Box<dyn Future<Output = BrokerReply> + Send>> + Send + Sync;

/// A running broker socket. It stops with its connections when the value is dropped.
pub(super) struct FakeBroker {
    received: Arc<Mutex<Vec<BrokerRequest>>>,
    connections: Arc<Mutex<Vec<OwnedFd>>>,
    task: JoinHandle<()>,
}

impl Drop for FakeBroker {
    fn drop(&mut self) {
        self.task.abort();
        self.cut();
    }
}

impl FakeBroker {
    pub(super) fn requests(&self) -> Vec<BrokerRequest> {
        self.received.lock().unwrap().clone()
    }

    /// Returns true if a client with this certificate has sent a request.
    pub(super) fn was_presented(&self, certificate: &CertificateDer<'_>) -> bool {
        self.received
            .lock()
            .unwrap()
            .iter()
            .rev()
            .any(|received| received.presented == *certificate)
    }

    /// Closes all open connections.
    pub(super) fn cut(&self) {
        for connection in self.connections.lock().unwrap().drain(..) {
            // An error means that the client has closed it.
            let _ = std::os::unix::net::UnixStream::from(connection).shutdown(Shutdown::Both);
        }
    }

    /// Listens at `path` with this certificate, accepts the clients in `clients`, and replies by
    /// `script`.
    pub(super) fn at<F>(
        path: &Path,
        authority: &Authority,
        certificate: TestCertificate,
        clients: &[&str],
        script: impl Fn(BrokerRequest) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = BrokerReply> + Send + 'static,
    {
        let script: Arc<BrokerScript> = Arc::new(move |received| Box::pin(script(received)));
        let (received, connections) = (
            Arc::<Mutex<Vec<BrokerRequest>>>::default(),
            Arc::<Mutex<Vec<OwnedFd>>>::default(),
        );
        let (seen, open) = (received.clone(), connections.clone());
        let tls = TlsAcceptor::from(Arc::new(config(authority, certificate, clients)));
        let listener = UnixListener::bind(path).unwrap();
        let task = tokio::spawn(async move {
            for number in 0.. {
                let (stream, _) = listener.accept().await.unwrap();
                let (tls, script, seen) = (tls.clone(), script.clone(), seen.clone());
                open.lock()
                    .unwrap()
                    .push(stream.as_fd().try_clone_to_owned().unwrap());
                tokio::spawn(async move {
                    let Ok(stream) = tls.accept(stream).await else {
                        return;
                    };
                    let presented = stream.get_ref().1.peer_certificates().unwrap()[0].clone();
                    let (sender, streams) = mpsc::unbounded_channel();
                    sender
                        .send(Ok::<_, io::Error>(ConnectedTlsStream(stream)))
                        .unwrap();
                    drop(sender);
                    let service = ApiServer::new(BrokerService {
                        script,
                        seen,
                        number,
                        presented,
                    });
                    let streams = UnboundedReceiverStream::new(streams);
                    Server::builder()
                        .add_service(service)
                        .serve_with_incoming(streams)
                        .await
                        .unwrap();
                });
            }
        });
        Self {
            received,
            connections,
            task,
        }
    }
}

fn config(authority: &Authority, certificate: TestCertificate, clients: &[&str]) -> ServerConfig {
    let provider = Arc::new(default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(authority.der.clone().into()).unwrap();
    let by_chain = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .unwrap();
    let clients = clients.iter().map(|id| (*id).to_owned()).collect();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(certificate.key));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(Arc::new(Clients { by_chain, clients }))
        .with_single_cert(vec![certificate.certificate.into()], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

/// Verifier that accepts clients of the trust domain with these IDs.
#[derive(Debug)]
struct Clients {
    by_chain: Arc<dyn ClientCertVerifier>,
    clients: Vec<String>,
}

impl ClientCertVerifier for Clients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.by_chain.verify_client_cert(leaf, intermediates, now)?;
        match self
            .clients
            .iter()
            .any(|client| client == id_of(leaf).unwrap().as_str())
        {
            true => Ok(ClientCertVerified::assertion()),
            false => Err(Error::InvalidCertificate(
                CertificateError::ApplicationVerificationFailure,
            )),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.by_chain
            .verify_tls12_signature(message, leaf, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.by_chain
            .verify_tls13_signature(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.by_chain.supported_verify_schemes()
    }
}

struct BrokerService {
    script: Arc<BrokerScript>,
    seen: Arc<Mutex<Vec<BrokerRequest>>>,
    number: usize,
    presented: CertificateDer<'static>,
}

#[tonic::async_trait]
impl Api for BrokerService {
    async fn fetch_jwtsvid(
        &self,
        request: Request<FetchJwtsvidRequest>,
    ) -> Result<Response<FetchJwtsvidResponse>, Status> {
        let header: Vec<_> = request
            .metadata()
            .get_all("broker.spiffe.io")
            .iter()
            .collect();
        if header != ["true"] {
            return Err(Status::invalid_argument(
                "security header missing from request",
            ));
        }
        let metadata = request.metadata().clone();
        let received = BrokerRequest {
            metadata,
            request: request.into_inner(),
            connection: self.number,
            presented: self.presented.clone(),
        };
        self.seen.lock().unwrap().push(received.clone());
        match (self.script)(received).await {
            Some(answer) => answer.map(Response::new),
            None => pending().await,
        }
    }
}

/// A stream that implements tonic's `Connected`.
struct ConnectedTlsStream(TlsStream<UnixStream>);

impl Connected for ConnectedTlsStream {
    type ConnectInfo = ();

    fn connect_info(&self) -> Self::ConnectInfo {}
}

impl AsyncRead for ConnectedTlsStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for ConnectedTlsStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

//! An agent's broker socket, as strict as SPIRE's and with whatever certificate and answers the test gives it.

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
use crate::svid::own_svid::tests::fake::{Authority, Certified};
use crate::svid::proto::broker::api_server::{Api, ApiServer};
use crate::svid::proto::broker::{FetchJwtsvidRequest, FetchJwtsvidResponse};

/// A request that arrived.
#[derive(Clone)]
pub(super) struct Asked {
    pub(super) metadata: MetadataMap,
    pub(super) request: FetchJwtsvidRequest,
    /// Over which connection, from 0.
    pub(super) connection: usize,
    /// The certificate that the client showed.
    pub(super) shown: CertificateDer<'static>,
}

/// What to say; `None`: nothing, ever.
pub(super) type Answer = Option<Result<FetchJwtsvidResponse, Status>>;
type BrokerScript = dyn Fn(Asked) -> Pin<Box<dyn Future<Output = Answer> + Send>> + Send + Sync;

/// A running broker socket; it ends with the value, and so do its connections.
pub(super) struct FakeBroker {
    asked: Arc<Mutex<Vec<Asked>>>,
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
    pub(super) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// Whether a client with this certificate has asked.
    pub(super) fn was_shown(&self, certificate: &CertificateDer<'_>) -> bool {
        self.asked
            .lock()
            .unwrap()
            .iter()
            .rev()
            .any(|asked| asked.shown == *certificate)
    }

    /// Ends all connections that are open.
    pub(super) fn cut(&self) {
        for connection in self.connections.lock().unwrap().drain(..) {
            // An error means that the client has ended it.
            let _ = std::os::unix::net::UnixStream::from(connection).shutdown(Shutdown::Both);
        }
    }

    /// Listens at `path` with this certificate, lets in whom `clients` names, and answers by `script`.
    pub(super) fn at<F>(
        path: &Path,
        authority: &Authority,
        certified: Certified,
        clients: &[&str],
        script: impl Fn(Asked) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Answer> + Send + 'static,
    {
        let script: Arc<BrokerScript> = Arc::new(move |asked| Box::pin(script(asked)));
        let (asked, connections) = (
            Arc::<Mutex<Vec<Asked>>>::default(),
            Arc::<Mutex<Vec<OwnedFd>>>::default(),
        );
        let (seen, open) = (asked.clone(), connections.clone());
        let tls = TlsAcceptor::from(Arc::new(config(authority, certified, clients)));
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
                    let shown = stream.get_ref().1.peer_certificates().unwrap()[0].clone();
                    let (sender, streams) = mpsc::unbounded_channel();
                    sender.send(Ok::<_, io::Error>(Encrypted(stream))).unwrap();
                    drop(sender);
                    let service = ApiServer::new(BrokerService {
                        script,
                        seen,
                        number,
                        shown,
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
            asked,
            connections,
            task,
        }
    }
}

fn config(authority: &Authority, certified: Certified, clients: &[&str]) -> ServerConfig {
    let provider = Arc::new(default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(authority.der.clone().into()).unwrap();
    let by_chain = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .unwrap();
    let clients = clients.iter().map(|id| (*id).to_owned()).collect();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(certified.key));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(Arc::new(Clients { by_chain, clients }))
        .with_single_cert(vec![certified.certificate.into()], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

/// Lets in clients of the trust domain with these IDs.
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
    seen: Arc<Mutex<Vec<Asked>>>,
    number: usize,
    shown: CertificateDer<'static>,
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
        let asked = Asked {
            metadata,
            request: request.into_inner(),
            connection: self.number,
            shown: self.shown.clone(),
        };
        self.seen.lock().unwrap().push(asked.clone());
        match (self.script)(asked).await {
            Some(answer) => answer.map(Response::new),
            None => pending().await,
        }
    }
}

/// tonic takes streams that say something of themselves.
struct Encrypted(TlsStream<UnixStream>);

impl Connected for Encrypted {
    type ConnectInfo = ();

    fn connect_info(&self) -> Self::ConnectInfo {}
}

impl AsyncRead for Encrypted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Encrypted {
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

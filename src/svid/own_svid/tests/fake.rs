//! A certificate authority, and a Workload API with streams that the test controls.

use std::path::Path;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_stream::wrappers::{UnboundedReceiverStream, UnixListenerStream};
use tonic::codegen::BoxStream;
use tonic::metadata::MetadataMap;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::svid::proto::workload::spiffe_workload_api_server::{
    SpiffeWorkloadApi, SpiffeWorkloadApiServer,
};
use crate::svid::proto::workload::{X509svid, X509svidRequest, X509svidResponse};

/// A CA that signs every certificate.
pub(in crate::svid) struct Authority {
    pub(in crate::svid) der: Vec<u8>,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, in DER.
pub(in crate::svid) struct TestCertificate {
    pub(in crate::svid) certificate: Vec<u8>,
    pub(in crate::svid) key: Vec<u8>,
}

impl Authority {
    pub(in crate::svid) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let der = params.self_signed(&key).unwrap().der().to_vec();
        Self {
            der,
            issuer: Issuer::new(params, key),
        }
    }

    /// Signs a certificate with these URIs, after `change` has changed it.
    pub(in crate::svid) fn sign(
        &self,
        uris: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) -> TestCertificate {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.subject_alt_names = uris
            .iter()
            .map(|uri| SanType::URI((*uri).try_into().unwrap()))
            .collect();
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap().der().to_vec();
        TestCertificate {
            certificate,
            key: key.serialize_der(),
        }
    }

    /// Returns an SVID in the form of the Workload API.
    pub(in crate::svid) fn svid(&self, id: &str) -> X509svid {
        self.svid_of(id, self.sign(&[id], |_| {}))
    }

    /// Returns an SVID with this certificate.
    pub(in crate::svid) fn svid_of(&self, id: &str, certified: TestCertificate) -> X509svid {
        X509svid {
            spiffe_id: id.to_owned(),
            x509_svid: certified.certificate,
            x509_svid_key: certified.key,
            bundle: self.der.clone(),
            hint: String::new(),
        }
    }

    /// Returns a message with only this SVID.
    pub(in crate::svid) fn message(&self, id: &str) -> X509svidResponse {
        X509svidResponse {
            svids: vec![self.svid(id)],
        }
    }
}

/// A running Workload API. It stops with its streams when the value is dropped.
pub(in crate::svid) struct FakeAgent {
    opened: mpsc::UnboundedReceiver<PendingStream>,
    task: JoinHandle<()>,
}

/// A client that waits for its stream.
pub(in crate::svid) struct PendingStream {
    pub(in crate::svid) metadata: MetadataMap,
    reply: oneshot::Sender<Result<Messages, Status>>,
}

type Messages = mpsc::UnboundedReceiver<Result<X509svidResponse, Status>>;

/// An open stream, which ends when the value is dropped.
pub(in crate::svid) struct Stream(mpsc::UnboundedSender<Result<X509svidResponse, Status>>);

impl Drop for FakeAgent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FakeAgent {
    pub(in crate::svid) fn at(path: &Path) -> Self {
        let (sender, opened) = mpsc::unbounded_channel();
        let listener = UnixListenerStream::new(UnixListener::bind(path).unwrap());
        let server =
            Server::builder().add_service(SpiffeWorkloadApiServer::new(OwnSvidService(sender)));
        let task = tokio::spawn(async move { server.serve_with_incoming(listener).await.unwrap() });
        Self { opened, task }
    }

    /// Returns the next client. Every client connects well within this timeout.
    pub(in crate::svid) async fn next_client(&mut self) -> PendingStream {
        timeout(Duration::from_secs(120), self.opened.recv())
            .await
            .expect("a request")
            .unwrap()
    }

    /// Returns true if no client has connected since the last one.
    pub(in crate::svid) fn has_no_client(&mut self) -> bool {
        self.opened.try_recv().is_err()
    }
}

impl PendingStream {
    pub(in crate::svid) fn reject(self, status: Status) {
        // An error means that the client is gone.
        let _ = self.reply.send(Err(status));
    }

    pub(in crate::svid) fn accept(self) -> Stream {
        let (sender, messages) = mpsc::unbounded_channel();
        let _ = self.reply.send(Ok(messages));
        Stream(sender)
    }
}

impl Stream {
    pub(in crate::svid) fn send(&self, message: X509svidResponse) {
        self.0.send(Ok(message)).unwrap();
    }

    pub(in crate::svid) fn fail(self, status: Status) {
        self.0.send(Err(status)).unwrap();
    }

    /// Returns when the client has closed the stream.
    pub(in crate::svid) async fn closed(&self) {
        self.0.closed().await;
    }
}

struct OwnSvidService(mpsc::UnboundedSender<PendingStream>);

#[tonic::async_trait]
impl SpiffeWorkloadApi for OwnSvidService {
    async fn fetch_x509svid(
        &self,
        request: Request<X509svidRequest>,
    ) -> Result<Response<BoxStream<X509svidResponse>>, Status> {
        let (reply, answer) = oneshot::channel();
        self.0
            .send(PendingStream {
                metadata: request.metadata().clone(),
                reply,
            })
            .unwrap();
        let messages = answer
            .await
            .unwrap_or_else(|_| Err(Status::internal("the test left it")))?;
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(
            messages,
        ))))
    }
}

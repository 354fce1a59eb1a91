//! Fake STS servers, and a fake proxy in front of them.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::pending;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{
    AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader, copy_bidirectional,
};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Barrier;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::aws_lc_rs::default_provider;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_stream::StreamExt;

/// Reply of the fake server.
#[derive(Clone)]
pub(crate) enum StsReply {
    /// This response, at once.
    Body(u16, &'static str, String),
    /// This head without a body, and a `Location`.
    Redirect(String),
    /// This response, once two requests wait for it.
    Together(Arc<RequestBarrier>, String),
    /// No response at all.
    Never,
    /// The beginning of a response, without an end.
    Stalls,
    /// The beginning of a response, and the end of the connection.
    Breaks,
}

/// Barrier at which requests wait for one another, and are counted.
pub(crate) struct RequestBarrier {
    two: Barrier,
    waiting: AtomicUsize,
    pub(crate) most: AtomicUsize,
}

impl RequestBarrier {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            two: Barrier::new(2),
            waiting: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
        })
    }
}

/// A request that arrived.
#[derive(Clone, Debug)]
pub(crate) struct ReceivedRequest {
    pub(crate) uri: String,
    pub(crate) headers: HeaderMap,
    pub(crate) form: HashMap<String, String>,
    pub(crate) connection: usize,
}

/// A running server, which stops when the value is dropped.
pub(crate) struct FakeSts {
    pub(crate) address: SocketAddr,
    received: Arc<Mutex<Vec<ReceivedRequest>>>,
    task: JoinHandle<()>,
}

impl Drop for FakeSts {
    fn drop(&mut self) {
        self.task.abort();
    }
}

type Script = dyn Fn(usize, &ReceivedRequest) -> StsReply + Send + Sync;

impl FakeSts {
    /// Starts plain HTTP on loopback. `script` gets the request's number, from 0.
    pub(crate) async fn start(
        script: impl Fn(usize, &ReceivedRequest) -> StsReply + Send + Sync + 'static,
    ) -> Self {
        Self::start_with(None, script).await
    }

    /// Starts a server, with TLS if there is a certificate.
    pub(crate) async fn start_with(
        tls: Option<TlsAcceptor>,
        script: impl Fn(usize, &ReceivedRequest) -> StsReply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let received = Arc::new(Mutex::new(Vec::new()));
        let (previous, script): (_, Arc<Script>) = (received.clone(), Arc::new(script));
        let task = tokio::spawn(async move {
            for connection in 0.. {
                let (stream, _) = listener.accept().await.unwrap();
                let (tls, previous, script) = (tls.clone(), previous.clone(), script.clone());
                tokio::spawn(async move {
                    match tls {
                        None => serve(stream, connection, previous, script).await,
                        Some(tls) => match tls.accept(stream).await {
                            Ok(stream) => serve(stream, connection, previous, script).await,
                            Err(rejected_by_the_client) => drop(rejected_by_the_client),
                        },
                    }
                });
            }
        });
        Self {
            address,
            received,
            task,
        }
    }

    pub(crate) fn received(&self) -> Vec<ReceivedRequest> {
        self.received.lock().unwrap().clone()
    }
}

async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
    connection: usize,
    previous: Arc<Mutex<Vec<ReceivedRequest>>>,
    script: Arc<Script>,
) {
    let service = hyper::service::service_fn(|request: Request<Incoming>| async {
        let (head, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let form = std::str::from_utf8(&body)
            .unwrap()
            .split('&')
            .filter_map(|pair| pair.split_once('='));
        let decode = |text: &str| {
            percent_encoding::percent_decode_str(text)
                .decode_utf8()
                .unwrap()
                .into_owned()
        };
        let form = form
            .map(|(name, value)| (decode(name), decode(value)))
            .collect();
        let request = ReceivedRequest {
            uri: head.uri.to_string(),
            headers: head.headers,
            form,
            connection,
        };
        let number = {
            let mut previous = previous.lock().unwrap();
            previous.push(request.clone());
            previous.len() - 1
        };
        Ok::<_, Infallible>(answer(script(number, &request)).await)
    });
    // An error is a client that hung up, or a reply that breaks off on purpose.
    let _ = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn answer(reply: StsReply) -> Response<UnsyncBoxBody<Bytes, std::io::Error>> {
    let full = |text: String| {
        Full::new(Bytes::from(text))
            .map_err(|never| match never {})
            .boxed_unsync()
    };
    let beginning = || {
        tokio_stream::once(Ok(Frame::data(Bytes::from_static(
            b"<AssumeRoleWithWebIdentityResponse>",
        ))))
    };
    match reply {
        StsReply::Body(status, kind, body) => Response::builder()
            .status(status)
            .header("content-type", kind)
            .body(full(body))
            .unwrap(),
        StsReply::Together(meeting, body) => {
            let waiting = meeting.waiting.fetch_add(1, Ordering::SeqCst) + 1;
            meeting.most.fetch_max(waiting, Ordering::SeqCst);
            meeting.two.wait().await;
            meeting.waiting.fetch_sub(1, Ordering::SeqCst);
            Response::new(full(body))
        }
        StsReply::Redirect(location) => Response::builder()
            .status(307)
            .header("location", location)
            .body(full(String::new()))
            .unwrap(),
        StsReply::Never => pending().await,
        StsReply::Stalls => Response::new(
            StreamBody::new(beginning().chain(tokio_stream::pending())).boxed_unsync(),
        ),
        StsReply::Breaks => {
            let end = tokio_stream::once(Err(std::io::Error::other("on purpose")));
            Response::new(StreamBody::new(beginning().chain(end)).boxed_unsync())
        }
    }
}

/// Creates a certificate authority and a server's certificate for these names: (CA as PEM, TLS).
pub(crate) fn tls(names: &[&str]) -> (String, TlsAcceptor) {
    tls_with(names, |_| {})
}

/// Does the same, and changes the server's certificate.
pub(crate) fn tls_with(
    names: &[&str],
    change: impl FnOnce(&mut rcgen::CertificateParams),
) -> (String, TlsAcceptor) {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(vec![]).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = rcgen::CertificateParams::new(names).unwrap();
    change(&mut params);
    let certificate = params.signed_by(&key, &issuer).unwrap();
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions();
    let config = config
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    (ca_pem, TlsAcceptor::from(Arc::new(config)))
}

/// A proxy that tunnels every CONNECT to one server, and records the requested hosts.
pub(crate) struct FakeProxy {
    pub(crate) address: SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl Drop for FakeProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FakeProxy {
    pub(crate) async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let heads = Arc::new(Mutex::new(Vec::new()));
        let previous = heads.clone();
        let task = tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let previous = previous.clone();
                tokio::spawn(async move {
                    let mut client = BufReader::new(client);
                    let mut head = String::new();
                    while !head.ends_with("\r\n\r\n") {
                        if client.read_line(&mut head).await.unwrap() == 0 {
                            return;
                        }
                    }
                    previous.lock().unwrap().push(head);
                    let mut server = TcpStream::connect(server).await.unwrap();
                    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                    // An error is one of the two ends hanging up.
                    let _ = copy_bidirectional(&mut client, &mut server).await;
                });
            }
        });
        Self {
            address,
            heads,
            task,
        }
    }

    /// Returns the heads of the CONNECT requests.
    pub(crate) fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap().clone()
    }
}

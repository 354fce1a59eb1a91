//! HTTP on loopback: the server of `dev`'s issuer and STS, and the client with which that STS
//! fetches the keys.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::HOST;
use hyper::{Request, Response, StatusCode, Uri};
use hyper_util::rt::{TokioIo, TokioTimer};
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::http_client::{self, ClientError};

/// Maximum open connections. Further ones are closed at once.
const MAX_CONNECTIONS: usize = 256;
/// Maximum size of a request body. The longest token and policy that STS accepts fit in it,
/// percent-encoded.
const MAX_BODY: usize = 128 * 1024;
/// Maximum size of a key set: 100 keys of each kind, as AWS accepts them.
const MAX_RESPONSE: usize = 256 * 1024;
/// Lifetime of a connection, which carries one request.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause before the next accept when the process has no descriptor left.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Response of these servers.
pub(super) type LoopbackResponse = Response<Full<Bytes>>;

/// An HTTP server on 127.0.0.1. It and its connections end when this value is dropped.
#[derive(Debug)]
pub(super) struct Server {
    _accepting: JoinSet<()>,
}

/// Binds a port of 127.0.0.1 that the kernel picks.
pub(super) async fn bind() -> io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

impl Server {
    /// Serves requests. Their bodies are bounded, and complete before `answer` gets them.
    pub(super) fn start<F, A>(listener: TcpListener, answer: F) -> Self
    where
        F: Fn(Request<Bytes>) -> A + Clone + Send + Sync + 'static,
        A: Future<Output = LoopbackResponse> + Send + 'static,
    {
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, answer));
        Self {
            _accepting: accepting,
        }
    }
}

async fn accept<F, A>(listener: TcpListener, answer: F)
where
    F: Fn(Request<Bytes>) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = LoopbackResponse> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        let accepted = listener.accept().await;
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((stream, _)) if connections.len() < MAX_CONNECTIONS => {
                connections.spawn(serve(stream, answer.clone()));
            }
            Ok(_) => tracing::warn!("dev: connection closed: too many connections"),
            Err(error) => {
                tracing::warn!(%error, "dev: accepting a connection failed");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

async fn serve<F, A>(stream: TcpStream, answer: F)
where
    F: Fn(Request<Bytes>) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = LoopbackResponse> + Send + 'static,
{
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let answer = answer.clone();
        async move {
            let (head, body) = request.into_parts();
            let Ok(body) = Limited::new(body, MAX_BODY).collect().await else {
                return Ok(empty(StatusCode::PAYLOAD_TOO_LARGE));
            };
            Ok::<_, Infallible>(answer(Request::from_parts(head, body.to_bytes())).await)
        }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(CONNECTION_TIMEOUT)
        .keep_alive(false);
    let connection = http.serve_connection(TokioIo::new(stream), service);
    // A client that disconnects or is too slow loses its response. That is not an error here.
    let _ = timeout(CONNECTION_TIMEOUT, connection).await;
}

/// Returns a response without a body.
pub(super) fn empty(status: StatusCode) -> LoopbackResponse {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
}

/// Failure of a fetch, with its URL.
#[derive(Debug, Error)]
#[error("{url}: {reason}")]
pub(super) struct FetchError {
    url: String,
    reason: FetchFailure,
}

#[derive(Debug, Error)]
enum FetchFailure {
    #[error("not an http URL with a loopback address")]
    Url,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Request(#[from] hyper::http::Error),
    #[error(transparent)]
    Response(#[from] ClientError),
    #[error("answered {0}")]
    Status(u16),
    #[error("no response in time")]
    TimedOut,
}

/// Fetches a document from a server on loopback. Any status but 200 is an error.
pub(super) async fn get(url: &str) -> Result<Bytes, FetchError> {
    let fetched = timeout(CONNECTION_TIMEOUT, fetch(url)).await;
    fetched
        .unwrap_or(Err(FetchFailure::TimedOut))
        .map_err(|reason| FetchError {
            url: url.to_owned(),
            reason,
        })
}

async fn fetch(url: &str) -> Result<Bytes, FetchFailure> {
    let uri: Uri = url.parse().map_err(|_| FetchFailure::Url)?;
    let address = address_of(&uri).ok_or(FetchFailure::Url)?;
    let stream = TcpStream::connect(address).await?;
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::get(path)
        .header(HOST, address.to_string())
        .body(Empty::<Bytes>::new())?;
    let response = http_client::send(stream, request, MAX_RESPONSE).await?;
    match response.status {
        200 => Ok(Bytes::copy_from_slice(&response.body)),
        status => Err(FetchFailure::Status(status)),
    }
}

fn address_of(uri: &Uri) -> Option<SocketAddr> {
    if uri.scheme_str() != Some("http") {
        return None;
    }
    let ip: IpAddr = uri
        .host()?
        .trim_start_matches('[')
        .trim_end_matches(']')
        .parse()
        .ok()?;
    ip.is_loopback()
        .then(|| SocketAddr::new(ip, uri.port_u16().unwrap_or(80)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn get_accepts_only_loopback_addresses() {
        let table = [
            ("http://127.0.0.1:8080/keys", Some("127.0.0.1:8080")),
            ("http://[::1]:8080/keys", Some("[::1]:8080")),
            ("http://127.0.0.1/", Some("127.0.0.1:80")),
            ("https://127.0.0.1:8080/", None),
            ("http://localhost:8080/", None),
            ("http://192.0.2.1/", None),
            ("http://127.0.0.1.example.org/", None),
            ("/keys", None),
        ];
        for (url, expected) in table {
            let expected = expected.map(|address| address.parse().unwrap());
            assert_eq!(address_of(&url.parse().unwrap()), expected, "{url}");
        }
    }

    #[tokio::test]
    async fn get_accepts_only_status_200() {
        let (listener, address) = bind().await.unwrap();
        let server = Server::start(listener, |request: Request<Bytes>| async move {
            match request.uri().path() {
                "/document" => LoopbackResponse::new("text".into()),
                "/long" => LoopbackResponse::new(vec![0; MAX_RESPONSE + 1].into()),
                _ => empty(StatusCode::NOT_FOUND),
            }
        });
        let fetch = async |path: &str| get(&format!("http://{address}{path}")).await;
        assert_eq!(fetch("/document").await.unwrap(), "text");
        assert!(
            fetch("/other")
                .await
                .unwrap_err()
                .to_string()
                .contains("404")
        );
        assert!(fetch("/long").await.is_err());
        drop(server);
        assert!(fetch("/document").await.is_err());
    }
}

//! HTTP on loopback: how the issuer and the STS of `dev` answer, and the GET with which that STS fetches the keys.

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

/// Connections at one time; more are closed at once.
const MAX_CONNECTIONS: usize = 256;
/// The longest token and the longest policy that STS takes, percent-encoded, fit in.
const MAX_BODY: usize = 128 * 1024;
/// A key set: 100 keys of each kind at most, as AWS takes them.
const MAX_ANSWER: usize = 256 * 1024;
/// For a connection's whole life: it carries one request.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long no connection is accepted when the process has no descriptor left.
const PAUSE: Duration = Duration::from_millis(50);

/// What is answered.
pub(super) type LoopbackResponse = Response<Full<Bytes>>;

/// An HTTP server on 127.0.0.1. It and all its connections end with this value.
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
    /// Answers requests, whose bodies are read and bounded before `answer` sees them.
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
            Ok(_) => tracing::warn!("dev: too many connections at one time, this one is closed"),
            Err(error) => {
                tracing::warn!(%error, "dev: no connection can be accepted");
                tokio::time::sleep(PAUSE).await;
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
        .header_read_timeout(TIMEOUT)
        .keep_alive(false);
    let connection = http.serve_connection(TokioIo::new(stream), service);
    // A client that goes away in between, or is too slow, loses its answer and nothing else.
    let _ = timeout(TIMEOUT, connection).await;
}

/// An answer without a body.
pub(super) fn empty(status: StatusCode) -> LoopbackResponse {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
}

/// Why nothing could be fetched.
#[derive(Debug, Error)]
#[error("{url}: {reason}")]
pub(super) struct FetchError {
    url: String,
    reason: String,
}

/// Fetches a document from a server on loopback; only a 200 counts.
pub(super) async fn get(url: &str) -> Result<Bytes, FetchError> {
    match timeout(TIMEOUT, exchange(url)).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(reason)) => Err(FetchError {
            url: url.to_owned(),
            reason,
        }),
        Err(_) => Err(FetchError {
            url: url.to_owned(),
            reason: "no answer in time".to_owned(),
        }),
    }
}

async fn exchange(url: &str) -> Result<Bytes, String> {
    let uri: Uri = url.parse().map_err(|_| "not a URL".to_owned())?;
    let address = address_of(&uri).ok_or("not an http URL with a loopback address")?;
    let stream = TcpStream::connect(address)
        .await
        .map_err(|error| error.to_string())?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::get(path)
        .header(HOST, address.to_string())
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let answer = async {
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| error.to_string())?;
        if response.status() != StatusCode::OK {
            return Err(format!("answered {}", response.status()));
        }
        let body = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await;
        body.map(|body| body.to_bytes())
            .map_err(|error| error.to_string())
    };
    // The connection makes progress only while it is polled; the answer decides when it is over.
    tokio::pin!(connection);
    tokio::pin!(answer);
    tokio::select! {
        body = &mut answer => body,
        _ = &mut connection => answer.await,
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
    fn only_loopback_is_asked() {
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
    async fn a_document_is_fetched_and_anything_but_a_200_is_an_error() {
        let (listener, address) = bind().await.unwrap();
        let server = Server::start(listener, |request: Request<Bytes>| async move {
            match request.uri().path() {
                "/document" => LoopbackResponse::new("text".into()),
                "/long" => LoopbackResponse::new(vec![0; MAX_ANSWER + 1].into()),
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

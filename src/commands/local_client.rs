//! One request to the daemon, over one of its sockets.

use std::io::{self, ErrorKind};
use std::time::Duration;

use http_body_util::Empty;
use hyper::Request;
use hyper::body::Bytes;
use hyper::header::{CONNECTION, CONTENT_LENGTH, HOST, RETRY_AFTER};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout_at};
use zeroize::Zeroizing;

use crate::http_client::{self, ClientError};

/// A complete response of the daemon.
#[derive(Debug)]
pub(super) struct LocalResponse {
    pub(super) status: u16,
    /// Minimum wait before a retry, as sent by the daemon.
    pub(super) retry_after: Option<Duration>,
    /// The body, which may contain credentials.
    pub(super) body: Zeroizing<Vec<u8>>,
}

/// Reason why the daemon has not answered.
#[derive(Debug, Error)]
pub(super) enum LocalError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Request(#[from] hyper::http::Error),
    #[error("invalid response: {0}")]
    Response(#[from] ClientError),
    /// Without a length, the end of the connection may be that of a response that was cut.
    #[error("invalid response: it has no Content-Length")]
    WithoutLength,
}

impl LocalError {
    pub(super) fn kind(&self) -> ErrorKind {
        match self {
            Self::Io(error) => error.kind(),
            Self::Request(_) => ErrorKind::InvalidInput,
            Self::Response(_) | Self::WithoutLength => ErrorKind::InvalidData,
        }
    }
}

/// Runs the requests of a command, which has no runtime of its own. Fails if there are no
/// descriptors for one.
pub(super) fn block_on<T>(requests: impl Future<Output = T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let ended = runtime.block_on(requests);
    // Does not wait for the lookup of a name that is not needed any more.
    runtime.shutdown_background();
    Ok(ended)
}

/// Requests `path`, and reads a response with at most `max_body` bytes, until `deadline`.
pub(super) async fn get(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    path: &str,
    max_body: usize,
    deadline: Instant,
) -> Result<LocalResponse, LocalError> {
    let request = Request::get(path)
        .header(HOST, "localhost")
        .header(CONNECTION, "close")
        .body(Empty::<Bytes>::new())?;
    let sent = timeout_at(deadline, http_client::send(stream, request, max_body)).await;
    let response = sent.map_err(|_| io::Error::from(ErrorKind::TimedOut))??;
    if !response.headers.contains_key(CONTENT_LENGTH) {
        return Err(LocalError::WithoutLength);
    }
    let retry_after = response.headers.get(RETRY_AFTER);
    let retry_after = retry_after.and_then(|value| value.to_str().ok()?.parse().ok());
    Ok(LocalResponse {
        status: response.status,
        retry_after: retry_after.map(Duration::from_secs),
        body: response.body,
    })
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    async fn answered(text: &str) -> Result<LocalResponse, LocalError> {
        let (client, mut server) = duplex(1024);
        let deadline = Instant::now() + Duration::from_secs(20);
        let serving = async {
            let mut request = [0; 1024];
            let length = server.read(&mut request).await.unwrap();
            server.write_all(text.as_bytes()).await.unwrap();
            drop(server);
            String::from_utf8(request[..length].to_vec()).unwrap()
        };
        let (response, request) = tokio::join!(get(client, "/a", 1000, deadline), serving);
        assert!(
            request.starts_with("GET /a HTTP/1.1\r\nhost: localhost\r\n"),
            "{request}"
        );
        response
    }

    #[tokio::test]
    async fn response_without_a_length_is_an_error() {
        let text = "HTTP/1.1 503 Busy\r\nRetry-After: 2\r\ncontent-length: 4\r\n\r\nbody";
        let good = answered(text).await.unwrap();
        assert_eq!(
            (good.status, good.retry_after, &good.body[..]),
            (503, Some(Duration::from_secs(2)), &b"body"[..])
        );
        for wrong in [
            text.replace("content-length: 4\r\n", ""),
            text.replace("length: 4", "length: 5"),
            text.replace("length: 4", "length: 1001"),
        ] {
            let error = answered(&wrong).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidData, "{wrong:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn get_ends_at_the_deadline() {
        let (client, _server) = duplex(1024);
        let deadline = Instant::now() + Duration::from_secs(20);
        let error = get(client, "/a", 1000, deadline).await.unwrap_err();
        assert_eq!(
            (error.kind(), Instant::now()),
            (ErrorKind::TimedOut, deadline)
        );
    }
}

//! One HTTP request on a connection. The probes of readiness, the commands and the servers of `dev`
//! send theirs this way.

use std::error::Error as _;

use http_body_util::{BodyExt, Empty};
use hyper::body::{Body, Bytes};
use hyper::client::conn::http1;
use hyper::header::HeaderMap;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use zeroize::Zeroizing;

/// A response that has arrived to its end.
#[derive(Debug)]
pub struct ClientResponse {
    /// The status, which may be that of an error.
    pub status: u16,
    /// The headers, which are not secret.
    pub headers: HeaderMap,
    /// The body, which may contain credentials.
    pub body: Zeroizing<Vec<u8>>,
}

/// The reason why a response has not arrived to its end.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The connection broke, or the bytes are not HTTP.
    #[error("{}", with_cause(.0))]
    Http(#[from] hyper::Error),
    /// The body is longer than this number of bytes.
    #[error("the response is longer than {0} bytes")]
    TooLong(usize),
}

/// Returns hyper's text with that of the cause, which hyper leaves out.
fn with_cause(error: &hyper::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// Sends a request without a body, and waits for the whole response, of any status. Fails if its
/// body is longer than `max_body` bytes, or ends early. It has no time limit of its own.
///
/// A body of known length is in one buffer, which is cleared when the response is dropped. hyper's
/// own buffer of the connection is not cleared.
pub async fn send<S>(
    stream: S,
    request: Request<Empty<Bytes>>,
    max_body: usize,
) -> Result<ClientResponse, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let exchange = async { read(sender.send_request(request).await?, max_body).await };
    // The connection progresses only while it is polled. The exchange decides when both end.
    tokio::pin!(connection, exchange);
    tokio::select! {
        response = &mut exchange => response,
        _ = &mut connection => exchange.await,
    }
}

async fn read<B>(response: Response<B>, max_body: usize) -> Result<ClientResponse, ClientError>
where
    B: Body<Data = Bytes, Error = hyper::Error> + Unpin,
{
    let (head, mut incoming) = response.into_parts();
    let length = incoming.size_hint().exact().unwrap_or_default();
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > max_body {
        return Err(ClientError::TooLong(max_body));
    }
    let mut body = Zeroizing::new(Vec::with_capacity(length));
    while let Some(frame) = incoming.frame().await {
        let Ok(data) = frame?.into_data() else {
            continue;
        };
        if data.len() > max_body - body.len() {
            return Err(ClientError::TooLong(max_body));
        }
        body.extend_from_slice(&data);
    }
    Ok(ClientResponse {
        status: head.status.as_u16(),
        headers: head.headers,
        body,
    })
}

#[cfg(test)]
mod tests {
    use hyper::header::{HOST, RETRY_AFTER};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    async fn answered(text: &str, max_body: usize) -> Result<ClientResponse, ClientError> {
        let (client, mut server) = duplex(1024);
        let request = Request::get("/a").header(HOST, "localhost");
        let sending = send(client, request.body(Empty::new()).unwrap(), max_body);
        let serving = async {
            let mut request = [0; 1024];
            let length = server.read(&mut request).await.unwrap();
            // The client may have closed the connection.
            let _ = server.write_all(text.as_bytes()).await;
            drop(server);
            String::from_utf8(request[..length].to_vec()).unwrap()
        };
        let (response, request) = tokio::join!(sending, serving);
        assert_eq!(request, "GET /a HTTP/1.1\r\nhost: localhost\r\n\r\n");
        response
    }

    #[tokio::test]
    async fn partial_response_is_an_error() {
        let text = "HTTP/1.1 503 Busy\r\nRetry-After: 2\r\ncontent-length: 4\r\n\r\nbody";
        let good = answered(text, 4).await.unwrap();
        assert_eq!((good.status, &good.body[..]), (503, &b"body"[..]));
        assert_eq!(good.headers[RETRY_AFTER], "2");
        for wrong in [
            text.replace("length: 4", "length: 5"),
            text.replace("\r\n\r\n", "\r\n"),
            text.replace("HTTP/1.1 503", "SSH-2.0"),
            String::new(),
        ] {
            let error = answered(&wrong, 1000).await.unwrap_err();
            assert!(matches!(error, ClientError::Http(_)), "{wrong:?}: {error}");
        }
    }

    #[tokio::test]
    async fn body_is_bounded_with_and_without_a_length() {
        let body = "x".repeat(300_000);
        let counted = format!(
            "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let endless = format!("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{body}");
        for text in [counted, endless] {
            let whole = answered(&text, body.len()).await.unwrap();
            assert_eq!(&whole.body[..], body.as_bytes());
            let error = answered(&text, body.len() - 1).await.unwrap_err();
            assert!(matches!(error, ClientError::TooLong(_)), "{error}");
        }
    }
}

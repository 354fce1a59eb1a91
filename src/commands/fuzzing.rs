//! The fuzz targets for the responses of the daemon, with arbitrary bytes, and for what commands
//! read.

use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::task::yield_now;
use tokio::time::Instant;

pub(crate) use super::check::fuzzing::documents;
use super::local_client::{LocalResponse, block_on, get};
pub(crate) use super::node::fuzzing::socket_unit;
use super::{https_probe, trust_policy};

/// Maximum length of a body.
const MAX_BODY: usize = 4096;

/// Maximum length of an input.
const MAX_RESPONSE: usize = 16 * 1024;

/// Reads a response that arrives in two parts, of which the first has `first` bytes. Then the
/// server closes the connection.
fn read(bytes: &[u8], first: usize) -> Option<LocalResponse> {
    let (client, mut server) = duplex(MAX_RESPONSE);
    let serve = async move {
        // A response before its request is not one.
        let mut request = BytesMut::new();
        server.read_buf(&mut request).await?;
        let (first, second) = bytes.split_at(first);
        server.write_all(first).await?;
        yield_now().await;
        server.write_all(second).await
    };
    let deadline = Instant::now() + Duration::from_secs(600);
    let request = get(client, "/v1/credentials", MAX_BODY, deadline);
    // The server's part fails if the client closes the connection early.
    let (response, _) = block_on(async { tokio::join!(request, serve) }).ok()?;
    response.ok()
}

/// Returns the head of a response, up to its empty line. `None` if the body does not follow as it
/// is: in chunks, or after an interim response.
fn plain_head(bytes: &[u8]) -> Option<&[u8]> {
    let lines = bytes.split_inclusive(|byte| *byte == b'\n');
    let until_empty = lines.take_while(|line| !matches!(line, [b'\n'] | [b'\r', b'\n']));
    let end = until_empty.map(<[u8]>::len).sum::<usize>();
    let empty = if bytes[end..].starts_with(b"\r") {
        2
    } else {
        1
    };
    let head = bytes.get(..end + empty)?;
    let text = head.to_ascii_lowercase();
    // With any transfer coding, a Content-Length does not count (RFC 9112, section 6.3).
    const CODED: &[u8] = b"transfer-encoding";
    let is_coded = text.windows(CODED.len()).any(|word| word == CODED);
    (text.starts_with(b"http/1.1 ") && !text.starts_with(b"http/1.1 1") && !is_coded)
        .then_some(head)
}

/// Checks a response: the parts in which it arrives do not matter, its body is bounded, and one
/// that ends early is an error.
pub(crate) fn client(bytes: &[u8]) -> bool {
    let whole = read(bytes, bytes.len());
    let facts = |response: &LocalResponse| {
        (
            response.status,
            response.retry_after,
            response.body.to_vec(),
        )
    };
    let in_parts = read(bytes, bytes.len() / 2);
    assert_eq!(whole.as_ref().map(facts), in_parts.as_ref().map(facts));
    let Some(response) = whole else { return false };
    assert!(response.body.len() <= MAX_BODY);
    let head = plain_head(bytes);
    if let Some(head) = head {
        let end = head.len() + response.body.len();
        assert_eq!(bytes.get(head.len()..end), Some(&response.body[..]));
        let in_body = (!response.body.is_empty()).then(|| end - 1);
        let cut = [0, head.len() / 2, head.len() - 1];
        for end in cut.into_iter().chain(in_body) {
            assert!(
                read(&bytes[..end], end).is_none(),
                "accepted without its end"
            );
        }
    }
    true
}

/// Checks the URL of an issuer or of another server, or a value of `--resolve`.
pub(crate) fn url(text: &str) -> bool {
    let is_issuer = trust_policy::fuzzing::issuer(text);
    let is_url = https_probe::fuzzing::url(text);
    is_issuer || is_url
}

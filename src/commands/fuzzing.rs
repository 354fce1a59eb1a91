//! The fuzz target for the responses of the daemon, with arbitrary bytes.

#![expect(
    clippy::disallowed_methods,
    reason = "a command is a process of its own, without a runtime"
)]

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use super::http_client::{Connection, LocalResponse, get};

/// Maximum length of a response.
const MAX_RESPONSE: usize = 4096;

/// A server that sends these bytes, a few at a time, and then closes the connection.
struct Response<'b> {
    bytes: &'b [u8],
    chunk: usize,
}

impl Read for Response<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.chunk.min(self.bytes.len()).min(buffer.len());
        let (now, later) = self.bytes.split_at(length);
        buffer[..length].copy_from_slice(now);
        self.bytes = later;
        Ok(length)
    }
}

impl Write for Response<'_> {
    fn write(&mut self, request: &[u8]) -> io::Result<usize> {
        Ok(request.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Connection for Response<'_> {
    fn limit(&self, _time: Duration) -> io::Result<()> {
        Ok(())
    }
}

fn read(bytes: &[u8], chunk: usize) -> Option<LocalResponse> {
    let deadline = Instant::now() + Duration::from_secs(600);
    get(
        Response { bytes, chunk },
        "/v1/credentials",
        MAX_RESPONSE,
        deadline,
    )
    .ok()
}

/// Checks a response: the parts in which it arrives do not matter, and one that ends early is an
/// error.
pub(crate) fn client(bytes: &[u8]) -> bool {
    let whole = read(bytes, MAX_RESPONSE);
    let facts = |response: &LocalResponse| {
        (
            response.status,
            response.retry_after,
            response.body.to_vec(),
        )
    };
    let in_parts = read(bytes, 7);
    assert_eq!(whole.as_ref().map(facts), in_parts.as_ref().map(facts));
    let Some(response) = whole else { return false };
    assert!(bytes.len() <= MAX_RESPONSE && bytes.ends_with(&response.body));
    let head = &bytes[..bytes.len() - response.body.len()];
    assert!(head.starts_with(b"HTTP/1.1 ") && head.ends_with(b"\r\n\r\n"));
    let status = response.status.to_string();
    assert!(
        head[b"HTTP/1.1 ".len()..].starts_with(status.as_bytes()),
        "{status}"
    );
    for end in [0, head.len() - 1, bytes.len() - 1] {
        assert!(
            read(&bytes[..end], MAX_RESPONSE).is_none(),
            "accepted without its end"
        );
    }
    true
}

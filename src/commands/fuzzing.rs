//! The fuzz target for the responses of the daemon, with arbitrary bytes.

#![expect(
    clippy::disallowed_methods,
    reason = "a command is a process of its own, without a runtime"
)]

use std::time::Duration;

use tokio::io::{AsyncReadExt, join, sink};
use tokio::time::Instant;

use super::local_client::{LocalResponse, block_on, get};

/// Maximum length of a body.
const MAX_BODY: usize = 4096;

/// Reads a response that arrives in two parts, of which the first has `first` bytes. Then the
/// server closes the connection.
fn read(bytes: &[u8], first: usize) -> Option<LocalResponse> {
    let (first, second) = bytes.split_at(first);
    let stream = join(first.chain(second), sink());
    let request = async {
        let deadline = Instant::now() + Duration::from_secs(600);
        get(stream, "/v1/credentials", MAX_BODY, deadline).await
    };
    block_on(request).ok()?.ok()
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
    // With chunks the last bytes do not belong to the body.
    let head = bytes.strip_suffix(&response.body[..]);
    let is_chunked = |head: &[u8]| {
        head.to_ascii_lowercase()
            .windows(7)
            .any(|w| w == b"chunked")
    };
    if let Some(head) = head.filter(|head| !is_chunked(head)) {
        let cut = [0, head.len() / 2, head.len().saturating_sub(2)];
        let in_body = (!response.body.is_empty()).then(|| bytes.len() - 1);
        for end in cut.into_iter().chain(in_body) {
            assert!(
                read(&bytes[..end], end).is_none(),
                "accepted without its end"
            );
        }
    }
    true
}

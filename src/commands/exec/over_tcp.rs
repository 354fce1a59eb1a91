//! Check that the daemon attests callers over TCP, because the command's SDK has no other way to
//! it.

use std::io;
use std::path::Path;
use std::time::Duration;

use hyper::Uri;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use crate::attest::{self, UnixSupport};
use crate::commands::local_client;

/// Time limit of the daemon's response. A slow or missing daemon is left to the command.
const DAEMON_TIMEOUT: Duration = Duration::from_secs(2);
const MAX_RESPONSE: usize = 64 * 1024;
/// Path for the request: the daemon attests the caller and then finds nothing there, so it returns
/// no credentials.
const PATH: &str = "/probe";
const UNSUPPORTED: &str = "unsupported_kernel";

/// Fails if the daemon at `uri` rejects every caller over TCP because the kernel lacks something.
///
/// Sends a request only where this process finds the same lack, so mostly the command starts
/// without one. Blocks for up to twice [`DAEMON_TIMEOUT`].
pub(super) fn check(uri: &str) -> Result<(), String> {
    let Err(missing) = attest::try_tcp(Path::new("/proc")) else {
        return Ok(());
    };
    if !is_unsupported(uri).unwrap_or(false) {
        return Ok(());
    }
    let unix = attest::unix_support();
    let over_unix = match unix {
        UnixSupport::NoPidfd => "",
        UnixSupport::Process | UnixSupport::Pid => {
            "set `credential_process = awsvid credential-process` in a profile of ~/.aws/config, which uses the unix socket; \
             for TCP "
        }
    };
    Err(format!(
        "awsvid rejects all callers over TCP ({UNSUPPORTED}): {missing}; {over_unix}{}",
        missing.fix(unix)
    ))
}

/// Returns whether the daemon reports an unsupported kernel. `None` if it does not answer.
fn is_unsupported(uri: &str) -> Option<bool> {
    let uri: Uri = uri.parse().ok()?;
    // Only an operator's proxy answers https.
    let port = uri
        .port_u16()
        .or_else(|| (uri.scheme_str() == Some("http")).then_some(80))?;
    let host = uri.host()?.trim_start_matches('[').trim_end_matches(']');
    let answer = local_client::block_on(async {
        let deadline = Instant::now() + DAEMON_TIMEOUT;
        let connected = timeout_at(deadline, TcpStream::connect((host, port))).await;
        let stream = connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        let deadline = Instant::now() + DAEMON_TIMEOUT;
        local_client::get(stream, PATH, MAX_RESPONSE, deadline).await
    });
    let answer = answer.ok()?.ok()?;
    let body: Value = serde_json::from_slice(&answer.body).ok()?;
    Some(answer.status == 403 && body["code"] == UNSUPPORTED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::thread;

    #[test]
    fn check_trusts_only_the_daemons_own_response() {
        let rejected = |code: &str| {
            let body = format!("{{\"code\":\"{code}\"}}");
            format!(
                "HTTP/1.1 403 Forbidden\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            )
        };
        let table = [
            (rejected(UNSUPPORTED), Some(true)),
            (rejected("no_identity"), Some(false)),
            (rejected(UNSUPPORTED).replace("403", "503"), Some(false)),
            ("SSH-2.0\r\n".to_owned(), None),
        ];
        for (answer, expected) in table {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let uri = format!("http://{}/v1/credentials/a", listener.local_addr().unwrap());
            let serving = thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 1024];
                let length = stream.read(&mut request).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
                String::from_utf8(request[..length].to_vec()).unwrap()
            });
            assert_eq!(is_unsupported(&uri), expected);
            // The request has no token and does not fetch credentials.
            let request = serving.join().unwrap();
            assert!(
                request.starts_with("GET /probe HTTP/1.1\r\n") && !request.contains("uthorization"),
                "{request}"
            );
        }
        let closed = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        assert_eq!(
            is_unsupported(&format!("http://{closed}/v1/credentials")),
            None
        );
    }
}

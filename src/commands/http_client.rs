//! One question to the daemon, over one of its sockets.

#![expect(
    clippy::disallowed_methods,
    reason = "a command is a process of its own, without a runtime"
)]

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

/// A complete response of the daemon.
pub(super) struct LocalResponse {
    pub(super) status: u16,
    /// Minimum wait before a retry, as sent by the daemon.
    pub(super) retry_after: Option<Duration>,
    /// The body, which may contain credentials.
    pub(super) body: Zeroizing<Vec<u8>>,
}

/// A connection with a time limit for reads and writes.
pub(super) trait Connection: Read + Write {
    /// Limits each read and each write from now on.
    fn limit(&self, time: Duration) -> io::Result<()>;
}

impl Connection for UnixStream {
    fn limit(&self, time: Duration) -> io::Result<()> {
        self.set_write_timeout(Some(time))?;
        self.set_read_timeout(Some(time))
    }
}

impl Connection for TcpStream {
    fn limit(&self, time: Duration) -> io::Result<()> {
        self.set_write_timeout(Some(time))?;
        self.set_read_timeout(Some(time))
    }
}

/// Requests `path`, and reads a response of at most `most` bytes, until `deadline`.
pub(super) fn get(
    mut stream: impl Connection,
    path: &str,
    most: usize,
    deadline: Instant,
) -> io::Result<LocalResponse> {
    stream.limit(remaining_time(deadline)?)?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    // The buffer gets its size at once: one that grows leaves copies of its content behind.
    let mut answer = Zeroizing::new(vec![0; most.min(64 * 1024)]);
    let mut length = 0;
    loop {
        if length == answer.len() {
            if length >= most {
                return Err(invalid_response("it does not end"));
            }
            let mut larger = Zeroizing::new(vec![0; (length * 2).min(most)]);
            larger[..length].copy_from_slice(&answer);
            answer = larger;
        }
        stream.limit(remaining_time(deadline)?)?;
        match stream.read(&mut answer[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                return Err(ErrorKind::TimedOut.into());
            }
            Err(error) => return Err(error),
        }
    }
    parse(&answer[..length])
}

fn remaining_time(deadline: Instant) -> io::Result<Duration> {
    let remaining_time = deadline.saturating_duration_since(Instant::now());
    if remaining_time.is_zero() {
        Err(ErrorKind::TimedOut.into())
    } else {
        Ok(remaining_time)
    }
}

fn parse(answer: &[u8]) -> io::Result<LocalResponse> {
    let end = answer
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .ok_or_else(|| invalid_response("it has no header section"))?;
    let head = std::str::from_utf8(&answer[..end])
        .map_err(|_| invalid_response("its header section is not UTF-8"))?;
    let mut lines = head.split("\r\n");
    let status = lines
        .next()
        .and_then(|line| line.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok());
    let status = status.ok_or_else(|| invalid_response("it is not HTTP"))?;
    let (mut length, mut retry_after) = (None, None);
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse::<usize>().ok(),
            "retry-after" => retry_after = value.trim().parse().ok().map(Duration::from_secs),
            _ => {}
        }
    }
    let body = &answer[end + 4..];
    if length != Some(body.len()) {
        return Err(invalid_response("it ends too early"));
    }
    Ok(LocalResponse {
        status,
        retry_after,
        body: Zeroizing::new(body.to_vec()),
    })
}

fn invalid_response(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("invalid response: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn answered(text: String, most: usize) -> io::Result<LocalResponse> {
        let (client, mut server) = UnixStream::pair().unwrap();
        let serving = thread::spawn(move || {
            let mut request = [0; 1024];
            let read = server.read(&mut request).unwrap();
            // The client may have closed the connection.
            let _ = server.write_all(text.as_bytes());
            String::from_utf8(request[..read].to_vec()).unwrap()
        });
        let answer = get(client, "/a", most, Instant::now() + Duration::from_secs(20));
        assert!(
            serving
                .join()
                .unwrap()
                .starts_with("GET /a HTTP/1.1\r\nHost: localhost\r\n")
        );
        answer
    }

    #[test]
    fn partial_response_is_an_error() {
        let answer =
            "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\ncontent-length: 4\r\n\r\nbody"
                .to_owned();
        let good = answered(answer.clone(), 1000).unwrap();
        assert_eq!(
            (good.status, good.retry_after, &good.body[..]),
            (503, Some(Duration::from_secs(2)), &b"body"[..])
        );
        for (text, most) in [
            (answer.replace("length: 4", "length: 5"), 1000),
            (answer.replace("content-length: 4\r\n", ""), 1000),
            (answer.replace("\r\n\r\n", "\r\n"), 1000),
            (answer.replace("HTTP/1.1 503", "SSH-2.0"), 1000),
            (String::new(), 1000),
            (answer, 20),
        ] {
            assert_eq!(
                answered(text.clone(), most).err().unwrap().kind(),
                ErrorKind::InvalidData,
                "{text:?}"
            );
        }
    }

    #[test]
    fn long_response_is_read_to_its_end() {
        let body = "x".repeat(300_000);
        let text = format!(
            "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        assert_eq!(
            &answered(text, 1_000_000).unwrap().body[..],
            body.as_bytes()
        );
    }

    #[test]
    fn get_ends_at_the_deadline() {
        let (client, _server) = UnixStream::pair().unwrap();
        let error = get(
            client,
            "/a",
            1000,
            Instant::now() + Duration::from_millis(20),
        )
        .err()
        .unwrap();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }
}

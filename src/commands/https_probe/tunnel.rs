//! CONNECT (RFC 9110, section 9.3.6): a tunnel through an HTTP proxy.

use hyper::header::HeaderValue;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Maximum size of the proxy's response.
const MAX_HEADER_SIZE: usize = 8 * 1024;

/// Opens a tunnel to `host` on this connection to a proxy.
pub(super) async fn open(
    stream: &mut TcpStream,
    host: &str,
    port: u16,
    authorization: Option<&HeaderValue>,
) -> Result<(), String> {
    let authority = if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    };
    let mut request = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n").into_bytes();
    if let Some(value) = authorization {
        request.extend([b"Proxy-Authorization: ", value.as_bytes(), b"\r\n"].concat());
    }
    request.extend(b"\r\n");
    stream
        .write_all(&request)
        .await
        .map_err(|error| error.to_string())?;
    // Byte by byte: the bytes after the header section belong to the tunnel.
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() == MAX_HEADER_SIZE {
            return Err("its response is too long".to_owned());
        }
        head.push(
            stream
                .read_u8()
                .await
                .map_err(|error| format!("it closed the connection: {error}"))?,
        );
    }
    let head = String::from_utf8_lossy(&head);
    let line = head.lines().next().unwrap_or_default();
    match line.split(' ').nth(1) {
        Some(status)
            if line.starts_with("HTTP/1.") && status.len() == 3 && status.starts_with('2') =>
        {
            Ok(())
        }
        _ => Err(format!(
            "it does not let through to {authority}: {}",
            line.replace(char::is_control, " ")
        )),
    }
}

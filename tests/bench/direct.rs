//! `direct`, the baseline of the daemon's figures: hyper on the daemon's runtime, with the daemon's
//! settings (main.rs, http.rs) and the same bytes as its responses. It attests no caller, caches
//! nothing and records nothing.

use std::convert::Infallible;
use std::io::Read;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};

/// Serves until it is killed, on the unix socket `address` or, for "tcp", on a port of 127.0.0.1
/// that the kernel picks. It reads the body from standard input, and prints its address.
pub(crate) fn run(address: &str) -> Result<(), crate::BenchError> {
    let mut body = Vec::new();
    std::io::stdin().read_to_end(&mut body)?;
    let body = Bytes::from(body);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        if address == "tcp" {
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            println!("{}", listener.local_addr()?);
            loop {
                tokio::spawn(connection(listener.accept().await?.0, body.clone()));
            }
        }
        let listener = UnixListener::bind(address)?;
        std::fs::set_permissions(address, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
        println!("{address}");
        loop {
            tokio::spawn(connection(listener.accept().await?.0, body.clone()));
        }
    })
}

async fn connection(stream: impl AsyncRead + AsyncWrite + Unpin, body: Bytes) {
    let service = service_fn(|_| {
        let mut response = hyper::Response::new(Full::new(body.clone()));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
        async move { Ok::<_, Infallible>(response) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(5))
        .keep_alive(false);
    http.max_buf_size(16 * 1024).max_headers(64);
    // An error is a client that has closed its connection.
    let _ = http.serve_connection(TokioIo::new(stream), service).await;
}

//! A stub HTTP server, for responses that no real counterpart gives on demand.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};

/// Starts a server that sends what `answer` makes of a request's first line and body, byte for
/// byte. It runs until the test process ends. Returns its URL.
pub(crate) fn start(answer: impl Fn(&str, &str) -> String + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!(
        "http://{}",
        listener.local_addr().expect("the address just bound")
    );
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            // A client that closes its connection loses only its own response.
            let _ = serve(stream, &answer);
        }
    });
    url
}

fn serve(stream: TcpStream, answer: &impl Fn(&str, &str) -> String) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let (mut first, mut line, mut length) = (String::new(), String::new(), 0);
    reader.read_line(&mut first)?;
    while reader.read_line(&mut line)? > 2 {
        if let Some(text) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = text.trim().parse().unwrap_or_default();
        }
        line.clear();
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    reader
        .get_mut()
        .write_all(answer(&first, &String::from_utf8_lossy(&body)).as_bytes())
}

/// Formats a response from a status line, further header lines and a body.
pub(crate) fn http(status: &str, head: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{head}\r\n{body}",
        body.len()
    )
}

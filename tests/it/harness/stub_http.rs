//! A stub HTTP server, for responses that no real counterpart gives on demand.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};

/// Starts a server that sends what `answer` makes of a request's first line and body, byte for
/// byte. It runs until the test process ends. Returns its URL.
pub(crate) fn start(answer: impl Fn(&str, &str) -> String + Send + 'static) -> String {
    start_raw(move |request| {
        let (head, body) = request.split_once("\r\n\r\n").unwrap_or_default();
        answer(head.lines().next().unwrap_or_default(), body)
    })
}

/// Does the same with the whole request, as it was received.
pub(crate) fn start_raw(answer: impl Fn(&str) -> String + Send + 'static) -> String {
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

fn serve(stream: TcpStream, answer: &impl Fn(&str) -> String) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let (mut request, mut line, mut length) = (String::new(), String::new(), 0);
    while reader.read_line(&mut line)? > 2 {
        if let Some(text) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = text.trim().parse().unwrap_or_default();
        }
        request.push_str(&line);
        line.clear();
    }
    request.push_str("\r\n");
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    request.push_str(&String::from_utf8_lossy(&body));
    reader.get_mut().write_all(answer(&request).as_bytes())
}

/// Formats a response from a status line, further header lines and a body.
pub(crate) fn http(status: &str, head: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{head}\r\n{body}",
        body.len()
    )
}

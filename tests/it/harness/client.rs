//! A client of this test's own process.

use std::io::{Read, Write};

use serde_json::Value;

const REQUEST: &[u8] = b"GET /v1/credentials HTTP/1.1\r\nHost: localhost\r\nAuthorization: any\r\n\r\n";

/// Asks for credentials; the stream is for [`answer`].
pub(crate) fn send<S: Write>(mut stream: S) -> S {
    stream.write_all(REQUEST).expect("send a request");
    stream
}

/// The status and body of an answer, read to its very end. Panics if there is none.
pub(crate) fn answer(stream: &mut impl Read) -> (u16, Value) {
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read an answer");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    (head[9..12].parse().expect("a status"), serde_json::from_str(body).expect("a JSON body"))
}

/// Both.
pub(crate) fn ask(stream: impl Read + Write) -> (u16, Value) {
    answer(&mut send(stream))
}

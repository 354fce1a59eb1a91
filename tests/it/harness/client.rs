//! A client inside the test's own process.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::unistd::{Uid, setfsuid};
use serde_json::Value;

const REQUEST: &[u8] =
    b"GET /v1/credentials HTTP/1.1\r\nHost: localhost\r\nAuthorization: any\r\n\r\n";

/// The user of sockets that [`connect`] makes in a test of root.
pub(crate) const TCP_USER: u32 = 60_001;

/// Connects over TCP as a user that is not root.
///
/// For a socket of such a user a rule by cgroup decides alone. For one of root the daemon also
/// searches the descriptors of its cgroup, and all tests that run now share this one: together they
/// may have more descriptors than one search covers.
pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    // Of this thread only. Without root it has no effect.
    let previous = setfsuid(Uid::from_raw(TCP_USER));
    let connected = TcpStream::connect(address);
    setfsuid(previous);
    connected.expect("connect to the daemon")
}

/// Sends a request for credentials and returns the stream for [`answer`].
pub(crate) fn send<S: Write>(mut stream: S) -> S {
    stream.write_all(REQUEST).expect("send a request");
    stream
}

/// Reads a response to the end of the stream, and returns its status and body. Panics if there is
/// none.
pub(crate) fn answer(stream: &mut impl Read) -> (u16, Value) {
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read an answer");
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no answer: {answer:?}"));
    (
        head[9..12].parse().expect("a status"),
        serde_json::from_str(body).expect("a JSON body"),
    )
}

/// Sends a request and returns the response's status and body.
pub(crate) fn fetch(stream: impl Read + Write) -> (u16, Value) {
    answer(&mut send(stream))
}

/// Sends requests continuously, and panics at the first response without credentials.
pub(crate) struct Poller<'a> {
    fetch: Box<dyn Fn() -> (u16, Value) + Sync + 'a>,
    answered: AtomicUsize,
    ended: AtomicBool,
}

/// Ends the requests when dropped, also by a panic.
pub(crate) struct EndLater<'a>(pub(crate) &'a AtomicBool);

impl Drop for EndLater<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl<'a> Poller<'a> {
    /// Makes one that sends its requests by `fetch`.
    pub(crate) fn new(fetch: impl Fn() -> (u16, Value) + Sync + 'a) -> Self {
        Self {
            fetch: Box::new(fetch),
            answered: AtomicUsize::new(0),
            ended: AtomicBool::new(false),
        }
    }

    /// Sends requests until it is ended.
    pub(crate) fn run(&self) {
        while !self.ended.load(Ordering::Relaxed) {
            let (status, body) = (self.fetch)();
            assert!(
                status == 200 && body["AccessKeyId"].is_string(),
                "{status} {body}"
            );
            self.answered.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns the number of responses so far.
    pub(crate) fn count(&self) -> usize {
        self.answered.load(Ordering::Relaxed)
    }

    /// Returns a guard that ends `run` when it is dropped.
    pub(crate) fn end_later(&self) -> EndLater<'_> {
        EndLater(&self.ended)
    }
}

//! The real systems that awsvid works with: SPIRE, MinIO, the AWS CLI. A test starts them on
//! loopback, and they end with it. `tests/counterparts/get` builds them.
//!
//! All calls block the calling thread: in an async test use a multi-threaded runtime. A failure is
//! a panic that names the awaited event and shows the logs.

pub(crate) mod minio;
pub(crate) mod process;
pub(crate) mod spire;
pub(crate) mod workload;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::TcpSocket;

pub(crate) use super::skip::{root, skip};

/// Returns the folder into which `tests/counterparts/get` puts the programs. Both must compute the
/// same path.
fn cache() -> PathBuf {
    let env = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    if let Some(path) = env("AWSVID_TEST_CACHE") {
        return path;
    }
    if nix::unistd::getuid().is_root() {
        return PathBuf::from("/var/cache/awsvid-tests");
    }
    env("XDG_CACHE_HOME")
        .unwrap_or_else(|| env("HOME").unwrap_or_default().join(".cache"))
        .join("awsvid-tests")
}

/// Returns the path of an entry of that folder, whether it exists or not.
pub(crate) fn cached(name: &str) -> PathBuf {
    cache().join(name)
}

/// Returns the path of a program that `tests/counterparts/get` provides, such as `aws` or `mc`.
/// Returns `None` after a printed skip if it is missing. In CI that is a panic.
pub(crate) fn tool(name: &str) -> Option<PathBuf> {
    let path = cached("bin").join(name);
    if path.exists() {
        return Some(path);
    }
    skip(&format!(
        "{} is missing: run tests/counterparts/get",
        path.display()
    ));
    None
}

/// Returns the path of an interpreter of Python, like [`tool`]. Not that of the link: Python knows
/// its libraries by the path that it was started with.
pub(crate) fn python(name: &str) -> Option<PathBuf> {
    let link = tool(name)?;
    Some(std::fs::read_link(&link).unwrap_or(link))
}

/// Creates a folder that other users can enter, removed at the end. A plain temporary folder is
/// closed to them. Its path is short enough for unix sockets.
pub(crate) fn folder() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let permissions = std::fs::Permissions::from_mode(0o755);
    tempfile::Builder::new()
        .prefix("awsvid-")
        .permissions(permissions)
        .tempdir()
        .expect("a temporary folder")
}

/// A loopback TCP port that the kernel picked and that stays reserved while this lives, however
/// often the program that uses it stops and starts.
///
/// The socket is bound and never listens. With SO_REUSEADDR on both, another socket may bind the
/// same port and listen, but only by naming it (Go's listeners and tokio's set it). The kernel
/// never picks this port for a socket that names none, neither to listen nor to connect.
pub(crate) struct Port {
    address: SocketAddr,
    _socket: TcpSocket,
}

impl Port {
    /// Reserves a port of 127.0.0.1.
    pub(crate) fn reserve() -> Port {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_reuseaddr(true).expect("SO_REUSEADDR");
        socket
            .bind((Ipv4Addr::LOCALHOST, 0).into())
            .expect("a free port on 127.0.0.1");
        Port {
            address: socket.local_addr().expect("the address just bound"),
            _socket: socket,
        }
    }

    /// Returns 127.0.0.1 with the port.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Sends `GET path` over plain HTTP, and returns the status and body. Returns `None` without a
/// response within 5 s, or if it is not HTTP.
pub(crate) fn http_get(address: SocketAddr, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    // HTTP/1.0: the server closes the connection after a response that is not chunked.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.get(2..5)?.parse().ok()?;
    Some((status, body.to_owned()))
}

/// Returns the text of a file that may not exist yet, or that ends within a character during a
/// write.
fn read(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}

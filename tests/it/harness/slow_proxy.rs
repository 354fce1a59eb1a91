//! A proxy in front of a server that delays the clients' bytes.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{self, Shutdown};

/// Forwards connections until it is dropped, which cuts them. It delays each read from the client,
/// whatever its size, and forwards the server's bytes at once.
pub(crate) struct SlowProxy {
    listener: OwnedFd,
    connections: Arc<Mutex<Vec<OwnedFd>>>,
}

impl SlowProxy {
    /// Listens at `path`, in front of the socket `to`.
    pub(crate) fn unix(path: &Path, to: PathBuf, delay: Duration) -> Self {
        let listener = UnixListener::bind(path).expect("the socket of a delay");
        let way = Self::new(listener.try_clone().expect("a second handle").into());
        let connections = way.connections.clone();
        thread::spawn(move || {
            let clients = listener.incoming().map_while(Result::ok);
            clients.for_each(|client| {
                pass(
                    &connections,
                    client.into(),
                    UnixStream::connect(&to).map(OwnedFd::from),
                    delay,
                );
            });
        });
        way
    }

    /// Listens on a port of 127.0.0.1 that the kernel picks, in front of `to`, and returns the
    /// address.
    pub(crate) fn tcp(to: SocketAddr, delay: Duration) -> (Self, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("the address just bound");
        let way = Self::new(listener.try_clone().expect("a second handle").into());
        let connections = way.connections.clone();
        thread::spawn(move || {
            let clients = listener.incoming().map_while(Result::ok);
            clients.for_each(|client| {
                pass(
                    &connections,
                    client.into(),
                    TcpStream::connect(to).map(OwnedFd::from),
                    delay,
                );
            });
        });
        (way, address)
    }

    fn new(listener: OwnedFd) -> Self {
        Self {
            listener,
            connections: Arc::default(),
        }
    }
}

/// Copies both ways, in threads that end with the connection. If the server can't be reached, it
/// closes the connection.
fn pass(
    connections: &Mutex<Vec<OwnedFd>>,
    client: OwnedFd,
    server: io::Result<OwnedFd>,
    delay: Duration,
) {
    let Ok(server) = server else { return };
    connections
        .lock()
        .unwrap()
        .push(client.try_clone().expect("a second handle"));
    let handle = |fd: &OwnedFd| File::from(fd.try_clone().expect("a second handle"));
    let (mut back, mut answered) = (handle(&server), handle(&client));
    let (mut client, mut server) = (File::from(client), File::from(server));
    let (sender, chunks) = channel::<(Instant, Vec<u8>)>();
    thread::spawn(move || {
        let mut buffer = [0; 16 * 1024];
        while let Ok(length @ 1..) = client.read(&mut buffer) {
            let _ = sender.send((Instant::now() + delay, buffer[..length].to_vec()));
        }
    });
    thread::spawn(move || {
        for (at, chunk) in chunks {
            thread::sleep(at.saturating_duration_since(Instant::now()));
            if server.write_all(&chunk).is_err() {
                break;
            }
        }
        let _ = socket::shutdown(server.as_raw_fd(), Shutdown::Write);
    });
    thread::spawn(move || {
        let _ = io::copy(&mut back, &mut answered);
        let _ = socket::shutdown(answered.as_raw_fd(), Shutdown::Write);
    });
}

impl Drop for SlowProxy {
    fn drop(&mut self) {
        // Ends accept(2) in the thread.
        let _ = socket::shutdown(self.listener.as_raw_fd(), Shutdown::Both);
        for connection in self.connections.lock().unwrap().iter() {
            let _ = socket::shutdown(connection.as_raw_fd(), Shutdown::Both);
        }
    }
}

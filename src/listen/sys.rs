//! System calls and socket options of listeners and connections.

use std::io;
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{MsgFlags, SockaddrStorage, getsockname};
use rustix::net::SocketFlags;
use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, ReadBuf};

/// Sets `TCP_CORK` of `tcp(7)`: the kernel sends all that is written together with the shutdown.
///
/// A client that waits for a response is then woken once, not once for the response and again for
/// the end. Each connection is shut down after its only response.
pub(super) fn set_tcp_cork(stream: impl AsFd) -> io::Result<()> {
    Ok(rustix::net::sockopt::set_tcp_cork(stream, true)?)
}

const ACCEPTED: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// Calls `accept4(2)` on a unix socket.
pub(super) fn accept_unix(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    Ok(rustix::net::accept_with(listener, ACCEPTED)?)
}

/// Calls `accept4(2)` on a TCP socket, and returns the client's address too.
pub(super) fn accept_tcp(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, SocketAddr)> {
    let (accepted, client) = rustix::net::acceptfrom_with(listener, ACCEPTED)?;
    // EPROTO is handled as an error of this connection only.
    let client = client
        .and_then(|client| SocketAddr::try_from(client).ok())
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EPROTO))?;
    Ok((accepted, client))
}

/// Returns the address that a TCP socket is bound to.
pub(super) fn local_address(socket: impl AsFd) -> io::Result<SocketAddr> {
    let address: SockaddrStorage = getsockname(socket.as_fd().as_raw_fd())?;
    ip(&address).ok_or_else(|| io::Error::from_raw_os_error(libc::EAFNOSUPPORT))
}

fn ip(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = || {
        address
            .as_sockaddr_in()
            .map(|v4| SocketAddr::from(SocketAddrV4::from(*v4)))
    };
    let v6 = || {
        address
            .as_sockaddr_in6()
            .map(|v6| SocketAddr::from(SocketAddrV6::from(*v6)))
    };
    v4().or_else(v6)
}

/// The bytes that one read takes, and initializes in 50 ns. The head of an SDK's request has less
/// than 2,000.
const READ_BYTES: usize = 2048;

/// Calls `recv(2)` into the free part of `buffer`. It initializes only what one read takes: tokio
/// returns the rest of a fresh buffer only by an unsafe function.
pub(super) fn recv(socket: BorrowedFd<'_>, buffer: &mut ReadBuf<'_>) -> io::Result<()> {
    let room = buffer.initialize_unfilled_to(buffer.remaining().min(READ_BYTES));
    let length = nix::sys::socket::recv(socket.as_raw_fd(), room, MsgFlags::empty())?;
    buffer.advance(length);
    Ok(())
}

/// Registers a nonblocking listener with the runtime, to wake the task that waits for a connection.
#[expect(
    unsafe_code,
    reason = "tokio has no other function for this that is not deprecated"
)]
pub(super) fn register_listener(listener: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: the Arc keeps the descriptor open, and always returns the same one.
    Ok(unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) }?)
}

/// Registers a nonblocking socket with the runtime, to wake the task that waits for it.
#[expect(
    unsafe_code,
    reason = "tokio has no other function for this that is not deprecated"
)]
pub(super) fn register(socket: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: the Arc keeps the descriptor open, and always returns the same one.
    Ok(unsafe { AsyncFd::register(socket) }?)
}

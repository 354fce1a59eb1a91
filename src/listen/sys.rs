//! System calls and socket options that have no safe wrapper here, or only one that does more than
//! is needed.
#![allow(
    unsafe_code,
    reason = "raw system calls are this module's whole purpose; nothing else is in it"
)]

use std::io;
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{SockaddrLike, SockaddrStorage, getsockname};
use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, ReadBuf};

/// Sets `TCP_CORK` of `tcp(7)`: the kernel sends all that is written together with the shutdown.
///
/// A client that waits for a response is then woken once, not once for the response and again for
/// the end. Each connection is shut down after its only response.
pub(super) fn set_tcp_cork(stream: impl AsFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of::<libc::c_int>()).map_err(io::Error::other)?;
    // SAFETY: `on` is valid for `length` bytes, which the kernel only reads.
    let status = unsafe {
        let socket = stream.as_fd().as_raw_fd();
        libc::setsockopt(
            socket,
            libc::IPPROTO_TCP,
            libc::TCP_CORK,
            (&raw const on).cast(),
            length,
        )
    };
    if status < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

const ACCEPTED: libc::c_int = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;

/// Calls `accept4(2)` on a unix socket.
pub(super) fn accept_unix(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: without a buffer for the address the kernel writes none.
    owned_fd(unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            ACCEPTED,
        )
    })
}

/// Calls `accept4(2)` on a TCP socket, and returns the client's address too.
pub(super) fn accept_tcp(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, SocketAddr)> {
    // SAFETY: zeros are a sockaddr_storage without an address.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of_val(&storage)).map_err(io::Error::other)?;
    let address = (&raw mut storage).cast::<libc::sockaddr>();
    // SAFETY: `storage` has room for `length` bytes, and the kernel writes at most that many.
    let accepted = owned_fd(unsafe {
        libc::accept4(listener.as_raw_fd(), address, &raw mut length, ACCEPTED)
    })?;
    // SAFETY: the kernel has written an address of `length` bytes here.
    let client = unsafe { SockaddrStorage::from_raw(address, Some(length)) };
    // EPROTO is handled as an error of this connection only.
    let client = client
        .and_then(|client| ip(&client))
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

fn owned_fd(fd: libc::c_int) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so this is a new descriptor without another owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Calls `recv(2)` into the free part of `buffer`, which need not be initialized.
pub(super) fn recv(socket: BorrowedFd<'_>, buffer: &mut ReadBuf<'_>) -> io::Result<()> {
    // SAFETY: the buffer is not read, and only the kernel's bytes are written there.
    let room = unsafe { buffer.unfilled_mut() };
    // SAFETY: the kernel writes at most `room.len()` bytes into `room`.
    let length = unsafe { libc::recv(socket.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), 0) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel has initialized that many bytes.
    unsafe { buffer.assume_init(length) };
    buffer.advance(length);
    Ok(())
}

/// Registers a nonblocking listener with the runtime, to wake the task that waits for a connection.
pub(super) fn register_listener(listener: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: the Arc keeps the descriptor open, and always returns the same one.
    Ok(unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) }?)
}

/// Registers a nonblocking socket with the runtime, to wake the task that waits for it.
pub(super) fn register(socket: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: the Arc keeps the descriptor open, and always returns the same one.
    Ok(unsafe { AsyncFd::register(socket) }?)
}

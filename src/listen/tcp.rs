//! Listening on a TCP address.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::socket::{
    self, AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, setsockopt, sockopt,
};

/// The length of a listener's backlog, as in awsvid.socket. The kernel drops connections when the
/// backlog is full, and TCP clients retry only after a second.
pub(super) const BACKLOG: i32 = 4096;

/// `SO_RCVBUF` of a listener, in bytes. The kernel doubles it for its own bookkeeping.
///
/// Accepted connections inherit it, and their buffers then do not grow automatically (tcp(7)).
/// Bytes that a client sends and the daemon does not read stay in that buffer and count as the
/// daemon's memory. A request that waits for its exchange can go on sending: up to 6 MiB per
/// connection without this bound (T32). An SDK's request head (below 2 kB) fits; a head of 16 KiB
/// is read in parts.
const RECEIVE_BUFFER_BYTES: usize = 8 * 1024;
/// `SO_SNDBUF` of a listener, in bytes. The largest response (below 10 kB) fits, so it is written
/// at once.
const SEND_BUFFER_BYTES: usize = 16 * 1024;

/// Bounds the kernel's buffers of each connection that is accepted from here on. Connections that
/// already wait in the backlog keep the buffers that they have.
///
/// On a unix socket this would have no effect: bytes sent there count against the sender's own
/// `SO_SNDBUF`.
pub(super) fn bound_buffers(listener: impl AsFd) -> io::Result<()> {
    setsockopt(&listener, sockopt::RcvBuf, &RECEIVE_BUFFER_BYTES)?;
    Ok(setsockopt(&listener, sockopt::SndBuf, &SEND_BUFFER_BYTES)?)
}

/// Whether an address that the machine does not have may be bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FreeBind {
    Allowed,
    Denied,
}

/// Listens in the calling thread's network namespace.
pub(super) fn bind(address: SocketAddr, free_bind: FreeBind) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket::socket(family, SockType::Stream, flags, None)?;
    // Leftover connections of an earlier start must not block the bind.
    setsockopt(&listener, sockopt::ReuseAddr, &true)?;
    if free_bind == FreeBind::Allowed {
        setsockopt(&listener, sockopt::IpFreebind, &true)?;
    }
    bound_buffers(&listener)?;
    socket::bind(listener.as_raw_fd(), &SockaddrStorage::from(address))?;
    socket::listen(&listener, Backlog::new(BACKLOG)?)?;
    Ok(listener)
}

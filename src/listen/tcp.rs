//! Listening on a TCP address.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::socket::{
    self, AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, setsockopt, sockopt,
};

/// How many may wait to be accepted, as in awsvid.socket. The kernel drops who comes when the queue is full, and TCP
/// clients try again only a second later.
pub(super) const BACKLOG: i32 = 4096;

/// `SO_RCVBUF` of a listener, in bytes; the kernel takes twice as much, its own bookkeeping included. Accepted connections
/// inherit it, and their buffers do not grow by themselves then (tcp(7)). What a client sends and the daemon does not read
/// (a request that waits for its exchange, and goes on sending) stays in that buffer, and counts as the daemon's memory: up to
/// 6 MiB each without this bound (attack 32). A head of an SDK (below 2 kB) fits; one of 16 KiB is read in parts.
const RECEIVE_BUFFER_BYTES: usize = 8 * 1024;
/// `SO_SNDBUF`, likewise. The largest answer (below 10 kB) fits, so that it is written at once.
const SEND_BUFFER_BYTES: usize = 16 * 1024;

/// Bounds what the kernel keeps for each connection that is accepted from here on. Connections that wait in the queue of a
/// listener that was made elsewhere keep the buffers that they have.
///
/// On a unix socket this would be without effect: what is sent there counts against the sender's own `SO_SNDBUF`.
pub(super) fn bound_buffers(listener: impl AsFd) -> io::Result<()> {
    setsockopt(&listener, sockopt::RcvBuf, &RECEIVE_BUFFER_BYTES)?;
    Ok(setsockopt(&listener, sockopt::SndBuf, &SEND_BUFFER_BYTES)?)
}

/// Whether an address may be bound that the machine does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FreeBind {
    Allowed,
    Denied,
}

/// Listens in the calling thread's network namespace.
pub(super) fn bind(address: SocketAddr, freely: FreeBind) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket::socket(family, SockType::Stream, flags, None)?;
    // What is left of the connections of an earlier start keeps nobody from listening.
    setsockopt(&listener, sockopt::ReuseAddr, &true)?;
    if freely == FreeBind::Allowed {
        setsockopt(&listener, sockopt::IpFreebind, &true)?;
    }
    bound_buffers(&listener)?;
    socket::bind(listener.as_raw_fd(), &SockaddrStorage::from(address))?;
    socket::listen(&listener, Backlog::new(BACKLOG)?)?;
    Ok(listener)
}

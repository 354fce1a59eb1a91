//! Listening on a TCP address.

use std::ffi::OsString;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::socket::{
    self, AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, getsockopt, setsockopt,
    sockopt,
};

/// The name of the loopback device in every network namespace.
const LOOPBACK: &str = "lo";

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

/// Options of a listener on a TCP address.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct BindOptions {
    /// Set if an address that the machine does not have may be bound.
    pub(super) free_bind: bool,
    /// Set if only connections over the loopback device reach the listener. Without that the kernel
    /// also passes it packets from other hosts that are routed to its address (T39).
    pub(super) loopback_only: bool,
}

/// Listens in the calling thread's network namespace.
pub(super) fn bind(address: SocketAddr, options: BindOptions) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket::socket(family, SockType::Stream, flags, None)?;
    // Leftover connections of an earlier start must not block the bind.
    setsockopt(&listener, sockopt::ReuseAddr, &true)?;
    if options.free_bind {
        setsockopt(&listener, sockopt::IpFreebind, &true)?;
    }
    if options.loopback_only {
        setsockopt(&listener, sockopt::BindToDevice, &OsString::from(LOOPBACK))?;
        // No router forwards an answer.
        match address {
            SocketAddr::V4(_) => setsockopt(&listener, sockopt::Ipv4Ttl, &1)?,
            SocketAddr::V6(_) => setsockopt(&listener, sockopt::Ipv6Ttl, &1)?,
        }
    }
    bound_buffers(&listener)?;
    socket::bind(listener.as_raw_fd(), &SockaddrStorage::from(address))?;
    socket::listen(&listener, Backlog::new(BACKLOG)?)?;
    Ok(listener)
}

/// Returns whether only connections over the loopback device reach the listener.
pub(super) fn is_loopback_only(listener: impl AsFd) -> io::Result<bool> {
    Ok(getsockopt(&listener, sockopt::BindToDevice)? == LOOPBACK)
}

//! Listening on a TCP address.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, setsockopt, sockopt};

/// How many may wait to be accepted, as in awsvid.socket. The kernel drops who comes when the queue is full, and TCP
/// clients try again only a second later.
pub(super) const BACKLOG: i32 = 4096;

/// Whether an address may be bound that the machine does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Freely {
    Yes,
    No,
}

/// Listens in the calling thread's network namespace.
pub(super) fn bind(address: SocketAddr, freely: Freely) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket::socket(family, SockType::Stream, flags, None)?;
    // What is left of the connections of an earlier start keeps nobody from listening.
    setsockopt(&listener, sockopt::ReuseAddr, &true)?;
    if freely == Freely::Yes {
        setsockopt(&listener, sockopt::IpFreebind, &true)?;
    }
    socket::bind(listener.as_raw_fd(), &SockaddrStorage::from(address))?;
    socket::listen(&listener, Backlog::new(BACKLOG)?)?;
    Ok(listener)
}

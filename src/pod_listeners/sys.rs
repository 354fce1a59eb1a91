//! System calls and socket options of pods' listeners.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// From Linux 5.14 on; the libc crate lacks it.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// Registers a descriptor with the runtime, so that tasks can wait for `interest`.
#[expect(
    unsafe_code,
    reason = "tokio has no other function for this that is not deprecated"
)]
pub(crate) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the value owns the descriptor, and returns no other one.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// Sends a few bytes, with a descriptor if there is one.
pub(super) fn send(
    stream: BorrowedFd<'_>,
    bytes: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    if let Some(descriptor) = &descriptor {
        // The space is that of one descriptor, so it fits.
        rights.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(
            descriptor,
        )));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let sent = rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut rights, flags)?;
    // A unix stream takes so few bytes whole or not at all.
    if sent == bytes.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// Receives as many bytes as fit, and the descriptor that comes with them.
pub(super) fn receive(
    stream: BorrowedFd<'_>,
    room: &mut [u8],
) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = rustix::net::recvmsg(stream, &mut [IoSliceMut::new(room)], &mut rights, flags)?;
    let received = rights.drain().filter_map(|control| match control {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.last(),
        _ => None,
    });
    let received = received.last();
    Ok((message.bytes, received))
}

/// Returns the cookie of the calling thread's network namespace.
pub(super) fn cookie_here() -> io::Result<u64> {
    let datagram = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    network_cookie(datagram.as_fd())
}

/// Returns `SO_NETNS_COOKIE` of `socket(7)`: the number of a socket's network namespace, unique
/// until the next boot.
#[expect(unsafe_code, reason = "neither rustix nor nix has this option")]
pub(super) fn network_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie: u64 = 0;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).map_err(io::Error::other)?;
    // SAFETY: `cookie` has `length` bytes that the kernel may write.
    let status = unsafe {
        let buffer = (&raw mut cookie).cast();
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            buffer,
            &raw mut length,
        )
    };
    if status < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(cookie)
    }
}

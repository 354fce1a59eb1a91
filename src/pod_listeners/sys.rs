//! System calls without a safe wrapper.
#![allow(
    unsafe_code,
    reason = "raw system calls are this module's whole purpose; nothing else is in it"
)]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
};
use nix::sys::socket::{recvmsg, sendmsg, socket};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// From Linux 5.14 on; the libc crate lacks it.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// Registers a descriptor with the runtime, so that tasks can wait for `interest`.
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
    let descriptors = descriptor.map(|fd| [fd.as_raw_fd()]);
    let rights = descriptors
        .as_ref()
        .map(|fds| ControlMessage::ScmRights(fds));
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(bytes)],
        rights.as_slice(),
        flags,
        None,
    )?;
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
    let mut space = nix::cmsg_space!(RawFd);
    let mut slices = [IoSliceMut::new(room)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
    let mut received = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            // SAFETY: the kernel has just made these descriptors for this process, and nothing else
            // owns them.
            received.extend(
                fds.into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    Ok((message.bytes, received.pop()))
}

/// Returns the cookie of the calling thread's network namespace.
pub(super) fn cookie_here() -> io::Result<u64> {
    let made = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    network_cookie(made.as_fd())
}

/// Returns `SO_NETNS_COOKIE` of `socket(7)`: the number of a socket's network namespace, unique
/// until the next boot.
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

//! The few system calls and socket options that no safe wrapper has.
#![allow(unsafe_code, reason = "raw system calls are this module's whole purpose; nothing else is in it")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// Linux 6.5.
const SO_PEERPIDFD: libc::c_int = 77;
/// The kernel's own bound (`NGROUPS_MAX`).
const GROUPS_MAX: usize = 65536;

/// `pidfd_open(2)`: a descriptor for the process that has this number now.
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers and no memory; the result is checked below.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so this is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `SO_PEERPIDFD`: a descriptor for the process that connected. `None` on kernels before 6.5.
///
/// A connector that is gone is an error on some kernels, and a pidfd that reads as exited on others.
pub(crate) fn peer_pidfd(socket: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let mut fd: RawFd = -1;
    let mut length = libc::socklen_t::try_from(size_of::<RawFd>()).map_err(io::Error::other)?;
    // SAFETY: `fd` is a valid place for the `length` bytes that the kernel may write.
    let status = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_PEERPIDFD, (&raw mut fd).cast(), &raw mut length)
    };
    if status < 0 {
        return match Errno::last() {
            Errno::ENOPROTOOPT => Ok(None),
            errno => Err(errno.into()),
        };
    }
    // SAFETY: the call succeeded, so the kernel has put a new descriptor here that nobody else owns.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// `SO_PEERGROUPS`: the connector's supplementary groups as they were when it connected, ascending.
pub(crate) fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut room = 64;
    loop {
        let mut groups: Vec<libc::gid_t> = vec![0; room];
        let bytes = room * size_of::<libc::gid_t>();
        let mut length = libc::socklen_t::try_from(bytes).map_err(io::Error::other)?;
        // SAFETY: `groups` has room for `length` bytes, and the kernel writes at most that many.
        let status = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        if status == 0 {
            groups.truncate(length as usize / size_of::<libc::gid_t>());
            groups.sort_unstable();
            groups.dedup();
            return Ok(groups);
        }
        match Errno::last() {
            Errno::ERANGE if room < GROUPS_MAX => room = GROUPS_MAX,
            errno => return Err(errno.into()),
        }
    }
}

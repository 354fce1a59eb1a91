//! What has no safe wrapper here.
#![allow(unsafe_code, reason = "raw system calls are this module's whole purpose; nothing else is in it")]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A descriptor that wakes whoever waits for this.
pub(super) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: it owns the descriptor, and gives no other than that.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

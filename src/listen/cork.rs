//! The one socket option that has no safe wrapper here.
#![allow(unsafe_code, reason = "a raw system call is this module's whole purpose; nothing else is in it")]

use std::io;
use std::os::fd::AsRawFd;

use tokio::net::TcpStream;

/// `TCP_CORK` of `tcp(7)`: what is written is sent when the connection is shut down, with that. A client that waits for an
/// answer is woken once then, not for the answer and again for its end. Each connection is shut down after its one answer.
pub(super) fn cork(stream: &TcpStream) -> io::Result<()> {
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of::<libc::c_int>()).map_err(io::Error::other)?;
    // SAFETY: `on` is a valid place of `length` bytes, which the kernel only reads.
    let status = unsafe {
        libc::setsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_CORK, (&raw const on).cast(), length)
    };
    if status < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

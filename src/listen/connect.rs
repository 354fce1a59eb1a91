//! Connections to a unix socket whose listener may be stopped.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

/// The shortest time that the kernel can wait. A zero would mean no limit.
const MIN_WAIT: Duration = Duration::from_millis(1);

/// Connects to the unix socket at `path`. Waits at most `max_wait` while the listener's backlog is
/// full, and then fails with [`io::ErrorKind::TimedOut`].
///
/// Without a limit connect(2) waits until the listener accepts. Any local user can fill the backlog
/// of a process that is stopped (T25). The stream keeps the limit for its writes.
#[expect(
    clippy::disallowed_methods,
    reason = "connect(2) itself waits, so this never runs on an I/O thread"
)]
pub(crate) fn connect_unix(path: &Path, max_wait: Duration) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    let stream = UnixStream::from(socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?);
    let deadline = Instant::now() + max_wait;
    loop {
        let remaining = deadline.saturating_duration_since(Instant::now());
        // SO_SNDTIMEO limits connect(2), too (unix(7), socket(7)).
        stream.set_write_timeout(Some(remaining.max(MIN_WAIT)))?;
        match connect(stream.as_raw_fd(), &address) {
            Ok(()) => return Ok(stream),
            Err(Errno::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Gives the listener the smallest backlog, and connects until it is full.
#[cfg(test)]
pub(crate) fn fill_backlog(
    listener: &std::os::unix::net::UnixListener,
    path: &Path,
) -> Vec<UnixStream> {
    use nix::sys::socket::{Backlog, listen};
    listen(listener, Backlog::new(0).unwrap()).unwrap();
    std::iter::from_fn(|| connect_unix(path, Duration::ZERO).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn connect_ends_while_the_backlog_is_full() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let missing = connect_unix(&path, Duration::ZERO).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        let listener = UnixListener::bind(&path).unwrap();
        let mut waiting = fill_backlog(&listener, &path);
        for max_wait in [Duration::ZERO, Duration::from_millis(20)] {
            let error = connect_unix(&path, max_wait).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        }
        listener.accept().unwrap();
        waiting.push(connect_unix(&path, Duration::ZERO).unwrap());
        drop(listener);
        let dead = connect_unix(&path, Duration::ZERO).unwrap_err();
        assert_eq!(dead.kind(), io::ErrorKind::ConnectionRefused);
    }
}

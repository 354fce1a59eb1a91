//! The socket of an accepted connection.
//!
//! In most cases the request has already arrived when it is read, and the response fits into the
//! kernel's buffer. Registration with the runtime costs a system call, and another to undo it. So a
//! socket is registered only when a read or write would block.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use nix::sys::socket::{self, Shutdown, setsockopt, sockopt};
use nix::sys::uio::writev;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::listen::sys;

/// A stream socket that is registered with the runtime only when it has to wait.
#[derive(Debug)]
pub struct LazySocket {
    fd: Arc<OwnedFd>,
    watched: Option<AsyncFd<Arc<OwnedFd>>>,
}

#[derive(Debug, Clone, Copy)]
enum IoDirection {
    Read,
    Write,
}

impl LazySocket {
    /// Wraps a nonblocking socket.
    pub(super) fn new(fd: impl Into<OwnedFd>) -> Self {
        Self {
            fd: Arc::new(fd.into()),
            watched: None,
        }
    }

    /// Returns the descriptor. The connection is closed with the last clone of it.
    pub fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Makes a later close send a reset, which leaves no port in TIME_WAIT as an orderly close
    /// would (T20).
    pub fn reset_on_close(descriptor: &OwnedFd) {
        // If that fails, and on a unix socket, the close is an ordinary one.
        let _ = setsockopt(
            descriptor,
            sockopt::Linger,
            &libc::linger {
                l_onoff: 1,
                l_linger: 0,
            },
        );
    }

    /// Repeats `call` until it does not block.
    fn poll<T>(
        &mut self,
        cx: &mut Context<'_>,
        direction: IoDirection,
        mut call: impl FnMut(BorrowedFd<'_>) -> io::Result<T>,
    ) -> Poll<io::Result<T>> {
        let fd = self.fd.as_fd();
        let mut call = || loop {
            match call(fd) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return done,
            }
        };
        let watched = match &self.watched {
            Some(watched) => watched,
            None => match call() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.watched.insert(sys::register(self.fd.clone())?)
                }
                done => return Poll::Ready(done),
            },
        };
        loop {
            let mut is_ready = match direction {
                IoDirection::Read => ready!(watched.poll_read_ready(cx))?,
                IoDirection::Write => ready!(watched.poll_write_ready(cx))?,
            };
            if let Ok(done) = is_ready.try_io(|_| call()) {
                return Poll::Ready(done);
            }
        }
    }
}

impl AsFd for LazySocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsyncRead for LazySocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll(cx, IoDirection::Read, |fd| sys::recv(fd, buffer))
    }
}

impl AsyncWrite for LazySocket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll(cx, IoDirection::Write, |fd| Ok(writev(fd, slices)?))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Returns at once: nothing is buffered here.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(socket::shutdown(self.fd.as_raw_fd(), Shutdown::Write).map_err(io::Error::from))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::timeout;

    use super::*;

    fn pair() -> (LazySocket, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (LazySocket::new(ours), theirs)
    }

    #[tokio::test]
    async fn read_of_arrived_bytes_does_not_register_the_socket() {
        let (mut ours, mut theirs) = pair();
        io::Write::write_all(&mut theirs, b"there").unwrap();
        let mut room = [0; 16];
        assert_eq!(ours.read(&mut room).await.unwrap(), 5);
        assert_eq!(&room[..5], b"there");
        ours.write_all(b"answer").await.unwrap();
        assert!(ours.watched.is_none());
    }

    #[tokio::test]
    async fn read_waits_for_bytes_that_arrive_later() {
        let (mut ours, mut theirs) = pair();
        let mut room = [0; 16];
        let nothing = timeout(Duration::from_millis(10), ours.read(&mut room)).await;
        assert!(nothing.is_err() && ours.watched.is_some());
        let reading = tokio::spawn(async move {
            let mut room = [0; 16];
            let first = ours.read(&mut room).await.unwrap();
            (first, ours.read(&mut room).await.unwrap())
        });
        tokio::task::yield_now().await;
        io::Write::write_all(&mut theirs, b"later").unwrap();
        drop(theirs);
        assert_eq!(reading.await.unwrap(), (5, 0));
    }

    #[tokio::test]
    async fn write_waits_for_room_in_the_kernels_buffer() {
        let (mut ours, mut theirs) = pair();
        let much = vec![7; 4 * 1024 * 1024];
        let expected = much.len();
        let mut writing = Box::pin(async move {
            ours.write_all(&much).await.unwrap();
            let watched = ours.watched.is_some();
            ours.shutdown().await.unwrap();
            watched
        });
        // Nothing is read yet.
        tokio::select! {
            biased;
            _ = &mut writing => panic!("the kernel's buffer has room for all"),
            () = std::future::ready(()) => {}
        }
        let read = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            io::Read::read_to_end(&mut theirs, &mut all).unwrap();
            all.len()
        });
        let (is_watched, read) = tokio::join!(writing, read);
        assert_eq!(read.unwrap(), expected);
        assert!(is_watched);
    }
}

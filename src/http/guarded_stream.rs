//! The stream below hyper. It withholds hyper's own answers, and rejects lines that end with a line
//! feed alone.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::timeout;

/// The bytes that are read and dropped before the connection is closed, and the time for that.
const DRAIN_BYTES: u64 = 1024 * 1024;
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// The progress of a connection towards its answer.
#[derive(Debug, Default)]
pub(super) struct ResponseState {
    /// hyper has read a request. Bytes that it wrote before are not the daemon's answer.
    answering: AtomicBool,
    /// The answer takes time, so the client may close the connection in between.
    waiting: AtomicBool,
}

impl ResponseState {
    /// Records that hyper has read a request.
    pub(super) fn set_answering(&self) {
        self.answering.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_answering(&self) -> bool {
        self.answering.load(Ordering::Relaxed)
    }

    /// Waits for the answer. If it is not ready at once, the connection is polled again, so that
    /// hyper checks whether the client is still there. Its first check is before it polls the
    /// answer, and is suppressed ([`GuardedStream::poll_read`]).
    pub(super) async fn wait_for<A>(&self, mut answer: Pin<&mut impl Future<Output = A>>) -> A {
        poll_fn(|cx| {
            let polled = answer.as_mut().poll(cx);
            if polled.is_pending() && !self.waiting.swap(true, Ordering::Relaxed) {
                cx.waker().wake_by_ref();
            }
            polled
        })
        .await
    }

    fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::Relaxed)
    }
}

/// The stream of one client.
pub(super) struct GuardedStream<'a, S> {
    stream: S,
    /// The stream is shut down before it is closed. Over TCP this sends the answer. On a unix
    /// socket close(2) is enough, and wakes the client once less.
    shuts_down: bool,
    state: &'a ResponseState,
    last_byte: u8,
    bare_lf_seen: bool,
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin> GuardedStream<'a, S> {
    pub(super) fn new(stream: S, shuts_down: bool, state: &'a ResponseState) -> Self {
        Self {
            stream,
            shuts_down,
            state,
            last_byte: 0,
            bare_lf_seen: false,
        }
    }

    /// Returns whether the head has a line feed without a carriage return.
    pub(super) fn saw_bare_lf(&self) -> bool {
        self.bare_lf_seen
    }

    /// Writes the answer to a head that hyper rejects.
    pub(super) async fn write_raw(&mut self, answer: &[u8]) -> io::Result<()> {
        self.stream.write_all(answer).await?;
        self.stream.shutdown().await
    }

    /// Reads and drops bytes of the client, within bounds. If a socket is closed with unread bytes,
    /// the kernel resets the connection, and the client may lose the answer.
    pub(super) async fn drain_input(&mut self) {
        let unwanted = async {
            // The client sees the end of the answer also while it sends.
            let _ = self.stream.shutdown().await;
            // The buffer is on the heap: few connections need it, and each future would contain it.
            let mut buffer = vec![0; 4096];
            let mut rest = (&mut self.stream).take(DRAIN_BYTES);
            while rest.read(&mut buffer).await.is_ok_and(|length| length > 0) {}
        };
        let _ = timeout(DRAIN_TIMEOUT, unwanted).await;
    }

    /// Returns whether a line feed follows another byte than a carriage return. Some parsers end a
    /// line there and others do not, so text that a client passes on in one header could become a
    /// second.
    fn has_bare_lf(&mut self, bytes: &[u8]) -> bool {
        let before = |at: usize| at.checked_sub(1).map_or(self.last_byte, |at| bytes[at]);
        let alone = bytes
            .iter()
            .enumerate()
            .any(|(at, byte)| *byte == b'\n' && before(at) != b'\r');
        self.last_byte = bytes.last().copied().unwrap_or(self.last_byte);
        alone
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for GuardedStream<'_, S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // hyper checks here whether the client is still there, and polls again while the answer
        // takes time. Most answers take none, and this would be one more system call.
        if self.state.is_answering() && !self.state.is_waiting() {
            return Poll::Pending;
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        if !self.state.is_answering() && self.has_bare_lf(&buf.filled()[before..]) {
            self.bare_lf_seen = true;
            return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for GuardedStream<'_, S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.state.is_answering() {
            Pin::new(&mut self.stream).poll_write(cx, bytes)
        } else {
            Poll::Ready(Ok(bytes.len()))
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.state.is_answering() {
            Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
        } else {
            Poll::Ready(Ok(slices.iter().map(|slice| slice.len()).sum()))
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.shuts_down && self.state.is_answering() {
            Pin::new(&mut self.stream).poll_shutdown(cx)
        } else {
            Poll::Ready(Ok(()))
        }
    }
}

#[cfg(test)]
mod tests;

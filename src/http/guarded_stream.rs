//! The stream under hyper: what hyper would say by itself does not reach the client, and a line ends as the standard says.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::timeout;

/// How much of what nobody wants is read before the connection is closed, and for how long.
const DRAIN_BYTES: u64 = 1024 * 1024;
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// How far a connection has come.
#[derive(Debug, Default)]
pub(super) struct ResponseState {
    /// A request was understood: only what is written from then on is the daemon's answer.
    answering: AtomicBool,
    /// The answer was not there at once, so the client may go away meanwhile.
    waiting: AtomicBool,
}

impl ResponseState {
    pub(super) fn answering(&self) {
        self.answering.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_answering(&self) -> bool {
        self.answering.load(Ordering::Relaxed)
    }

    /// The answer, once it is there. If that is not at once, the connection is polled again, so that hyper looks whether the
    /// client is still there: it does so before it asks for the answer, and then it is too early ([`GuardedStream::poll_read`]).
    pub(super) async fn waiting<A>(&self, mut answer: Pin<&mut impl Future<Output = A>>) -> A {
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

/// A client's stream.
pub(super) struct GuardedStream<'a, S> {
    stream: S,
    /// Whether the stream is shut down before it is closed. Over TCP the answer is sent with that; on a unix socket closing
    /// says the same, and wakes the client once less.
    shuts_down: bool,
    stage: &'a ResponseState,
    last_byte: u8,
    line_feed_alone: bool,
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin> GuardedStream<'a, S> {
    pub(super) fn new(stream: S, shuts_down: bool, stage: &'a ResponseState) -> Self {
        Self {
            stream,
            shuts_down,
            stage,
            last_byte: 0,
            line_feed_alone: false,
        }
    }

    /// Whether the head was given up because of a line feed without a carriage return.
    pub(super) fn saw_bare_lf(&self) -> bool {
        self.line_feed_alone
    }

    /// Answers a head that hyper did not understand.
    pub(super) async fn write_raw(&mut self, answer: &[u8]) -> io::Result<()> {
        self.stream.write_all(answer).await?;
        self.stream.shutdown().await
    }

    /// Reads what the client still sends, within bounds. Closed with unread bytes, the kernel would reset the connection,
    /// and the client might never see the answer.
    pub(super) async fn drain_input(&mut self) {
        let unwanted = async {
            // The client sees the end of the answer, whether it goes on to send or not.
            let _ = self.stream.shutdown().await;
            // Not in the future of each connection, of which hardly one comes here.
            let mut buffer = vec![0; 4096];
            let mut rest = (&mut self.stream).take(DRAIN_BYTES);
            while rest.read(&mut buffer).await.is_ok_and(|length| length > 0) {}
        };
        let _ = timeout(DRAIN_TIMEOUT, unwanted).await;
    }

    /// Whether a line feed follows something else than a carriage return. Many parsers take that for the end of a line,
    /// others for a part of it; whoever lets a stranger write into one header must not have let him write the next.
    fn has_line_feed_alone(&mut self, bytes: &[u8]) -> bool {
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
        // hyper wants to know whether the client is still there, and polls again if the answer has to be waited for. Mostly it
        // has not, and then this would be a system call for nothing.
        if self.stage.is_answering() && !self.stage.is_waiting() {
            return Poll::Pending;
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        if !self.stage.is_answering() && self.has_line_feed_alone(&buf.filled()[before..]) {
            self.line_feed_alone = true;
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
        if self.stage.is_answering() {
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
        if self.stage.is_answering() {
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
        if self.shuts_down && self.stage.is_answering() {
            Pin::new(&mut self.stream).poll_shutdown(cx)
        } else {
            Poll::Ready(Ok(()))
        }
    }
}

#[cfg(test)]
mod tests;

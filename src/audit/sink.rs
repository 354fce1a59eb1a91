//! Where audit records go.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use crate::config::AuditFile;
use crate::metrics::Metrics;

/// Records that wait for a reader that is slower than requests come.
const QUEUE: usize = 8192;
/// How long the end of the daemon waits for such a reader.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// An open destination.
#[derive(Debug)]
pub(super) enum Sink {
    /// A regular file: an append takes microseconds and blocks on no reader.
    File(File),
    /// Anything whose reader may stall: a thread writes, so that requests never wait for that reader.
    Queue(Queue),
    /// None yet: it could not be opened.
    Unopened,
}

/// To the thread that writes.
#[derive(Debug)]
pub(super) struct Queue {
    messages: SyncSender<Message>,
    /// Whether the last line could not be written. Then the next ones are taken for lost as well until one is written, so
    /// that where a record is required only what was under way at that moment is handed out without one.
    failing: Arc<AtomicBool>,
}

/// What that thread is told.
#[derive(Debug)]
pub(super) enum Message {
    /// Write this.
    Line(Vec<u8>),
    /// Say when everything before this is written.
    Flush(SyncSender<()>),
}

impl Sink {
    pub(super) fn open(to: &AuditFile, metrics: &Metrics) -> io::Result<Self> {
        let file = match to {
            AuditFile::Stdout => File::from(own_stdout()?),
            AuditFile::Path(path) => OpenOptions::new().append(true).create(true).mode(0o600).open(path)?,
        };
        let kind = file.metadata()?.file_type();
        let may_stall = kind.is_fifo() || kind.is_socket() || kind.is_char_device();
        Ok(if may_stall { Self::Queue(queue(file, metrics.clone())?) } else { Self::File(file) })
    }

    /// Writes one line, or queues it; says why, and counts it, if neither can be done. Never waits for a reader.
    pub(super) fn write(&self, line: Vec<u8>, metrics: &Metrics) -> bool {
        match self {
            Self::Unopened => {
                metrics.audit_lost.inc();
                false
            }
            Self::File(file) => {
                let mut file = file;
                file.write_all(&line).inspect_err(|error| lost(error, metrics)).is_ok()
            }
            Self::Queue(queue) => match queue.messages.try_send(Message::Line(line)) {
                Ok(()) => !queue.failing.load(Ordering::Relaxed),
                Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                    tracing::error!("an audit record was lost: whoever reads the audit stream is too slow or gone");
                    metrics.audit_lost.inc();
                    false
                }
            },
        }
    }

    /// At the daemon's end, which would otherwise take along what is still queued. A reader that stalls is not waited for.
    pub(super) fn flush(&self) {
        let Self::Queue(queue) = self else { return };
        let (done, is_done) = sync_channel(1);
        if queue.messages.try_send(Message::Flush(done)).is_ok() {
            let _ = is_done.recv_timeout(LAST_WORDS);
        }
    }
}

fn lost(error: &io::Error, metrics: &Metrics) {
    tracing::error!(%error, "an audit record cannot be written");
    metrics.audit_lost.inc();
}

fn own_stdout() -> io::Result<std::os::fd::OwnedFd> {
    use std::os::fd::AsFd;
    io::stdout().as_fd().try_clone_to_owned()
}

fn queue(mut file: File, metrics: Metrics) -> io::Result<Queue> {
    let (sender, messages) = sync_channel(QUEUE);
    let failing = Arc::new(AtomicBool::new(false));
    let queue = Queue { messages: sender, failing: failing.clone() };
    std::thread::Builder::new().name("audit".to_owned()).spawn(move || {
        for message in messages {
            let line = match message {
                Message::Line(line) => line,
                Message::Flush(done) => {
                    let _ = done.send(());
                    continue;
                }
            };
            let written = file.write_all(&line);
            failing.store(written.is_err(), Ordering::Relaxed);
            if let Err(error) = written {
                lost(&error, &metrics);
            }
        }
    })?;
    Ok(queue)
}

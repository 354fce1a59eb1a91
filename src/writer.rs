//! Lines for a file, a pipe or a socket. A thread of its own writes them, so that no other thread
//! waits for a disk or for a reader that stalls.
//!
//! The queue is bounded, in total and for each workload. A workload that causes very many lines
//! loses its own first (T30). Lost lines are counted, and the output gets a note of them as soon as
//! a line can be written again.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::oneshot;

use crate::caller::WorkloadKey;

/// The bytes of lines that may wait in the queue.
const MAX_QUEUED_BYTES: usize = 8 * 1024 * 1024;
/// The memory of a line in addition to its bytes.
const LINE_OVERHEAD_BYTES: usize = 128;

/// The share of the queue that lines of one kind may take, in total and for one workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// Three quarters in total, a sixteenth for one workload.
    Ordinary,
    /// All of it in total, a quarter for one workload.
    High,
}

impl Priority {
    fn in_all(self) -> usize {
        match self {
            Self::Ordinary => MAX_QUEUED_BYTES / 4 * 3,
            Self::High => MAX_QUEUED_BYTES,
        }
    }

    fn of_one(self) -> usize {
        match self {
            Self::Ordinary => MAX_QUEUED_BYTES / 16,
            Self::High => MAX_QUEUED_BYTES / 4,
        }
    }
}

/// A line for the output, with its share of the queue.
#[derive(Debug)]
pub struct Line {
    /// The text, with the line feed at its end.
    pub bytes: Vec<u8>,
    /// The number of events that are lost with this line.
    pub stands_for: u64,
    /// The workload that caused the line; `None` for lines of the daemon itself.
    pub owner: Option<WorkloadKey>,
    /// The share of the queue that it may take.
    pub priority: Priority,
}

/// The reason for which a line was lost.
#[derive(Debug)]
pub enum LineLoss {
    /// The queue is full: the destination stalls, or is slower than the lines come.
    NoRoom,
    /// The destination returned an error.
    Failed(io::Error),
}

impl fmt::Display for LineLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRoom => f.write_str("the destination is too slow, or has stopped"),
            Self::Failed(error) => error.fmt(f),
        }
    }
}

/// Accounts for lost lines. The writer holds no lock when it calls these functions.
pub trait LossObserver: fmt::Debug + Send + Sync {
    /// Records that one line was lost.
    fn lost(&self, loss: &LineLoss);

    /// Records that lines can be written again, after lines for so many events were lost. Returns
    /// the line that is written next.
    fn over(&self, events: u64) -> Vec<u8>;
}

/// A queue of lines, with a thread that writes them. The thread ends when this is dropped and all
/// lines are written.
#[derive(Debug)]
pub struct Writer(Arc<WriterState>);

#[derive(Debug)]
struct WriterState {
    queue: Mutex<LineQueue>,
    /// Signals a new line, or the end of the queue.
    filled: Condvar,
    /// Signals that the queue is empty.
    emptied: Condvar,
    losses: Box<dyn LossObserver>,
}

#[derive(Debug, Default)]
struct LineQueue {
    lines: VecDeque<(Line, oneshot::Sender<bool>)>,
    /// The memory of all lines, in total and by workload.
    size: usize,
    sizes: HashMap<WorkloadKey, usize>,
    /// The thread waits for a line.
    waiting: bool,
    /// The latest line could not be written.
    failing: bool,
    /// A caller has waited too long for a line, and the queue has not been empty since.
    behind: bool,
    /// Events of lost lines of which the output has no note yet.
    lost: u64,
    /// The writer is dropped, so no more lines come.
    closed: bool,
}

impl Line {
    fn size(&self) -> usize {
        self.bytes.len() + LINE_OVERHEAD_BYTES
    }
}

impl LineQueue {
    fn has_room_for(&self, line: &Line) -> bool {
        let of_one = line
            .owner
            .as_ref()
            .map_or(0, |owner| self.sizes.get(owner).copied().unwrap_or(0));
        let size = line.size();
        self.size + size <= line.priority.in_all() && of_one + size <= line.priority.of_one()
    }

    fn put(&mut self, line: Line, written: oneshot::Sender<bool>) {
        self.size += line.size();
        if let Some(owner) = &line.owner {
            *self.sizes.entry(owner.clone()).or_default() += line.size();
        }
        self.lines.push_back((line, written));
    }

    /// Frees the memory of a line after it is written.
    fn release(&mut self, line: &Line) {
        self.size -= line.size();
        if let Some(owner) = &line.owner
            && let Some(size) = self.sizes.get_mut(owner)
        {
            *size -= line.size();
            if *size == 0 {
                self.sizes.remove(owner);
            }
        }
    }
}

impl Writer {
    /// Returns a queue that takes lines at once, and writes them after [`Self::start`].
    pub fn new(losses: Box<dyn LossObserver>) -> Self {
        let (queue, filled, emptied) = (Mutex::default(), Condvar::new(), Condvar::new());
        Self(Arc::new(WriterState {
            queue,
            filled,
            emptied,
            losses,
        }))
    }

    /// Starts the thread called `name`, which writes to `file`. Call it once. Fails if the thread
    /// cannot be started.
    pub fn start(&self, name: &str, file: File) -> io::Result<()> {
        let writing = self.0.clone();
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || writing.write_all(&WriterDestination(file)))?;
        Ok(())
    }

    /// Takes a line if there is room. The receiver gets whether it was written. Never blocks.
    pub fn push(&self, line: Line) -> Option<oneshot::Receiver<bool>> {
        let (written, is_written) = oneshot::channel();
        let mut queue = self.0.queue();
        if !queue.has_room_for(&line) {
            queue.lost += line.stands_for;
            drop(queue);
            self.0.losses.lost(&LineLoss::NoRoom);
            return None;
        }
        queue.put(line, written);
        // A thread that is busy with another line needs no wake-up, which is a system call.
        if std::mem::take(&mut queue.waiting) {
            self.0.filled.notify_one();
        }
        Some(is_written)
    }

    /// Returns whether the latest line could not be written.
    pub fn is_failing(&self) -> bool {
        self.0.queue().failing
    }

    /// Returns whether the queue has not been empty since the latest [`Self::fall_behind`].
    pub fn is_behind(&self) -> bool {
        self.0.queue().behind
    }

    /// Records that a caller has waited too long for a line.
    pub fn fall_behind(&self) {
        let mut queue = self.0.queue();
        queue.behind = queue.size > 0;
    }

    /// Takes the number of events of which the output has no note, so that the caller writes one.
    pub fn take_lost(&self) -> u64 {
        std::mem::take(&mut self.0.queue().lost)
    }

    /// Blocks until all lines so far are written or lost, at most for `patience`.
    #[expect(
        clippy::disallowed_methods,
        reason = "it blocks a thread without a runtime"
    )]
    pub fn flush(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut queue = self.0.queue();
        while queue.size > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            queue = self
                .0
                .emptied
                .wait_timeout(queue, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.0.queue().closed = true;
        self.0.filled.notify_one();
    }
}

impl WriterState {
    fn queue(&self) -> MutexGuard<'_, LineQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes lines until the queue is closed and empty.
    fn write_all(&self, destination: &WriterDestination) {
        let mut is_torn = false;
        while let Some((line, written)) = self.next() {
            let done = destination.write(&line.bytes, &mut is_torn);
            let lost = {
                let mut queue = self.queue();
                queue.failing = done.is_err();
                match &done {
                    Ok(()) => std::mem::take(&mut queue.lost),
                    Err(_) => {
                        queue.lost += line.stands_for;
                        0
                    }
                }
            };
            let is_written = done.is_ok();
            // Before the caller goes on, so that no answer is ahead of the count of losses.
            if let Err(error) = done {
                self.losses.lost(&LineLoss::Failed(error));
            }
            // The caller may have stopped waiting.
            let _ = written.send(is_written);
            if lost > 0
                && destination
                    .write(&self.losses.over(lost), &mut is_torn)
                    .is_err()
            {
                self.queue().lost += lost;
            }
            let mut queue = self.queue();
            queue.release(&line);
            if queue.size == 0 {
                queue.behind = false;
                self.emptied.notify_all();
            }
        }
    }

    fn next(&self) -> Option<(Line, oneshot::Sender<bool>)> {
        let mut queue = self.queue();
        loop {
            if let Some(next) = queue.lines.pop_front() {
                return Some(next);
            }
            if queue.closed {
                return None;
            }
            queue.waiting = true;
            queue = self
                .filled
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The output of the thread.
struct WriterDestination(File);

impl WriterDestination {
    /// Writes all of these bytes, and blocks until the reader takes them.
    ///
    /// If only a part of a line was written, the next call ends that line first. A reader then sees
    /// one broken line, not two.
    fn write(&self, bytes: &[u8], is_torn: &mut bool) -> io::Result<()> {
        if std::mem::take(is_torn)
            && let Err(error) = self.write_part(b"\n")
        {
            *is_torn = true;
            return Err(error);
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.write_part(rest) {
                Ok(length) => rest = &rest[length..],
                Err(error) => {
                    *is_torn = rest.len() < bytes.len();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn write_part(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match (&self.0).write(bytes) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Another process that shares the open file may have set O_NONBLOCK.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let mut polled = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
                    match poll(&mut polled, PollTimeout::NONE) {
                        Ok(_) | Err(Errno::EINTR) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                done => return done,
            }
        }
    }
}

#[cfg(test)]
mod tests;

//! Lines for a file, a pipe or a socket, written by a thread of its own: the thread that has a line never waits for a disk or
//! for a reader that has stopped.
//!
//! The queue is bounded, in all and for each workload, so that a workload that causes very many lines loses its own first (attack
//! 30). Lost lines are counted, and noted as soon as a line can be written again.

#![expect(
    clippy::disallowed_methods,
    reason = "the thread of a writer has no runtime"
)]

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

/// Bytes that may wait to be written.
const MAX_QUEUED_BYTES: usize = 8 * 1024 * 1024;
/// What a line takes in addition to its bytes.
const LINE_OVERHEAD_BYTES: usize = 128;

/// How much of the room lines of one kind may take, in all and of one workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// Three quarters; a sixteenth.
    Ordinary,
    /// All of it; a quarter.
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

/// Something to be written.
#[derive(Debug)]
pub struct Line {
    /// With the line feed at its end.
    pub bytes: Vec<u8>,
    /// How many events it stands for, should it be lost.
    pub stands_for: u64,
    /// The workload whose share of the room it takes; `None` for lines of the daemon's own.
    pub owner: Option<WorkloadKey>,
    /// How important it is.
    pub priority: Priority,
}

/// Why a line was lost.
#[derive(Debug)]
pub enum LineLoss {
    /// There is no room: the destination stalls, or lines come faster than it takes them.
    NoRoom,
    /// Writing it failed.
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

/// Accounts for losses. No lock of the writer's is held when it is called.
pub trait LossObserver: fmt::Debug + Send + Sync {
    /// One line was lost.
    fn lost(&self, loss: &LineLoss);

    /// Lines can be written again, after those that stand for so many events were lost. The result is written next.
    fn over(&self, events: u64) -> Vec<u8>;
}

/// Takes lines. The thread behind it ends when this is dropped and all of them are written.
#[derive(Debug)]
pub struct Writer(Arc<WriterState>);

#[derive(Debug)]
struct WriterState {
    queue: Mutex<LineQueue>,
    /// There is a line, or none will come.
    filled: Condvar,
    /// Nothing waits any more.
    emptied: Condvar,
    losses: Box<dyn LossObserver>,
}

#[derive(Debug, Default)]
struct LineQueue {
    lines: VecDeque<(Line, oneshot::Sender<bool>)>,
    /// What they take, in all and by workload.
    size: usize,
    sizes: HashMap<WorkloadKey, usize>,
    /// The thread waits for a line.
    waiting: bool,
    /// The last line could not be written.
    failing: bool,
    /// A line was waited for in vain, and the queue was not empty since.
    behind: bool,
    /// Events whose lines were lost, as long as the stream has no note of it.
    lost: u64,
    /// No more lines come.
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

    /// A line takes its room until it is written.
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
    /// Takes lines, and writes them once it is [started](Self::start).
    pub fn new(losses: Box<dyn LossObserver>) -> Self {
        let (queue, filled, emptied) = (Mutex::default(), Condvar::new(), Condvar::new());
        Self(Arc::new(WriterState {
            queue,
            filled,
            emptied,
            losses,
        }))
    }

    /// Starts the thread that writes to `file`; to be called once. `name` is the thread's.
    pub fn start(&self, name: &str, file: File) -> io::Result<()> {
        let writing = self.0.clone();
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || writing.write_all(&WriterDestination(file)))?;
        Ok(())
    }

    /// Takes a line, if there is room; the receiver gets whether it was written. Never waits.
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
        // A system call less where it is busy with another one.
        if std::mem::take(&mut queue.waiting) {
            self.0.filled.notify_one();
        }
        Some(is_written)
    }

    /// Whether the last line could not be written.
    pub fn is_failing(&self) -> bool {
        self.0.queue().failing
    }

    /// Whether a caller of [`Self::fall_behind`] has given up waiting, and the queue was never empty since.
    pub fn is_behind(&self) -> bool {
        self.0.queue().behind
    }

    /// Notes that a line was waited for in vain.
    pub fn fall_behind(&self) {
        let mut queue = self.0.queue();
        queue.behind = queue.size > 0;
    }

    /// Takes the number of events whose lines were lost and not noted, so that the caller notes them.
    pub fn take_lost(&self) -> u64 {
        std::mem::take(&mut self.0.queue().lost)
    }

    /// Waits until everything that was taken is written or lost, for at most so long.
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

    /// The thread's work.
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
            // The receiver may be gone.
            let _ = written.send(done.is_ok());
            if let Err(error) = done {
                self.losses.lost(&LineLoss::Failed(error));
            }
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

/// Where lines go.
struct WriterDestination(File);

impl WriterDestination {
    /// Writes all of these bytes, and waits for a reader if it has to. A line of which only a part could be written is ended
    /// before the next one: a reader sees one that is broken, not two.
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
                // Another process that shares the open file has set O_NONBLOCK.
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

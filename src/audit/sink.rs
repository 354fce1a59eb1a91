//! The destination of audit records, and the number of those that could not be written.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;

use crate::audit::line::{LostRecordsLine, moment, render};
use crate::clock::Clock;
use crate::config::AuditFile;
use crate::limits::LogQuota;
use crate::metrics::Metrics;
use crate::writer::{Line, LineLoss, LossObserver, Priority, Writer};

/// The longest time for which an answer waits for a required record. A write takes microseconds,
/// unless the destination stalls.
const REQUIRED_TIMEOUT: Duration = Duration::from_secs(1);
/// The same where the answer is sent without a written record.
const WRITE_TIMEOUT: Duration = Duration::from_millis(100);
/// The longest time for which the end of the daemon waits for a destination that stalls.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
/// The shortest time between log lines about lost records.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// The destination, with the queue of records for it.
#[derive(Debug)]
pub(super) struct Sink {
    /// The file, once it is open.
    to: Mutex<Option<AuditFile>>,
    writer: Writer,
    /// Is notified when a record arrives while the file is not open.
    needed: Notify,
}

impl Sink {
    /// Returns a destination that is not open. Records wait until it is.
    pub(super) fn unopened(clock: Clock, metrics: &Metrics) -> Self {
        let log_quota = LogQuota::new(1, LOG_INTERVAL);
        let lost = LostRecords {
            clock,
            metrics: metrics.clone(),
            log_quota,
        };
        Self {
            to: Mutex::default(),
            writer: Writer::new(Box::new(lost)),
            needed: Notify::new(),
        }
    }

    /// Writes to this open file, unless the destination is open already.
    pub(super) fn open_as(&self, to: &AuditFile, file: File) -> io::Result<()> {
        let mut opened = self.to();
        if opened.is_none() {
            self.writer.start("awsvid-audit", file)?;
            *opened = Some(to.clone());
        }
        Ok(())
    }

    pub(super) fn is_unopened(&self) -> bool {
        self.to().is_none()
    }

    pub(super) fn is_stdout(&self) -> bool {
        *self.to() == Some(AuditFile::Stdout)
    }

    fn to(&self) -> MutexGuard<'_, Option<AuditFile>> {
        self.to.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a line. If it is lost, it is counted, and a later record has the number.
    pub(super) fn put(&self, line: Line) {
        drop(self.writer.push(line));
        if self.is_unopened() {
            self.needed.notify_one();
        }
    }

    /// Waits for a record that arrives while the destination is not open.
    pub(super) async fn needed(&self) {
        self.needed.notified().await;
    }

    /// Writes a line and waits until it is written. Returns false if it was lost, or, with
    /// `required`, not written in time.
    ///
    /// Without `required` the wait is short. There is none while the destination stalls or is not
    /// open.
    pub(super) async fn write(&self, line: Line, required: bool) -> bool {
        let Some(written) = self.writer.push(line) else {
            return false;
        };
        let is_unopened = self.is_unopened();
        if is_unopened {
            self.needed.notify_one();
        }
        if !required && (self.writer.is_behind() || is_unopened) {
            return true;
        }
        match timeout(
            if required {
                REQUIRED_TIMEOUT
            } else {
                WRITE_TIMEOUT
            },
            written,
        )
        .await
        {
            Ok(written) => written.unwrap_or(false),
            Err(_) => {
                self.writer.fall_behind();
                !required
            }
        }
    }

    /// Returns whether lines cannot be written at present.
    pub(super) fn is_failing(&self) -> bool {
        self.writer.is_failing() || self.writer.is_behind() || self.is_unopened()
    }

    /// Records what the previous destination lost and could not record itself.
    pub(super) fn take_over_losses(&self, before: &Self, clock: &Clock) {
        let requests = before.writer.take_lost();
        if requests > 0 {
            let (bytes, priority) = (lost_records_line(clock, requests), Priority::High);
            self.put(Line {
                bytes,
                stands_for: requests,
                owner: None,
                priority,
            });
        }
    }

    /// Writes the queue before the daemon ends, at most for [`FLUSH_TIMEOUT`].
    pub(super) fn flush(&self) {
        self.writer.flush(FLUSH_TIMEOUT);
    }
}

/// Opens the destination. Blocks while the file's server does not respond.
pub(super) fn open(to: &AuditFile) -> io::Result<File> {
    match to {
        AuditFile::Stdout => Ok(File::from(io::stdout().as_fd().try_clone_to_owned()?)),
        AuditFile::Path(path) => open_file(path),
    }
}

/// Opens the file. A pipe without a reader is an error, and is not waited for. The writer waits for
/// a pipe that is full, in its own thread.
fn open_file(path: &Path) -> io::Result<File> {
    let opened = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    opened.map_err(|error| match error.raw_os_error() {
        Some(libc::ENXIO) => io::Error::other("no process reads from this pipe; start its reader"),
        _ => error,
    })
}

#[derive(Debug)]
struct LostRecords {
    clock: Clock,
    metrics: Metrics,
    log_quota: LogQuota,
}

impl LossObserver for LostRecords {
    fn lost(&self, loss: &LineLoss) {
        self.metrics.audit_records_dropped.inc();
        if let Some(before) = self.log_quota.take() {
            tracing::error!(before, error = %loss, "an audit record cannot be written");
        }
    }

    /// Returns a record for the lost ones, so that the sum over all records stays right.
    fn over(&self, requests: u64) -> Vec<u8> {
        tracing::warn!(
            requests,
            "audit records can be written again; those of so many requests were lost"
        );
        lost_records_line(&self.clock, requests)
    }
}

fn lost_records_line(clock: &Clock, requests: u64) -> Vec<u8> {
    let time = moment(clock.now());
    render(&LostRecordsLine {
        time,
        target: "audit",
        outcome: "lost",
        reason: "not_written",
        repeated: requests,
    })
}

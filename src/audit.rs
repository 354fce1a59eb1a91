//! One record per request whose head arrived: who asked, as whom, for which role, and what was handed out.
//!
//! A record is one line of JSON, written in one write before the answer is sent. The fields are a contract: see
//! deploy/README.md. Nothing secret is in it; the access key id ties it to CloudTrail.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep};

use crate::caller::{Caller, ListenerKind};
use crate::clock::Clock;
use crate::config::AuditFile;
use crate::metrics::Metrics;
use crate::writer::Line;

mod flood;
mod line;
mod record;
mod sink;

use flood::{Beyond, RefusalAggregator, SWEEP};
use sink::Sink;

pub use record::Record;

/// Opens records and writes them.
#[derive(Debug)]
pub struct Audit {
    sink: ArcSwap<Sink>,
    required: AtomicBool,
    clock: Clock,
    metrics: Metrics,
    boot: u32,
    next: AtomicU64,
    /// Of requests that were given nothing.
    refusals: RefusalAggregator,
    /// Of those that were answered from the cache.
    hits: RefusalAggregator,
}

/// Names a request in its record, in the answer and in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestId {
    boot: u32,
    number: u64,
}

/// How credentials were come by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheResult {
    /// From the cache.
    Hit,
    /// Issued for this request, or for one that this request joined.
    Miss,
    /// From the cache, past the time at which they should have been refreshed.
    Stale,
}

impl CacheResult {
    /// All results of a lookup.
    pub const ALL: [Self; 3] = [Self::Hit, Self::Miss, Self::Stale];

    /// Returns the label in metrics, which is also the field `cache` of audit records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
            Self::Stale => "stale",
        }
    }
}

/// What a request came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Credentials were handed out.
    Issued,
    /// The caller may not have them, or asked wrongly.
    Refused,
    /// They could not be had in time.
    Failed,
}

impl Outcome {
    /// Returns the label in metrics and audit records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Issued => "issued",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

/// The reason of a request that was answered with credentials.
pub const OK: &str = "ok";
/// The outcome, and the reason, of a request whose client closed the connection before the answer.
pub const ABORTED: &str = "aborted";

/// What was handed out.
#[derive(Debug, Clone, Copy)]
pub struct IssuedFields<'a> {
    /// Of the credentials.
    pub access_key_id: &'a str,
    /// Of the credentials.
    pub expiration: SystemTime,
    /// Cached or new.
    pub freshness: CacheResult,
}

impl Audit {
    /// Without a destination yet: records wait for [`Audit::reopen`], as many as there is room for. With `required`, credentials
    /// whose record can't be written are not handed out.
    pub fn unopened(required: bool, clock: Clock, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self {
            sink: ArcSwap::from_pointee(Sink::unopened(clock.clone(), &metrics)),
            required: AtomicBool::new(required),
            clock,
            metrics,
            boot: fastrand::u32(..),
            next: AtomicU64::new(0),
            refusals: RefusalAggregator::new(Beyond::Counted),
            // Each caller's first hit of a key has a record in every case.
            hits: RefusalAggregator::new(Beyond::Written),
        })
    }

    /// Whether it has no destination yet.
    pub fn is_unopened(&self) -> bool {
        self.sink.load().is_unopened()
    }

    /// Opens the destination, or opens it anew: its name may have been given to another file since, as rotation does. Until the new
    /// one is open, and if it can't be, records go to the old one. Its thread writes what it has by then, and ends.
    pub fn reopen(&self, to: &AuditFile, required: bool) -> io::Result<()> {
        let before = self.sink.load_full();
        if before.is_unopened() {
            before.open(to)?;
        } else if *to != AuditFile::Stdout || !before.is_stdout() {
            // Standard output is what it was. One that stalls would keep another thread with each reload.
            let new = Arc::new(Sink::unopened(self.clock.clone(), &self.metrics));
            new.open(to)?;
            new.succeed(&self.sink.swap(new.clone()), &self.clock);
        }
        self.required.store(required, Ordering::Relaxed);
        Ok(())
    }

    /// Opens the record of a request. `caller` is `None` where it could not be attested.
    pub fn begin(self: &Arc<Self>, listener: ListenerKind, caller: Option<Arc<Caller>>) -> Record {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        Record::new(
            self.clone(),
            RequestId {
                boot: self.boot,
                number,
            },
            listener,
            caller,
        )
    }

    fn is_required(&self) -> bool {
        self.required.load(Ordering::Relaxed)
    }

    fn put(&self, lines: impl IntoIterator<Item = Line>) {
        lines
            .into_iter()
            .for_each(|line| self.sink.load().put(line));
    }

    async fn write(&self, line: Line) -> bool {
        self.sink.load_full().write(line, self.is_required()).await
    }

    /// Writes, as long as requests of one kind come, the records that stand for several. Ends with the daemon.
    fn sweep(self: &Arc<Self>, floods: fn(&Self) -> &RefusalAggregator) {
        // Without a runtime, as at the very end, `Drop` does it.
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let audit = Arc::downgrade(self);
        runtime.spawn(async move {
            loop {
                sleep(SWEEP).await;
                let Some(audit) = audit.upgrade() else { return };
                let (lines, done) = floods(&audit).sweep(Some(Instant::now()));
                audit.put(lines);
                if done {
                    return;
                }
            }
        });
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        for floods in [&self.refusals, &self.hits] {
            self.put(floods.sweep(None).0);
        }
        self.sink.load().flush();
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}-{}", self.boot, self.number)
    }
}

#[cfg(test)]
mod tests;

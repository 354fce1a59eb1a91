//! Audit records, one for each request that sent a complete head: the caller, its SPIFFE ID, the
//! role, and the issued key. Many equal ones become one record with a count (`aggregate`).
//!
//! A record is one line of JSON, written with one write(2). The answer waits for that up to 0.1 s,
//! or with `required` for as long as it may take. Its fields
//! are a contract, described in `deploy/docs/audit-log.md`. It contains no secret. The access key
//! id joins it with CloudTrail.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep};

use crate::caller::{Caller, ListenerKind, PeerFacts, Process, WorkloadKey};
use crate::clock::Clock;
use crate::config::AuditFile;
use crate::metrics::Metrics;
use crate::protocol::Protocol;
use crate::writer::Line;

mod aggregate;
mod line;
mod record;
mod sink;

use aggregate::{RecordAggregator, SWEEP_INTERVAL};
use sink::Sink;

pub use crate::telemetry::RequestId;
pub use record::Record;

/// The audit log: begins records, and writes them to their destination.
#[derive(Debug)]
pub struct Audit {
    sink: ArcSwap<Sink>,
    required: AtomicBool,
    clock: Clock,
    metrics: Metrics,
    boot: u32,
    next: AtomicU64,
    /// Requests that got no credentials.
    rejections: RecordAggregator,
    /// Requests that were answered from the cache.
    hits: RecordAggregator,
}

/// The result of a lookup of credentials in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheResult {
    /// The cache had credentials that are not due for a refresh.
    Hit,
    /// An exchange for this request, or one that it joined, issued the credentials.
    Miss,
    /// The cache had credentials that are due for a refresh.
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

/// The outcome of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The request was answered with credentials.
    Issued,
    /// The request for metadata was answered with something else.
    Answered,
    /// The caller may not get credentials, or its request was not valid.
    Refused,
    /// An outage or a limit, which may pass, prevented the answer.
    Failed,
}

impl Outcome {
    /// Returns the label in metrics and audit records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Issued => "issued",
            Self::Answered => "answered",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

/// The reason of a request that was answered with credentials.
pub const OK: &str = "ok";
/// The outcome, and the reason, of a request that its client abandoned before the answer.
pub const ABORTED: &str = "aborted";

/// The fields of a record that describe issued credentials.
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "the names of the fields are their meaning")]
pub struct IssuedFields<'a> {
    pub access_key_id: &'a str,
    /// Where it is not the one that awsvid requested.
    pub first_session_name: Option<&'a str>,
    pub expiration: SystemTime,
    pub cache_result: CacheResult,
}

/// The peer that sent a request.
#[derive(Debug, Clone)]
pub enum RequestPeer {
    /// The peer was attested, and its connection is served for this caller.
    Attested(Arc<Caller>),
    /// A rejected peer, with the facts that its socket had shown by then.
    Rejected(Option<PeerFacts>),
}

impl RequestPeer {
    fn facts(&self) -> Option<&PeerFacts> {
        match self {
            Self::Attested(caller) => Some(&caller.peer),
            Self::Rejected(facts) => facts.as_ref(),
        }
    }

    fn process(&self) -> Option<&Process> {
        match self {
            Self::Attested(caller) => caller.process.as_ref(),
            Self::Rejected(_) => None,
        }
    }

    fn workload_key(&self) -> WorkloadKey {
        self.facts()
            .map_or_else(WorkloadKey::unknown, PeerFacts::workload_key)
    }
}

impl Audit {
    /// Returns an audit log without a destination. Records wait for [`Audit::redirect`], up to the
    /// bound of the queue. With `required`, no credentials are served without a written record.
    pub fn unopened(required: bool, clock: Clock, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self {
            sink: ArcSwap::from_pointee(Sink::unopened(clock.clone(), &metrics)),
            required: AtomicBool::new(required),
            clock,
            metrics,
            boot: fastrand::u32(..),
            next: AtomicU64::new(0),
            rejections: RecordAggregator::default(),
            hits: RecordAggregator::default(),
        })
    }

    /// Returns whether the log has no destination yet.
    pub fn is_unopened(&self) -> bool {
        self.sink.load().is_unopened()
    }

    /// Waits for a record that needs the destination before it is open.
    pub async fn needs_destination(&self) {
        self.sink.load_full().needed().await;
    }

    /// Opens the destination. Blocks while the file's server does not respond. Fails if the file
    /// cannot be opened for appending.
    pub fn open(to: &AuditFile) -> io::Result<File> {
        sink::open(to)
    }

    /// Writes to `opened`, the destination `to`. A rotation may have renamed the file, so a reload
    /// opens it again.
    ///
    /// Records go to the previous destination until then. The thread of the previous one then
    /// writes its queue and ends. Fails if no thread for the destination can be started; then the
    /// previous one stays.
    pub fn redirect(&self, to: &AuditFile, opened: File, required: bool) -> io::Result<()> {
        let before = self.sink.load_full();
        if before.is_unopened() {
            before.open_as(to, opened)?;
        } else if *to != AuditFile::Stdout || !before.is_stdout() {
            // Standard output is still the same. If it stalls, each reload would leave one more
            // thread.
            let new = Arc::new(Sink::unopened(self.clock.clone(), &self.metrics));
            new.open_as(to, opened)?;
            new.take_over_losses(&self.sink.swap(new.clone()), &self.clock);
        }
        self.required.store(required, Ordering::Relaxed);
        Ok(())
    }

    /// Returns the id of the request that a new connection is going to send.
    pub fn next_request(&self) -> RequestId {
        RequestId {
            boot: self.boot,
            number: self.next.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// Opens the destination and writes to it.
    #[cfg(test)]
    pub(crate) fn reopen(&self, to: &AuditFile, required: bool) -> io::Result<()> {
        self.redirect(to, Self::open(to)?, required)
    }

    /// Begins the record of a request by this peer.
    pub fn begin(
        self: &Arc<Self>,
        id: RequestId,
        (listener, protocol): (ListenerKind, Protocol),
        peer: RequestPeer,
    ) -> Record {
        Record::new(self.clone(), id, (listener, protocol), peer)
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

    /// Spawns a task that writes records for several requests, until there are none to combine.
    fn sweep(self: &Arc<Self>, aggregator: fn(&Self) -> &RecordAggregator) {
        // Without a runtime, as when the daemon ends, `Drop` writes them.
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let audit = Arc::downgrade(self);
        runtime.spawn(async move {
            loop {
                sleep(SWEEP_INTERVAL).await;
                let Some(audit) = audit.upgrade() else { return };
                let (lines, done) = aggregator(&audit).sweep(Some(Instant::now()));
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
        for aggregator in [&self.rejections, &self.hits] {
            self.put(aggregator.sweep(None).0);
        }
        self.sink.load().flush();
    }
}

#[cfg(test)]
mod tests;

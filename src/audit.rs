//! One record per request whose head arrived: who asked, as whom, for which role, and what was handed out.
//!
//! A record is one line of JSON, written in one write before the answer is sent. The fields are a contract: see
//! deploy/README.md. Nothing secret is in it; the access key id ties it to CloudTrail.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use serde::{Serialize, Serializer};
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep};

use crate::caller::{Caller, Listener, Owner, Stranger};
use crate::cgroup::{CgroupPath, Pod};
use crate::clock::Clock;
use crate::config::AuditFile;
use crate::metrics::{Metrics, Request};
use crate::role::Grant;

mod flood;
mod sink;

use flood::{Floods, Key, SWEEP};
use sink::Sink;

/// Most records are shorter, and are rendered without a second allocation.
const LINE: usize = 768;
/// The last second of the year 9999, in which the format of times ends.
const LAST_TIME: Duration = Duration::from_secs(253_402_300_799);

/// Opens records and writes them.
#[derive(Debug)]
pub struct Audit {
    sink: ArcSwap<Sink>,
    required: AtomicBool,
    clock: Clock,
    metrics: Metrics,
    boot: u32,
    next: AtomicU64,
    floods: Floods,
}

/// Names a request in its record, in the answer and in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestId {
    boot: u32,
    number: u64,
}

/// How credentials were come by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Freshness {
    /// From the cache.
    Hit,
    /// Issued for this request, or for one that this request joined.
    Miss,
    /// From the cache, past the time at which they should have been refreshed.
    Stale,
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
    fn name(self) -> &'static str {
        match self {
            Self::Issued => "issued",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

/// What was handed out.
#[derive(Debug, Clone, Copy)]
pub struct Issued<'a> {
    /// Of the credentials.
    pub access_key_id: &'a str,
    /// Of the credentials.
    pub expiration: SystemTime,
    /// Cached or new.
    pub freshness: Freshness,
}

/// The record of one request. Dropped without [`Record::finish`], it says `aborted`.
#[derive(Debug)]
pub struct Record {
    audit: Arc<Audit>,
    started: Instant,
    request_id: RequestId,
    listener: Listener,
    caller: Option<Arc<Caller>>,
    stranger: Option<Stranger>,
    grant: Option<Grant>,
    finished: bool,
}

/// The line. Keys are part of the contract.
#[derive(Serialize)]
struct Line<'a> {
    time: Text<humantime::Rfc3339Timestamp>,
    target: &'static str,
    request_id: Text<RequestId>,
    outcome: &'static str,
    reason: &'static str,
    listener: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cgroup: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    systemd_unit: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pod_uid: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    container_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    network_namespace: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exe: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    spiffe_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    role_arn: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session_name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    access_key_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expiration: Option<Text<humantime::Rfc3339Timestamp>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache: Option<Freshness>,
    milliseconds: f64,
}

/// What the socket or the connector told.
#[derive(Clone, Copy)]
struct Seen<'a> {
    uid: u32,
    cgroup: Option<&'a CgroupPath>,
    pod: Option<&'a Pod>,
    namespace: Option<u64>,
}

/// Rendered in place, without a string of its own.
struct Text<T>(T);

impl Audit {
    /// Opens the destination. With `required`, credentials whose record can't be written are not handed out.
    pub fn open(to: &AuditFile, required: bool, clock: Clock, metrics: Metrics) -> io::Result<Arc<Self>> {
        let sink = ArcSwap::from_pointee(Sink::open(to, &metrics)?);
        Ok(Arc::new(Self {
            sink,
            required: AtomicBool::new(required),
            clock,
            metrics,
            boot: fastrand::u32(..),
            next: AtomicU64::new(0),
            floods: Floods::default(),
        }))
    }

    /// Opens the destination anew: its name may have been given to another file since, as rotation does. Until the new
    /// one is open, and if it can't be, records go to the old one.
    pub fn reopen(&self, to: &AuditFile, required: bool) -> io::Result<()> {
        self.sink.store(Arc::new(Sink::open(to, &self.metrics)?));
        self.required.store(required, Ordering::Relaxed);
        Ok(())
    }

    /// Opens the record of a request. `caller` is `None` where it could not be attested.
    pub fn begin(self: &Arc<Self>, listener: Listener, caller: Option<Arc<Caller>>) -> Record {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        Record {
            audit: self.clone(),
            started: Instant::now(),
            request_id: RequestId { boot: self.boot, number },
            listener,
            caller,
            stranger: None,
            grant: None,
            finished: false,
        }
    }

    /// Writes one or more lines.
    fn write(&self, lines: Vec<u8>) -> bool {
        lines.is_empty() || self.sink.load().write(lines, &self.metrics)
    }

    /// Writes, as long as refusals come, the records that stand for several. Ends with the daemon.
    fn sweep(self: &Arc<Self>) {
        // Without a runtime, as at the very end, `Drop` does it.
        let Ok(runtime) = Handle::try_current() else { return };
        let audit = Arc::downgrade(self);
        runtime.spawn(async move {
            loop {
                sleep(SWEEP).await;
                let Some(audit) = audit.upgrade() else { return };
                let (lines, done) = audit.floods.sweep(Some(Instant::now()));
                audit.write(lines);
                if done {
                    return;
                }
            }
        });
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        let (lines, _) = self.floods.sweep(None);
        self.write(lines);
        self.sink.load().flush();
    }
}

impl Record {
    /// Names the request in answers and logs.
    pub fn request_id(&self) -> RequestId {
        self.request_id
    }

    /// Notes what the socket of a caller that was not attested has told.
    pub fn unattested(&mut self, peer: Option<Stranger>) {
        self.stranger = peer;
    }

    /// Notes what the request was found to be for.
    pub fn granted(&mut self, grant: &Grant) {
        self.grant = Some(grant.clone());
    }

    /// Takes that back: a reload came between.
    pub fn undecided(&mut self) {
        self.grant = None;
    }

    /// Writes the record. `false`: it could not be written, and the configuration says that then nothing is to be handed out.
    pub fn finish(mut self, outcome: Outcome, reason: &'static str, issued: Option<Issued<'_>>) -> bool {
        self.finished = true;
        let elapsed = self.count(outcome.name(), reason);
        let written = match outcome {
            Outcome::Issued => self.audit.write(self.line(outcome.name(), reason, issued, true, elapsed)),
            Outcome::Refused | Outcome::Failed => self.write_few(outcome.name(), reason, elapsed),
        };
        written || !self.audit.required.load(Ordering::Relaxed)
    }

    /// A record of a request that was given nothing: of very many of them, one stands for the rest.
    fn write_few(&self, outcome: &'static str, reason: &'static str, elapsed: f64) -> bool {
        let owner = match (self.caller.as_deref(), &self.stranger) {
            (Some(caller), _) => Owner::of(caller),
            (None, Some(stranger)) => stranger.owner(),
            (None, None) => Owner::unknown(),
        };
        let key = Key { owner: Some(owner), listener: self.listener, reason };
        let line = |of_one| self.line(outcome, reason, None, of_one, elapsed);
        let turn = self.audit.floods.take(key, Instant::now(), line);
        if turn.begin_sweep {
            self.audit.sweep();
        }
        self.audit.write(turn.lines)
    }

    /// What is known of the caller, attested or refused.
    fn seen(&self) -> Option<Seen<'_>> {
        match (self.caller.as_deref(), &self.stranger) {
            (Some(Caller { uid, cgroup, pod, namespace, .. }), _)
            | (None, Some(Stranger { uid, cgroup, pod, namespace })) => {
                Some(Seen { uid: *uid, cgroup: cgroup.as_ref(), pod: pod.as_ref(), namespace: *namespace })
            }
            (None, None) => None,
        }
    }

    /// The seconds since the head arrived, noted in the metrics with the outcome.
    fn count(&self, outcome: &'static str, reason: &'static str) -> f64 {
        let elapsed = self.started.elapsed().as_secs_f64();
        let metrics = &self.audit.metrics;
        metrics.requests.get_or_create(&Request { listener: self.listener.name(), outcome, reason }).inc();
        metrics.latency.0.observe(elapsed);
        elapsed
    }

    /// Renders the record; without what names the caller, if it stands for several callers.
    fn line(
        &self,
        outcome: &'static str,
        reason: &'static str,
        issued: Option<Issued<'_>>,
        of_one: bool,
        elapsed: f64,
    ) -> Vec<u8> {
        let grant = self.grant.as_ref().filter(|_| of_one);
        let caller = self.caller.as_deref().filter(|_| of_one);
        let seen = self.seen().filter(|_| of_one);
        let (cgroup, pod) = (seen.and_then(|seen| seen.cgroup), seen.and_then(|seen| seen.pod));
        let process = caller.and_then(|caller| caller.process.as_ref());
        let line = Line {
            time: Text(humantime::format_rfc3339_millis(printable(self.audit.clock.now()))),
            target: "audit",
            request_id: Text(self.request_id),
            outcome,
            reason,
            listener: self.listener.name(),
            uid: seen.map(|seen| seen.uid),
            cgroup: cgroup.map(|cgroup| cgroup.as_str()),
            systemd_unit: cgroup.and_then(|cgroup| cgroup.systemd_unit()),
            pod_uid: pod.map(|pod| pod.uid.as_str()),
            container_id: pod.and_then(|pod| pod.container.as_deref()),
            network_namespace: seen.and_then(|seen| seen.namespace),
            pid: process.map(|process| process.pid),
            gid: process.map(|process| process.gid),
            exe: process.and_then(|process| process.program.as_ref()?.exe.as_ref()?.path.to_str()),
            spiffe_id: grant.map(|grant| grant.spiffe_id.as_str()),
            role_arn: grant.map(|grant| grant.role_arn.as_str()),
            session_name: grant.map(|grant| grant.session_name.as_str()),
            access_key_id: issued.map(|issued| issued.access_key_id),
            expiration: issued.map(|issued| Text(humantime::format_rfc3339_seconds(printable(issued.expiration)))),
            cache: issued.map(|issued| issued.freshness),
            milliseconds: (elapsed * 1e6).round() / 1e3,
        };
        let mut bytes = Vec::with_capacity(LINE);
        // Strings and numbers: writing them to memory cannot fail.
        let _ = serde_json::to_writer(&mut bytes, &line);
        bytes.push(b'\n');
        bytes
    }
}

/// A moment that the format of times can show.
fn printable(time: SystemTime) -> SystemTime {
    time.clamp(UNIX_EPOCH, UNIX_EPOCH + LAST_TIME)
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.finished {
            let elapsed = self.count("aborted", "aborted");
            self.audit.write(self.line("aborted", "aborted", None, true, elapsed));
        }
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}-{}", self.boot, self.number)
    }
}

impl<T: fmt::Display> Serialize for Text<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

#[cfg(test)]
mod tests;

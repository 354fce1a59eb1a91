//! One record per request whose head arrived: who asked, as whom, for which role, and what was handed out.
//!
//! A record is one line of JSON, written in one write before the answer is sent. The fields are a contract: see
//! deploy/README.md. Nothing secret is in it; the access key id ties it to CloudTrail.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use serde::Serialize;
use tokio::time::Instant;

use crate::caller::{Caller, Listener};
use crate::clock::Clock;
use crate::config::AuditFile;
use crate::metrics::{Metrics, Request};
use crate::role::Grant;

mod sink;

use sink::Sink;

/// Opens records and writes them.
#[derive(Debug)]
pub struct Audit {
    sink: ArcSwap<Sink>,
    required: AtomicBool,
    clock: Clock,
    metrics: Metrics,
    boot: u32,
    next: AtomicU64,
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
#[derive(Debug, Clone)]
pub struct Issued {
    /// Of the credentials.
    pub access_key_id: Arc<str>,
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
    request_id: String,
    listener: Listener,
    caller: Option<Arc<Caller>>,
    grant: Option<Grant>,
    finished: bool,
}

/// The line. Keys are part of the contract.
#[derive(Serialize)]
struct Line<'a> {
    time: String,
    target: &'static str,
    request_id: &'a str,
    outcome: &'static str,
    reason: &'static str,
    listener: &'static str,
    #[serde(flatten)]
    caller: Option<CallerFields<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    spiffe_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    role_arn: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session_name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    access_key_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expiration: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache: Option<Freshness>,
    milliseconds: f64,
}

#[derive(Serialize)]
struct CallerFields<'a> {
    uid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    cgroup: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    systemd_unit: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    start_time: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exe: Option<&'a str>,
}

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
            request_id: format!("{:08x}-{number}", self.boot),
            listener,
            caller,
            grant: None,
            finished: false,
        }
    }

    fn write(&self, line: Vec<u8>) -> bool {
        let written = self.sink.load().write(line);
        if !written {
            self.metrics.audit_lost.inc();
        }
        written
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        self.sink.load().flush();
    }
}

impl Record {
    /// Names the request in answers and logs.
    pub fn request_id(&self) -> &str {
        &self.request_id
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
    pub fn finish(mut self, outcome: Outcome, reason: &'static str, issued: Option<&Issued>) -> bool {
        self.finished = true;
        let written = self.write(outcome.name(), reason, issued);
        written || !self.audit.required.load(Ordering::Relaxed)
    }

    fn write(&self, outcome: &'static str, reason: &'static str, issued: Option<&Issued>) -> bool {
        let elapsed = self.started.elapsed().as_secs_f64();
        let audit = &self.audit;
        audit.metrics.requests.get_or_create(&Request { listener: self.listener.name(), outcome, reason }).inc();
        audit.metrics.latency.0.observe(elapsed);
        let line = Line {
            time: humantime::format_rfc3339_millis(audit.clock.now()).to_string(),
            target: "audit",
            request_id: &self.request_id,
            outcome,
            reason,
            listener: self.listener.name(),
            caller: self.caller.as_deref().map(CallerFields::of),
            spiffe_id: self.grant.as_ref().map(|grant| grant.spiffe_id.as_str()),
            role_arn: self.grant.as_ref().map(|grant| grant.role_arn.as_str()),
            session_name: self.grant.as_ref().map(|grant| grant.session_name.as_str()),
            access_key_id: issued.map(|issued| &*issued.access_key_id),
            expiration: issued.map(|issued| humantime::format_rfc3339_seconds(issued.expiration).to_string()),
            cache: issued.map(|issued| issued.freshness),
            milliseconds: (elapsed * 1e6).round() / 1e3,
        };
        // Strings and numbers: writing them to memory cannot fail.
        let mut bytes = serde_json::to_vec(&line).unwrap_or_default();
        bytes.push(b'\n');
        audit.write(bytes)
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.finished {
            self.write("aborted", "aborted", None);
        }
    }
}

impl<'a> CallerFields<'a> {
    fn of(caller: &'a Caller) -> Self {
        let process = caller.process.as_ref();
        Self {
            uid: caller.uid,
            cgroup: caller.cgroup.as_ref().map(|cgroup| cgroup.as_str()),
            systemd_unit: caller.cgroup.as_ref().and_then(|cgroup| cgroup.systemd_unit()),
            pid: process.map(|process| process.pid),
            start_time: process.and_then(|process| process.program.as_ref()).map(|program| program.start_time),
            gid: process.map(|process| process.gid),
            exe: process.and_then(|process| process.program.as_ref()?.exe.as_ref()?.path.to_str()),
        }
    }
}

#[cfg(test)]
mod tests;

//! One place in the cache: what is handed out of it, and what is known about it.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use serde::Serialize;
use tokio::time::Instant;

use super::failure::FailureState;
use super::flight::Flight;
use super::issued::CachedCredentials;
use crate::caller::Caller;
use crate::clock::Clock;
use crate::metrics::EntryStateLabel;
use crate::role::Grant;

/// `(uid_t) -1`.
const NO_UID: u32 = u32::MAX;

/// The place of one grant.
pub(super) struct Entry {
    pub(super) grant: Grant,
    pub(super) current: ArcSwapOption<CachedCredentials>,
    /// The caller that asked last, where the source needs one and it is not known to be gone.
    pub(super) latest: ArcSwapOption<Caller>,
    last_used: AtomicU64,
    /// The user of whoever asked last, for `/status`: also where the caller itself is not kept. Nobody has [`NO_UID`].
    last_uid: AtomicU32,
    state: Mutex<CachedState>,
}

/// What changes with flights.
#[derive(Default)]
pub(super) struct CachedState {
    pub(super) flight: Option<Arc<Flight>>,
    /// It is not in the cache any more.
    pub(super) ended: bool,
    /// When it is looked at next.
    pub(super) next: Option<Instant>,
    /// What has failed since the last success.
    pub(super) trouble: Option<Box<FailureState>>,
}

impl Entry {
    pub(super) fn new(grant: Grant) -> Arc<Self> {
        Arc::new(Self {
            grant,
            current: ArcSwapOption::empty(),
            latest: ArcSwapOption::empty(),
            last_used: AtomicU64::new(0),
            last_uid: AtomicU32::new(NO_UID),
            state: Mutex::default(),
        })
    }

    /// Locked for moments only, never while anything is waited for. Whoever holds it must not look into the cache's table:
    /// there places are locked in the other order.
    pub(super) fn state(&self) -> MutexGuard<'_, CachedState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a request of this user, at this time since the cache's start.
    pub(super) fn used(&self, at: Duration, uid: u32) {
        self.last_uid.store(uid, Ordering::Relaxed);
        self.last_used.store(
            at.as_millis().try_into().unwrap_or(u64::MAX),
            Ordering::Relaxed,
        );
    }

    pub(super) fn last_used(&self) -> Duration {
        Duration::from_millis(self.last_used.load(Ordering::Relaxed))
    }

    /// Forgets a caller that is gone.
    pub(super) fn drop_caller(&self, gone: &Arc<Caller>) {
        let latest = self.latest.load();
        if latest
            .as_ref()
            .is_some_and(|latest| Arc::ptr_eq(latest, gone))
        {
            // Another that came in between stays.
            self.latest.compare_and_swap(&latest, None);
        }
    }

    /// For metrics.
    pub(super) fn status(&self, clock: &Clock) -> EntryStateLabel {
        let state = self.state();
        let current = self.current.load();
        match (current.as_ref(), &state.trouble) {
            (None, _) => EntryStateLabel::Empty,
            (Some(_), Some(trouble)) if trouble.refused_since.is_some() => EntryStateLabel::Refused,
            (Some(_), Some(_)) => EntryStateLabel::Failing,
            (Some(issued), None) if issued.remaining(clock) <= issued.refresh_left => {
                EntryStateLabel::Due
            }
            (Some(_), None) => EntryStateLabel::Fresh,
        }
    }

    pub(super) fn describe(&self, clock: &Clock) -> EntryStatus {
        let current = self.current.load();
        let latest = self.latest.load();
        let state = self.state();
        let trouble = state.trouble.as_ref();
        let date = |time: SystemTime| humantime::format_rfc3339_seconds(time).to_string();
        let waiting = state.flight.as_ref().map_or(0, |flight| flight.waiting());
        EntryStatus {
            spiffe_id: self.grant.spiffe_id.to_string(),
            role: self.grant.role.name.clone(),
            role_arn: self.grant.role_arn.to_string(),
            session_name: self.grant.session_name.as_str().to_owned(),
            access_key_id: current
                .as_ref()
                .map(|issued| issued.access_key_id.to_string()),
            expiration: current.as_ref().map(|issued| date(issued.expiration)),
            // No refresh is ever further away than this.
            next_try: state
                .next
                .map(|at| date(clock.now() + at.saturating_duration_since(Instant::now()))),
            last_error: trouble.map(|trouble| trouble.error.to_string()),
            last_error_reason: trouble.map(|trouble| trouble.error.reason()),
            last_error_at: trouble.map(|trouble| date(trouble.time)),
            refused_since: trouble
                .and_then(|trouble| trouble.refused_since)
                .map(|(_, time)| date(time)),
            callers: waiting.max(usize::from(latest.is_some())),
            latest_uid: Some(self.last_uid.load(Ordering::Relaxed)).filter(|uid| *uid != NO_UID),
            latest_pid: latest
                .as_ref()
                .and_then(|caller| caller.process.as_ref())
                .map(|process| process.pid),
        }
    }
}

/// One cached set of credentials, for people. Times are in UTC.
#[derive(Debug, Serialize)]
pub struct EntryStatus {
    /// Whose.
    pub spiffe_id: String,
    /// Which `[[role]]`; the ARN itself where the workload named one.
    pub role: String,
    /// Which role.
    pub role_arn: String,
    /// The session's name.
    pub session_name: String,
    /// The access key id, if there are credentials.
    pub access_key_id: Option<String>,
    /// When they end.
    pub expiration: Option<String>,
    /// When the next refresh is due, or the next try.
    pub next_try: Option<String>,
    /// What the last try to issue them failed with, if nothing has succeeded since.
    pub last_error: Option<String>,
    /// Its label in metrics.
    pub last_error_reason: Option<&'static str>,
    /// When that was.
    pub last_error_at: Option<String>,
    /// Since when STS, or the source, refuses to renew them.
    pub refused_since: Option<String>,
    /// How many callers it could be renewed with: those that wait, or the last one that asked. None with a source that
    /// does not look at callers.
    pub callers: usize,
    /// The user of whoever asked last, whatever the source.
    pub latest_uid: Option<u32>,
    /// The process of the last of the callers, if that was looked at.
    pub latest_pid: Option<u32>,
}

//! One place in the cache: what is handed out of it, and what is known about it.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use serde::Serialize;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::flight::Flight;
use super::rules::{self, Trouble};
use crate::caller::Caller;
use crate::clock::Clock;
use crate::credentials::Credentials;
use crate::metrics::EntryState;
use crate::role::Grant;

/// Credentials as they are handed out: the secrets are in the body alone.
#[derive(Debug)]
pub struct Issued {
    /// Not secret.
    pub access_key_id: Arc<str>,
    /// When AWS stops to accept them.
    pub expiration: SystemTime,
    /// The body for SDKs, rendered once.
    pub body: Body,
    /// The same by the monotonic clock.
    expires: Instant,
    /// How long they last when they are issued.
    pub(super) lifetime: Duration,
    /// With this much left they are due for a refresh.
    pub(super) refresh_left: Duration,
}

/// A rendered answer. Zeroized when the last holder drops it, and not printed.
#[derive(Clone)]
pub struct Body(pub Arc<Zeroizing<Vec<u8>>>);

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Body({} bytes)", self.0.len())
    }
}

impl Issued {
    /// Of credentials that were issued now. No session lasts longer than was asked for, whatever this node's clock says:
    /// with a clock that is behind, `Expiration` alone looks further away than it is.
    pub(super) fn new(grant: &Grant, credentials: &Credentials, clock: &Clock) -> Self {
        let lifetime = clock.until(credentials.expiration).min(grant.role.duration);
        Self {
            access_key_id: credentials.access_key_id.as_str().into(),
            expiration: credentials.expiration,
            body: Body(Arc::new(credentials.body(&grant.role_arn))),
            expires: Instant::now() + lifetime,
            lifetime,
            refresh_left: rules::refresh_left(lifetime),
        }
    }

    /// How long they last still: by the monotonic clock or by the wall clock, whichever says less. A suspended machine's
    /// monotonic clock stands still; a wall clock that is set back says too much.
    pub(super) fn left(&self, clock: &Clock) -> Duration {
        self.expires.saturating_duration_since(Instant::now()).min(clock.until(self.expiration))
    }
}

/// The place of one grant.
pub(super) struct Slot {
    pub(super) grant: Grant,
    pub(super) current: ArcSwapOption<Issued>,
    /// The caller that asked last, where the source needs one and it is not known to be gone.
    pub(super) latest: ArcSwapOption<Caller>,
    last_used: AtomicU64,
    state: Mutex<State>,
}

/// What changes with flights.
#[derive(Default)]
pub(super) struct State {
    pub(super) flight: Option<Arc<Flight>>,
    /// It is not in the cache any more.
    pub(super) ended: bool,
    /// When it is looked at next.
    pub(super) next: Option<Instant>,
    /// What has failed since the last success.
    pub(super) trouble: Option<Box<Trouble>>,
}

impl Slot {
    pub(super) fn new(grant: Grant) -> Arc<Self> {
        Arc::new(Self {
            grant,
            current: ArcSwapOption::empty(),
            latest: ArcSwapOption::empty(),
            last_used: AtomicU64::new(0),
            state: Mutex::default(),
        })
    }

    /// Locked for moments only, never while anything is waited for. Whoever holds it must not look into the cache's table:
    /// there places are locked in the other order.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a request, at this time since the cache's start.
    pub(super) fn used(&self, at: Duration) {
        self.last_used.store(at.as_millis().try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(super) fn last_used(&self) -> Duration {
        Duration::from_millis(self.last_used.load(Ordering::Relaxed))
    }

    /// Forgets a caller that is gone.
    pub(super) fn forget(&self, gone: &Arc<Caller>) {
        let latest = self.latest.load();
        if latest.as_ref().is_some_and(|latest| Arc::ptr_eq(latest, gone)) {
            // Another that came in between stays.
            self.latest.compare_and_swap(&latest, None);
        }
    }

    /// For metrics.
    pub(super) fn condition(&self, clock: &Clock) -> EntryState {
        let state = self.state();
        let current = self.current.load();
        match (current.as_ref(), &state.trouble) {
            (None, _) => EntryState::Empty,
            (Some(_), Some(trouble)) if trouble.refused_since.is_some() => EntryState::Refused,
            (Some(_), Some(_)) => EntryState::Failing,
            (Some(issued), None) if issued.left(clock) <= issued.refresh_left => EntryState::Due,
            (Some(_), None) => EntryState::Fresh,
        }
    }

    pub(super) fn describe(&self, clock: &Clock) -> Entry {
        let current = self.current.load();
        let latest = self.latest.load();
        let state = self.state();
        let trouble = state.trouble.as_ref();
        let date = |time: SystemTime| humantime::format_rfc3339_seconds(time).to_string();
        let waiting = state.flight.as_ref().map_or(0, |flight| flight.waiting());
        Entry {
            spiffe_id: self.grant.spiffe_id.to_string(),
            role: self.grant.role.name.clone(),
            role_arn: self.grant.role_arn.to_string(),
            session_name: self.grant.session_name.as_str().to_owned(),
            access_key_id: current.as_ref().map(|issued| issued.access_key_id.to_string()),
            expiration: current.as_ref().map(|issued| date(issued.expiration)),
            // No refresh is ever further away than this.
            next_try: state.next.map(|at| date(clock.now() + at.saturating_duration_since(Instant::now()))),
            last_error: trouble.map(|trouble| trouble.error.to_string()),
            last_error_reason: trouble.map(|trouble| trouble.error.reason()),
            last_error_at: trouble.map(|trouble| date(trouble.time)),
            refused_since: trouble.and_then(|trouble| trouble.refused_since).map(|(_, time)| date(time)),
            callers: waiting.max(usize::from(latest.is_some())),
            latest_uid: latest.as_ref().map(|caller| caller.uid),
            latest_pid: latest.as_ref().and_then(|caller| caller.process.as_ref()).map(|process| process.pid),
        }
    }
}

/// One cached set of credentials, for people. Times are in UTC.
#[derive(Debug, Serialize)]
pub struct Entry {
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
    /// The last one's user.
    pub latest_uid: Option<u32>,
    /// The last one's process, if that was looked at.
    pub latest_pid: Option<u32>,
}

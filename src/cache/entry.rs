//! One cache entry: its credentials as they are served, and for how long, and its refresh and
//! failure state.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use serde::Serialize;
use tokio::time::Instant;

use super::failure::FailureState;
use super::flight::Flight;
use crate::caller::Caller;
use crate::clock::Clock;
use crate::credentials::{Credentials, RenderedBody};
use crate::identity::{RoleArn, SessionName};
use crate::metrics::EntryStateLabel;
use crate::policy::Policy;
use crate::role::Grant;

/// Credentials with at most this remaining lifetime are not served.
pub(super) const MIN_REMAINING: Duration = Duration::from_secs(60);
/// SDKs (botocore, Java, .NET) fetch on each call once less than this remains.
const SDK_REFRESH_WINDOW: Duration = Duration::from_secs(15 * 60);
/// Lead of the daemon's refresh over that of the SDKs.
const SDK_MARGIN: Duration = Duration::from_secs(90);
/// Sessions that exceed [`SDK_REFRESH_WINDOW`] by less than this are refreshed at half their life,
/// not before the SDKs. Otherwise they would be refreshed all the time.
const MIN_REFRESH_GAIN: Duration = Duration::from_secs(5 * 60);
/// `(uid_t) -1`, which is not a user.
const NO_UID: u32 = u32::MAX;

/// The entry of one grant.
pub(super) struct Entry {
    pub(super) grant: Grant,
    /// The last policy that verified the entry. Requests of this policy may use it.
    pub(super) policy: ArcSwap<Policy>,
    pub(super) current: ArcSwapOption<CachedCredentials>,
    /// The latest caller, if the source needs a live one and this one is not known to be gone.
    pub(super) latest: ArcSwapOption<Caller>,
    last_used: AtomicU64,
    /// User id of the latest caller, for `/status`. It is kept where `latest` is not. [`NO_UID`]
    /// before the first request.
    last_uid: AtomicU32,
    state: Mutex<EntryState>,
}

/// The part of an entry that flights change, behind its lock.
#[derive(Default)]
pub(super) struct EntryState {
    pub(super) flight: Option<Arc<Flight>>,
    /// True once the entry is retired: the table drops it, and a flight must not store into it.
    pub(super) retired: bool,
    /// Time of this entry in the [`Schedule`](super::refresh::Schedule).
    pub(super) next: Option<Instant>,
    /// The failures since the last success.
    pub(super) failure: Option<Box<FailureState>>,
}

impl Entry {
    pub(super) fn new(grant: Grant, policy: Arc<Policy>) -> Arc<Self> {
        Arc::new(Self {
            grant,
            policy: ArcSwap::new(policy),
            current: ArcSwapOption::empty(),
            latest: ArcSwapOption::empty(),
            last_used: AtomicU64::new(0),
            last_uid: AtomicU32::new(NO_UID),
            state: Mutex::default(),
        })
    }

    /// Locks the state for a moment, never across an await. A thread that holds this lock must not
    /// use the table. The table locks its shard first and an entry second.
    pub(super) fn state(&self) -> MutexGuard<'_, EntryState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a request of user `uid`, `at` this time since the cache's start.
    pub(super) fn record_use(&self, at: Duration, uid: u32) {
        self.last_uid.store(uid, Ordering::Relaxed);
        self.last_used.store(
            at.as_millis().try_into().unwrap_or(u64::MAX),
            Ordering::Relaxed,
        );
    }

    pub(super) fn last_used(&self) -> Duration {
        Duration::from_millis(self.last_used.load(Ordering::Relaxed))
    }

    /// Drops the caller `gone`, so that no refresh uses it.
    pub(super) fn drop_caller(&self, gone: &Arc<Caller>) {
        let latest = self.latest.load();
        if latest
            .as_ref()
            .is_some_and(|latest| Arc::ptr_eq(latest, gone))
        {
            // A newer caller that arrived in between stays.
            self.latest.compare_and_swap(&latest, None);
        }
    }

    /// Returns the entry's state as a metric label.
    pub(super) fn status(&self, clock: &Clock) -> EntryStateLabel {
        let state = self.state();
        let current = self.current.load();
        match (current.as_ref(), &state.failure) {
            (None, _) => EntryStateLabel::Empty,
            (Some(_), Some(failure)) if failure.refused_since.is_some() => EntryStateLabel::Refused,
            (Some(_), Some(_)) => EntryStateLabel::Failing,
            (Some(cached), None) if cached.times(clock).is_due() => EntryStateLabel::Due,
            (Some(_), None) => EntryStateLabel::Fresh,
        }
    }

    /// Returns the ARN of each role in the chain up to this entry's; none without a chain.
    fn chain(&self) -> Vec<String> {
        let first = self.grant.is_chained().then_some(&self.grant.role_arn);
        let rest = self.grant.chain().iter().map(|session| &session.role_arn);
        first
            .into_iter()
            .chain(rest)
            .map(RoleArn::to_string)
            .collect()
    }

    /// Returns whether it is a session within a chain whose renewal was rejected. No later session
    /// may start with it.
    pub(super) fn is_rejected_hop(&self, state: &EntryState) -> bool {
        let failure = state.failure.as_ref();
        self.grant.is_hop() && failure.is_some_and(|failure| failure.is_rejected())
    }

    pub(super) fn describe(&self, clock: &Clock) -> EntryStatus {
        let current = self.current.load();
        let chosen = current
            .as_deref()
            .and_then(CachedCredentials::first_session_name);
        let latest = self.latest.load();
        let state = self.state();
        let failure = state.failure.as_ref();
        let date = |time: SystemTime| humantime::format_rfc3339_seconds(time).to_string();
        let waiting = state.flight.as_ref().map_or(0, |flight| flight.waiting());
        EntryStatus {
            spiffe_id: self.grant.spiffe_id.to_string(),
            role: self.grant.role.name.clone(),
            role_arn: self.grant.issued_role_arn().to_string(),
            session_name: self.grant.issued_session_name(chosen).to_owned(),
            hop: self.grant.is_hop().then(|| self.grant.hop_number()),
            chain: self.chain(),
            access_key_id: current
                .as_ref()
                .map(|cached| cached.access_key_id.to_string()),
            expiration: current.as_ref().map(|cached| date(cached.expiration)),
            next_try: state
                .next
                .map(|at| date(clock.now() + at.saturating_duration_since(Instant::now()))),
            last_error: failure.map(|failure| failure.error.to_string()),
            last_error_reason: failure.map(|failure| failure.error.reason()),
            last_error_at: failure.map(|failure| date(failure.time)),
            refused_since: failure
                .and_then(|failure| failure.refused_since)
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

/// Credentials as they are served. Only the body has the secrets.
#[derive(Debug)]
pub struct CachedCredentials {
    /// Access key ID, which is not a secret.
    pub access_key_id: Arc<str>,
    /// Time at which AWS stops accepting the credentials.
    pub expiration: SystemTime,
    /// Response body for SDKs, rendered once. It is empty for a session within a chain, which no
    /// workload gets.
    pub body: Arc<RenderedBody>,
    /// Name of the first session, where AWS has not used the one that awsvid requested.
    first_session_name: Option<SessionName>,
    /// The credentials themselves, where they sign the call for the next session of a chain.
    pub(super) signing: Option<Arc<Credentials>>,
    /// The expiration by the monotonic clock.
    expires: Instant,
    /// The lifetime at the time of issue.
    lifetime: Duration,
    /// The remaining lifetime at which a refresh is due.
    refresh_at_remaining: Duration,
}

/// The times of an entry's credentials, at one moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct CredentialTimes {
    pub(super) remaining: Duration,
    /// The lifetime at the time of issue.
    pub(super) lifetime: Duration,
    /// The remaining lifetime at which a refresh is due.
    pub(super) refresh_at_remaining: Duration,
}

impl CredentialTimes {
    /// Returns the time for which the credentials may still be served.
    pub(super) fn servable_for(self) -> Duration {
        self.remaining.saturating_sub(MIN_REMAINING)
    }

    /// Returns whether the credentials may be served at all.
    pub(super) fn is_servable(self) -> bool {
        !self.servable_for().is_zero()
    }

    /// Returns the time until a refresh is due.
    pub(super) fn due_in(self) -> Duration {
        self.remaining.saturating_sub(self.refresh_at_remaining)
    }

    /// Returns whether a refresh is due.
    pub(super) fn is_due(self) -> bool {
        self.due_in().is_zero()
    }
}

impl CachedCredentials {
    /// Wraps credentials that STS has just issued. The lifetime is bounded by the requested
    /// duration. If this node's clock is behind, `Expiration` alone seems further off than it is.
    pub(super) fn new(grant: &Grant, credentials: &Credentials, clock: &Clock) -> Self {
        let requested = grant.issued_duration();
        let lifetime = clock.until(credentials.expiration).min(requested);
        let (body, signing) = match grant.is_hop() {
            true => (RenderedBody::empty(), Some(Arc::new(credentials.clone()))),
            false => (credentials.body(grant.issued_role_arn()), None),
        };
        Self {
            access_key_id: credentials.access_key_id.as_str().into(),
            expiration: credentials.expiration,
            body: Arc::new(body),
            first_session_name: credentials.first_session_name.clone(),
            signing,
            expires: Instant::now() + lifetime,
            lifetime,
            refresh_at_remaining: refresh_at_remaining(lifetime),
        }
    }

    /// Returns the same credentials with a refresh that is due now.
    pub(super) fn due_now(&self) -> Self {
        Self {
            access_key_id: self.access_key_id.clone(),
            expiration: self.expiration,
            body: self.body.clone(),
            first_session_name: self.first_session_name.clone(),
            signing: self.signing.clone(),
            expires: self.expires,
            lifetime: self.lifetime,
            refresh_at_remaining: self.lifetime,
        }
    }

    /// Returns the name of the first session, where AWS has not used the one that awsvid requested.
    pub fn first_session_name(&self) -> Option<&str> {
        self.first_session_name.as_ref().map(SessionName::as_str)
    }

    /// Returns the time at which STS issued the credentials, by its clock.
    pub fn issued(&self) -> SystemTime {
        let issued = self.expiration.checked_sub(self.lifetime);
        issued.unwrap_or(self.expiration)
    }

    /// Returns the remaining lifetime, by the monotonic or the wall clock, whichever is less. The
    /// monotonic clock of a suspended machine stands still. A wall clock that is set back gives too
    /// much.
    pub(super) fn remaining(&self, clock: &Clock) -> Duration {
        self.expires
            .saturating_duration_since(Instant::now())
            .min(clock.until(self.expiration))
    }

    pub(super) fn times(&self, clock: &Clock) -> CredentialTimes {
        CredentialTimes {
            remaining: self.remaining(clock),
            lifetime: self.lifetime,
            refresh_at_remaining: self.refresh_at_remaining,
        }
    }
}

/// Returns the remaining lifetime at which credentials of this lifetime are refreshed. It is about
/// half, with jitter so that the identities of a node do not refresh together. It is before the
/// time at which SDKs begin to fetch on each call.
pub(super) fn refresh_at_remaining(lifetime: Duration) -> Duration {
    let half = lifetime.mul_f64(0.45 + 0.1 * fastrand::f64());
    if lifetime < SDK_REFRESH_WINDOW + MIN_REFRESH_GAIN {
        return half;
    }
    half.max(SDK_REFRESH_WINDOW + SDK_MARGIN.mul_f64(1.0 + 0.5 * fastrand::f64()))
}

/// One cache entry as `/status` shows it. Times are in UTC (RFC 3339).
#[derive(Debug, Serialize)]
pub struct EntryStatus {
    /// The SPIFFE ID of the workload.
    pub spiffe_id: String,
    /// Name of the `[[role]]`, or the ARN if the workload requested one.
    pub role: String,
    /// ARN of the IAM role.
    pub role_arn: String,
    /// The `RoleSessionName` at STS.
    pub session_name: String,
    /// Number of the session in its chain, from 1, if it is one that no workload gets. Such an
    /// entry has no name in `role`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hop: Option<usize>,
    /// ARNs of the roles of the chain up to this session. Empty without a chain.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub chain: Vec<String>,
    /// Access key ID, if the entry has credentials.
    pub access_key_id: Option<String>,
    /// Time at which AWS stops accepting the credentials.
    pub expiration: Option<String>,
    /// Time at which the cache examines the entry next: a refresh, a retry, or the end of its
    /// credentials.
    pub next_try: Option<String>,
    /// Text of the last failure, if no exchange has succeeded since.
    pub last_error: Option<String>,
    /// The metric label of `last_error`.
    pub last_error_reason: Option<&'static str>,
    /// Time of the last failure.
    pub last_error_at: Option<String>,
    /// Time since when STS or the source has rejected the refresh.
    pub refused_since: Option<String>,
    /// Number of callers that a refresh could use: those that wait, or the latest one. Always zero
    /// if the source does not need a live caller.
    pub callers: usize,
    /// User ID of the latest caller, with every source.
    pub latest_uid: Option<u32>,
    /// Process ID of the latest caller, if the daemon read its process and the source needs a live
    /// caller.
    pub latest_pid: Option<u32>,
}

//! Credentials by SPIFFE ID and role: issued once for all who ask, refreshed ahead, kept through outages.
//!
//! A flight (one exchange of a JWT-SVID at STS) belongs to the cache: a client that hangs up, as many SDKs do after a
//! second, neither cancels it nor wastes it. Readers load the current credentials without waiting for a refresh.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use dashmap::DashMap;
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use crate::audit::Freshness;
use crate::caller::Caller;
use crate::clock::Clock;
use crate::credentials::Credentials;
use crate::issue::{IssueError, Issuer};
use crate::metrics::{Call, Metrics};
use crate::role::Grant;

/// Credentials with less than this left are not handed out any more.
const LAST_GOOD: Duration = Duration::from_secs(60);
/// How long a request is held while its credentials are issued. The most patient SDKs give up after 5 s.
const HOLD: Duration = Duration::from_millis(4500);
/// How long a failure is remembered where nothing is cached: SDKs repeat a refused request several times within seconds.
const REMEMBER_PERMANENT: Duration = Duration::from_secs(3);
/// Likewise for a failure that may pass at any time.
const REMEMBER_TRANSIENT: Duration = Duration::from_millis(500);
/// Waits between tries to refresh double from this ...
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
/// ... to this.
const BACKOFF_LAST: Duration = Duration::from_secs(60);

/// Hands out credentials. Cheap to clone.
#[derive(Debug, Clone)]
pub struct CredentialCache(Arc<Shared>);

struct Shared {
    setup: ArcSwap<Setup>,
    clock: Clock,
    metrics: Metrics,
    slots: DashMap<Grant, Arc<Slot>>,
}

/// What a reload replaces.
struct Setup {
    issuer: Issuer,
    limits: Limits,
    keep: Box<dyn Fn(&Grant) -> bool + Send + Sync>,
}

/// `[cache]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How many sets of credentials there are at most.
    pub max_entries: usize,
    /// How long credentials are still handed out once STS refuses to renew them.
    pub revocation_grace: Duration,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("slots", &self.slots.len()).finish_non_exhaustive()
    }
}

/// The place of one grant.
#[derive(Debug)]
struct Slot {
    grant: Grant,
    current: ArcSwapOption<Issued>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    flight: Option<Flight>,
    /// Taken out by a reload: nothing of it is handed out any more, and nothing is put into it.
    ended: bool,
    /// Whether a task refreshes it ahead of time.
    kept_fresh: bool,
    /// What the last flight failed with, if nothing has succeeded since.
    failure: Option<(Instant, IssueError)>,
    last_used: Instant,
}

type Landed = Result<Arc<Issued>, CacheError>;
type Flight = watch::Receiver<Option<Landed>>;

/// Credentials, the answer made of them, and their times.
#[derive(Debug)]
pub struct Issued {
    /// As STS gave them.
    pub credentials: Credentials,
    /// The body for SDKs, rendered once.
    pub body: Body,
    expires: Instant,
    refresh_at: Instant,
    lifetime: Duration,
}

/// A rendered answer. Zeroized when the last holder drops it, and not printed.
#[derive(Clone)]
pub struct Body(pub Arc<zeroize::Zeroizing<Vec<u8>>>);

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Body({} bytes)", self.0.len())
    }
}

/// Why there are no credentials to hand out now.
#[derive(Debug, Clone, Error)]
pub enum CacheError {
    /// They could not be issued.
    #[error(transparent)]
    Issue(#[from] IssueError),
    /// They are still being issued, or a reload came between: the next try will find them.
    #[error("the credentials are still being issued")]
    Pending,
    /// There are too many others.
    #[error("the daemon holds as many credentials as it may")]
    Full,
}

impl CredentialCache {
    /// An empty cache.
    pub fn new(issuer: Issuer, clock: Clock, metrics: Metrics, limits: Limits) -> Self {
        let setup = ArcSwap::from_pointee(Setup { issuer, limits, keep: Box::new(|_| true) });
        Self(Arc::new(Shared { setup, clock, metrics, slots: DashMap::new() }))
    }

    /// Goes on with another source, another STS and other limits, and ends every entry that `keep` is false for: when
    /// this returns nothing of it is handed out any more, and what a flight under way brings for it is thrown away
    /// (attack 17). `keep` is asked again for each new entry, so a request that was decided by the old configuration
    /// and comes late makes none that the new one would not.
    pub fn reconfigure(&self, issuer: Issuer, limits: Limits, keep: impl Fn(&Grant) -> bool + Send + Sync + 'static) {
        let setup = Arc::new(Setup { issuer, limits, keep: Box::new(keep) });
        self.0.setup.store(setup.clone());
        self.0.slots.retain(|grant, slot| {
            let kept = (setup.keep)(grant);
            if !kept {
                slot.end();
            }
            kept
        });
        self.0.count();
    }

    /// The credentials for `grant`: those that are there, or newly issued with `caller`'s token.
    pub async fn get(&self, grant: &Grant, caller: &Arc<Caller>) -> Result<(Arc<Issued>, Freshness), CacheError> {
        let slot = self.0.slot(grant)?;
        if let Some(issued) = self.0.usable(&slot) {
            let stale = issued.refresh_at <= Instant::now();
            return Ok((issued, if stale { Freshness::Stale } else { Freshness::Hit }));
        }
        let mut flight = self.0.join_or_start(&slot, caller)?;
        let landed = timeout(HOLD, flight.wait_for(Option::is_some)).await.map_err(|_| CacheError::Pending)?;
        // The sender is gone without a result only if the runtime is shutting down.
        let landed = landed.ok().and_then(|landed| landed.clone()).ok_or(CacheError::Pending)?;
        Ok((landed?, Freshness::Miss))
    }

    /// What is cached, for `/status`: never a secret.
    pub fn entries(&self) -> Vec<Entry> {
        self.0.slots.iter().map(|slot| slot.describe()).collect()
    }
}

/// One cached set of credentials, for people.
#[derive(Debug, serde::Serialize)]
pub struct Entry {
    /// Whose.
    pub spiffe_id: String,
    /// Which role.
    pub role_arn: String,
    /// The session's name.
    pub session_name: String,
    /// The access key id, if there are credentials.
    pub access_key_id: Option<String>,
    /// When they end.
    pub expiration: Option<String>,
    /// What the last try to issue them failed with, if nothing has succeeded since.
    pub last_error: Option<String>,
}

impl Slot {
    /// Nothing of it is handed out from now on. Whoever waits for its flight is told when that lands.
    fn end(&self) {
        let mut state = self.state();
        state.ended = true;
        self.current.store(None);
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn describe(&self) -> Entry {
        let current = self.current.load();
        let credentials = current.as_ref().map(|issued| &issued.credentials);
        Entry {
            spiffe_id: self.grant.spiffe_id.to_string(),
            role_arn: self.grant.role_arn.to_string(),
            session_name: self.grant.session_name.as_str().to_owned(),
            access_key_id: credentials.map(|credentials| credentials.access_key_id.clone()),
            expiration: credentials.map(|c| humantime::format_rfc3339_seconds(c.expiration).to_string()),
            last_error: self.state().failure.as_ref().map(|(_, error)| error.to_string()),
        }
    }
}

impl Shared {
    fn slot(&self, grant: &Grant) -> Result<Arc<Slot>, CacheError> {
        if let Some(slot) = self.slots.get(grant) {
            return Ok(slot.clone());
        }
        if self.slots.len() >= self.setup.load().limits.max_entries {
            return Err(CacheError::Full);
        }
        let empty = || {
            let state =
                State { flight: None, ended: false, kept_fresh: false, failure: None, last_used: Instant::now() };
            Arc::new(Slot { grant: grant.clone(), current: ArcSwapOption::empty(), state: Mutex::new(state) })
        };
        let slot = {
            // While its place in the map is locked a reload can't pass it by: either `keep` is the new one already, or
            // the reload is still to come here.
            let place = self.slots.entry(grant.clone());
            if !(self.setup.load().keep)(grant) {
                return Err(CacheError::Pending);
            }
            place.or_insert_with(empty).clone()
        };
        self.count();
        Ok(slot)
    }

    fn count(&self) {
        self.metrics.cache_entries.set(i64::try_from(self.slots.len()).unwrap_or(i64::MAX));
    }

    /// Those that may still be handed out: by the monotonic clock and by the wall clock, whichever says less.
    fn usable(&self, slot: &Slot) -> Option<Arc<Issued>> {
        let issued = slot.current.load_full()?;
        let now = Instant::now();
        let by_wall = self.clock.until(issued.credentials.expiration);
        if issued.expires.saturating_duration_since(now).min(by_wall) <= LAST_GOOD {
            return None;
        }
        slot.state().last_used = now;
        Some(issued)
    }

    /// The flight under way, or a new one; or the failure that was seen a moment ago.
    fn join_or_start(self: &Arc<Self>, slot: &Arc<Slot>, caller: &Arc<Caller>) -> Result<Flight, CacheError> {
        let mut state = slot.state();
        state.last_used = Instant::now();
        if state.ended {
            return Err(CacheError::Pending);
        }
        if let Some(flight) = &state.flight {
            return Ok(flight.clone());
        }
        if let Some((at, error)) = &state.failure {
            let remember = if error.is_transient() { REMEMBER_TRANSIENT } else { REMEMBER_PERMANENT };
            if at.elapsed() < remember {
                return Err(error.clone().into());
            }
        }
        Ok(self.launch(slot, caller, &mut state))
    }

    /// Starts the one flight of this place. It goes on whatever becomes of `caller`'s connection.
    fn launch(self: &Arc<Self>, slot: &Arc<Slot>, caller: &Arc<Caller>, state: &mut State) -> Flight {
        let (land, flight) = watch::channel(None);
        state.flight = Some(flight.clone());
        let (shared, slot, caller) = (self.clone(), slot.clone(), caller.clone());
        tokio::spawn(async move {
            let flying = {
                let (shared, slot, caller) = (shared.clone(), slot.clone(), caller.clone());
                tokio::spawn(async move { shared.fly(&slot, &caller).await })
            };
            // A panic in a library below ends that flight, not the place that it was for.
            let landed = flying.await.unwrap_or_else(|_| Err(IssueError::broken()));
            let landed = shared.landed(&slot, landed);
            if landed.is_ok() {
                shared.keep_fresh(&slot, caller);
            } else {
                tokio::spawn(forget_later(Arc::downgrade(&shared), slot));
            }
            land.send_replace(Some(landed));
        });
        flight
    }

    /// Starts what refreshes this place ahead of time, unless it runs already.
    fn keep_fresh(self: &Arc<Self>, slot: &Arc<Slot>, caller: Arc<Caller>) {
        let mut state = slot.state();
        if !state.kept_fresh && !state.ended {
            state.kept_fresh = true;
            tokio::spawn(refresh_ahead(Arc::downgrade(self), slot.clone(), caller));
        }
    }

    /// Issues once.
    async fn fly(&self, slot: &Slot, caller: &Caller) -> Result<Arc<Issued>, IssueError> {
        let issuer = self.setup.load().issuer.clone();
        let credentials = issuer.issue(caller, &slot.grant).await?;
        Ok(Arc::new(self.issued(&slot.grant, credentials)))
    }

    /// Puts a flight's result in its place, and says what those who wait for it get.
    fn landed(&self, slot: &Slot, landed: Result<Arc<Issued>, IssueError>) -> Landed {
        let label = landed.as_ref().map_or_else(IssueError::reason, |_| "ok");
        self.metrics.issues.get_or_create(&Call { result: label }).inc();
        let mut state = slot.state();
        state.flight = None;
        if state.ended {
            return Err(CacheError::Pending);
        }
        match &landed {
            Ok(issued) => {
                slot.current.store(Some(issued.clone()));
                state.failure = None;
            }
            Err(error) => {
                let Grant { spiffe_id, role_arn, .. } = &slot.grant;
                tracing::warn!(%spiffe_id, %role_arn, %error, "credentials were not issued");
                state.failure = Some((Instant::now(), error.clone()));
            }
        }
        Ok(landed?)
    }

    fn issued(&self, grant: &Grant, credentials: Credentials) -> Issued {
        let lifetime = self.clock.until(credentials.expiration);
        let now = Instant::now();
        // About half, so that SDKs that refresh 15 minutes early always find more than that in an hour's session; spread,
        // so that a node's identities don't refresh together.
        let ahead = lifetime.mul_f64(0.45 + 0.1 * fastrand::f64());
        let body = Body(Arc::new(credentials.body(&grant.role_arn)));
        Issued { credentials, body, expires: now + lifetime, refresh_at: now + ahead, lifetime }
    }

    fn remove(&self, slot: &Slot) {
        self.slots.remove_if(&slot.grant, |_, found| std::ptr::eq(Arc::as_ptr(found), slot));
        self.count();
    }
}

/// A place where nothing was ever issued is only kept as long as its failure is remembered.
async fn forget_later(shared: Weak<Shared>, slot: Arc<Slot>) {
    sleep_until(Instant::now() + REMEMBER_PERMANENT).await;
    let idle = slot.current.load().is_none() && slot.state().flight.is_none();
    if let (true, Some(shared)) = (idle, shared.upgrade()) {
        shared.remove(&slot);
    }
}

/// Keeps one place fresh until nobody asks for it during a whole lifetime, or its credentials have ended.
async fn refresh_ahead(shared: Weak<Shared>, slot: Arc<Slot>, caller: Arc<Caller>) {
    let mut backoff = BACKOFF_FIRST;
    let mut next = slot.current.load().as_ref().map(|issued| issued.refresh_at);
    while let Some(at) = next {
        sleep_until(at).await;
        let (Some(shared), Some(issued)) = (shared.upgrade(), slot.current.load_full()) else { return };
        let now = Instant::now();
        let unused = slot.state().last_used + issued.lifetime < now;
        if unused || shared.clock.until(issued.credentials.expiration).is_zero() || issued.expires <= now {
            shared.remove(&slot);
            return;
        }
        let mut flight = {
            let mut state = slot.state();
            match &state.flight {
                Some(flight) => flight.clone(),
                None => shared.launch(&slot, &caller, &mut state),
            }
        };
        drop(shared);
        let landed = flight.wait_for(Option::is_some).await.ok().and_then(|landed| landed.clone());
        next = Some(match landed {
            Some(Ok(issued)) => {
                backoff = BACKOFF_FIRST;
                issued.refresh_at
            }
            Some(Err(_)) | None => {
                let wait = backoff.mul_f64(0.5 + fastrand::f64());
                backoff = (backoff * 2).min(BACKOFF_LAST);
                Instant::now() + wait
            }
        });
    }
}

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::SystemTime;

use async_trait::async_trait;
use tokio::sync::Semaphore;
use tokio::time::{advance, sleep};
use zeroize::Zeroizing;

use super::*;
use crate::accounts::UserNames;
use crate::caller::constant_proof::ConstantProof;
use crate::caller::{AttestError, CallerFacts, ListenerKind, PeerFacts, Process, ProcessFacts};
use crate::captured_log::count_all_logs;
use crate::clock::REQUEST_HOLD;
use crate::credentials::Credentials;
use crate::exchange::TokenExchanger;
use crate::file_threads::FileThreads;
use crate::identity::{ArnTemplate, AttestedFacts, SpiffeId, Template};
use crate::policy::CacheLimits;
use crate::role::{Identity, RequestedRole, Role, Roles, RolesAnywhereTarget};
use crate::roles_anywhere::CreateSession;
use crate::socket_endpoint::Endpoint;
use crate::sts::{AssumeRole, RetryPolicy, StsError, StsReason};
use crate::svid::jwt::tests::token_of;
use crate::svid::{IdentityBasis, IdentitySource, JwtSvid, SourceError, X509Svid};

mod bounds;
mod callers;
mod chains;
mod clocks;
mod decision;
mod outages;
mod reload;
mod reload_model;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const LIMITS: CacheLimits = CacheLimits {
    max_entries: 3,
    revocation_grace: Duration::from_secs(300),
};

/// A source and an STS with replies that the test chooses. A failing source stops the exchange
/// before STS.
#[derive(Debug)]
struct CacheEnv {
    clock: Clock,
    /// Flights wait here until the test adds permits.
    gate: Semaphore,
    /// Duration of one call to the source.
    takes: Mutex<Duration>,
    fetched: AtomicUsize,
    /// Number of queries for certificates, which are all denied.
    certificate_queries: AtomicUsize,
    failure: Mutex<Option<SourceError>>,
    rejection: Mutex<Option<StsError>>,
    lifetime: Mutex<Duration>,
    panics: AtomicBool,
    requires_live_caller: AtomicBool,
    /// User IDs of the callers that are gone.
    gone: Mutex<HashSet<u32>>,
    requesters: Mutex<Vec<u32>>,
    /// Number of running calls to the source.
    busy: AtomicUsize,
    metrics: Metrics,
    chain: Mutex<ChainCalls>,
}

/// The calls for the later sessions of chains, and the failures of further ones, by the number of
/// the session.
#[derive(Debug, Default)]
struct ChainCalls {
    calls: Vec<usize>,
    failures: HashMap<usize, StsError>,
}

impl CacheEnv {
    fn fail(&self, failure: impl Into<Option<SourceError>>) {
        *self.failure.lock().unwrap() = failure.into();
    }

    fn reject(&self, rejection: impl Into<Option<StsError>>) {
        *self.rejection.lock().unwrap() = rejection.into();
    }

    fn fetched(&self) -> usize {
        self.fetched.load(Ordering::SeqCst)
    }

    /// Returns a policy with this source and STS.
    fn policy(self: &Arc<Self>, roles: &[Arc<Role>], limits: CacheLimits) -> Policy {
        let (clock, metrics) = (self.clock.clone(), self.metrics.clone());
        let roles = Roles {
            defined: roles.to_vec(),
            requested: None,
        };
        let exchanger = TokenExchanger::new(self.clone(), self.clone(), clock, metrics)
            .with_roles_anywhere(self.clone());
        let users = UserNames::new(FileThreads::default());
        Policy::new(self.clone(), roles, exchanger, users, limits)
    }

    async fn answer(
        &self,
        caller: &Caller,
        id: &SpiffeId,
        audience: &str,
    ) -> Result<JwtSvid, SourceError> {
        self.requesters.lock().unwrap().push(caller.peer.uid);
        self.gate.acquire().await.unwrap().forget();
        let takes = *self.takes.lock().unwrap();
        sleep(takes).await;
        self.fetched.fetch_add(1, Ordering::SeqCst);
        assert!(!self.panics.load(Ordering::SeqCst), "a panic was requested");
        if self.gone.lock().unwrap().contains(&caller.peer.uid) {
            return Err(SourceError::Caller(AttestError::CallerGone));
        }
        if let Some(failure) = self.failure.lock().unwrap().clone() {
            return Err(failure);
        }
        Ok(JwtSvid::check(
            token_of(id.as_str(), audience, self.clock.now(), 300, 0),
            id,
            audience,
            self.clock.now(),
        )
        .unwrap())
    }
}

/// Counts a call to the source until it ends, or is cancelled.
struct BusyCall<'a>(&'a AtomicUsize);

impl<'a> BusyCall<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for BusyCall<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl IdentitySource for CacheEnv {
    async fn identify(&self, _: &Arc<Caller>) -> Result<Vec<Identity>, SourceError> {
        Ok(Vec::new())
    }

    async fn token(
        &self,
        caller: &Arc<Caller>,
        id: &SpiffeId,
        audience: &str,
    ) -> Result<JwtSvid, SourceError> {
        let _busy = BusyCall::new(&self.busy);
        self.answer(caller, id, audience).await
    }

    async fn x509_svid(&self, _: &Arc<Caller>, _: &SpiffeId) -> Result<X509Svid, SourceError> {
        self.certificate_queries.fetch_add(1, Ordering::SeqCst);
        Err(denied())
    }

    fn facts_needed(&self, _: CallerFacts<'_>) -> Option<ProcessFacts> {
        None
    }

    fn basis(&self, _: &SpiffeId) -> IdentityBasis {
        IdentityBasis::Agent(Endpoint::Unix("/run/agent.sock".into()))
    }

    async fn ready(&self, _: &str) -> Result<(), SourceError> {
        Ok(())
    }

    fn requires_live_caller(&self) -> bool {
        self.requires_live_caller.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl AssumeRole for CacheEnv {
    async fn assume(&self, _: &Grant, _: &JwtSvid) -> Result<Credentials, StsError> {
        if let Some(rejection) = self.rejection.lock().unwrap().clone() {
            return Err(rejection);
        }
        Ok(Credentials {
            access_key_id: format!("KEY{}", self.fetched()),
            secret_access_key: Zeroizing::new("secret".to_owned()),
            session_token: Zeroizing::new("token".to_owned()),
            expiration: self.clock.now() + *self.lifetime.lock().unwrap(),
            first_session_name: None,
        })
    }

    async fn assume_chained(
        &self,
        grant: &Grant,
        previous: &Credentials,
    ) -> Result<Credentials, StsError> {
        let hop = grant.hop_number();
        let before = match hop {
            2 => "KEY".to_owned(),
            hop => format!("HOP{}-", hop - 1),
        };
        assert!(previous.access_key_id.starts_with(&before), "{previous:?}");
        let takes = *self.takes.lock().unwrap();
        sleep(takes).await;
        let mut chain = self.chain.lock().unwrap();
        chain.calls.push(hop);
        if let Some(failure) = chain.failures.get(&hop) {
            return Err(failure.clone());
        }
        let number = chain.calls.iter().filter(|call| **call == hop).count();
        Ok(Credentials {
            access_key_id: format!("HOP{hop}-{number}"),
            secret_access_key: Zeroizing::new("secret".to_owned()),
            session_token: Zeroizing::new("token".to_owned()),
            expiration: self.clock.now() + *self.lifetime.lock().unwrap(),
            first_session_name: None,
        })
    }
}

#[async_trait]
impl CreateSession for CacheEnv {
    async fn create_session(
        &self,
        _: &Grant,
        _: &RolesAnywhereTarget,
        _: &X509Svid,
    ) -> Result<Credentials, StsError> {
        panic!("the source has no certificates")
    }
}

fn unavailable() -> SourceError {
    SourceError::Unavailable("away".to_owned())
}

fn denied() -> SourceError {
    SourceError::Denied("not registered".to_owned())
}

fn rejected() -> StsError {
    let what = "STS rejects".to_owned();
    StsError {
        retry: RetryPolicy::Never,
        reason: StsReason::AccessDenied,
        code: "AccessDenied".to_owned(),
        what,
        fix: None,
    }
}

/// Returns a caller with a process ID equal to its user ID.
fn caller_of(uid: u32) -> Arc<Caller> {
    let process = Process {
        pid: uid,
        gid: 1,
        groups: None,
        in_container: false,
        program: None,
        started: None,
    };
    let process = Some(process);
    Arc::new(Caller {
        listener: ListenerKind::Tcp,
        peer: PeerFacts::of_user(uid),
        process,
        proof: Box::new(ConstantProof),
    })
}

fn caller() -> Arc<Caller> {
    caller_of(1)
}

/// Returns a role with this name that every SPIFFE ID matches.
fn role(name: &str) -> Role {
    Role {
        name: name.to_owned(),
        role_arn: ArnTemplate::parse("arn:aws:iam::123456789012:role/r").unwrap(),
        ..Role::example()
    }
}

fn grant_of(owner: &str, role: &Arc<Role>) -> Grant {
    let spiffe_id = SpiffeId::parse(&format!("spiffe://example.org/{owner}")).unwrap();
    let roles = Roles {
        defined: vec![role.clone()],
        requested: None,
    };
    roles
        .select(
            &[Identity {
                spiffe_id,
                hint: None,
            }],
            &AttestedFacts::default(),
            &RequestedRole::Default,
        )
        .unwrap()
}

/// Returns the grant of this identity's one role, with a new definition each time.
fn grant(owner: &str) -> Grant {
    grant_of(owner, &Arc::new(role("r")))
}

fn env_of(open: usize, limits: CacheLimits) -> (Arc<CacheEnv>, CredentialCache) {
    count_all_logs();
    let clock = Clock::starting_at(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
    let env = Arc::new(CacheEnv {
        clock: clock.clone(),
        gate: Semaphore::new(open),
        takes: Mutex::default(),
        fetched: AtomicUsize::new(0),
        certificate_queries: AtomicUsize::new(0),
        failure: Mutex::default(),
        rejection: Mutex::default(),
        lifetime: Mutex::new(HOUR),
        panics: AtomicBool::new(false),
        requires_live_caller: AtomicBool::new(false),
        gone: Mutex::default(),
        requesters: Mutex::default(),
        busy: AtomicUsize::new(0),
        metrics: Metrics::default(),
        chain: Mutex::default(),
    });
    let policy = env.policy(&[Arc::new(role("r"))], limits);
    let cache = CredentialCache::new(policy, clock, env.metrics.clone());
    (env, cache)
}

fn env(open: usize) -> (Arc<CacheEnv>, CredentialCache) {
    env_of(open, LIMITS)
}

async fn key_for(
    cache: &CredentialCache,
    owner: &str,
    uid: u32,
) -> Result<(String, CacheResult), CacheError> {
    let (cached, result) = cache
        .get(&cache.policy(), &grant(owner), &caller_of(uid))
        .await?;
    Ok((cached.access_key_id.to_string(), result))
}

async fn key(cache: &CredentialCache) -> Result<(String, CacheResult), CacheError> {
    key_for(cache, "a", 1).await
}

/// Returns the label of the failure of a request.
async fn reason(cache: &CredentialCache) -> &'static str {
    match key(cache).await {
        Err(CacheError::Exchange(error)) => error.reason(),
        other => panic!("{other:?}"),
    }
}

/// Fills the cache with this number of entries.
async fn fill(cache: &CredentialCache, entries: usize) {
    let role = Arc::new(role("r"));
    for number in 0..entries {
        let grant = grant_of(&number.to_string(), &role);
        cache.get(&cache.policy(), &grant, &caller()).await.unwrap();
    }
}

/// Counts the running flights.
fn flights(cache: &CredentialCache) -> usize {
    let mut count = 0;
    cache
        .0
        .table
        .for_each(|entry| count += usize::from(entry.state().flight.is_some()));
    count
}

/// Runs every task that can run without the passage of time.
async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

/// Advances the time in small steps, so that timers fire at about their time.
async fn pass(time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        advance(SECOND.min(end - Instant::now())).await;
        for _ in 0..5 {
            tokio::task::yield_now().await;
        }
    }
    settle().await;
}

#[tokio::test(start_paused = true)]
async fn flight_is_shared_by_a_thousand_callers() {
    let (env, cache) = env(0);
    let waiting: Vec<_> = (0..1000)
        .map(|_| {
            let cache = cache.clone();
            tokio::spawn(async move { key(&cache).await.unwrap() })
        })
        .collect();
    settle().await;
    env.gate.add_permits(10);
    for waiting in waiting {
        assert_eq!(
            waiting.await.unwrap(),
            ("KEY1".to_owned(), CacheResult::Miss)
        );
    }
    assert_eq!(env.fetched(), 1);
    assert_eq!(key(&cache).await.unwrap().1, CacheResult::Hit);
}

#[tokio::test(start_paused = true)]
async fn late_caller_starts_no_second_flight() {
    let (env, cache) = env(100);
    key(&cache).await.unwrap();
    let entry = cache.0.entry(&cache.policy(), &grant("a")).unwrap();
    match cache.0.join_or_start(&entry, &caller(), FlightStart::Due) {
        Ok(Some(Lookup::Credentials(cached, CacheResult::Hit))) => {
            assert_eq!(cached.access_key_id.to_string(), "KEY1")
        }
        Ok(_) => panic!("another flight"),
        Err(error) => panic!("{error}"),
    }
    cache.0.refresh_for(&entry, &caller());
    settle().await;
    assert_eq!(env.fetched(), 1);
}

#[tokio::test(start_paused = true)]
async fn flight_continues_after_its_caller_hangs_up() {
    let (env, cache) = env(0);
    let impatient = tokio::spawn({
        let cache = cache.clone();
        async move { key(&cache).await.map(drop) }
    });
    settle().await;
    impatient.abort();
    settle().await;
    env.gate.add_permits(10);
    settle().await;
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY1".to_owned(), CacheResult::Hit)
    );
}

#[tokio::test(start_paused = true)]
async fn request_is_pending_after_the_hold() {
    let (env, cache) = env(0);
    let before = Instant::now();
    assert!(matches!(key(&cache).await, Err(CacheError::Pending)));
    assert_eq!(before.elapsed(), REQUEST_HOLD);
    env.gate.add_permits(10);
    settle().await;
    assert_eq!(key(&cache).await.unwrap().1, CacheResult::Hit);
}

#[tokio::test(start_paused = true)]
async fn entry_is_refreshed_at_half_its_lifetime() {
    let (env, cache) = env(100);
    key(&cache).await.unwrap();
    advance(HOUR.mul_f64(0.44)).await;
    settle().await;
    assert_eq!(env.fetched(), 1);
    advance(HOUR.mul_f64(0.12)).await;
    settle().await;
    assert_eq!(env.fetched(), 2);
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY2".to_owned(), CacheResult::Hit)
    );
}

#[tokio::test(start_paused = true)]
async fn cache_serves_through_outage_until_a_minute_before_expiry() {
    let (env, cache) = env(10_000);
    key(&cache).await.unwrap();
    env.fail(unavailable());
    for _ in 0..58 {
        advance(Duration::from_secs(60)).await;
        settle().await;
        assert_eq!(key(&cache).await.unwrap().0, "KEY1");
    }
    // First 58 minutes and 59 seconds after the issue, then 59 minutes and a second.
    advance(Duration::from_secs(59)).await;
    assert_eq!(key(&cache).await.unwrap().0, "KEY1");
    advance(Duration::from_secs(2)).await;
    assert!(matches!(key(&cache).await, Err(CacheError::Exchange(_))));
    env.fail(None);
    advance(Duration::from_secs(1)).await;
    assert_ne!(key(&cache).await.unwrap().0, "KEY1");
}

#[tokio::test(start_paused = true)]
async fn failure_is_cached_for_its_negative_ttl() {
    let (env, cache) = env(10_000);
    env.fail(denied());
    assert!(matches!(key(&cache).await, Err(CacheError::Exchange(_))));
    let requesters = env.fetched();
    assert!(matches!(key(&cache).await, Err(CacheError::Exchange(_))));
    assert_eq!(env.fetched(), requesters);
    env.fail(None);
    advance(failure::FailureKind::of(&denied().into()).negative_ttl()).await;
    assert_eq!(key(&cache).await.unwrap().1, CacheResult::Miss);
}

#[tokio::test(start_paused = true)]
async fn entry_is_usable_after_a_panic_in_its_flight() {
    let (env, cache) = env(10_000);
    env.panics.store(true, Ordering::SeqCst);
    assert_eq!(reason(&cache).await, "internal_error");
    env.panics.store(false, Ordering::SeqCst);
    advance(failure::FailureKind::of(&ExchangeError::Panicked).negative_ttl()).await;
    assert_eq!(key(&cache).await.unwrap().1, CacheResult::Miss);
}

#[tokio::test(start_paused = true)]
async fn entry_is_removed_when_unused_for_a_lifetime() {
    let (env, cache) = env(10_000);
    key(&cache).await.unwrap();
    for _ in 0..200 {
        advance(Duration::from_secs(60)).await;
        settle().await;
    }
    assert!(cache.entries().is_empty());
    let refreshed = env.fetched();
    advance(HOUR * 3).await;
    settle().await;
    assert_eq!(env.fetched(), refreshed);
}

#[tokio::test(start_paused = true)]
async fn cache_is_bounded_by_max_entries() {
    let (_env, cache) = env(100);
    for name in ["a", "b", "c"] {
        cache
            .get(&cache.policy(), &grant(name), &caller())
            .await
            .unwrap();
    }
    assert!(matches!(
        cache.get(&cache.policy(), &grant("d"), &caller()).await,
        Err(CacheError::Full)
    ));
    assert!(
        cache
            .get(&cache.policy(), &grant("a"), &caller())
            .await
            .is_ok()
    );
}

#[tokio::test(start_paused = true)]
async fn entry_is_separate_for_each_role_definition() {
    let (_env, cache) = env(10_000);
    let narrowed = Role {
        policy: Template::parse_json(r#"{"Version":"2012-10-17"}"#).ok(),
        ..role("r")
    };
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY1".to_owned(), CacheResult::Miss)
    );
    let (cached, result) = cache
        .get(
            &cache.policy(),
            &grant_of("a", &Arc::new(narrowed)),
            &caller(),
        )
        .await
        .unwrap();
    assert_eq!(
        (&*cached.access_key_id, result),
        ("KEY2", CacheResult::Miss)
    );
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY1".to_owned(), CacheResult::Hit),
        "a new object with the same definition"
    );
}

#[tokio::test(start_paused = true)]
async fn stale_request_starts_one_refresh() {
    let (env, cache) = env(1);
    key(&cache).await.unwrap();
    // The refresh task sleeps by the monotonic clock, so it has not noticed the step.
    env.clock.step(2000);
    for _ in 0..10 {
        assert_eq!(
            key(&cache).await.unwrap(),
            ("KEY1".to_owned(), CacheResult::Stale)
        );
        settle().await;
    }
    assert_eq!(env.requesters.lock().unwrap().len(), 2, "one more");
    env.gate.add_permits(1);
    settle().await;
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY2".to_owned(), CacheResult::Hit)
    );
}

#[test]
fn refresh_point_is_spread_and_ahead_of_sdks() {
    for minutes in [20, 25, 30, 45, 60, 12 * 60] {
        let lifetime = MINUTE * minutes;
        let points: Vec<_> = (0..1000)
            .map(|_| entry::refresh_at_remaining(lifetime))
            .collect();
        let (first, last) = (points.iter().max().unwrap(), points.iter().min().unwrap());
        assert!(
            *last > MINUTE * 15 && *first < lifetime,
            "{minutes}: {last:?} {first:?}"
        );
        assert!(
            *first - *last > SECOND * 30,
            "{minutes}: {last:?} {first:?}"
        );
    }
    let hour: Vec<_> = (0..1000)
        .map(|_| entry::refresh_at_remaining(HOUR).as_secs_f64() / 3600.0)
        .collect();
    assert!(
        hour.iter()
            .all(|remaining| (0.45..=0.55).contains(remaining))
    );
    let mean = hour.iter().sum::<f64>() / 1000.0;
    assert!((0.48..0.52).contains(&mean), "{mean}");
    assert!(
        entry::refresh_at_remaining(MINUTE * 15) < MINUTE * 9,
        "not all the time"
    );
}

#[tokio::test(start_paused = true)]
async fn request_gets_more_than_fifteen_minutes_at_any_time() {
    for minutes in [20, 30, 60] {
        let (env, cache) = env(10_000);
        *env.lifetime.lock().unwrap() = MINUTE * minutes;
        for _ in 0..3 * 60 * 3 {
            let (cached, _) = cache
                .get(&cache.policy(), &grant("a"), &caller())
                .await
                .unwrap();
            let remaining = cached.remaining(&env.clock);
            assert!(remaining > MINUTE * 15, "{minutes}: {remaining:?}");
            pass(SECOND * 20).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn credentials_of_a_minute_are_a_failure() {
    let (env, cache) = env(10_000);
    *env.lifetime.lock().unwrap() = MINUTE;
    assert_eq!(reason(&cache).await, "sts_bad_answer");
    assert!(cache.entries()[0].access_key_id.is_none());
}

#[tokio::test(start_paused = true)]
async fn cache_has_one_task_that_ends_with_its_last_handle() {
    let tasks = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    let (_env, cache) = env_of(
        10_000,
        CacheLimits {
            max_entries: 1000,
            ..LIMITS
        },
    );
    fill(&cache, 500).await;
    settle().await;
    assert_eq!((cache.entries().len(), tasks()), (500, 1));
    drop(cache);
    settle().await;
    assert_eq!(tasks(), 0);
}

#[test]
fn entry_is_small() {
    let entry_size = size_of::<Entry>();
    assert!(entry_size <= 192, "{entry_size}");
    assert!(
        size_of::<CachedCredentials>() <= 112,
        "{}",
        size_of::<CachedCredentials>()
    );
    // Entries of one definition share it.
    let role = Arc::new(role("r"));
    let (one, other) = (grant_of("a", &role), grant_of("b", &role));
    assert_eq!(
        one.role_arn.as_str().as_ptr(),
        other.role_arn.as_str().as_ptr()
    );
    assert!(Arc::ptr_eq(&one.role, &other.role));
}

#[tokio::test(start_paused = true)]
async fn status_describes_an_entry() {
    let (env, cache) = env(10_000);
    env.requires_live_caller.store(true, Ordering::SeqCst);
    key_for(&cache, "a", 7).await.unwrap();
    let [fresh] = &cache.entries()[..] else {
        panic!("one entry")
    };
    assert_eq!(fresh.expiration.as_deref(), Some("2027-01-15T09:00:00Z"));
    assert_eq!(
        (
            fresh.access_key_id.as_deref(),
            &fresh.last_error,
            fresh.callers
        ),
        (Some("KEY1"), &None, 1)
    );
    assert_eq!((fresh.latest_uid, fresh.latest_pid), (Some(7), Some(7)));
    let next = fresh.next_try.as_deref().unwrap();
    assert!(
        ("2027-01-15T08:26:59Z".."2027-01-15T08:33:01Z").contains(&next),
        "{next}"
    );

    env.reject(rejected());
    pass(MINUTE * 26).await;
    while env.fetched() == 1 {
        pass(SECOND).await;
    }
    pass(MINUTE).await;
    let [rejected] = &cache.entries()[..] else {
        panic!("one entry")
    };
    assert_eq!(
        (
            rejected.access_key_id.as_deref(),
            rejected.last_error_reason
        ),
        (Some("KEY1"), Some("sts_access_denied"))
    );
    let (since, at) = (
        rejected.refused_since.as_deref().unwrap(),
        rejected.last_error_at.as_deref().unwrap(),
    );
    assert!(since >= next && since < at, "{next} {since} {at}");
    let text = serde_json::to_string(&rejected).unwrap();
    assert!(
        !text.contains("secret") && !text.contains("token\":"),
        "{text}"
    );
}

#[tokio::test(start_paused = true)]
async fn metrics_show_an_outage() {
    let (env, cache) = env(10_000);
    let metrics = || {
        cache.update_gauges();
        env.metrics.encode()
    };
    key(&cache).await.unwrap();
    assert!(
        metrics().contains("awsvid_cache_entries{state=\"fresh\"} 1\n"),
        "{}",
        metrics()
    );
    env.fail(unavailable());
    pass(MINUTE * 34).await;
    let during = metrics();
    for line in [
        "awsvid_cache_entries{state=\"fresh\"} 0\n",
        "awsvid_cache_entries{state=\"failing\"} 1\n",
        "awsvid_sts_calls_total{result=\"ok\"} 1\n",
        "awsvid_exchanges_total{result=\"source_unavailable\"} ",
    ] {
        assert!(during.contains(line), "{line}: {during}");
    }
    pass(MINUTE * 27).await;
    assert!(
        metrics().contains("awsvid_cache_evictions_total{reason=\"expired\"} 1\n"),
        "{}",
        metrics()
    );
}

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::SystemTime;

use async_trait::async_trait;
use tokio::sync::Semaphore;
use tokio::time::{advance, sleep};
use zeroize::Zeroizing;

use super::*;
use crate::caller::{AttestError, ListenerKind, PeerProof, Process, ProcessFacts};
use crate::clock::REQUEST_HOLD;
use crate::credentials::Credentials;
use crate::identity::{ArnTemplate, SpiffeId, SpiffeIdPattern};
use crate::role::{Identity, RequestedRole, Role, Roles, StsTarget};
use crate::sts::{AssumeRole, RetryPolicy, StsError};
use crate::svid::{IdentityBasis, IdentitySource, JwtSvid, SourceError};

mod bounds;
mod callers;
mod clocks;
mod outages;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const LIMITS: Limits = Limits {
    max_entries: 3,
    revocation_grace: Duration::from_secs(300),
};

/// A source and an STS whose answers the test chooses. The exchange never gets to STS where the source fails.
#[derive(Debug)]
struct CacheEnv {
    clock: Clock,
    /// Flights wait here until the test lets them go.
    gate: Semaphore,
    /// How long the source takes.
    takes: Mutex<Duration>,
    fetched: AtomicUsize,
    failure: Mutex<Option<SourceError>>,
    refusal: Mutex<Option<StsError>>,
    lifetime: Mutex<Duration>,
    panics: AtomicBool,
    needs_caller: AtomicBool,
    /// User ids of callers that are gone, and of those that the source was asked for.
    gone: Mutex<HashSet<u32>>,
    asked: Mutex<Vec<u32>>,
    /// Calls under way.
    busy: AtomicUsize,
    metrics: Metrics,
}

impl CacheEnv {
    fn fail(&self, failure: impl Into<Option<SourceError>>) {
        *self.failure.lock().unwrap() = failure.into();
    }

    fn refuse(&self, refusal: impl Into<Option<StsError>>) {
        *self.refusal.lock().unwrap() = refusal.into();
    }

    fn fetched(&self) -> usize {
        self.fetched.load(Ordering::SeqCst)
    }

    fn issuer(self: &Arc<Self>) -> TokenExchanger {
        TokenExchanger::new(
            self.clone(),
            self.clone(),
            self.clock.clone(),
            self.metrics.clone(),
        )
    }

    async fn answer(
        &self,
        caller: &Caller,
        id: &SpiffeId,
        audience: &str,
    ) -> Result<JwtSvid, SourceError> {
        self.asked.lock().unwrap().push(caller.uid);
        self.gate.acquire().await.unwrap().forget();
        let takes = *self.takes.lock().unwrap();
        sleep(takes).await;
        self.fetched.fetch_add(1, Ordering::SeqCst);
        assert!(!self.panics.load(Ordering::SeqCst), "asked to");
        if self.gone.lock().unwrap().contains(&caller.uid) {
            return Err(SourceError::Caller(AttestError::CallerGone));
        }
        if let Some(failure) = self.failure.lock().unwrap().clone() {
            return Err(failure);
        }
        Ok(JwtSvid::check(
            token(id, audience, self.clock.now()),
            id,
            audience,
            self.clock.now(),
        )
        .unwrap())
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
        self.busy.fetch_add(1, Ordering::SeqCst);
        let answer = self.answer(caller, id, audience).await;
        self.busy.fetch_sub(1, Ordering::SeqCst);
        answer
    }

    fn facts_needed(&self, _: &Caller) -> Option<ProcessFacts> {
        None
    }

    fn basis(&self, _: &SpiffeId) -> IdentityBasis {
        IdentityBasis::Rules(Vec::new())
    }

    async fn ready(&self, _: &str) -> Result<(), SourceError> {
        Ok(())
    }

    fn requires_live_caller(&self) -> bool {
        self.needs_caller.load(Ordering::SeqCst)
    }
}

fn token(id: &SpiffeId, audience: &str, now: SystemTime) -> String {
    use base64::Engine;
    let encode = |text: String| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text);
    let now = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let claims = format!(
        r#"{{"sub":"{id}","aud":["{audience}"],"iat":{now},"exp":{}}}"#,
        now + 300
    );
    format!(
        "{}.{}.{}",
        encode(r#"{"alg":"ES256","typ":"JWT"}"#.to_owned()),
        encode(claims),
        encode("x".to_owned())
    )
}

#[async_trait]
impl AssumeRole for CacheEnv {
    async fn assume(&self, _: &Grant, _: &JwtSvid) -> Result<Credentials, StsError> {
        if let Some(refusal) = self.refusal.lock().unwrap().clone() {
            return Err(refusal);
        }
        Ok(Credentials {
            access_key_id: format!("KEY{}", self.fetched()),
            secret_access_key: Zeroizing::new("secret".to_owned()),
            session_token: Zeroizing::new("token".to_owned()),
            expiration: self.clock.now() + *self.lifetime.lock().unwrap(),
        })
    }
}

fn unavailable() -> SourceError {
    SourceError::Unavailable("away".to_owned())
}

fn denied() -> SourceError {
    SourceError::Denied("not registered".to_owned())
}

fn refused() -> StsError {
    let what = "STS refuses".to_owned();
    StsError {
        again: RetryPolicy::Never,
        reason: "sts_access_denied",
        code: "AccessDenied".to_owned(),
        what,
        fix: None,
    }
}

#[derive(Debug)]
struct Always;

#[async_trait::async_trait]
impl PeerProof for Always {
    async fn verify_unchanged(&self) -> Result<(), AttestError> {
        Ok(())
    }
}

/// A caller whose process has the same number as its user.
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
        uid,
        cgroup: None,
        pod: None,
        namespace: None,
        process,
        evidence: Box::new(Always),
    })
}

fn caller() -> Arc<Caller> {
    caller_of(1)
}

/// A role of this name for everybody.
fn role(name: &str) -> Role {
    Role {
        name: name.to_owned(),
        spiffe_id: SpiffeIdPattern::parse("spiffe://example.org/**").unwrap(),
        role_arn: ArnTemplate::parse("arn:aws:iam::123456789012:role/r").unwrap(),
        audience: "sts.amazonaws.com".to_owned(),
        duration: HOUR,
        session_name: None,
        sts: StsTarget {
            region: "eu-central-1".to_owned(),
            endpoint: None,
        },
        policy: None,
        policy_arns: Vec::new(),
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
            &RequestedRole::Default,
        )
        .unwrap()
}

/// The one role of this owner: each time with a definition made anew.
fn grant(owner: &str) -> Grant {
    grant_of(owner, &Arc::new(role("r")))
}

fn world_of(open: usize, limits: Limits) -> (Arc<CacheEnv>, CredentialCache) {
    let clock = Clock::starting_at(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
    let world = Arc::new(CacheEnv {
        clock: clock.clone(),
        gate: Semaphore::new(open),
        takes: Mutex::default(),
        fetched: AtomicUsize::new(0),
        failure: Mutex::default(),
        refusal: Mutex::default(),
        lifetime: Mutex::new(HOUR),
        panics: AtomicBool::new(false),
        needs_caller: AtomicBool::new(false),
        gone: Mutex::default(),
        asked: Mutex::default(),
        busy: AtomicUsize::new(0),
        metrics: Metrics::default(),
    });
    let cache = CredentialCache::new(world.issuer(), clock, world.metrics.clone(), limits);
    (world, cache)
}

fn world(open: usize) -> (Arc<CacheEnv>, CredentialCache) {
    world_of(open, LIMITS)
}

async fn key_for(
    cache: &CredentialCache,
    owner: &str,
    uid: u32,
) -> Result<(String, CacheResult), CacheError> {
    let (issued, freshness) = cache.get(&grant(owner), &caller_of(uid)).await?;
    Ok((issued.access_key_id.to_string(), freshness))
}

async fn key(cache: &CredentialCache) -> Result<(String, CacheResult), CacheError> {
    key_for(cache, "a", 1).await
}

/// The label of what the request fails with.
async fn reason(cache: &CredentialCache) -> &'static str {
    match key(cache).await {
        Err(CacheError::Issue(error)) => error.reason(),
        other => panic!("{other:?}"),
    }
}

/// How many are under way.
fn flights(cache: &CredentialCache) -> usize {
    let mut count = 0;
    cache
        .0
        .places
        .for_each(|slot| count += usize::from(slot.state().flight.is_some()));
    count
}

/// Lets everything run that can run without time passing.
async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

/// Lets this time pass, in small steps, so that timers fire at about their time.
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
async fn a_thousand_callers_cause_one_flight() {
    let (world, cache) = world(0);
    let waiting: Vec<_> = (0..1000)
        .map(|_| {
            let cache = cache.clone();
            tokio::spawn(async move { key(&cache).await.unwrap() })
        })
        .collect();
    settle().await;
    world.gate.add_permits(10);
    for waiting in waiting {
        assert_eq!(
            waiting.await.unwrap(),
            ("KEY1".to_owned(), CacheResult::Miss)
        );
    }
    assert_eq!(world.fetched(), 1);
    assert_eq!(key(&cache).await.unwrap().1, CacheResult::Hit);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_looked_just_before_a_flight_landed_starts_no_other() {
    let (world, cache) = world(100);
    key(&cache).await.unwrap();
    let slot = cache.0.slot(&grant("a")).unwrap();
    match cache.0.join_or_start(&slot, &caller()) {
        Ok(Some(Lookup::Credentials(issued, CacheResult::Hit))) => {
            assert_eq!(issued.access_key_id.to_string(), "KEY1")
        }
        Ok(_) => panic!("another flight"),
        Err(error) => panic!("{error}"),
    }
    cache.0.refresh_for(&slot, &caller());
    settle().await;
    assert_eq!(world.fetched(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_hangs_up_leaves_its_flight_behind() {
    let (world, cache) = world(0);
    let impatient = tokio::spawn({
        let cache = cache.clone();
        async move { key(&cache).await.map(drop) }
    });
    settle().await;
    impatient.abort();
    settle().await;
    world.gate.add_permits(10);
    settle().await;
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY1".to_owned(), CacheResult::Hit)
    );
}

#[tokio::test(start_paused = true)]
async fn a_request_is_held_and_then_told_to_come_again() {
    let (world, cache) = world(0);
    let before = Instant::now();
    assert!(matches!(key(&cache).await, Err(CacheError::Pending)));
    assert_eq!(before.elapsed(), REQUEST_HOLD);
    world.gate.add_permits(10);
    settle().await;
    assert_eq!(key(&cache).await.unwrap().1, CacheResult::Hit);
}

#[tokio::test(start_paused = true)]
async fn credentials_are_refreshed_at_about_half_their_life() {
    let (world, cache) = world(100);
    key(&cache).await.unwrap();
    advance(HOUR.mul_f64(0.44)).await;
    settle().await;
    assert_eq!(world.fetched(), 1);
    advance(HOUR.mul_f64(0.12)).await;
    settle().await;
    assert_eq!(world.fetched(), 2);
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY2".to_owned(), CacheResult::Hit)
    );
}

#[tokio::test(start_paused = true)]
async fn the_last_good_ones_are_served_through_an_outage_until_a_minute_before_their_end() {
    let (world, cache) = world(10_000);
    key(&cache).await.unwrap();
    world.fail(unavailable());
    for _ in 0..58 {
        advance(Duration::from_secs(60)).await;
        settle().await;
        assert_eq!(key(&cache).await.unwrap().0, "KEY1");
    }
    // 58 minutes and 59 seconds after they were issued, then 59 minutes and a second.
    advance(Duration::from_secs(59)).await;
    assert_eq!(key(&cache).await.unwrap().0, "KEY1");
    advance(Duration::from_secs(2)).await;
    assert!(matches!(key(&cache).await, Err(CacheError::Issue(_))));
    world.fail(None);
    advance(Duration::from_secs(1)).await;
    assert_ne!(key(&cache).await.unwrap().0, "KEY1");
}

#[tokio::test(start_paused = true)]
async fn a_failure_is_remembered_for_a_moment_only() {
    let (world, cache) = world(10_000);
    world.fail(denied());
    assert!(matches!(key(&cache).await, Err(CacheError::Issue(_))));
    let asked = world.fetched();
    assert!(matches!(key(&cache).await, Err(CacheError::Issue(_))));
    assert_eq!(world.fetched(), asked);
    world.fail(None);
    advance(trouble::negative_ttl(&denied().into())).await;
    assert_eq!(key(&cache).await.unwrap().1, CacheResult::Miss);
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_flight_leaves_its_place_usable() {
    let (world, cache) = world(10_000);
    world.panics.store(true, Ordering::SeqCst);
    assert!(matches!(key(&cache).await, Err(CacheError::Issue(error)) if error.is_transient()));
    world.panics.store(false, Ordering::SeqCst);
    advance(trouble::negative_ttl(&ExchangeError::task_panicked())).await;
    assert_eq!(key(&cache).await.unwrap().1, CacheResult::Miss);
}

#[tokio::test(start_paused = true)]
async fn what_nobody_asks_for_during_a_lifetime_is_dropped() {
    let (world, cache) = world(10_000);
    key(&cache).await.unwrap();
    for _ in 0..200 {
        advance(Duration::from_secs(60)).await;
        settle().await;
    }
    assert!(cache.entries().is_empty());
    let refreshed = world.fetched();
    advance(HOUR * 3).await;
    settle().await;
    assert_eq!(world.fetched(), refreshed);
}

#[tokio::test(start_paused = true)]
async fn the_number_of_entries_is_bounded() {
    let (_world, cache) = world(100);
    for name in ["a", "b", "c"] {
        cache.get(&grant(name), &caller()).await.unwrap();
    }
    assert!(matches!(
        cache.get(&grant("d"), &caller()).await,
        Err(CacheError::Full)
    ));
    assert!(cache.get(&grant("a"), &caller()).await.is_ok());
}

/// Like `world`'s, after a reload that changed nothing else.
fn reload(
    world: &Arc<CacheEnv>,
    cache: &CredentialCache,
    keep: impl Fn(&Grant) -> bool + Send + Sync + 'static,
) {
    cache.reconfigure(world.issuer(), LIMITS, keep);
}

#[tokio::test(start_paused = true)]
async fn a_reload_ends_what_it_does_not_keep() {
    let (world, cache) = world(10_000);
    cache.get(&grant("a"), &caller()).await.unwrap();
    cache.get(&grant("b"), &caller()).await.unwrap();
    reload(&world, &cache, |grant| *grant != self::grant("a"));
    let left: Vec<_> = cache
        .entries()
        .into_iter()
        .map(|entry| entry.spiffe_id)
        .collect();
    assert_eq!(left, ["spiffe://example.org/b"]);
    // One that was decided by the old configuration, and comes after the reload.
    assert!(matches!(
        cache.get(&grant("a"), &caller()).await,
        Err(CacheError::Pending)
    ));
    assert_eq!(
        cache.get(&grant("b"), &caller()).await.unwrap().1,
        CacheResult::Hit
    );
    assert_eq!(world.fetched(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_flight_that_lands_after_a_reload_serves_nobody() {
    let (world, cache) = world(0);
    let waiting = tokio::spawn({
        let cache = cache.clone();
        async move { key(&cache).await }
    });
    settle().await;
    // Somebody who has found the place, and looks into it a moment later.
    let place = cache.0.slot(&grant("a")).unwrap();
    reload(&world, &cache, |_| false);
    reload(&world, &cache, |_| true);
    world.gate.add_permits(1);
    assert!(matches!(waiting.await.unwrap(), Err(CacheError::Pending)));
    settle().await;
    assert!(cache.entries().is_empty() && place.current.load().is_none());
    world.gate.add_permits(10);
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY2".to_owned(), CacheResult::Miss)
    );
}

#[tokio::test(start_paused = true)]
async fn a_narrowed_role_is_never_answered_with_the_wide_ones_credentials() {
    let (_world, cache) = world(10_000);
    let narrowed = Role {
        policy: Some(r#"{"Version":"2012-10-17"}"#.to_owned()),
        ..role("r")
    };
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY1".to_owned(), CacheResult::Miss)
    );
    let (issued, freshness) = cache
        .get(&grant_of("a", &Arc::new(narrowed)), &caller())
        .await
        .unwrap();
    assert_eq!(
        (&*issued.access_key_id, freshness),
        ("KEY2", CacheResult::Miss)
    );
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY1".to_owned(), CacheResult::Hit),
        "the same definition, made anew"
    );
}

#[tokio::test(start_paused = true)]
async fn a_request_past_the_refresh_point_gets_the_old_ones_and_starts_one_refresh() {
    let (world, cache) = world(1);
    key(&cache).await.unwrap();
    // The background sleeps by the monotonic clock, and has not noticed.
    world.clock.step(2000);
    for _ in 0..10 {
        assert_eq!(
            key(&cache).await.unwrap(),
            ("KEY1".to_owned(), CacheResult::Stale)
        );
        settle().await;
    }
    assert_eq!(world.asked.lock().unwrap().len(), 2, "one more");
    world.gate.add_permits(1);
    settle().await;
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY2".to_owned(), CacheResult::Hit)
    );
}

#[test]
fn refreshes_are_spread_and_leave_sdks_what_they_want() {
    for minutes in [20, 25, 30, 45, 60, 12 * 60] {
        let lifetime = MINUTE * minutes;
        let points: Vec<_> = (0..1000)
            .map(|_| issued::refresh_at_remaining(lifetime))
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
        .map(|_| issued::refresh_at_remaining(HOUR).as_secs_f64() / 3600.0)
        .collect();
    assert!(hour.iter().all(|left| (0.45..=0.55).contains(left)));
    let mean = hour.iter().sum::<f64>() / 1000.0;
    assert!((0.48..0.52).contains(&mean), "{mean}");
    assert!(
        issued::refresh_at_remaining(MINUTE * 15) < MINUTE * 9,
        "not all the time"
    );
}

#[tokio::test(start_paused = true)]
async fn who_asks_at_any_time_gets_more_than_fifteen_minutes() {
    for minutes in [20, 30, 60] {
        let (world, cache) = world(10_000);
        *world.lifetime.lock().unwrap() = MINUTE * minutes;
        for _ in 0..3 * 60 * 3 {
            let (issued, _) = cache.get(&grant("a"), &caller()).await.unwrap();
            let left = issued.remaining(&world.clock);
            assert!(left > MINUTE * 15, "{minutes}: {left:?}");
            pass(SECOND * 20).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn credentials_that_are_as_good_as_over_are_no_credentials() {
    let (world, cache) = world(10_000);
    *world.lifetime.lock().unwrap() = MINUTE;
    assert_eq!(reason(&cache).await, "sts_bad_answer");
    assert!(cache.entries()[0].access_key_id.is_none());
}

#[tokio::test(start_paused = true)]
async fn an_entry_is_no_task_and_the_cache_ends_with_its_last_handle() {
    let tasks = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    let (_world, cache) = world_of(
        10_000,
        Limits {
            max_entries: 1000,
            ..LIMITS
        },
    );
    let role = Arc::new(role("r"));
    for number in 0..500 {
        cache
            .get(&grant_of(&number.to_string(), &role), &caller())
            .await
            .unwrap();
    }
    settle().await;
    assert_eq!((cache.entries().len(), tasks()), (500, 1));
    drop(cache);
    settle().await;
    assert_eq!(tasks(), 0);
}

#[test]
fn an_entry_is_small() {
    let place = size_of::<Entry>();
    assert!(place <= 192, "{place}");
    assert!(
        size_of::<CachedCredentials>() <= 96,
        "{}",
        size_of::<CachedCredentials>()
    );
    // What a definition has is not copied for each of its entries.
    let role = Arc::new(role("r"));
    let (one, other) = (grant_of("a", &role), grant_of("b", &role));
    assert_eq!(
        one.role_arn.as_str().as_ptr(),
        other.role_arn.as_str().as_ptr()
    );
    assert!(Arc::ptr_eq(&one.role, &other.role));
}

#[tokio::test(start_paused = true)]
async fn status_shows_what_is_known_of_an_entry() {
    let (world, cache) = world(10_000);
    world.needs_caller.store(true, Ordering::SeqCst);
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

    world.refuse(refused());
    pass(MINUTE * 26).await;
    while world.fetched() == 1 {
        pass(SECOND).await;
    }
    pass(MINUTE).await;
    let [refused] = &cache.entries()[..] else {
        panic!("one entry")
    };
    assert_eq!(
        (refused.access_key_id.as_deref(), refused.last_error_reason),
        (Some("KEY1"), Some("sts_access_denied"))
    );
    let (since, at) = (
        refused.refused_since.as_deref().unwrap(),
        refused.last_error_at.as_deref().unwrap(),
    );
    assert!(since >= next && since < at, "{next} {since} {at}");
    let text = serde_json::to_string(&refused).unwrap();
    assert!(
        !text.contains("secret") && !text.contains("token\":"),
        "{text}"
    );
}

#[tokio::test(start_paused = true)]
async fn metrics_show_an_outage() {
    let (world, cache) = world(10_000);
    let metrics = || {
        cache.count();
        world.metrics.encode()
    };
    key(&cache).await.unwrap();
    assert!(
        metrics().contains("awsvid_cache_entries{state=\"fresh\"} 1\n"),
        "{}",
        metrics()
    );
    world.fail(unavailable());
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

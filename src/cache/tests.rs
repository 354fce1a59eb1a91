use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::SystemTime;

use async_trait::async_trait;
use tokio::sync::Semaphore;
use tokio::time::advance;
use zeroize::Zeroizing;

use super::*;
use crate::caller::{Evidence, Listener, Refusal};
use crate::identity::{ArnTemplate, SpiffeId, SpiffeIdPattern};
use crate::role::{Identity, Role, Roles, StsTarget, Wanted};
use crate::sts::{AssumeRole, StsError};
use crate::svid::{IdentitySource, JwtSvid, SourceError};

const HOUR: Duration = Duration::from_secs(3600);
const LIMITS: Limits = Limits { max_entries: 3, revocation_grace: Duration::from_secs(300) };

/// A source whose answers the test chooses. The exchange never gets to STS where the source fails.
#[derive(Debug)]
struct World {
    clock: Clock,
    /// Flights wait here until the test lets them go.
    gate: Semaphore,
    fetched: AtomicUsize,
    failure: Mutex<Option<SourceError>>,
    panics: AtomicBool,
}

#[async_trait]
impl IdentitySource for World {
    async fn identify(&self, _: &Caller) -> Result<Vec<Identity>, SourceError> {
        Ok(Vec::new())
    }

    async fn token(&self, _: &Caller, id: &SpiffeId, audience: &str) -> Result<JwtSvid, SourceError> {
        self.gate.acquire().await.unwrap().forget();
        self.fetched.fetch_add(1, Ordering::SeqCst);
        assert!(!self.panics.load(Ordering::SeqCst), "asked to");
        if let Some(failure) = self.failure.lock().unwrap().clone() {
            return Err(failure);
        }
        Ok(JwtSvid::check(token(id, audience, self.clock.now()), id, audience, self.clock.now()).unwrap())
    }
}

fn token(id: &SpiffeId, audience: &str, now: SystemTime) -> String {
    use base64::Engine;
    let encode = |text: String| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text);
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let claims = format!(r#"{{"sub":"{id}","aud":["{audience}"],"iat":{now},"exp":{}}}"#, now + 300);
    format!("{}.{}.{}", encode(r#"{"alg":"ES256","typ":"JWT"}"#.to_owned()), encode(claims), encode("x".to_owned()))
}

#[async_trait]
impl AssumeRole for World {
    async fn assume(&self, _: &Grant, _: &JwtSvid) -> Result<Credentials, StsError> {
        let number = self.fetched.load(Ordering::SeqCst);
        Ok(Credentials {
            access_key_id: format!("KEY{number}"),
            secret_access_key: Zeroizing::new("secret".to_owned()),
            session_token: Zeroizing::new("token".to_owned()),
            expiration: self.clock.now() + HOUR,
        })
    }
}

#[derive(Debug)]
struct Always;

impl Evidence for Always {
    fn still_same(&self) -> Result<(), Refusal> {
        Ok(())
    }
}

fn caller() -> Arc<Caller> {
    Arc::new(Caller { listener: Listener::Tcp, uid: 1, cgroup: None, process: None, evidence: Box::new(Always) })
}

fn grant(name: &str) -> Grant {
    let id = format!("spiffe://example.org/{name}");
    let role = Role {
        name: name.to_owned(),
        spiffe_id: SpiffeIdPattern::parse(&id).unwrap(),
        role_arn: ArnTemplate::parse("arn:aws:iam::123456789012:role/r").unwrap(),
        audience: "sts.amazonaws.com".to_owned(),
        duration: HOUR,
        session_name: None,
        sts: StsTarget { region: "eu-central-1".to_owned(), endpoint: None },
        policy: None,
        policy_arns: Vec::new(),
    };
    let roles = Roles { defined: vec![Arc::new(role)], requested: None };
    roles.choose(&[Identity { spiffe_id: SpiffeId::parse(&id).unwrap(), hint: None }], &Wanted::First).unwrap()
}

fn world(open: usize) -> (Arc<World>, CredentialCache) {
    let clock = Clock::starting_at(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
    let gate = Semaphore::new(open);
    let world = Arc::new(World {
        clock: clock.clone(),
        gate,
        fetched: AtomicUsize::new(0),
        failure: Mutex::default(),
        panics: AtomicBool::new(false),
    });
    let issuer = Issuer::new(world.clone(), world.clone(), clock.clone(), Metrics::default());
    (world, CredentialCache::new(issuer, clock, Metrics::default(), LIMITS))
}

async fn key(cache: &CredentialCache) -> Result<(String, Freshness), CacheError> {
    let (issued, freshness) = cache.get(&grant("a"), &caller()).await?;
    Ok((issued.credentials.access_key_id.clone(), freshness))
}

/// Lets everything run that can run without time passing.
async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
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
        assert_eq!(waiting.await.unwrap(), ("KEY1".to_owned(), Freshness::Miss));
    }
    assert_eq!(world.fetched.load(Ordering::SeqCst), 1);
    assert_eq!(key(&cache).await.unwrap().1, Freshness::Hit);
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
    assert_eq!(key(&cache).await.unwrap(), ("KEY1".to_owned(), Freshness::Hit));
}

#[tokio::test(start_paused = true)]
async fn a_request_is_held_and_then_told_to_come_again() {
    let (world, cache) = world(0);
    let before = Instant::now();
    assert!(matches!(key(&cache).await, Err(CacheError::Pending)));
    assert_eq!(before.elapsed(), HOLD);
    world.gate.add_permits(10);
    settle().await;
    assert_eq!(key(&cache).await.unwrap().1, Freshness::Hit);
}

#[tokio::test(start_paused = true)]
async fn credentials_are_refreshed_at_about_half_their_life() {
    let (world, cache) = world(100);
    key(&cache).await.unwrap();
    advance(HOUR.mul_f64(0.44)).await;
    settle().await;
    assert_eq!(world.fetched.load(Ordering::SeqCst), 1);
    advance(HOUR.mul_f64(0.12)).await;
    settle().await;
    assert_eq!(world.fetched.load(Ordering::SeqCst), 2);
    assert_eq!(key(&cache).await.unwrap(), ("KEY2".to_owned(), Freshness::Hit));
}

#[tokio::test(start_paused = true)]
async fn the_last_good_ones_are_served_through_an_outage_until_a_minute_before_their_end() {
    let (world, cache) = world(10_000);
    key(&cache).await.unwrap();
    *world.failure.lock().unwrap() = Some(SourceError::Unavailable("away".to_owned()));
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
    *world.failure.lock().unwrap() = None;
    advance(Duration::from_secs(1)).await;
    assert_ne!(key(&cache).await.unwrap().0, "KEY1");
}

#[tokio::test(start_paused = true)]
async fn a_failure_is_remembered_for_a_moment_only() {
    let (world, cache) = world(10_000);
    *world.failure.lock().unwrap() = Some(SourceError::Denied("not registered".to_owned()));
    assert!(matches!(key(&cache).await, Err(CacheError::Issue(_))));
    let asked = world.fetched.load(Ordering::SeqCst);
    assert!(matches!(key(&cache).await, Err(CacheError::Issue(_))));
    assert_eq!(world.fetched.load(Ordering::SeqCst), asked);
    *world.failure.lock().unwrap() = None;
    advance(REMEMBER_PERMANENT).await;
    assert_eq!(key(&cache).await.unwrap().1, Freshness::Miss);
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_flight_leaves_its_place_usable() {
    let (world, cache) = world(10_000);
    world.panics.store(true, Ordering::SeqCst);
    assert!(matches!(key(&cache).await, Err(CacheError::Issue(error)) if error.is_transient()));
    world.panics.store(false, Ordering::SeqCst);
    advance(REMEMBER_TRANSIENT).await;
    assert_eq!(key(&cache).await.unwrap().1, Freshness::Miss);
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
    let refreshed = world.fetched.load(Ordering::SeqCst);
    advance(HOUR * 3).await;
    settle().await;
    assert_eq!(world.fetched.load(Ordering::SeqCst), refreshed);
}

#[tokio::test(start_paused = true)]
async fn the_number_of_entries_is_bounded() {
    let (_world, cache) = world(100);
    for name in ["a", "b", "c"] {
        cache.get(&grant(name), &caller()).await.unwrap();
    }
    assert!(matches!(cache.get(&grant("d"), &caller()).await, Err(CacheError::Full)));
    assert!(cache.get(&grant("a"), &caller()).await.is_ok());
}

/// Like `world`'s, after a reload that changed nothing else.
fn reload(world: &Arc<World>, cache: &CredentialCache, keep: impl Fn(&Grant) -> bool + Send + Sync + 'static) {
    let issuer = Issuer::new(world.clone(), world.clone(), world.clock.clone(), Metrics::default());
    cache.reconfigure(issuer, LIMITS, keep);
}

#[tokio::test(start_paused = true)]
async fn a_reload_ends_what_it_does_not_keep() {
    let (world, cache) = world(10_000);
    cache.get(&grant("a"), &caller()).await.unwrap();
    cache.get(&grant("b"), &caller()).await.unwrap();
    reload(&world, &cache, |grant| *grant != self::grant("a"));
    let left: Vec<_> = cache.entries().into_iter().map(|entry| entry.spiffe_id).collect();
    assert_eq!(left, ["spiffe://example.org/b"]);
    // One that was decided by the old configuration, and comes after the reload.
    assert!(matches!(cache.get(&grant("a"), &caller()).await, Err(CacheError::Pending)));
    assert_eq!(cache.get(&grant("b"), &caller()).await.unwrap().1, Freshness::Hit);
    assert_eq!(world.fetched.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn a_flight_that_lands_after_a_reload_serves_nobody() {
    let (world, cache) = world(0);
    let waiting = tokio::spawn({
        let cache = cache.clone();
        async move { key(&cache).await }
    });
    settle().await;
    reload(&world, &cache, |_| false);
    reload(&world, &cache, |_| true);
    world.gate.add_permits(1);
    assert!(matches!(waiting.await.unwrap(), Err(CacheError::Pending)));
    assert!(cache.entries().is_empty());
    world.gate.add_permits(10);
    assert_eq!(key(&cache).await.unwrap(), ("KEY2".to_owned(), Freshness::Miss));
}

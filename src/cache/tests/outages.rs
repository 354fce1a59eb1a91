//! Cached credentials through failures of the source and of STS.

use super::*;
use crate::captured_log::CapturedLog;
use crate::role::FirstExchange;
use crate::svid::BadToken;

/// The latest time at which the first refresh may be due.
const DUE: Duration = Duration::from_secs(3600 * 55 / 100);

/// Returns a cache with credentials of an hour, right after the failure of its first refresh.
async fn rejected_env() -> (Arc<CacheEnv>, CredentialCache) {
    let (env, cache) = env(10_000);
    key(&cache).await.unwrap();
    env.reject(rejected());
    // Steps by a second, so that the time of the first rejection is known to the second.
    while env.fetched() == 1 {
        pass(SECOND).await;
    }
    (env, cache)
}

#[tokio::test(start_paused = true)]
async fn sts_rejection_removes_credentials_after_the_grace() {
    let (_env, cache) = rejected_env().await;
    pass(LIMITS.revocation_grace - SECOND * 3).await;
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY1".to_owned(), CacheResult::Stale)
    );
    pass(SECOND * 4).await;
    assert_eq!(reason(&cache).await, "sts_access_denied");
}

#[tokio::test(start_paused = true)]
async fn outage_after_rejection_does_not_extend_the_grace() {
    let (env, cache) = rejected_env().await;
    pass(SECOND * 60).await;
    env.fail(unavailable());
    pass(LIMITS.revocation_grace - SECOND * 63).await;
    assert_eq!(key(&cache).await.unwrap().0, "KEY1");
    assert!(cache.entries()[0].refused_since.is_some());
    pass(SECOND * 4).await;
    assert_eq!(reason(&cache).await, "source_unavailable");
}

#[tokio::test(start_paused = true)]
async fn success_ends_the_grace() {
    let (env, cache) = rejected_env().await;
    pass(SECOND * 60).await;
    env.reject(None);
    pass(SECOND * 120).await;
    let (renewed, result) = key(&cache).await.unwrap();
    assert!(
        renewed != "KEY1" && result == CacheResult::Hit,
        "{renewed} {result:?}"
    );
    // The next rejection starts a new grace.
    env.reject(rejected());
    let before = env.fetched();
    while env.fetched() == before {
        pass(SECOND).await;
    }
    pass(LIMITS.revocation_grace - SECOND * 3).await;
    assert_eq!(key(&cache).await.unwrap().0, renewed);
}

#[tokio::test(start_paused = true)]
async fn hanging_source_does_not_extend_the_grace() {
    let (env, cache) = rejected_env().await;
    *env.takes.lock().unwrap() = HOUR;
    pass(LIMITS.revocation_grace + SECOND).await;
    assert!(
        matches!(key(&cache).await, Err(CacheError::Pending)),
        "only a success brings them back"
    );
}

#[tokio::test(start_paused = true)]
async fn new_grace_applies_to_earlier_rejections() {
    let (env, cache) = rejected_env().await;
    let limits = CacheLimits {
        revocation_grace: HOUR,
        ..LIMITS
    };
    cache.reload(env.policy(&[Arc::new(role("r"))], limits));
    pass(LIMITS.revocation_grace + MINUTE).await;
    assert_eq!(key(&cache).await.unwrap().0, "KEY1");
}

#[tokio::test(start_paused = true)]
async fn single_denial_has_no_effect() {
    let (env, cache) = env(10_000);
    key(&cache).await.unwrap();
    env.fail(denied());
    while env.fetched() == 1 {
        pass(SECOND).await;
    }
    // Requests continue meanwhile, but the second query waits for its time.
    for _ in 0..8 {
        assert_eq!(
            key(&cache).await.unwrap(),
            ("KEY1".to_owned(), CacheResult::Stale)
        );
        pass(SECOND).await;
    }
    assert_eq!(env.fetched(), 2);
    env.fail(None);
    pass(SECOND * 5).await;
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY3".to_owned(), CacheResult::Hit)
    );
    // A success lies between this denial and the first.
    env.fail(denied());
    while env.fetched() == 3 {
        pass(SECOND).await;
    }
    assert_eq!(key(&cache).await.unwrap().0, "KEY3");
}

#[tokio::test(start_paused = true)]
async fn second_denial_after_ten_seconds_removes_credentials() {
    let (env, cache) = env(10_000);
    key(&cache).await.unwrap();
    env.fail(denied());
    while env.fetched() == 1 {
        pass(SECOND).await;
    }
    pass(SECOND * 12).await;
    assert_eq!(env.fetched(), 3, "fetched once more, by itself");
    assert!(
        cache
            .entries()
            .iter()
            .all(|entry| entry.access_key_id.is_none())
    );
    assert_eq!(reason(&cache).await, "source_denied");
}

/// Requests the credentials of a role with both exchanges.
async fn key_by_either(
    cache: &CredentialCache,
    role: &Arc<Role>,
) -> Result<(String, CacheResult), CacheError> {
    let grant = grant_of("a", role);
    let found = cache.get(&cache.policy(), &grant, &caller()).await;
    found.map(|(cached, result)| (cached.access_key_id.to_string(), result))
}

/// With both exchanges, an outage is not worse where the agent has no certificates.
#[tokio::test(start_paused = true)]
async fn denied_certificate_in_an_outage_of_sts_removes_nothing() {
    let (env, cache) = env(10_000);
    let target = RolesAnywhereTarget {
        trust_anchor_arn: String::new(),
        profile_arn: String::new(),
        region: "eu-central-1".to_owned(),
        endpoint: None,
    };
    let role = Arc::new(Role {
        exchange: FirstExchange::Both(Arc::new(target)),
        ..role("r")
    });
    cache.reload(env.policy(std::slice::from_ref(&role), LIMITS));
    key_by_either(&cache, &role).await.unwrap();
    env.reject(StsError {
        retry: RetryPolicy::Later,
        reason: StsReason::Unreachable,
        ..rejected()
    });
    while env.certificate_queries.load(Ordering::SeqCst) == 0 {
        pass(SECOND).await;
    }
    for _ in 0..60 {
        pass(SECOND).await;
        let found = key_by_either(&cache, &role).await.unwrap();
        assert_eq!(found, ("KEY1".to_owned(), CacheResult::Stale));
    }
    // The second denial would have been enough.
    assert!(env.certificate_queries.load(Ordering::SeqCst) > 2);
    assert!(cache.entries()[0].refused_since.is_none());

    // A denial of tokens still withdraws the identity.
    env.fail(denied());
    pass(MINUTE * 2).await;
    let Err(CacheError::Exchange(error)) = key_by_either(&cache, &role).await else {
        panic!("the identity is still served");
    };
    assert_eq!(error.reason(), "source_denied");
}

#[tokio::test(start_paused = true)]
async fn outage_between_denials_keeps_the_first() {
    let (env, cache) = env(10_000);
    key(&cache).await.unwrap();
    env.fail(denied());
    while env.fetched() == 1 {
        pass(SECOND).await;
    }
    env.fail(unavailable());
    pass(MINUTE * 5).await;
    assert_eq!(key(&cache).await.unwrap().0, "KEY1");
    env.fail(denied());
    let before = env.fetched();
    while env.fetched() == before {
        pass(SECOND).await;
    }
    pass(SECOND * 3).await;
    assert_eq!(
        reason(&cache).await,
        "source_denied",
        "at the first question after it"
    );
}

#[tokio::test(start_paused = true)]
async fn refresh_backs_off_in_an_outage() {
    let (env, cache) = env(10_000);
    key(&cache).await.unwrap();
    // A kind of failure that one flight tries only once.
    env.fail(SourceError::BadToken(BadToken::Expiring("old".to_owned())));
    while env.fetched() == 1 {
        pass(SECOND).await;
    }
    pass(MINUTE * 20).await;
    let tries = env.fetched() - 2;
    // 1, 2, 4, 8, 16, 32 s, then 64, each half as long to half as long again.
    assert!((18..=45).contains(&tries), "{tries}");
    // Requests do not add tries.
    for _ in 0..100 {
        assert_eq!(
            key(&cache).await.unwrap(),
            ("KEY1".to_owned(), CacheResult::Stale)
        );
        settle().await;
    }
    assert!(env.fetched() - 2 <= tries + 1);
    env.fail(None);
    pass(SECOND * 97).await;
    assert_eq!(key(&cache).await.unwrap().1, CacheResult::Hit);
}

#[tokio::test(start_paused = true)]
async fn log_has_a_failure_once_per_change() {
    let (env, cache) = env(10_000);
    key(&cache).await.unwrap();
    let log = CapturedLog::start();
    let count = |what: &str| log.text().matches(what).count();
    env.fail(unavailable());
    pass(MINUTE * 45).await;
    assert!(env.fetched() > 20);
    assert_eq!(count("exchange failed"), 1);
    env.fail(denied());
    pass(MINUTE * 2).await;
    assert_eq!(
        (
            count("exchange failed"),
            count("identity withdrawn: credentials removed")
        ),
        (2, 1)
    );
    env.fail(None);
    pass(MINUTE).await;
    key(&cache).await.unwrap();
    assert_eq!(
        count("exchange succeeded again"),
        0,
        "a new entry without the old one's state"
    );
}

#[tokio::test(start_paused = true)]
async fn log_has_recovery_and_is_bounded_in_an_outage() {
    let (env, cache) = env_of(
        1_000_000,
        CacheLimits {
            max_entries: 1000,
            ..LIMITS
        },
    );
    fill(&cache, 300).await;
    let log = CapturedLog::start();
    env.fail(unavailable());
    pass(DUE + SECOND).await;
    let failed = log.text().matches("exchange failed").count();
    assert!(
        (20..=60).contains(&failed),
        "{failed} lines for 300 workloads"
    );
    env.fail(None);
    pass(MINUTE * 3).await;
    let text = log.text();
    let again = text.matches("exchange succeeded again").count();
    assert!((1..=failed).contains(&again), "{again}");
    assert!(
        text.lines()
            .any(|line| line.contains("missed=") && !line.contains("missed=0")),
        "{text}"
    );
}

#[test]
fn negative_ttl_depends_on_the_failure() {
    let sts = |retry| {
        ExchangeError::from(StsError {
            retry,
            ..rejected()
        })
    };
    let table = [
        (ExchangeError::from(unavailable()), 1),
        (
            SourceError::BadToken(BadToken::Expiring(String::new())).into(),
            1,
        ),
        (SourceError::Caller(AttestError::CallerGone).into(), 1),
        (denied().into(), 3),
        (SourceError::Misconfigured(String::new()).into(), 5),
        (
            SourceError::BadToken(BadToken::Wrong(String::new())).into(),
            5,
        ),
        (sts(RetryPolicy::Later), 1),
        (sts(RetryPolicy::NewToken), 5),
        (sts(RetryPolicy::Never), 5),
        (ExchangeError::TooOften, 1),
        (ExchangeError::TooShort, 1),
    ];
    for (error, seconds) in table {
        let ttl = failure::FailureKind::of(&error).negative_ttl();
        assert_eq!(ttl, SECOND * seconds, "{error:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn rejection_without_credentials_is_cached_for_seconds() {
    let (env, cache) = env(10_000);
    env.reject(rejected());
    for _ in 0..5 {
        assert_eq!(reason(&cache).await, "sts_access_denied");
        advance(SECOND * 9 / 10).await;
    }
    assert_eq!(env.fetched(), 1);
    pass(SECOND).await;
    assert!(cache.entries().is_empty(), "it takes up no entry");
    assert_eq!(reason(&cache).await, "sts_access_denied");
    assert_eq!(env.fetched(), 2);
}

/// After an outage of ten minutes, no entry serves another's credentials, and refreshes are spread.
#[tokio::test(start_paused = true)]
async fn refreshes_are_spread_after_an_outage_of_ten_thousand() {
    const MANY: usize = 10_000;
    let (env, cache) = env_of(
        100_000_000,
        CacheLimits {
            max_entries: MANY,
            ..LIMITS
        },
    );
    let role = Arc::new(role("r"));
    let grants: Vec<_> = (0..MANY)
        .map(|number| grant_of(&number.to_string(), &role))
        .collect();
    for grant in &grants {
        cache.get(&cache.policy(), grant, &caller()).await.unwrap();
    }
    *env.takes.lock().unwrap() = Duration::from_millis(200);
    // All are due within it. A kind of failure that one flight tries only once keeps the test
    // short.
    env.fail(SourceError::BadToken(BadToken::Expiring("old".to_owned())));
    pass(MINUTE * 33 + SECOND).await;
    assert_eq!(
        flights(&cache),
        MAX_REFRESHES,
        "as many as there are permits for"
    );
    let during = env.fetched() - MANY;
    assert!(during > MANY, "each was tried: {during}");
    env.fail(None);
    for _ in 0..30 {
        pass(SECOND * 10).await;
        let flights = flights(&cache);
        assert!(flights <= MAX_REFRESHES, "{flights} at one time");
    }
    for grant in &grants {
        let (_, result) = cache.get(&cache.policy(), grant, &caller()).await.unwrap();
        assert_eq!(result, CacheResult::Hit, "nobody's ended, and all are new");
    }
    assert_eq!(
        env.metrics
            .encode()
            .matches("cache_evictions_total{")
            .count(),
        0
    );
}

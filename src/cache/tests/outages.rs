//! What is cached, through failures of the source and of STS.

use super::*;
use crate::svid::BadToken;
use crate::svid::jwt::tests::CapturedLog;
use news::CacheEvent;

/// When the first refresh may be due at the latest.
const DUE: Duration = Duration::from_secs(3600 * 55 / 100);

/// An hour's credentials whose first refresh has just failed, or will within a moment.
async fn refused_world() -> (Arc<CacheEnv>, CredentialCache) {
    let (world, cache) = world(10_000);
    key(&cache).await.unwrap();
    world.refuse(refused());
    // Looks second by second, so that the first refusal is known to the second.
    while world.fetched() == 1 {
        pass(SECOND).await;
    }
    (world, cache)
}

#[tokio::test(start_paused = true)]
async fn a_refusal_by_sts_ends_what_is_there_after_the_grace() {
    let (_world, cache) = refused_world().await;
    pass(LIMITS.revocation_grace - SECOND * 3).await;
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY1".to_owned(), CacheResult::Stale)
    );
    pass(SECOND * 4).await;
    assert_eq!(reason(&cache).await, "sts_access_denied");
}

#[tokio::test(start_paused = true)]
async fn an_outage_after_a_refusal_does_not_lengthen_the_grace() {
    let (world, cache) = refused_world().await;
    pass(SECOND * 60).await;
    world.fail(unavailable());
    pass(LIMITS.revocation_grace - SECOND * 63).await;
    assert_eq!(key(&cache).await.unwrap().0, "KEY1");
    assert!(cache.entries()[0].refused_since.is_some());
    pass(SECOND * 4).await;
    assert_eq!(reason(&cache).await, "source_unavailable");
}

#[tokio::test(start_paused = true)]
async fn a_success_ends_the_grace() {
    let (world, cache) = refused_world().await;
    pass(SECOND * 60).await;
    world.refuse(None);
    pass(SECOND * 120).await;
    let (renewed, freshness) = key(&cache).await.unwrap();
    assert!(
        renewed != "KEY1" && freshness == CacheResult::Hit,
        "{renewed} {freshness:?}"
    );
    // The next refusal begins anew.
    world.refuse(refused());
    let before = world.fetched();
    while world.fetched() == before {
        pass(SECOND).await;
    }
    pass(LIMITS.revocation_grace - SECOND * 3).await;
    assert_eq!(key(&cache).await.unwrap().0, renewed);
}

#[tokio::test(start_paused = true)]
async fn a_hanging_source_does_not_lengthen_the_grace() {
    let (world, cache) = refused_world().await;
    *world.takes.lock().unwrap() = HOUR;
    pass(LIMITS.revocation_grace + SECOND).await;
    assert!(
        matches!(key(&cache).await, Err(CacheError::Pending)),
        "only a success brings them back"
    );
}

#[tokio::test(start_paused = true)]
async fn a_new_grace_counts_for_what_is_refused_already() {
    let (world, cache) = refused_world().await;
    cache.reconfigure(
        world.issuer(),
        Limits {
            revocation_grace: HOUR,
            ..LIMITS
        },
        |_| true,
    );
    pass(LIMITS.revocation_grace + MINUTE).await;
    assert_eq!(key(&cache).await.unwrap().0, "KEY1");
}

#[tokio::test(start_paused = true)]
async fn one_denial_by_the_source_changes_nothing() {
    let (world, cache) = world(10_000);
    key(&cache).await.unwrap();
    world.fail(denied());
    while world.fetched() == 1 {
        pass(SECOND).await;
    }
    // Others ask meanwhile, but the second question comes later.
    for _ in 0..8 {
        assert_eq!(
            key(&cache).await.unwrap(),
            ("KEY1".to_owned(), CacheResult::Stale)
        );
        pass(SECOND).await;
    }
    assert_eq!(world.fetched(), 2);
    world.fail(None);
    pass(SECOND * 5).await;
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY3".to_owned(), CacheResult::Hit)
    );
    // A success lies between this denial and the first.
    world.fail(denied());
    while world.fetched() == 3 {
        pass(SECOND).await;
    }
    assert_eq!(key(&cache).await.unwrap().0, "KEY3");
}

#[tokio::test(start_paused = true)]
async fn two_denials_ten_seconds_apart_end_it_though_nobody_asks() {
    let (world, cache) = world(10_000);
    key(&cache).await.unwrap();
    world.fail(denied());
    while world.fetched() == 1 {
        pass(SECOND).await;
    }
    pass(SECOND * 12).await;
    assert_eq!(world.fetched(), 3, "asked once more, by itself");
    assert!(
        cache
            .entries()
            .iter()
            .all(|entry| entry.access_key_id.is_none())
    );
    assert_eq!(reason(&cache).await, "source_denied");
}

#[tokio::test(start_paused = true)]
async fn an_outage_between_two_denials_does_not_make_the_first_undone() {
    let (world, cache) = world(10_000);
    key(&cache).await.unwrap();
    world.fail(denied());
    while world.fetched() == 1 {
        pass(SECOND).await;
    }
    world.fail(unavailable());
    pass(MINUTE * 5).await;
    assert_eq!(key(&cache).await.unwrap().0, "KEY1");
    world.fail(denied());
    let before = world.fetched();
    while world.fetched() == before {
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
async fn an_outage_is_tried_again_and_again_but_not_all_the_time() {
    let (world, cache) = world(10_000);
    key(&cache).await.unwrap();
    // Of a kind that one flight asks for once only.
    world.fail(SourceError::BadToken(BadToken::Expiring("old".to_owned())));
    while world.fetched() == 1 {
        pass(SECOND).await;
    }
    pass(MINUTE * 20).await;
    let tries = world.fetched() - 2;
    // 1, 2, 4 ... 32 s, then 64, each half as long to half as long again.
    assert!((18..=45).contains(&tries), "{tries}");
    // Requests don't add any.
    for _ in 0..100 {
        assert_eq!(
            key(&cache).await.unwrap(),
            ("KEY1".to_owned(), CacheResult::Stale)
        );
        settle().await;
    }
    assert!(world.fetched() - 2 <= tries + 1);
    world.fail(None);
    pass(SECOND * 97).await;
    assert_eq!(key(&cache).await.unwrap().1, CacheResult::Hit);
}

/// A line that is first written by another test's thread, which has no log, would be left out of this thread's as well: so
/// each is written once before.
fn log() -> CapturedLog {
    let slot = Entry::new(grant("before"));
    let error = || ExchangeError::from(unavailable());
    for news in [
        CacheEvent::Failed {
            error: error(),
            kept: false,
            missed: 0,
        },
        CacheEvent::Again,
        CacheEvent::Withdrawn(error()),
        CacheEvent::Over(error()),
    ] {
        news.emit(&slot, &super::EventLog::default());
    }
    CapturedLog::start()
}

#[tokio::test(start_paused = true)]
async fn the_log_has_a_failure_once_per_change() {
    let (world, cache) = world(10_000);
    key(&cache).await.unwrap();
    let log = log();
    let count = |what: &str| log.text().matches(what).count();
    world.fail(unavailable());
    pass(MINUTE * 45).await;
    assert!(world.fetched() > 20);
    assert_eq!(count("credentials were not issued"), 1);
    world.fail(denied());
    pass(MINUTE * 2).await;
    assert_eq!(
        (
            count("credentials were not issued"),
            count("the identity is withdrawn")
        ),
        (2, 1)
    );
    world.fail(None);
    pass(MINUTE).await;
    key(&cache).await.unwrap();
    assert_eq!(
        count("issued again"),
        0,
        "a new entry, which knows nothing of the old one"
    );
}

#[tokio::test(start_paused = true)]
async fn the_log_has_a_recovery_and_is_bounded_in_an_outage_of_all() {
    let (world, cache) = world_of(
        1_000_000,
        Limits {
            max_entries: 1000,
            ..LIMITS
        },
    );
    let role = Arc::new(role("r"));
    for number in 0..300 {
        cache
            .get(&grant_of(&number.to_string(), &role), &caller())
            .await
            .unwrap();
    }
    let log = log();
    world.fail(unavailable());
    pass(DUE + SECOND).await;
    let failed = log.text().matches("credentials were not issued").count();
    assert!(
        (20..=60).contains(&failed),
        "{failed} lines for 300 workloads"
    );
    world.fail(None);
    pass(MINUTE * 3).await;
    let text = log.text();
    let again = text.matches("credentials are issued again").count();
    assert!((1..=failed).contains(&again), "{again}");
    assert!(
        text.lines()
            .any(|line| line.contains("missed=") && !line.contains("missed=0")),
        "{text}"
    );
}

#[test]
fn how_long_each_failure_is_remembered() {
    let sts = |again| ExchangeError::from(StsError { again, ..refused() });
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
        assert_eq!(trouble::negative_ttl(&error), SECOND * seconds, "{error:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusal_of_what_is_not_cached_is_remembered_and_then_forgotten() {
    let (world, cache) = world(10_000);
    world.refuse(refused());
    for _ in 0..5 {
        assert_eq!(reason(&cache).await, "sts_access_denied");
        advance(SECOND * 9 / 10).await;
    }
    assert_eq!(world.fetched(), 1);
    pass(SECOND).await;
    assert!(cache.entries().is_empty(), "it takes up no place");
    assert_eq!(reason(&cache).await, "sts_access_denied");
    assert_eq!(world.fetched(), 2);
}

/// What is given up for an outage of ten minutes is nobody's credentials, and nobody marches in step when it is over.
#[tokio::test(start_paused = true)]
async fn ten_thousand_identities_come_out_of_an_outage_without_a_stampede() {
    const MANY: usize = 10_000;
    let (world, cache) = world_of(
        100_000_000,
        Limits {
            max_entries: MANY,
            ..LIMITS
        },
    );
    let role = Arc::new(role("r"));
    let grants: Vec<_> = (0..MANY)
        .map(|number| grant_of(&number.to_string(), &role))
        .collect();
    for grant in &grants {
        cache.get(grant, &caller()).await.unwrap();
    }
    *world.takes.lock().unwrap() = Duration::from_millis(200);
    // All are due within it. Of a kind that one flight asks for once only, so that this test is quick.
    world.fail(SourceError::BadToken(BadToken::Expiring("old".to_owned())));
    pass(MINUTE * 33 + SECOND).await;
    assert_eq!(
        flights(&cache),
        MAX_REFRESHES,
        "as many as there are turns for"
    );
    let during = world.fetched() - MANY;
    assert!(during > MANY, "each was tried: {during}");
    world.fail(None);
    for _ in 0..30 {
        pass(SECOND * 10).await;
        let flights = flights(&cache);
        assert!(flights <= MAX_REFRESHES, "{flights} at one time");
    }
    for grant in &grants {
        let (_, freshness) = cache.get(grant, &caller()).await.unwrap();
        assert_eq!(
            freshness,
            CacheResult::Hit,
            "nobody's ended, and all are new"
        );
    }
    assert_eq!(
        world
            .metrics
            .encode()
            .matches("cache_evictions_total{")
            .count(),
        0
    );
}

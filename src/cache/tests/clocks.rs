//! The cache takes the earlier of the wall clock and the monotonic clock.

use super::*;

#[tokio::test(start_paused = true)]
async fn cache_serves_nothing_expired_after_suspend() {
    let (env, cache) = env(10_000);
    key(&cache).await.unwrap();
    // The monotonic clock stood still meanwhile.
    env.clock.step(3600);
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY2".to_owned(), CacheResult::Miss)
    );
    env.clock.step(3541);
    env.fail(unavailable());
    assert_eq!(reason(&cache).await, "source_unavailable");
}

#[tokio::test(start_paused = true)]
async fn cache_refreshes_soon_after_suspend() {
    let (env, cache) = env(10_000);
    key(&cache).await.unwrap();
    pass(MINUTE).await;
    env.clock.step(40 * 60);
    pass(SECOND * 31).await;
    assert_eq!(env.fetched(), 2);
    // The machine was suspended for the credentials' whole lifetime.
    env.fail(unavailable());
    env.clock.step(2 * 3600);
    pass(SECOND * 31).await;
    assert!(cache.entries().is_empty());
}

#[tokio::test(start_paused = true)]
async fn lifetime_is_bounded_when_the_clock_is_set_back() {
    let (env, cache) = env(10_000);
    key(&cache).await.unwrap();
    env.clock.step(-10 * 3600);
    pass(MINUTE * 26).await;
    while env.fetched() == 1 {
        pass(SECOND).await;
    }
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY2".to_owned(), CacheResult::Hit)
    );
    env.fail(unavailable());
    pass(MINUTE * 59 - SECOND * 2).await;
    assert_eq!(key(&cache).await.unwrap().0, "KEY2");
    pass(SECOND * 3).await;
    assert_eq!(reason(&cache).await, "source_unavailable");
}

#[tokio::test(start_paused = true)]
async fn lifetime_is_bounded_when_the_clock_is_behind() {
    let (env, cache) = env(10_000);
    // STS's clock is two hours ahead of this node's, so a session of an hour seems to last three.
    *env.lifetime.lock().unwrap() = HOUR * 3;
    key(&cache).await.unwrap();
    pass(MINUTE * 34).await;
    assert_eq!(env.fetched(), 2);
    env.fail(unavailable());
    pass(MINUTE * 59 + SECOND).await;
    assert_eq!(reason(&cache).await, "source_unavailable");
}

#[tokio::test(start_paused = true)]
async fn entry_survives_a_clock_set_ahead_and_back() {
    let (env, cache) = env(10_000);
    key(&cache).await.unwrap();
    env.clock.step(10 * 60);
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY1".to_owned(), CacheResult::Hit)
    );
    env.clock.step(-10 * 60);
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY1".to_owned(), CacheResult::Hit)
    );
    pass(SECOND * 31).await;
    assert_eq!(env.fetched(), 1);
}

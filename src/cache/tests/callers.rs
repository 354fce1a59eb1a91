//! Sources that need a living caller.

use super::*;

fn world(open: usize) -> (Arc<CacheEnv>, CredentialCache) {
    let (world, cache) = super::world(open);
    world.needs_caller.store(true, Ordering::SeqCst);
    (world, cache)
}

fn asked(world: &CacheEnv) -> Vec<u32> {
    world.asked.lock().unwrap().clone()
}

#[tokio::test(start_paused = true)]
async fn a_flight_whose_caller_died_goes_on_with_the_latest_that_waits() {
    let (world, cache) = world(0);
    let mut waiting = Vec::new();
    for uid in [1, 2, 3] {
        let cache = cache.clone();
        waiting.push(tokio::spawn(async move { key_for(&cache, "a", uid).await }));
        settle().await;
    }
    // The latest has hung up, and is not asked for; nor is one that is gone a second time.
    let hung_up = tokio::spawn({
        let cache = cache.clone();
        async move { key_for(&cache, "a", 4).await.map(drop) }
    });
    settle().await;
    hung_up.abort();
    settle().await;
    world.gone.lock().unwrap().extend([1, 3, 4]);
    world.gate.add_permits(10);
    for waiting in waiting {
        assert_eq!(waiting.await.unwrap().unwrap().1, CacheResult::Miss);
    }
    assert_eq!(asked(&world), [1, 3, 2]);
}

#[tokio::test(start_paused = true)]
async fn without_a_living_caller_the_flight_ends() {
    let (world, cache) = world(100);
    world.gone.lock().unwrap().insert(1);
    assert_eq!(reason(&cache).await, "caller_gone");
    assert_eq!(asked(&world), [1]);
    advance(SECOND).await;
    assert!(key_for(&cache, "a", 2).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_refresh_is_asked_for_with_the_latest_caller() {
    let (world, cache) = world(100);
    for uid in [1, 2, 3] {
        key_for(&cache, "a", uid).await.unwrap();
    }
    pass(MINUTE * 34).await;
    assert_eq!(asked(&world), [1, 3]);
    assert_eq!(cache.entries()[0].latest_uid, Some(3));
}

#[tokio::test(start_paused = true)]
async fn without_a_living_caller_nothing_is_refreshed_until_one_comes() {
    let (world, cache) = world(100);
    key_for(&cache, "a", 1).await.unwrap();
    world.gone.lock().unwrap().insert(1);
    pass(MINUTE * 45).await;
    assert_eq!(asked(&world), [1, 1], "it is not tried for ever");
    assert_eq!(
        (cache.entries()[0].callers, cache.entries()[0].latest_uid),
        (0, Some(1))
    );
    // Each `aws` command is a new process.
    assert_eq!(
        key_for(&cache, "a", 2).await.unwrap(),
        ("KEY1".to_owned(), CacheResult::Stale)
    );
    settle().await;
    assert_eq!(asked(&world), [1, 1, 2]);
    assert_eq!(
        key_for(&cache, "a", 3).await.unwrap(),
        ("KEY3".to_owned(), CacheResult::Hit)
    );
}

#[tokio::test(start_paused = true)]
async fn without_a_living_caller_it_stays_until_its_end() {
    let (world, cache) = world(100);
    key_for(&cache, "a", 1).await.unwrap();
    world.gone.lock().unwrap().insert(1);
    pass(MINUTE * 59 - SECOND * 2).await;
    assert_eq!(cache.entries()[0].access_key_id.as_deref(), Some("KEY1"));
    pass(SECOND * 3).await;
    assert!(cache.entries().is_empty());
    assert_eq!(asked(&world), [1, 1]);
}

#[tokio::test(start_paused = true)]
async fn a_refresh_goes_on_with_one_that_came_while_it_ran() {
    let (world, cache) = world(1);
    key_for(&cache, "a", 1).await.unwrap();
    pass(MINUTE * 34).await;
    assert_eq!(asked(&world), [1, 1]);
    // It has what it wants and is gone, but it lives.
    key_for(&cache, "a", 2).await.unwrap();
    world.gone.lock().unwrap().insert(1);
    world.gate.add_permits(10);
    settle().await;
    assert_eq!(asked(&world), [1, 1, 2]);
    assert_eq!(key_for(&cache, "a", 3).await.unwrap().1, CacheResult::Hit);
}

#[tokio::test(start_paused = true)]
async fn where_the_source_needs_none_no_caller_is_kept() {
    let (world, cache) = super::world(100);
    let caller = caller_of(5);
    cache.get(&grant("a"), &caller).await.unwrap();
    settle().await;
    assert_eq!(Arc::strong_count(&caller), 1);
    assert_eq!(cache.entries()[0].callers, 0);
    pass(MINUTE * 34).await;
    assert_eq!(asked(&world), [5, u32::MAX]);
    assert!(Caller::synthetic().still_same().await.is_err());
}

//! The earlier of wall and monotonic clock.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_machine_that_slept_longer_than_the_session_hands_out_nothing_old() {
    let (world, cache) = world(10_000);
    key(&cache).await.unwrap();
    // The monotonic clock stood still meanwhile.
    world.clock.step(3600);
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY2".to_owned(), CacheResult::Miss)
    );
    world.clock.step(3541);
    world.fail(unavailable());
    assert_eq!(reason(&cache).await, "source_unavailable");
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_slept_refreshes_by_itself_soon_after() {
    let (world, cache) = world(10_000);
    key(&cache).await.unwrap();
    pass(MINUTE).await;
    world.clock.step(40 * 60);
    pass(SECOND * 31).await;
    assert_eq!(world.fetched(), 2);
    // One that was suspended all the time that the credentials lasted.
    world.fail(unavailable());
    world.clock.step(2 * 3600);
    pass(SECOND * 31).await;
    assert!(cache.entries().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_set_back_lengthens_nothing() {
    let (world, cache) = world(10_000);
    key(&cache).await.unwrap();
    world.clock.step(-10 * 3600);
    pass(MINUTE * 26).await;
    while world.fetched() == 1 {
        pass(SECOND).await;
    }
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY2".to_owned(), CacheResult::Hit)
    );
    world.fail(unavailable());
    pass(MINUTE * 59 - SECOND * 2).await;
    assert_eq!(key(&cache).await.unwrap().0, "KEY2");
    pass(SECOND * 3).await;
    assert_eq!(reason(&cache).await, "source_unavailable");
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_behind_lengthens_nothing() {
    let (world, cache) = world(10_000);
    // STS's clock is two hours ahead of this node's, so an hour's session seems to last for three.
    *world.lifetime.lock().unwrap() = HOUR * 3;
    key(&cache).await.unwrap();
    pass(MINUTE * 34).await;
    assert_eq!(world.fetched(), 2);
    world.fail(unavailable());
    pass(MINUTE * 59 + SECOND).await;
    assert_eq!(reason(&cache).await, "source_unavailable");
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_set_ahead_and_back_leaves_what_is_good() {
    let (world, cache) = world(10_000);
    key(&cache).await.unwrap();
    world.clock.step(10 * 60);
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY1".to_owned(), CacheResult::Hit)
    );
    world.clock.step(-10 * 60);
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY1".to_owned(), CacheResult::Hit)
    );
    pass(SECOND * 31).await;
    assert_eq!(world.fetched(), 1);
}

//! Refreshes with sources that need a live caller.

use super::*;

fn env(open: usize) -> (Arc<CacheEnv>, CredentialCache) {
    let (env, cache) = super::env(open);
    env.requires_live_caller.store(true, Ordering::SeqCst);
    (env, cache)
}

fn requesters(env: &CacheEnv) -> Vec<u32> {
    env.requesters.lock().unwrap().clone()
}

#[tokio::test(start_paused = true)]
async fn flight_continues_with_latest_waiter_if_caller_is_gone() {
    let (env, cache) = env(0);
    let mut waiting = Vec::new();
    for uid in [1, 2, 3] {
        let cache = cache.clone();
        waiting.push(tokio::spawn(async move { key_for(&cache, "a", uid).await }));
        settle().await;
    }
    // The latest caller has hung up, so it is not used. A caller that is gone is not used a second
    // time.
    let hung_up = tokio::spawn({
        let cache = cache.clone();
        async move { key_for(&cache, "a", 4).await.map(drop) }
    });
    settle().await;
    hung_up.abort();
    settle().await;
    env.gone.lock().unwrap().extend([1, 3, 4]);
    env.gate.add_permits(10);
    for waiting in waiting {
        assert_eq!(waiting.await.unwrap().unwrap().1, CacheResult::Miss);
    }
    assert_eq!(requesters(&env), [1, 3, 2]);
}

#[tokio::test(start_paused = true)]
async fn flight_ends_without_a_live_caller() {
    let (env, cache) = env(100);
    env.gone.lock().unwrap().insert(1);
    assert_eq!(reason(&cache).await, "caller_gone");
    assert_eq!(requesters(&env), [1]);
    advance(SECOND).await;
    assert!(key_for(&cache, "a", 2).await.is_ok());
}

/// Starts the exchange of a request that this caller is about to send.
fn start_ahead(cache: &CredentialCache, uid: u32) {
    cache.start(&cache.policy(), &grant("a"), &caller_of(uid));
}

#[tokio::test(start_paused = true)]
async fn exchange_that_starts_ahead_serves_the_next_request() {
    let (env, cache) = env(100);
    start_ahead(&cache, 1);
    start_ahead(&cache, 1);
    settle().await;
    let (key, result) = key_for(&cache, "a", 2).await.unwrap();
    assert_eq!((key.as_str(), result), ("KEY1", CacheResult::Hit));
    start_ahead(&cache, 1);
    settle().await;
    assert_eq!(requesters(&env), [1]);
}

/// The socket of the caller is closed when its request comes, so its failure is not the request's.
#[tokio::test(start_paused = true)]
async fn failure_of_a_caller_that_is_gone_ahead_is_not_recorded() {
    let (env, cache) = env(100);
    env.gone.lock().unwrap().insert(1);
    start_ahead(&cache, 1);
    settle().await;
    assert_eq!((requesters(&env), flights(&cache)), (vec![1], 0));
    assert!(key_for(&cache, "a", 2).await.is_ok());
    assert_eq!(requesters(&env), [1, 2]);
}

#[tokio::test(start_paused = true)]
async fn flight_that_started_ahead_continues_with_a_caller_that_waits() {
    let (env, cache) = env(0);
    env.gone.lock().unwrap().insert(1);
    start_ahead(&cache, 1);
    let waits = tokio::spawn({
        let cache = cache.clone();
        async move { key_for(&cache, "a", 2).await }
    });
    settle().await;
    env.gate.add_permits(10);
    assert_eq!(waits.await.unwrap().unwrap().1, CacheResult::Miss);
    assert_eq!(requesters(&env), [1, 2]);
}

#[tokio::test(start_paused = true)]
async fn rejection_of_an_exchange_ahead_is_recorded() {
    let (env, cache) = env(100);
    env.reject(rejected());
    start_ahead(&cache, 1);
    settle().await;
    let reason = cache.entries()[0].last_error_reason;
    assert_eq!(reason, Some("sts_access_denied"));
}

#[tokio::test(start_paused = true)]
async fn refresh_uses_the_latest_caller() {
    let (env, cache) = env(100);
    for uid in [1, 2, 3] {
        key_for(&cache, "a", uid).await.unwrap();
    }
    pass(MINUTE * 34).await;
    assert_eq!(requesters(&env), [1, 3]);
    assert_eq!(cache.entries()[0].latest_uid, Some(3));
}

#[tokio::test(start_paused = true)]
async fn refresh_waits_for_a_live_caller() {
    let (env, cache) = env(100);
    key_for(&cache, "a", 1).await.unwrap();
    env.gone.lock().unwrap().insert(1);
    pass(MINUTE * 45).await;
    assert_eq!(requesters(&env), [1, 1], "it is not tried for ever");
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
    assert_eq!(requesters(&env), [1, 1, 2]);
    assert_eq!(
        key_for(&cache, "a", 3).await.unwrap(),
        ("KEY3".to_owned(), CacheResult::Hit)
    );
}

#[tokio::test(start_paused = true)]
async fn entry_without_a_live_caller_is_served_until_expiry() {
    let (env, cache) = env(100);
    key_for(&cache, "a", 1).await.unwrap();
    env.gone.lock().unwrap().insert(1);
    pass(MINUTE * 59 - SECOND * 2).await;
    assert_eq!(cache.entries()[0].access_key_id.as_deref(), Some("KEY1"));
    pass(SECOND * 3).await;
    assert!(cache.entries().is_empty());
    assert_eq!(requesters(&env), [1, 1]);
}

#[tokio::test(start_paused = true)]
async fn refresh_continues_with_a_caller_that_arrived_meanwhile() {
    let (env, cache) = env(1);
    key_for(&cache, "a", 1).await.unwrap();
    pass(MINUTE * 34).await;
    assert_eq!(requesters(&env), [1, 1]);
    // The caller has its credentials and has disconnected, but its process lives.
    key_for(&cache, "a", 2).await.unwrap();
    env.gone.lock().unwrap().insert(1);
    env.gate.add_permits(10);
    settle().await;
    assert_eq!(requesters(&env), [1, 1, 2]);
    assert_eq!(key_for(&cache, "a", 3).await.unwrap().1, CacheResult::Hit);
}

#[tokio::test(start_paused = true)]
async fn cache_keeps_no_caller_if_the_source_needs_none() {
    let (env, cache) = super::env(100);
    let caller = caller_of(5);
    cache
        .get(&cache.policy(), &grant("a"), &caller)
        .await
        .unwrap();
    settle().await;
    assert_eq!(Arc::strong_count(&caller), 1);
    assert_eq!(cache.entries()[0].callers, 0);
    pass(MINUTE * 34).await;
    assert_eq!(requesters(&env), [5, u32::MAX]);
    assert!(Caller::synthetic().verify_unchanged().await.is_err());
}

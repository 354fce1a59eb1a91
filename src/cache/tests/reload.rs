//! Reloads, and the requests that run during one (T17).

use super::*;

/// Requests a grant as a policy has decided.
async fn key_by(
    cache: &CredentialCache,
    policy: &Arc<Policy>,
    grant: &Grant,
) -> Result<(String, CacheResult), CacheError> {
    let (cached, result) = cache.get(policy, grant, &caller()).await?;
    Ok((cached.access_key_id.to_string(), result))
}

fn two_roles() -> [Arc<Role>; 2] {
    ["r", "s"].map(|name| Arc::new(role(name)))
}

/// Caches credentials for a grant of each role. Returns the policy and its grants.
async fn two_entries(cache: &CredentialCache) -> (Arc<Policy>, [Grant; 2]) {
    let [removed, kept] = two_roles();
    let grants = [grant_of("a", &removed), grant_of("b", &kept)];
    let policy = cache.policy();
    for grant in &grants {
        key_by(cache, &policy, grant).await.unwrap();
    }
    (policy, grants)
}

#[tokio::test(start_paused = true)]
async fn reload_retires_entries_that_it_does_not_keep() {
    let (env, cache) = env(10_000);
    let (_, [_, kept]) = two_entries(&cache).await;
    cache.reload(env.policy(&two_roles()[1..], LIMITS));
    let remaining: Vec<_> = cache
        .entries()
        .into_iter()
        .map(|entry| entry.spiffe_id)
        .collect();
    assert_eq!(remaining, ["spiffe://example.org/b"]);
    assert_eq!(
        key_by(&cache, &cache.policy(), &kept).await.unwrap(),
        ("KEY2".to_owned(), CacheResult::Hit)
    );
    assert_eq!(env.fetched(), 2);
}

#[tokio::test(start_paused = true)]
async fn outdated_policy_adds_no_entry() {
    let (env, cache) = env(10_000);
    let old = cache.policy();
    cache.reload(env.policy(&two_roles(), LIMITS));
    assert!(!cache.is_current(&old));
    let late = key_by(&cache, &old, &grant("a")).await;
    assert!(matches!(late, Err(CacheError::Pending)), "{late:?}");
    assert!(cache.entries().is_empty());
    assert_eq!(env.fetched(), 0);
}

#[tokio::test(start_paused = true)]
async fn entry_ahead_of_the_sweep_is_verified() {
    let (env, cache) = env(10_000);
    let (old, [removed, kept]) = two_entries(&cache).await;
    // A reload that has not swept yet.
    let new = Arc::new(env.policy(&two_roles()[1..], LIMITS));
    cache.0.policy.store(new.clone());
    assert_eq!(
        key_by(&cache, &new, &kept).await.unwrap(),
        ("KEY2".to_owned(), CacheResult::Hit)
    );
    // The new policy decides on an entry, and the old one does not use it any more.
    let late = key_by(&cache, &old, &kept).await;
    assert!(matches!(late, Err(CacheError::Pending)), "{late:?}");
    assert_eq!(
        key_by(&cache, &new, &removed).await.unwrap(),
        ("KEY3".to_owned(), CacheResult::Miss)
    );
}

#[tokio::test(start_paused = true)]
async fn sweep_releases_the_old_policy() {
    let (env, cache) = env(10_000);
    key(&cache).await.unwrap();
    let old = Arc::downgrade(&cache.policy());
    cache.reload(env.policy(&two_roles(), LIMITS));
    assert_eq!(key(&cache).await.unwrap().1, CacheResult::Hit);
    assert!(old.upgrade().is_none());
}

#[tokio::test(start_paused = true)]
async fn flight_result_is_discarded_after_reload() {
    let (env, cache) = env(0);
    let waiting = tokio::spawn({
        let cache = cache.clone();
        async move { key(&cache).await }
    });
    settle().await;
    // A request that has found the entry and reads it a moment later.
    let entry = cache.0.entry(&cache.policy(), &grant("a")).unwrap();
    cache.reload(env.policy(&[], LIMITS));
    cache.reload(env.policy(&two_roles(), LIMITS));
    env.gate.add_permits(1);
    assert!(matches!(waiting.await.unwrap(), Err(CacheError::Pending)));
    settle().await;
    assert!(cache.entries().is_empty() && entry.current.load().is_none());
    env.gate.add_permits(10);
    assert_eq!(
        key(&cache).await.unwrap(),
        ("KEY2".to_owned(), CacheResult::Miss)
    );
}

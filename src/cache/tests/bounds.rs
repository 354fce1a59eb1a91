//! Bounds of the cache, per SPIFFE ID and in total (T22).

use super::*;
use table::MAX_ROLES_PER_ID;

const MANY: CacheLimits = CacheLimits {
    max_entries: 1000,
    ..LIMITS
};

fn roles(count: usize) -> Vec<Arc<Role>> {
    (0..count)
        .map(|number| Arc::new(role(&format!("r{number}"))))
        .collect()
}

fn names(cache: &CredentialCache, owner: &str) -> Vec<String> {
    let id = format!("spiffe://example.org/{owner}");
    let mut names: Vec<_> = cache
        .entries()
        .into_iter()
        .filter(|entry| entry.spiffe_id == id)
        .map(|entry| entry.role)
        .collect();
    names.sort();
    names
}

#[tokio::test(start_paused = true)]
async fn cache_evicts_least_recently_used_role_of_a_workload() {
    let (env, cache) = env_of(10_000, MANY);
    key_for(&cache, "other", 1).await.unwrap();
    let roles = roles(MAX_ROLES_PER_ID + 1);
    for role in &roles[..MAX_ROLES_PER_ID] {
        cache
            .get(&cache.policy(), &grant_of("a", role), &caller())
            .await
            .unwrap();
        advance(SECOND).await;
    }
    // The first is used again, so the second is evicted.
    assert_eq!(
        cache
            .get(&cache.policy(), &grant_of("a", &roles[0]), &caller())
            .await
            .unwrap()
            .1,
        CacheResult::Hit
    );
    cache
        .get(
            &cache.policy(),
            &grant_of("a", &roles[MAX_ROLES_PER_ID]),
            &caller(),
        )
        .await
        .unwrap();
    let remaining = names(&cache, "a");
    assert_eq!(remaining.len(), MAX_ROLES_PER_ID);
    assert!(
        remaining.contains(&"r0".to_owned()) && !remaining.contains(&"r1".to_owned()),
        "{remaining:?}"
    );
    assert_eq!(
        key_for(&cache, "other", 1).await.unwrap().1,
        CacheResult::Hit
    );
    assert!(
        env.metrics
            .encode()
            .contains("awsvid_cache_evictions_total{reason=\"evicted\"} 1\n")
    );
    // An evicted entry is not refreshed.
    pass(MINUTE * 34).await;
    assert_eq!(env.fetched(), 2 * (MAX_ROLES_PER_ID + 1) + 1);
}

#[tokio::test(start_paused = true)]
async fn entry_with_a_flight_is_not_evicted() {
    let (env, cache) = env_of(0, MANY);
    let roles = roles(MAX_ROLES_PER_ID + 1);
    let request = |owner: &'static str, role: &Arc<Role>| {
        let (cache, grant) = (cache.clone(), grant_of(owner, role));
        tokio::spawn(async move {
            cache
                .get(&cache.policy(), &grant, &caller())
                .await
                .map(|_| ())
        })
    };
    let waiting: Vec<_> = roles[..MAX_ROLES_PER_ID]
        .iter()
        .map(|role| request("a", role))
        .collect();
    settle().await;
    let rejected = cache
        .get(
            &cache.policy(),
            &grant_of("a", &roles[MAX_ROLES_PER_ID]),
            &caller(),
        )
        .await;
    assert!(
        matches!(rejected, Err(CacheError::TooManyRoles)),
        "{rejected:?}"
    );
    let other = request("b", &roles[0]);
    env.gate.add_permits(100);
    for waiting in waiting.into_iter().chain([other]) {
        waiting.await.unwrap().unwrap();
    }
    cache
        .get(
            &cache.policy(),
            &grant_of("a", &roles[MAX_ROLES_PER_ID]),
            &caller(),
        )
        .await
        .unwrap();
}

#[tokio::test(start_paused = true)]
async fn full_cache_evicts_only_the_requesters_entries() {
    let (_env, cache) = env(100);
    let roles = roles(2);
    cache
        .get(&cache.policy(), &grant_of("a", &roles[0]), &caller())
        .await
        .unwrap();
    for name in ["b", "c"] {
        key_for(&cache, name, 1).await.unwrap();
    }
    cache
        .get(&cache.policy(), &grant_of("a", &roles[1]), &caller())
        .await
        .unwrap();
    assert_eq!(names(&cache, "a"), ["r1"]);
    assert!(matches!(
        key_for(&cache, "d", 1).await,
        Err(CacheError::Full)
    ));
    for name in ["b", "c"] {
        assert_eq!(key_for(&cache, name, 1).await.unwrap().1, CacheResult::Hit);
    }
}

#[tokio::test(start_paused = true)]
async fn workload_that_invents_roles_is_limited_alone() {
    let (env, cache) = env_of(100_000, MANY);
    key_for(&cache, "other", 1).await.unwrap();
    let good = Arc::new(role("good"));
    cache
        .get(&cache.policy(), &grant_of("greedy", &good), &caller())
        .await
        .unwrap();
    env.reject(rejected());
    *env.takes.lock().unwrap() = Duration::from_millis(100);
    let before = env.fetched();
    let mut rejections = HashSet::new();
    for role in roles(2000) {
        match cache
            .get(&cache.policy(), &grant_of("greedy", &role), &caller())
            .await
        {
            Err(CacheError::Exchange(error)) => {
                rejections.insert((error.reason(), error.is_transient()))
            }
            other => panic!("{other:?}"),
        };
    }
    assert_eq!(
        rejections,
        HashSet::from([("sts_access_denied", false), ("too_many_exchanges", true)])
    );
    let requesters = env.fetched() - before;
    assert!(
        (20..60).contains(&requesters),
        "{requesters} of 2000 got as far as the source"
    );
    assert!((2..=MAX_ROLES_PER_ID).contains(&names(&cache, "greedy").len()));
    assert!(
        names(&cache, "greedy").contains(&"good".to_owned()),
        "what has credentials goes last"
    );
    // Other identities are served, and exchanged for, at once.
    env.reject(None);
    assert_eq!(
        key_for(&cache, "other", 1).await.unwrap().1,
        CacheResult::Hit
    );
    let start = Instant::now();
    key_for(&cache, "new", 1).await.unwrap();
    assert_eq!(start.elapsed(), Duration::from_millis(100));
    pass(SECOND * 6).await;
    assert_eq!(
        cache.entries().len(),
        3,
        "rejections are forgotten after seconds"
    );
    assert_eq!(cache.0.table.len(), 3, "and their entries are free");
}

#[tokio::test(start_paused = true)]
async fn hanging_source_delays_only_its_workload() {
    let (env, cache) = env_of(100_000, MANY);
    *env.takes.lock().unwrap() = SECOND * 30;
    for role in roles(MAX_ROLES_PER_ID) {
        let (cache, grant) = (cache.clone(), grant_of("a", &role));
        tokio::spawn(async move {
            cache
                .get(&cache.policy(), &grant, &caller())
                .await
                .map(drop)
        });
    }
    settle().await;
    assert_eq!(env.busy.load(Ordering::SeqCst), 4);
    *env.takes.lock().unwrap() = Duration::from_millis(100);
    let start = Instant::now();
    key_for(&cache, "b", 1).await.unwrap();
    assert_eq!(start.elapsed(), Duration::from_millis(100));
}

#[tokio::test(start_paused = true)]
async fn hanging_source_leaves_refreshes_for_others() {
    let (env, cache) = env_of(100_000, MANY);
    for role in roles(MAX_ROLES_PER_ID) {
        cache
            .get(&cache.policy(), &grant_of("a", &role), &caller())
            .await
            .unwrap();
    }
    *env.takes.lock().unwrap() = HOUR;
    pass(MINUTE * 35).await;
    assert_eq!(flights(&cache), MAX_REFRESHES_PER_SPIFFE_ID);
}

/// Requests the credentials of four roles of each of 16 SPIFFE IDs, which are as many calls as the
/// source gets at once.
async fn request_for_sixteen(cache: &CredentialCache) -> tokio::task::JoinSet<&'static str> {
    let mut requests = tokio::task::JoinSet::new();
    for number in 0..16 {
        for role in roles(MAX_REFRESHES_PER_SPIFFE_ID) {
            let (cache, grant) = (cache.clone(), grant_of(&format!("hostile-{number}"), &role));
            requests.spawn(async move {
                match cache.get(&cache.policy(), &grant, &caller()).await {
                    Ok(_) => "ok",
                    Err(CacheError::Exchange(error)) => error.reason(),
                    Err(CacheError::Pending) => "pending",
                    Err(other) => panic!("{other}"),
                }
            });
        }
    }
    settle().await;
    requests
}

/// Covers T29, like the next test.
#[tokio::test(start_paused = true)]
async fn source_that_hangs_for_many_workloads_delays_no_other() {
    let (env, cache) = env_of(100_000, MANY);
    *env.takes.lock().unwrap() = SECOND * 30;
    let mut hostile = request_for_sixteen(&cache).await;
    assert_eq!(env.busy.load(Ordering::SeqCst), 64);
    *env.takes.lock().unwrap() = Duration::from_millis(100);
    for name in ["b", "c", "d"] {
        let start = Instant::now();
        key_for(&cache, name, 1).await.unwrap();
        assert_eq!(start.elapsed(), Duration::from_millis(100));
        // One call was cancelled in favour of this one. It tries again, and waits for the end of
        // another.
        assert!(env.busy.load(Ordering::SeqCst) <= 64);
    }
    let mut results = HashSet::new();
    while let Some(result) = hostile.join_next().await {
        results.insert(result.unwrap());
    }
    assert!(results.contains("pending"), "{results:?}");
}

#[tokio::test(start_paused = true)]
async fn source_that_hangs_for_many_workloads_leaves_refreshes_for_others() {
    let (env, cache) = env_of(100_000, MANY);
    let hostile = request_for_sixteen(&cache).await.join_all().await;
    assert_eq!(hostile, vec!["ok"; 64]);
    *env.takes.lock().unwrap() = HOUR;
    pass(MINUTE * 10).await;
    *env.takes.lock().unwrap() = Duration::ZERO;
    let (first, _) = key_for(&cache, "b", 1).await.unwrap();
    *env.takes.lock().unwrap() = HOUR;
    // Half of their lives have passed, and not yet of these.
    pass(MINUTE * 25).await;
    assert_eq!(flights(&cache), MAX_REFRESHES);
    *env.takes.lock().unwrap() = Duration::ZERO;
    pass(MINUTE * 10).await;
    let (second, result) = key_for(&cache, "b", 1).await.unwrap();
    assert_eq!(result, CacheResult::Hit);
    assert_ne!(first, second);
}

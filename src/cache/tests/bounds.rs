//! How much there is, and whose (attack 22).

use super::*;
use places::MAX_ROLES_PER_ID;

const MANY: Limits = Limits {
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
async fn over_its_bound_a_workload_loses_what_it_used_least_recently() {
    let (world, cache) = world_of(10_000, MANY);
    key_for(&cache, "other", 1).await.unwrap();
    let roles = roles(MAX_ROLES_PER_ID + 1);
    for role in &roles[..MAX_ROLES_PER_ID] {
        cache.get(&grant_of("a", role), &caller()).await.unwrap();
        advance(SECOND).await;
    }
    // The first is used again, so the second goes.
    assert_eq!(
        cache
            .get(&grant_of("a", &roles[0]), &caller())
            .await
            .unwrap()
            .1,
        CacheResult::Hit
    );
    cache
        .get(&grant_of("a", &roles[MAX_ROLES_PER_ID]), &caller())
        .await
        .unwrap();
    let left = names(&cache, "a");
    assert_eq!(left.len(), MAX_ROLES_PER_ID);
    assert!(
        left.contains(&"r0".to_owned()) && !left.contains(&"r1".to_owned()),
        "{left:?}"
    );
    assert_eq!(
        key_for(&cache, "other", 1).await.unwrap().1,
        CacheResult::Hit
    );
    assert!(
        world
            .metrics
            .encode()
            .contains("awsvid_cache_evictions_total{reason=\"evicted\"} 1\n")
    );
    // What was taken out is not refreshed, either.
    pass(MINUTE * 34).await;
    assert_eq!(world.fetched(), 2 * (MAX_ROLES_PER_ID + 1) + 1);
}

#[tokio::test(start_paused = true)]
async fn what_is_under_way_is_not_taken_out() {
    let (world, cache) = world_of(0, MANY);
    let roles = roles(MAX_ROLES_PER_ID + 1);
    let ask = |owner: &'static str, role: &Arc<Role>| {
        let (cache, grant) = (cache.clone(), grant_of(owner, role));
        tokio::spawn(async move { cache.get(&grant, &caller()).await.map(|_| ()) })
    };
    let waiting: Vec<_> = roles[..MAX_ROLES_PER_ID]
        .iter()
        .map(|role| ask("a", role))
        .collect();
    settle().await;
    let refused = cache
        .get(&grant_of("a", &roles[MAX_ROLES_PER_ID]), &caller())
        .await;
    assert!(
        matches!(refused, Err(CacheError::TooManyRoles)),
        "{refused:?}"
    );
    let other = ask("b", &roles[0]);
    world.gate.add_permits(100);
    for waiting in waiting.into_iter().chain([other]) {
        waiting.await.unwrap().unwrap();
    }
    cache
        .get(&grant_of("a", &roles[MAX_ROLES_PER_ID]), &caller())
        .await
        .unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_full_cache_makes_room_among_the_askers_own_only() {
    let (_world, cache) = world(100);
    let roles = roles(2);
    cache
        .get(&grant_of("a", &roles[0]), &caller())
        .await
        .unwrap();
    for name in ["b", "c"] {
        key_for(&cache, name, 1).await.unwrap();
    }
    cache
        .get(&grant_of("a", &roles[1]), &caller())
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
async fn one_that_makes_up_roles_is_stopped_and_hinders_nobody() {
    let (world, cache) = world_of(100_000, MANY);
    key_for(&cache, "other", 1).await.unwrap();
    let good = Arc::new(role("good"));
    cache
        .get(&grant_of("greedy", &good), &caller())
        .await
        .unwrap();
    world.refuse(refused());
    *world.takes.lock().unwrap() = Duration::from_millis(100);
    let before = world.fetched();
    let mut refusals = HashSet::new();
    for role in roles(2000) {
        match cache.get(&grant_of("greedy", &role), &caller()).await {
            Err(CacheError::Issue(error)) => {
                refusals.insert((error.reason(), error.is_transient()))
            }
            other => panic!("{other:?}"),
        };
    }
    assert_eq!(
        refusals,
        HashSet::from([("sts_access_denied", false), ("too_many_exchanges", true)])
    );
    let asked = world.fetched() - before;
    assert!(
        (20..60).contains(&asked),
        "{asked} of 2000 got as far as the source"
    );
    assert!((2..=MAX_ROLES_PER_ID).contains(&names(&cache, "greedy").len()));
    assert!(
        names(&cache, "greedy").contains(&"good".to_owned()),
        "what has credentials goes last"
    );
    // Others are served, and issued for, at once.
    world.refuse(None);
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
        "refusals are forgotten after seconds"
    );
    assert_eq!(cache.0.places.len(), 3, "and their places are free");
}

#[tokio::test(start_paused = true)]
async fn one_whose_source_hangs_waits_for_itself_alone() {
    let (world, cache) = world_of(100_000, MANY);
    *world.takes.lock().unwrap() = SECOND * 30;
    for role in roles(MAX_ROLES_PER_ID) {
        let (cache, grant) = (cache.clone(), grant_of("a", &role));
        tokio::spawn(async move { cache.get(&grant, &caller()).await.map(drop) });
    }
    settle().await;
    assert_eq!(world.busy.load(Ordering::SeqCst), 4);
    *world.takes.lock().unwrap() = Duration::from_millis(100);
    let start = Instant::now();
    key_for(&cache, "b", 1).await.unwrap();
    assert_eq!(start.elapsed(), Duration::from_millis(100));
}

#[tokio::test(start_paused = true)]
async fn one_whose_source_hangs_leaves_refreshes_for_others() {
    let (world, cache) = world_of(100_000, MANY);
    for role in roles(MAX_ROLES_PER_ID) {
        cache.get(&grant_of("a", &role), &caller()).await.unwrap();
    }
    *world.takes.lock().unwrap() = HOUR;
    pass(MINUTE * 35).await;
    assert_eq!(flights(&cache), MAX_REFRESHES_PER_WORKLOAD);
}

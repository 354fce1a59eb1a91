//! Chains of roles: sessions that are shared, refreshed and revoked one by one.

use super::*;
use crate::role::ChainedRole;

/// A role of a chain with this name.
fn chained(name: &str) -> ChainedRole {
    ChainedRole {
        role_arn: ArnTemplate::parse(&format!("arn:aws:iam::222222222222:role/{name}")).unwrap(),
        external_id: None,
        session_name: Template::parse("{session_name}").unwrap(),
        source_identity: None,
        tags: Vec::new(),
        transitive_tags: Vec::new(),
        policy: None,
        policy_arns: Vec::new(),
        duration: HOUR,
    }
}

/// A role that is reached through these others.
fn chain(name: &str, chain: &[&str]) -> Arc<Role> {
    Arc::new(Role {
        chain: chain.iter().map(|name| chained(name)).collect(),
        ..role(name)
    })
}

/// Limits with room for all sessions of the tests.
fn limits() -> CacheLimits {
    CacheLimits {
        max_entries: 100,
        ..LIMITS
    }
}

fn env_with(roles: &[Arc<Role>]) -> (Arc<CacheEnv>, CredentialCache) {
    let (env, cache) = env(100_000);
    cache.reload(env.policy(roles, limits()));
    (env, cache)
}

/// Requests the credentials of one identity for this role.
async fn request(
    cache: &CredentialCache,
    role: &Arc<Role>,
) -> Result<(String, CacheResult), CacheError> {
    let grant = grant_of("a", role);
    let found = cache.get(&cache.policy(), &grant, &caller()).await;
    found.map(|(cached, result)| (cached.access_key_id.to_string(), result))
}

fn calls(env: &CacheEnv) -> (usize, Vec<usize>) {
    (env.fetched(), env.chain.lock().unwrap().calls.clone())
}

fn fail_hop(env: &CacheEnv, hop: usize, failure: impl Into<Option<StsError>>) {
    let mut chain = env.chain.lock().unwrap();
    match failure.into() {
        Some(failure) => drop(chain.failures.insert(hop, failure)),
        None => drop(chain.failures.remove(&hop)),
    }
}

fn throttled() -> StsError {
    StsError {
        retry: RetryPolicy::Later,
        reason: StsReason::Throttled,
        ..rejected()
    }
}

fn error_of(result: Result<(String, CacheResult), CacheError>) -> String {
    match result {
        Err(error) => error.to_string(),
        Ok(found) => panic!("{found:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn thousand_callers_of_one_identity_call_each_hop_once() {
    let role = chain("three", &["middle", "last"]);
    let (env, cache) = env_with(std::slice::from_ref(&role));
    *env.takes.lock().unwrap() = SECOND;
    let grant = grant_of("a", &role);
    let mut requests = tokio::task::JoinSet::new();
    for uid in 0..1000 {
        let (cache, grant) = (cache.clone(), grant.clone());
        requests.spawn(async move {
            let policy = cache.policy();
            let found = cache.get(&policy, &grant, &caller_of(uid)).await;
            found.unwrap().0.access_key_id.to_string()
        });
    }
    let keys: HashSet<String> = requests.join_all().await.into_iter().collect();
    assert_eq!(keys, HashSet::from(["HOP3-1".to_owned()]));
    assert_eq!(calls(&env), (1, vec![2, 3]));
    // A refresh of all of them is one of each, too, at about half of the hour.
    pass(MINUTE * 26).await;
    assert_eq!(calls(&env), (1, vec![2, 3]));
    pass(MINUTE * 8).await;
    assert_eq!(request(&cache, &role).await.unwrap().0, "HOP3-2");
    let (first, mut later) = calls(&env);
    later.sort_unstable();
    assert_eq!((first, later), (2, vec![2, 2, 3, 3]));
}

#[tokio::test(start_paused = true)]
async fn roles_share_sessions_that_no_workload_gets() {
    let roles = [
        chain("one", &["middle", "last"]),
        chain("two", &["middle"]),
        Arc::new(role("direct")),
    ];
    let (env, cache) = env_with(&roles);
    for (role, key) in roles.iter().zip(["HOP3-1", "HOP2-2", "KEY2"]) {
        assert_eq!(request(&cache, role).await.unwrap().0, key);
    }
    // `two` has the role of a hop, and `direct` that of the first one. Each has a session of its
    // own, so what a role gives is never what signs a call.
    assert_eq!(calls(&env), (2, vec![2, 3, 2]));
    let mut served = 0;
    cache.0.table.for_each(|entry| {
        let current = entry.current.load_full().unwrap();
        assert_eq!(current.signing.is_some(), entry.grant.is_hop());
        assert_eq!(current.body.bytes().is_empty(), entry.grant.is_hop());
        served += usize::from(!entry.grant.is_hop());
    });
    assert_eq!((served, cache.entries().len()), (3, 5));
}

#[tokio::test(start_paused = true)]
async fn rejection_of_a_hop_ends_later_sessions_after_the_grace() {
    for hop in [2, 3] {
        let role = chain("three", &["middle", "last"]);
        let (env, cache) = env_with(std::slice::from_ref(&role));
        request(&cache, &role).await.unwrap();
        fail_hop(&env, hop, rejected());
        let rejected_calls = || calls(&env).1.iter().filter(|call| **call == hop).count();
        while rejected_calls() == 1 {
            pass(SECOND).await;
        }
        // The last hop may have been renewed before, but is not from here on.
        let key = request(&cache, &role).await.unwrap().0;
        pass(LIMITS.revocation_grace - SECOND * 3).await;
        assert_eq!(request(&cache, &role).await.unwrap().0, key, "{hop}");
        pass(SECOND * 4).await;
        let error = error_of(request(&cache, &role).await);
        assert!(
            error.starts_with(&format!("hop {hop} (arn:aws:iam::2")),
            "{error}"
        );
        // The end of the rejection is the end of the failure.
        fail_hop(&env, hop, None);
        pass(SECOND * 10).await;
        assert!(request(&cache, &role).await.unwrap().0.starts_with("HOP3-"));
    }
}

#[tokio::test(start_paused = true)]
async fn withdrawal_of_the_identity_ends_the_whole_chain() {
    let role = chain("three", &["middle", "last"]);
    let (env, cache) = env_with(std::slice::from_ref(&role));
    request(&cache, &role).await.unwrap();
    env.fail(denied());
    let before = env.fetched();
    while env.fetched() == before {
        pass(SECOND).await;
    }
    pass(SECOND * 13).await;
    let error = error_of(request(&cache, &role).await);
    assert!(
        error.starts_with("hop 1 (arn:aws:iam::123456789012:role/r): "),
        "{error}"
    );
}

#[tokio::test(start_paused = true)]
async fn hop_that_recovers_within_the_grace_ends_nothing() {
    let role = chain("three", &["middle", "last"]);
    let (env, cache) = env_with(std::slice::from_ref(&role));
    request(&cache, &role).await.unwrap();
    fail_hop(&env, 2, rejected());
    let is_rejected = |entry: &EntryStatus| entry.refused_since.is_some();
    while !cache.entries().iter().any(is_rejected) {
        pass(SECOND).await;
    }
    fail_hop(&env, 2, None);
    for _ in 0..600 {
        pass(SECOND).await;
        request(&cache, &role).await.unwrap();
    }
    assert!(!cache.entries().iter().any(is_rejected));
}

#[tokio::test(start_paused = true)]
async fn outage_of_a_hop_ends_nothing_that_is_warm() {
    for hop in [1, 2, 3] {
        let role = chain("three", &["middle", "last"]);
        let (env, cache) = env_with(std::slice::from_ref(&role));
        request(&cache, &role).await.unwrap();
        match hop {
            1 => env.fail(unavailable()),
            hop => fail_hop(&env, hop, throttled()),
        }
        for _ in 0..50 {
            pass(SECOND * 60).await;
            assert!(request(&cache, &role).await.is_ok(), "{hop}");
        }
        env.fail(None);
        fail_hop(&env, hop, None);
        pass(SECOND * 300).await;
        assert!(request(&cache, &role).await.is_ok(), "{hop}");
    }
}

#[tokio::test(start_paused = true)]
async fn throttled_hop_is_named_and_keeps_the_sessions_before_it() {
    let role = chain("three", &["middle", "last"]);
    let (env, cache) = env_with(std::slice::from_ref(&role));
    fail_hop(&env, 3, throttled());
    let error = error_of(request(&cache, &role).await);
    assert!(
        error.starts_with("hop 3 (arn:aws:iam::222222222222:role/last): "),
        "{error}"
    );
    fail_hop(&env, 3, None);
    pass(SECOND * 2).await;
    request(&cache, &role).await.unwrap();
    let (first, later) = calls(&env);
    assert_eq!(
        (first, later.iter().filter(|call| **call == 2).count()),
        (1, 1)
    );
}

#[tokio::test(start_paused = true)]
async fn session_that_sts_does_not_accept_is_renewed_once() {
    let roles = [chain("one", &["last"]), chain("two", &["other"])];
    let (env, cache) = env_with(&roles);
    request(&cache, &roles[0]).await.unwrap();
    let expired = StsError {
        retry: RetryPolicy::NewToken,
        reason: StsReason::ExpiredToken,
        ..rejected()
    };
    fail_hop(&env, 2, expired);
    assert_eq!(env.fetched(), 1);
    let error = error_of(request(&cache, &roles[1]).await);
    assert!(error.starts_with("hop 2 "), "{error}");
    // The first hop was exchanged once more, and its session was tried once more.
    assert_eq!(calls(&env), (2, vec![2, 2, 2]));
    // A rejection of a session of this minute is not one of an old session.
    fail_hop(&env, 2, rejected());
    pass(SECOND * 6).await;
    error_of(request(&cache, &roles[1]).await);
    assert_eq!(env.fetched(), 2);
    pass(SECOND * 60).await;
    error_of(request(&cache, &roles[1]).await);
    assert_eq!(env.fetched(), 3);
}

#[tokio::test(start_paused = true)]
async fn exchange_during_the_rejection_of_a_hop_fails_too() {
    let role = chain("three", &["middle", "last"]);
    let (env, cache) = env_with(std::slice::from_ref(&role));
    request(&cache, &role).await.unwrap();
    let entry = |hop: usize| {
        let mut found = None;
        cache.0.table.for_each(|entry| {
            if entry.grant.hop_number() == hop {
                found = Some(entry.clone());
            }
        });
        found.unwrap()
    };
    let (middle, last) = (entry(2), entry(3));
    // The last hop's exchange takes longer than that of the middle one, which fails meanwhile.
    *env.takes.lock().unwrap() = SECOND * 4;
    let inner = &cache.0;
    let flight = inner.start_flight(&last, caller(), &mut last.state(), FlightStart::Due, None);
    pass(SECOND).await;
    *env.takes.lock().unwrap() = Duration::ZERO;
    fail_hop(&env, 2, rejected());
    inner.start_flight(
        &middle,
        caller(),
        &mut middle.state(),
        FlightStart::Due,
        None,
    );
    settle().await;
    let result = flight.join(&caller()).wait().await;
    assert!(result.unwrap_err().to_string().starts_with("hop 2 "));
    assert!(last.state().failure.is_some());
}

#[tokio::test(start_paused = true)]
async fn reload_keeps_only_sessions_of_chains_that_exist() {
    let roles = [chain("one", &["middle", "last"]), chain("two", &["other"])];
    let (env, cache) = env_with(&roles);
    for role in &roles {
        request(&cache, role).await.unwrap();
    }
    assert_eq!(cache.entries().len(), 4);
    cache.reload(env.policy(&roles[1..], limits()));
    let mut left: Vec<Option<usize>> = cache.entries().iter().map(|entry| entry.hop).collect();
    left.sort_unstable();
    assert_eq!(left, [None, Some(1)]);
    request(&cache, &roles[1]).await.unwrap();
    assert_eq!(calls(&env), (1, vec![2, 3, 2]));
    let changed = chain("two", &["changed"]);
    cache.reload(env.policy(std::slice::from_ref(&changed), limits()));
    assert_eq!(request(&cache, &changed).await.unwrap().0, "HOP2-3");
}

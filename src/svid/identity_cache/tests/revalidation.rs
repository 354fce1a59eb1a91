//! The order of revalidation, and the fate of subjects without an answer.

use super::cached_identity::{BYTES_PER_SLOT, MAX_UNCONFIRMED};
use super::*;

/// The agent's answer about one of these.
fn shop() -> IdentityResult {
    Ok(ids(&["shop"]))
}

fn learn(cache: &mut IdentityCache, uid: u32, pid: u32) -> Arc<Caller> {
    let (caller, _) = process(uid, pid);
    assert_eq!(found(cache, &caller), None);
    note(cache, &caller, shop());
    caller
}

fn record_slow(cache: &mut IdentityCache, caller: &Arc<Caller>, result: IdentityResult) {
    cache.record(&Subject::of(caller, true).unwrap(), result, QUICK_TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn take_due_returns_the_most_overdue_of_each_workload() {
    let mut cache = IdentityCache::new(1000);
    let mut greedy = Vec::new();
    for pid in 0..100 {
        greedy.push(learn(&mut cache, 1, pid));
        advance(Duration::from_millis(1)).await;
    }
    let mut others = Vec::new();
    for uid in [5, 3, 4, 2] {
        others.push(learn(&mut cache, uid, 1000));
        advance(Duration::from_millis(1)).await;
    }
    advance(REVALIDATE_AFTER).await;
    assert_eq!(due_pids(&mut cache, 3, 9), [1, 5, 3]);
    assert_eq!(due_pids(&mut cache, 1, 9), [4]);
    note(&mut cache, &others[0], unavailable());
    note(&mut cache, &greedy[0], shop());
    assert_eq!(
        due_pids(&mut cache, 9, 9),
        [1, 2],
        "its next one, after one of its has ended"
    );
    assert_eq!(due_pids(&mut cache, 9, 9), [0; 0], "no other one is due");
    assert!(
        cache
            .take_due(Capacity { quick: 9, slow: 9 })
            .queries
            .is_empty()
    );
}

#[tokio::test(start_paused = true)]
async fn slow_subject_uses_the_slow_lane_until_it_is_quick() {
    let mut cache = IdentityCache::new(1000);
    let slow: Vec<_> = (0..10).map(|uid| learn(&mut cache, uid, 1)).collect();
    // One subject was slow when it was new.
    record_slow(&mut cache, &slow[0], shop());
    advance(REVALIDATE_AFTER).await;
    assert_eq!(due_pids(&mut cache, 100, 1).len(), 10);
    slow.iter()
        .for_each(|caller| record_slow(&mut cache, caller, unavailable()));
    let modest = learn(&mut cache, 77, 1);
    advance(REVALIDATE_AFTER).await;
    assert_eq!(due_pids(&mut cache, 100, 0), [77]);
    assert_eq!(due_pids(&mut cache, 0, 3).len(), 3);
    note(&mut cache, &modest, shop());
    slow.iter()
        .for_each(|caller| note(&mut cache, caller, shop()));
    advance(REVALIDATE_AFTER).await;
    assert_eq!(
        due_pids(&mut cache, 100, 0).len(),
        11,
        "all are quick again"
    );
}

#[tokio::test(start_paused = true)]
async fn workload_is_paused_longer_after_each_timeout() {
    let mut cache = IdentityCache::new(1000);
    let slow: Vec<_> = (0..200).map(|pid| learn(&mut cache, 1, pid)).collect();
    let modest = learn(&mut cache, 2, 1000);
    let (start, mut pauses, mut last) = (Instant::now(), Vec::new(), Instant::now());
    while start.elapsed() < Duration::from_secs(1200) {
        for question in cache.take_due(Capacity { quick: 8, slow: 4 }).queries {
            if question.caller.peer.uid == 2 {
                note(&mut cache, &modest, shop());
            } else {
                pauses.push(last.elapsed().as_secs());
                last = Instant::now();
                cache.record(&question.subject, unavailable(), QUICK_TIMEOUT);
            }
        }
        advance(Duration::from_secs(1)).await;
    }
    assert_eq!(pauses, [30, 30, 60, 120, 240]);
    assert_eq!(
        (cache.len(), cache.pauses.len()),
        (1, 0),
        "they are believed no longer, and leave nothing"
    );
    // An answer ends the pause, however long it took.
    slow.iter()
        .for_each(|caller| assert_eq!(found(&mut cache, caller), None));
    slow.iter()
        .for_each(|caller| note(&mut cache, caller, shop()));
    for result in [unavailable(), shop(), shop()] {
        advance(REVALIDATE_AFTER).await;
        let questions = cache.take_due(Capacity { quick: 8, slow: 4 }).queries;
        let queried = questions
            .iter()
            .find(|question| question.caller.peer.uid == 1)
            .expect("it is not paused");
        cache.record(&queried.subject, result, QUICK_TIMEOUT);
        note(&mut cache, &modest, shop());
    }
    assert!(cache.pauses.is_empty());
}

#[tokio::test(start_paused = true)]
async fn pauses_end_after_an_outage() {
    for is_own in [false, true] {
        let mut cache = IdentityCache::new(1000);
        let all: Vec<_> = (0..10).map(|uid| learn(&mut cache, uid, 1)).collect();
        // The agent hangs.
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(1800) {
            for question in cache
                .take_due(Capacity {
                    quick: 100,
                    slow: 100,
                })
                .queries
            {
                cache.record(&question.subject, unavailable(), QUICK_TIMEOUT);
            }
            advance(Duration::from_secs(1)).await;
        }
        assert_eq!(
            (cache.pauses.len(), due_pids(&mut cache, 100, 100)),
            (10, vec![])
        );
        match is_own {
            true => cache.record_own_confirmation(start),
            false => drop(learn(&mut cache, 99, 1)),
        }
        assert_eq!(due_pids(&mut cache, 100, 100).len(), 10);
        all.iter()
            .for_each(|caller| note(&mut cache, caller, shop()));
    }
}

/// Sends all queries that are due in this time. Only subjects that are not `slow` get an answer.
async fn revalidate(
    cache: &mut IdentityCache,
    time: Duration,
    all: &[Arc<Caller>],
    slow: impl Fn(u32) -> bool,
) {
    let until = Instant::now() + time;
    while Instant::now() < until {
        let due_pids = cache.take_due(Capacity {
            quick: 1000,
            slow: 1000,
        });
        for question in due_pids.queries {
            assert!(
                all.iter()
                    .any(|caller| Arc::ptr_eq(caller, &question.caller))
            );
            let result = if slow(question.caller.peer.uid) {
                unavailable()
            } else {
                shop()
            };
            cache.record(&question.subject, result, Duration::ZERO);
        }
        advance(Duration::from_secs(1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn unconfirmed_identity_expires_while_others_are_confirmed() {
    let mut cache = IdentityCache::new(1000);
    let all: Vec<_> = (0..10).map(|uid| learn(&mut cache, uid, 1)).collect();
    let is_slow = |uid| uid < 5;
    revalidate(
        &mut cache,
        MAX_UNCONFIRMED - REVALIDATE_AFTER,
        &all,
        is_slow,
    )
    .await;
    assert!(
        all.iter().all(|caller| found(&mut cache, caller).is_some()),
        "not before its time"
    );
    revalidate(&mut cache, REVALIDATE_AFTER * 4, &all, is_slow).await;
    assert_eq!(cache.len(), 5, "an expired identity takes up no entry");
    let (slow, quick) = all.split_at(5);
    assert!(
        quick
            .iter()
            .all(|caller| found(&mut cache, caller).is_some())
    );
    assert!(
        slow.iter()
            .all(|caller| found(&mut cache, caller).is_none()),
        "it has to be queried"
    );
    // An outage at that moment does not restore it.
    slow.iter()
        .for_each(|caller| note(&mut cache, caller, unavailable()));
    assert!(
        slow.iter()
            .all(|caller| found(&mut cache, caller).is_none())
    );
}

#[tokio::test(start_paused = true)]
async fn query_in_flight_does_not_delay_expiry() {
    let mut cache = IdentityCache::new(1000);
    let all: Vec<_> = (0..2).map(|uid| learn(&mut cache, uid, 1)).collect();
    advance(REVALIDATE_AFTER).await;
    assert_eq!(due_pids(&mut cache, 1, 1).len(), 1);
    let queried = all
        .iter()
        .find(|caller| {
            cache.cached[&Subject::of(caller, true).unwrap()]
                .in_flight
                .is_some()
        })
        .unwrap();
    let other = queried.peer.uid ^ 1;
    revalidate(&mut cache, MAX_UNCONFIRMED * 2, &all, |uid| uid != other).await;
    let Ok(IdentityLookup::InFlight(mut result)) =
        cache.find(&Subject::of(queried, true).unwrap(), queried)
    else {
        panic!("it has expired, and its query is running")
    };
    note(&mut cache, queried, unavailable());
    assert_eq!(
        *result.wait_for(Option::is_some).await.unwrap(),
        Some(unavailable())
    );
}

#[tokio::test(start_paused = true)]
async fn outage_or_queue_does_not_age_identities() {
    let mut cache = IdentityCache::new(1000);
    let all: Vec<_> = (0..200).map(|uid| learn(&mut cache, uid, 1)).collect();
    let all_are_known =
        |cache: &mut IdentityCache| all.iter().all(|caller| found(cache, caller).is_some());
    revalidate(&mut cache, Duration::from_secs(7200), &all, |_| true).await;
    assert!(
        all_are_known(&mut cache),
        "an unavailable agent removes nothing"
    );
    // After the outage the agent answers one query in five seconds. A pass takes longer than
    // `MAX_UNCONFIRMED`.
    assert!(Duration::from_secs(5) * 200 > MAX_UNCONFIRMED);
    for _ in 0..2000 {
        let due_pids = cache.take_due(Capacity { quick: 1, slow: 0 });
        advance(Duration::from_secs(5)).await;
        for question in due_pids.queries {
            cache.record(&question.subject, shop(), Duration::ZERO);
        }
        assert!(all_are_known(&mut cache));
    }
}

#[tokio::test(start_paused = true)]
async fn own_confirmation_advances_the_clock() {
    let mut cache = IdentityCache::new(1000);
    let alone = learn(&mut cache, 1, 1);
    let (learnt, mut answered) = (Instant::now(), Instant::now());
    let no_workload = Capacity { quick: 0, slow: 0 };
    while cache.take_due(no_workload).expired.is_empty() {
        assert_eq!(
            cache.take_due(no_workload).is_overdue,
            learnt.elapsed() > REVALIDATE_AFTER * 2
        );
        assert!(found(&mut cache, &alone).is_some());
        advance(REVALIDATE_AFTER).await;
        cache.record_own_confirmation(answered);
        answered = Instant::now();
        assert!(learnt.elapsed() < MAX_UNCONFIRMED * 2);
    }
    assert!(learnt.elapsed() >= MAX_UNCONFIRMED);
    assert_eq!(found(&mut cache, &alone), None);
}

#[tokio::test(start_paused = true)]
async fn long_names_use_more_slots() {
    let mut cache = IdentityCache::new(10 * MAX_SUBJECTS_PER_WORKLOAD);
    let of_length = |pid, length| {
        let mut caller = Arc::into_inner(process(1, pid).0).unwrap();
        caller.peer.cgroup = CgroupPath::parse(&format!("/shop.service/{}", "x".repeat(length)));
        Arc::new(caller)
    };
    let learn = |cache: &mut IdentityCache, caller: &Arc<Caller>| {
        assert_eq!(found(cache, caller), None);
        note(cache, caller, shop());
    };
    for pid in 0..u32::try_from(MAX_SUBJECTS_PER_WORKLOAD).unwrap() {
        learn(&mut cache, &of_length(pid, BYTES_PER_SLOT));
        advance(Duration::from_millis(1)).await;
    }
    assert_eq!(
        (cache.len(), cache.used_slots),
        (MAX_SUBJECTS_PER_WORKLOAD / 4, MAX_SUBJECTS_PER_WORKLOAD),
        "its path is kept three times"
    );
    for pid in 0..u32::try_from(MAX_SUBJECTS_PER_WORKLOAD).unwrap() {
        learn(&mut cache, &of_length(10_000 + pid, 1));
    }
    assert_eq!(
        (cache.len(), cache.used_slots),
        (MAX_SUBJECTS_PER_WORKLOAD, MAX_SUBJECTS_PER_WORKLOAD)
    );
    assert_eq!(
        cache.counts.values().sum::<usize>(),
        MAX_SUBJECTS_PER_WORKLOAD
    );
}

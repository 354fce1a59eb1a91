mod properties;

use std::time::Duration;

use tokio::time::Instant;

use super::*;
use crate::identity::SpiffeId;

fn id(name: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://example.org/{name}")).unwrap()
}

/// A key in a group of several.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key(&'static str, u32);

impl FairKey for Key {
    type Group = &'static str;

    fn group(&self) -> &'static str {
        self.0
    }
}

impl<K: FairKey> FairSemaphore<K> {
    async fn acquire(&self, key: &K) -> Option<FairPermit<K>> {
        self.acquire_within(ACQUIRE_TIMEOUT, key).await
    }
}

fn is_empty<K: FairKey>(limit: &FairSemaphore<K>) -> bool {
    let state = limit.0.state();
    state.keys.is_empty()
        && state.groups.is_empty()
        && state.waiting.is_empty()
        && state.waiting_of.is_empty()
        && state.evictable.is_empty()
        && state.held == 0
}

#[tokio::test(start_paused = true)]
async fn semaphore_reserves_permits_for_other_keys() {
    let limit = FairSemaphore::new(4, 3);
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(limit.acquire(&id("greedy")).await.unwrap());
    }
    assert_eq!(
        limit.try_acquire(&id("greedy")).unwrap_err(),
        AcquireError::Key
    );
    let waiting: Vec<_> = (0..100)
        .map(|_| {
            let limit = limit.clone();
            tokio::spawn(async move { limit.acquire(&id("greedy")).await.is_some() })
        })
        .collect();
    tokio::task::yield_now().await;
    // No time passes: the hundred waiters do not delay other keys.
    let start = Instant::now();
    for name in ["a", "b", "c"] {
        drop(limit.acquire(&id(name)).await.unwrap());
    }
    assert_eq!(start.elapsed(), Duration::ZERO);
    for waiting in waiting {
        assert!(!waiting.await.unwrap(), "its own permits were all out");
    }
    assert_eq!(start.elapsed(), ACQUIRE_TIMEOUT);
    drop(held);
    assert!(is_empty(&limit));
}

#[tokio::test(start_paused = true)]
async fn released_permit_goes_to_the_group_that_holds_the_fewest() {
    let limit = FairSemaphore::new(2, 1);
    let held = [
        limit.acquire(&Key("many", 1)).await.unwrap(),
        limit.acquire(&Key("many", 2)).await.unwrap(),
    ];
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = Vec::new();
    for key in [
        Key("many", 3),
        Key("many", 4),
        Key("many", 5),
        Key("one", 1),
        Key("many", 6),
    ] {
        let (limit, order) = (limit.clone(), order.clone());
        tasks.push(tokio::spawn(async move {
            let permit = limit.acquire(&key).await.unwrap();
            order.lock().unwrap().push(key);
            tokio::task::yield_now().await;
            drop(permit);
        }));
        tokio::task::yield_now().await;
    }
    let [first, second] = held;
    drop(first);
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    drop(second);
    for task in tasks {
        task.await.unwrap();
    }
    // The number of the group's keys does not matter, nor how long they have waited.
    assert_eq!(order.lock().unwrap()[0], Key("one", 1));
    assert!(is_empty(&limit));
}

#[tokio::test(start_paused = true)]
async fn waiter_leaves_no_state_after_its_timeout() {
    let limit = FairSemaphore::new(1, 1);
    let held = limit.acquire(&id("a")).await.unwrap();
    assert!(limit.acquire(&id("a")).await.is_none());
    assert!(limit.acquire(&id("b")).await.is_none());
    drop(held);
    assert!(limit.try_acquire(&id("b")).is_ok());
    assert!(is_empty(&limit));
}

#[tokio::test(start_paused = true)]
async fn full_queue_drops_a_waiter_of_the_group_that_has_the_most() {
    let limit = FairSemaphore::with_waiting(1, 1, 4);
    let held = limit.acquire(&Key("holder", 0)).await.unwrap();
    let wait = |key: Key| {
        let limit = limit.clone();
        tokio::spawn(async move { limit.acquire(&key).await.is_some() })
    };
    let greedy: Vec<_> = (0..4).map(|uid| wait(Key("greedy", uid))).collect();
    tokio::task::yield_now().await;
    // The greedy group has the most waiters, so the queue has no room for it.
    assert!(limit.acquire(&Key("greedy", 9)).await.is_none());
    // Its newest waiters are dropped in favour of other groups.
    let modest = [wait(Key("a", 1)), wait(Key("b", 1))];
    tokio::task::yield_now().await;
    drop(held);
    let mut answers = Vec::new();
    for task in greedy.into_iter().chain(modest) {
        answers.push(task.await.unwrap());
    }
    assert_eq!(answers, [true, true, false, false, true, true]);
    assert!(is_empty(&limit));
}

#[tokio::test(start_paused = true)]
async fn eviction_takes_the_oldest_idle_permit_of_the_largest_key() {
    let limit = FairSemaphore::new(4, 4);
    let greedy: Vec<_> = (0..4)
        .map(|uid| limit.try_acquire_evicting(&Key("greedy", uid % 2)).unwrap())
        .collect();
    greedy[0].set_in_use();
    assert_eq!(
        limit.try_acquire_evicting(&Key("greedy", 1)).unwrap_err(),
        AcquireError::Total
    );
    let modest = limit.try_acquire_evicting(&Key("modest", 1)).unwrap();
    // Both keys of that group hold two permits. One of these keys has the oldest idle permit.
    assert_eq!(greedy.iter().filter(|permit| is_evicted(permit)).count(), 1);
    assert!(!is_evicted(&greedy[0]) && !is_evicted(&modest));
    let second = limit.try_acquire_evicting(&Key("modest", 1)).unwrap();
    // Two against two: neither group holds more than the other.
    assert_eq!(
        limit.try_acquire_evicting(&Key("modest", 1)).unwrap_err(),
        AcquireError::Total
    );
    assert_eq!(
        limit.try_acquire_evicting(&Key("greedy", 1)).unwrap_err(),
        AcquireError::Total
    );
    let third = limit.try_acquire_evicting(&Key("third", 1)).unwrap();
    drop((greedy, modest, second, third));
    assert!(is_empty(&limit));
}

fn is_evicted<K: FairKey>(permit: &FairPermit<K>) -> bool {
    matches!(
        futures_poll(std::pin::pin!(permit.evicted())),
        std::task::Poll::Ready(())
    )
}

#[tokio::test]
async fn admission_takes_the_keys_oldest_at_its_limit() {
    let limit = FairSemaphore::new(10, 3);
    let other = limit.admit(&id("other"));
    let flood: Vec<_> = (0..100).map(|_| limit.admit(&id("flood"))).collect();
    let evicted: Vec<bool> = flood.iter().map(is_evicted).collect();
    assert!(
        evicted[..97].iter().all(|evicted| *evicted)
            && evicted[97..].iter().all(|evicted| !evicted)
    );
    assert!(!is_evicted(&other));
    drop((flood, other));
    assert!(is_empty(&limit));
}

#[tokio::test]
async fn admission_takes_the_oldest_of_the_largest_key() {
    let limit = FairSemaphore::new(6, 3);
    let one = limit.admit(&id("one"));
    let most: Vec<_> = (0..3).map(|_| limit.admit(&id("most"))).collect();
    let two = [limit.admit(&id("two")), limit.admit(&id("two"))];
    let next = limit.admit(&id("next"));
    assert!(
        is_evicted(&most[0])
            && ![&one, &two[0], &two[1], &next, &most[1]]
                .into_iter()
                .any(is_evicted)
    );
    // Each key now holds one or two permits, and the victim is one of those that hold two.
    let last = limit.admit(&id("last"));
    let evicted = [&most[1], &two[0]]
        .into_iter()
        .filter(|permit| is_evicted(permit))
        .count();
    assert_eq!(
        (
            evicted,
            is_evicted(&one),
            is_evicted(&next),
            is_evicted(&last)
        ),
        (1, false, false, false)
    );
    drop((one, most, two, next, last));
    assert!(is_empty(&limit));
}

#[tokio::test(start_paused = true)]
async fn permit_in_use_is_evicted_if_none_is_idle() {
    let limit = FairSemaphore::new(2, 2);
    let held = [1, 2].map(|_| {
        let permit = limit.try_acquire_evicting(&id("greedy")).unwrap();
        permit.set_in_use();
        permit
    });
    let modest = limit.try_acquire_evicting(&id("modest")).unwrap();
    held[1].evicted().await;
    drop((held, modest));
    assert!(is_empty(&limit));
}

#[tokio::test(start_paused = true)]
async fn permit_in_use_gives_way_only_to_a_smaller_group() {
    let limit = FairSemaphore::new(6, 3);
    let acquire = |key: Key| {
        let limit = limit.clone();
        async move {
            limit
                .acquire_evicting_within(Duration::from_secs(1), &key)
                .await
        }
    };
    let mut held = Vec::new();
    for key in [("greedy", 1), ("greedy", 1), ("greedy", 2), ("slow", 1)] {
        held.push(acquire(Key(key.0, key.1)).await.unwrap());
    }
    for _ in 0..2 {
        held.push(acquire(Key("other", 1)).await.unwrap());
    }
    let start = Instant::now();
    // 3, 1 and 2: the largest group loses the newest of its largest key.
    held.push(acquire(Key("new", 1)).await.unwrap());
    let evicted: Vec<bool> = held.iter().map(is_evicted).collect();
    assert_eq!(
        evicted,
        [false, true, false, false, false, false, false],
        "the newest of the key with two"
    );
    // 2, 1, 2 and 1: one of the groups with two, and then the other.
    held.push(acquire(Key("newest", 1)).await.unwrap());
    held.push(acquire(Key("busy", 0)).await.unwrap());
    assert_eq!(start.elapsed(), Duration::ZERO);
    // Each of the six groups holds one now. No newcomer takes it, whether of another group or of
    // another key in one of these.
    for key in [Key("late", 1), Key("late", 2), Key("busy", 1)] {
        assert!(acquire(key).await.is_none());
    }
    assert_eq!(held.iter().filter(|permit| is_evicted(permit)).count(), 2);
    assert!(!is_evicted(&held[3]), "the only one of its group");
    drop(held);
    assert!(is_empty(&limit));
}

#[tokio::test(start_paused = true)]
async fn waiter_gets_a_permit_that_can_be_evicted() {
    let limit = FairSemaphore::new(2, 1);
    let wait = |key: Key| {
        let limit = limit.clone();
        tokio::spawn(async move { limit.acquire_evicting(&key).await.unwrap() })
    };
    let held = [
        limit.acquire(&Key("a", 1)).await.unwrap(),
        limit.acquire(&Key("a", 2)).await.unwrap(),
    ];
    let waiting = [wait(Key("b", 1)), wait(Key("b", 2))];
    tokio::task::yield_now().await;
    drop(held);
    let mut granted = Vec::new();
    for waiting in waiting {
        granted.push(waiting.await.unwrap());
    }
    let c = limit.acquire_evicting(&Key("c", 1)).await.unwrap();
    assert_eq!(
        granted.iter().filter(|permit| is_evicted(permit)).count(),
        1
    );
    drop((granted, c));
    assert!(is_empty(&limit));
}

#[tokio::test(start_paused = true)]
async fn detached_permit_counts_only_for_its_key() {
    let limit = FairSemaphore::new(1, 1);
    let stuck = limit.acquire(&id("stuck")).await.unwrap();
    assert!(limit.try_acquire(&id("other")).is_err());
    stuck.detach();
    stuck.detach();
    let other = limit.try_acquire(&id("other")).unwrap();
    assert_eq!(
        limit.try_acquire(&id("stuck")).unwrap_err(),
        AcquireError::Key
    );
    assert_eq!(
        limit.try_acquire(&id("third")).unwrap_err(),
        AcquireError::Total
    );
    drop((stuck, other));
    assert!(is_empty(&limit));
}

fn futures_poll<F: Future<Output = ()>>(future: std::pin::Pin<&mut F>) -> std::task::Poll<()> {
    future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop()))
}

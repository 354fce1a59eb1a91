//! Turns at what all workloads of a node share, the identity source and STS: bounded, and fair between SPIFFE IDs, so that
//! one workload that asks without end delays itself alone (attack 22).

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use crate::identity::SpiffeId;

/// How long a call may wait for its turn. A token that expires meanwhile is replaced by `issue`.
pub const TURN: Duration = Duration::from_secs(20);

/// Allows so many at one time in all, and of those so many to each owner: a SPIFFE ID, or a workload before its SPIFFE ID
/// is known. Cheap to clone.
///
/// Whoever waits has a turn of his owner's already, and all of these wait in one queue: so in front of anybody there are
/// at most `each` of every other owner.
#[derive(Debug)]
pub struct Turns<K: Eq + Hash = SpiffeId>(Arc<Shared<K>>);

impl<K: Eq + Hash> Clone for Turns<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

#[derive(Debug)]
struct Shared<K> {
    all: Arc<Semaphore>,
    each: usize,
    /// Only those that have a turn or wait for one.
    owners: Mutex<HashMap<K, Arc<Semaphore>>>,
}

/// Ends when it is dropped. The fields are dropped in this order: the place looks whether it was the last of its owner.
#[derive(Debug)]
pub struct Turn<K: Eq + Hash = SpiffeId> {
    _all: OwnedSemaphorePermit,
    _own: OwnedSemaphorePermit,
    _place: Place<K>,
}

/// Keeps the owner in the table while it has a turn or waits for one.
#[derive(Debug)]
struct Place<K: Eq + Hash> {
    turns: Arc<Shared<K>>,
    owner: K,
    own: Arc<Semaphore>,
}

impl<K: Eq + Hash + Clone> Turns<K> {
    /// `most` in all, `each` for one owner; neither is less than one.
    pub fn new(most: usize, each: usize) -> Self {
        let all = Arc::new(Semaphore::new(most.clamp(1, Semaphore::MAX_PERMITS)));
        Self(Arc::new(Shared { all, each: each.clamp(1, Semaphore::MAX_PERMITS), owners: Mutex::default() }))
    }

    /// Waits for a turn, at most for [`TURN`]: `None` if there was none.
    pub async fn take(&self, owner: &K) -> Option<Turn<K>> {
        self.take_within(TURN, owner).await
    }

    /// Waits for a turn, at most for `patience`.
    pub async fn take_within(&self, patience: Duration, owner: &K) -> Option<Turn<K>> {
        timeout(patience, self.wait(owner)).await.ok().flatten()
    }

    async fn wait(&self, owner: &K) -> Option<Turn<K>> {
        let place = self.place(owner);
        // The semaphores are never closed.
        let own = place.own.clone().acquire_owned().await.ok()?;
        let all = self.0.all.clone().acquire_owned().await.ok()?;
        Some(Turn { _all: all, _own: own, _place: place })
    }

    /// A turn if there is one now.
    pub fn try_take(&self, owner: &K) -> Option<Turn<K>> {
        let place = self.place(owner);
        let own = place.own.clone().try_acquire_owned().ok()?;
        let all = self.0.all.clone().try_acquire_owned().ok()?;
        Some(Turn { _all: all, _own: own, _place: place })
    }

    fn place(&self, owner: &K) -> Place<K> {
        let mut owners = self.0.owners();
        let own = owners.entry(owner.clone()).or_insert_with(|| Arc::new(Semaphore::new(self.0.each))).clone();
        Place { turns: self.0.clone(), owner: owner.clone(), own }
    }
}

impl<K> Shared<K> {
    fn owners(&self) -> MutexGuard<'_, HashMap<K, Arc<Semaphore>>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut owners = self.turns.owners();
        // The table's and this one's: whoever else has a place or a permit of this owner holds it, too.
        if Arc::strong_count(&self.own) == 2 {
            owners.remove(&self.owner);
        }
    }
}

/// A bucket that fills again with time.
///
/// It remembers only the moment at which it will be full again.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bucket(Option<Instant>);

impl Bucket {
    /// Takes one of `burst`, of which one comes back each `every`; `false` if there is none.
    pub fn take(&mut self, burst: u32, every: Duration) -> bool {
        let now = Instant::now();
        let full_again = self.0.map_or(now, |at| at.max(now)) + every;
        let room = full_again.duration_since(now) <= every * burst;
        if room {
            self.0 = Some(full_again);
        }
        room
    }

    fn is_full(&self) -> bool {
        self.0.is_none_or(|at| at <= Instant::now())
    }
}

/// A [`Bucket`] for each SPIFFE ID.
#[derive(Debug)]
pub struct Allowance {
    burst: u32,
    every: Duration,
    buckets: Mutex<HashMap<SpiffeId, Bucket>>,
}

/// Below this many there is nothing to tidy up.
const BUCKETS: usize = 1024;

impl Allowance {
    /// `burst` at once, and after that one each `every`.
    pub fn new(burst: u32, every: Duration) -> Self {
        Self { burst, every, buckets: Mutex::default() }
    }

    /// Takes one; `false` if `owner` has used up its own.
    pub fn take(&self, owner: &SpiffeId) -> bool {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        // A full bucket is as good as none. The table grows by its own size between two looks at all of it.
        if buckets.len() >= BUCKETS && buckets.len() == buckets.capacity() {
            buckets.retain(|_, bucket| !bucket.is_full());
        }
        buckets.entry(owner.clone()).or_default().take(self.burst, self.every)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn id(name: &str) -> SpiffeId {
        SpiffeId::parse(&format!("spiffe://example.org/{name}")).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_takes_all_it_can_leaves_the_others_theirs() {
        let turns = Turns::new(4, 3);
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(turns.take(&id("greedy")).await.unwrap());
        }
        assert!(turns.try_take(&id("greedy")).is_none());
        let waiting: Vec<_> = (0..100)
            .map(|_| {
                let turns = turns.clone();
                tokio::spawn(async move { turns.take(&id("greedy")).await })
            })
            .collect();
        tokio::task::yield_now().await;
        // No time passes: the hundred that wait are in nobody's way.
        let start = Instant::now();
        for name in ["a", "b", "c"] {
            drop(turns.take(&id(name)).await.unwrap());
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
        for waiting in waiting {
            assert!(waiting.await.unwrap().is_none(), "its own turns were all taken");
        }
        assert_eq!(start.elapsed(), TURN);
        drop(held);
        assert!(turns.0.owners().is_empty(), "nobody is remembered for nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn when_all_are_taken_the_next_is_not_the_greediest() {
        let turns = Turns::new(2, 2);
        let held = [turns.take(&id("greedy")).await.unwrap(), turns.take(&id("greedy")).await.unwrap()];
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = Vec::new();
        for name in ["greedy", "greedy", "greedy", "modest", "greedy"] {
            let (turns, order) = (turns.clone(), order.clone());
            tasks.push(tokio::spawn(async move {
                let turn = turns.take(&id(name)).await.unwrap();
                order.lock().unwrap().push(name);
                drop(turn);
            }));
            tokio::task::yield_now().await;
        }
        drop(held);
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(order.lock().unwrap()[0], "modest", "it was the only one in the common queue");
    }

    #[tokio::test(start_paused = true)]
    async fn who_stops_waiting_takes_nothing_along() {
        let turns = Turns::new(1, 1);
        let held = turns.take(&id("a")).await.unwrap();
        assert!(turns.take(&id("a")).await.is_none());
        assert!(turns.take(&id("b")).await.is_none());
        drop(held);
        assert!(turns.try_take(&id("b")).is_some());
        assert!(turns.0.owners().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn an_allowance_comes_back_with_time_and_is_each_ones_own() {
        let allowance = Allowance::new(3, Duration::from_secs(10));
        let taken = (0..5).filter(|_| allowance.take(&id("a"))).count();
        assert_eq!(taken, 3);
        assert!(allowance.take(&id("b")));
        advance(Duration::from_secs(9)).await;
        assert!(!allowance.take(&id("a")));
        advance(Duration::from_secs(1)).await;
        assert!(allowance.take(&id("a")));
        assert!(!allowance.take(&id("a")));
        advance(Duration::from_secs(1000)).await;
        assert_eq!((0..5).filter(|_| allowance.take(&id("a"))).count(), 3, "never more than the burst");
    }

    #[tokio::test(start_paused = true)]
    async fn the_table_of_allowances_is_tidied_up() {
        let allowance = Allowance::new(1, Duration::from_secs(1));
        for number in 0..100_000 {
            allowance.take(&id(&number.to_string()));
            advance(Duration::from_millis(1)).await;
        }
        let size = allowance.buckets.lock().unwrap().capacity();
        assert!(size < 10_000, "{size} for 1,000 that are not full");
    }
}

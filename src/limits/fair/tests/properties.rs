//! The semaphore, compared with a model that counts permits.

use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use super::*;
use crate::random_cases::for_random_cases;

const CASES: u64 = 500;
const STEPS: usize = 60;
const GROUPS: [&str; 3] = ["a", "b", "c"];

type WaitFuture = Pin<Box<dyn Future<Output = Option<FairPermit<Key>>>>>;

/// A permit that the test holds, and what the model knows of it.
struct Held {
    permit: FairPermit<Key>,
    can_be_evicted: bool,
    is_evicted: bool,
    is_detached: bool,
}

/// A semaphore with everything that the test has of it.
struct Model {
    limit: FairSemaphore<Key>,
    held: Vec<Held>,
    /// The waiters, the oldest first.
    waiting: Vec<(Key, WaitFuture)>,
    /// Whether keys are always admitted, as connections are. Then each permit is idle, since only
    /// an idle one always gives way.
    admits: bool,
}

impl Model {
    fn new(random: &mut fastrand::Rng) -> Self {
        let (total, per_key) = (random.usize(1..7), random.usize(1..4));
        Self {
            limit: FairSemaphore::with_waiting(total, per_key, random.usize(..6)),
            held: Vec::new(),
            waiting: Vec::new(),
            admits: random.bool(),
        }
    }

    fn total(&self) -> usize {
        let counts = |held: &&Held| !held.is_evicted && !held.is_detached;
        self.held.iter().filter(counts).count()
    }

    /// Returns the number of permits that count for this key.
    fn of_key(&self, key: &Key) -> usize {
        let counts = |held: &&Held| !held.is_evicted && held.permit.key() == key;
        self.held.iter().filter(counts).count()
    }

    /// Returns the number of permits of this group that count for the total.
    fn of_group(&self, group: &str) -> usize {
        let counts = |held: &&Held| {
            !held.is_evicted && !held.is_detached && held.permit.key().group() == group
        };
        self.held.iter().filter(counts).count()
    }

    fn keep(&mut self, permit: Option<FairPermit<Key>>) {
        self.held.extend(permit.map(|permit| Held {
            can_be_evicted: permit.eviction.is_some(),
            permit,
            is_evicted: false,
            is_detached: false,
        }));
    }

    /// Returns the positions of the waiters that are due, in the order in which they get permits.
    fn due(&self) -> Vec<usize> {
        let mut granted: Vec<usize> = Vec::new();
        let count = |granted: &[usize], is: &dyn Fn(&Key) -> bool| {
            granted
                .iter()
                .filter(|index| is(&self.waiting[**index].0))
                .count()
        };
        while self.total() + granted.len() < self.limit.0.total {
            let may = |index: &usize| {
                let key = &self.waiting[*index].0;
                !granted.contains(index)
                    && self.of_key(key) + count(&granted, &|other| other == key)
                        < self.limit.0.per_key
            };
            let of_group = |index: &usize| {
                let group = self.waiting[*index].0.group();
                self.of_group(group) + count(&granted, &|other| other.group() == group)
            };
            // Of equals, `min_by_key` returns the first, which is the oldest.
            let Some(next) = (0..self.waiting.len()).filter(may).min_by_key(of_group) else {
                break;
            };
            granted.push(next);
        }
        granted
    }

    /// Collects the results of waiters. Returns the keys of those that have a permit, and of those
    /// that were dropped.
    fn poll(&mut self) -> (Vec<Key>, Vec<Key>) {
        let (mut granted, mut dropped) = (Vec::new(), Vec::new());
        for (key, mut wait) in std::mem::take(&mut self.waiting) {
            match wait.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Pending => self.waiting.push((key, wait)),
                Poll::Ready(None) => dropped.push(key),
                Poll::Ready(permit) => {
                    granted.push(key);
                    self.keep(permit);
                }
            }
        }
        (granted, dropped)
    }

    /// Notes which permits were evicted for `key`, and checks that each of them had to give way.
    /// `may_be_own` is true if the key itself may lose a permit.
    fn note_evictions(&mut self, key: &Key, may_be_own: bool) -> usize {
        let evicted: Vec<usize> = (0..self.held.len())
            .filter(|index| {
                let held = &self.held[*index];
                held.can_be_evicted && !held.is_evicted && is_evicted(&held.permit)
            })
            .collect();
        for index in &evicted {
            let victim = self.held[*index].permit.key();
            let (own, own_of_group) = (self.of_key(key), self.of_group(key.group()));
            let gives_way = if victim.group() == key.group() {
                self.of_key(victim) > own || (may_be_own && victim == key)
            } else {
                self.of_group(victim.group()) > own_of_group
            };
            assert!(gives_way, "{victim:?} loses a permit to {key:?}");
        }
        for index in &evicted {
            self.held[*index].is_evicted = true;
        }
        evicted.len()
    }

    /// Acquires a permit for `key` in one of the ways that do not wait.
    fn acquire_now(&mut self, key: &Key, random: &mut fastrand::Rng) {
        let limit = self.limit.clone();
        let (is_full, is_key_full) = (
            self.total() >= limit.0.total,
            self.of_key(key) >= limit.0.per_key,
        );
        let (permit, may_be_own) = match (self.admits, random.bool()) {
            (_, true) => (limit.try_acquire_evicting(key), false),
            (true, false) => (Ok(limit.admit(key)), true),
            (false, false) => (limit.try_acquire(key), false),
        };
        let evictions = self.note_evictions(key, may_be_own);
        assert!(evictions <= 1);
        match &permit {
            Ok(_) => assert!(
                may_be_own || (!is_key_full && is_full == (evictions == 1)),
                "{key:?} got a permit beyond a limit"
            ),
            Err(AcquireError::Key) => assert!(is_key_full),
            Err(AcquireError::Total) => assert!(is_full && !is_key_full && evictions == 0),
        }
        self.keep(permit.ok());
    }

    /// Waits for a permit for `key`.
    fn wait(&mut self, key: &Key, can_evict: bool) {
        let (limit, own) = (self.limit.clone(), key.clone());
        let mut wait: WaitFuture = Box::pin(async move {
            if can_evict {
                limit.acquire_evicting(&own).await
            } else {
                limit.acquire(&own).await
            }
        });
        let of_group = |waiting: &[(Key, WaitFuture)], group: &str| {
            waiting
                .iter()
                .filter(|(key, _)| key.group() == group)
                .count()
        };
        let most = GROUPS
            .map(|group| of_group(&self.waiting, group))
            .into_iter()
            .max();
        let is_full = self.waiting.len() >= self.limit.0.max_waiting;
        let own_waiters = of_group(&self.waiting, key.group());
        match wait.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Pending => self.waiting.push((key.clone(), wait)),
            Poll::Ready(None) => assert!(is_full && most == Some(own_waiters)),
            Poll::Ready(permit) => {
                self.note_evictions(key, false);
                self.keep(permit);
            }
        }
        let (granted, dropped) = self.poll();
        assert!(granted.is_empty(), "a new waiter frees no permit");
        // The newcomer takes the position of a waiter of the group with the most.
        for victim in dropped {
            assert!(is_full && victim.group() != key.group());
            assert_eq!(Some(of_group(&self.waiting, victim.group()) + 1), most);
        }
    }

    /// Releases a permit or gives up a wait, and checks which waiters get a permit.
    fn release(&mut self, random: &mut fastrand::Rng) {
        let candidates = self.held.len() + self.waiting.len();
        if candidates == 0 {
            return;
        }
        let index = random.usize(..candidates);
        let released = if let Some(waiter) = index.checked_sub(self.held.len()) {
            drop(self.waiting.remove(waiter));
            None
        } else if random.bool() {
            let held = &mut self.held[index];
            // A detached permit still counts for its key. One that was evicted counts for nothing.
            if !held.is_evicted && !held.can_be_evicted {
                held.is_detached = true;
                None
            } else {
                if !self.admits {
                    held.permit.set_in_use();
                }
                return;
            }
        } else {
            Some(self.held.remove(index))
        };
        let expected: Vec<Key> = {
            let mut due = self.due();
            due.sort_unstable();
            due.into_iter()
                .map(|index| self.waiting[index].0.clone())
                .collect()
        };
        match released {
            Some(held) => drop(held),
            None if index < self.held.len() => self.held[index].permit.detach(),
            None => {}
        }
        let (granted, dropped) = self.poll();
        assert_eq!(
            granted, expected,
            "the next waiter is of the group with the fewest permits"
        );
        assert!(dropped.is_empty());
    }

    fn check(&self) {
        let state = self.limit.0.state();
        assert_eq!(state.held, self.total());
        assert!(state.held <= self.limit.0.total, "over the total limit");
        assert!(self.waiting.len() <= self.limit.0.max_waiting);
        assert_eq!(state.waiting.len(), self.waiting.len());
        for group in GROUPS {
            assert_eq!(count(&state.groups, &group), self.of_group(group));
            for number in 0..2 {
                let key = Key(group, number);
                assert_eq!(count(&state.keys, &key), self.of_key(&key));
                assert!(
                    self.of_key(&key) <= self.limit.0.per_key,
                    "over the limit of a key"
                );
            }
        }
        drop(state);
        assert_eq!(
            self.due(),
            [] as [usize; 0],
            "a waiter waits although a permit is free"
        );
    }
}

#[test]
fn semaphore_agrees_with_a_model() {
    // Within a task, tokio would return `Pending` after a number of polls.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let _entered = runtime.enter();
    for_random_cases(CASES, |random| {
        let mut model = Model::new(random);
        for _ in 0..STEPS {
            let key = Key(GROUPS[random.usize(..GROUPS.len())], random.u32(..2));
            match random.u8(..5) {
                0 | 1 => model.acquire_now(&key, random),
                // A waiter's permit is in use.
                2 if !model.admits => model.wait(&key, random.bool()),
                _ => model.release(random),
            }
            model.check();
        }
        let limit = model.limit.clone();
        drop(model);
        assert!(is_empty(&limit));
    });
}

//! The permits and waiters of a [`super::FairSemaphore`], and the rules by which permits give way.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tokio::sync::{Notify, oneshot};

use super::FairPermit;
use crate::limits::FairKey;

#[derive(Debug)]
pub(super) struct State<K: FairKey> {
    next_id: u64,
    /// The number of permits that count towards the total.
    pub(super) held: usize,
    pub(super) keys: HashMap<K, usize>,
    pub(super) groups: HashMap<K::Group, usize>,
    /// The waiters, the oldest first.
    pub(super) waiting: BTreeMap<u64, PermitWaiter<K>>,
    pub(super) waiting_of: HashMap<K::Group, usize>,
    /// Permits that may be evicted in favour of other keys, the oldest first.
    pub(super) evictable: BTreeMap<u64, EvictablePermit<K>>,
}

#[derive(Debug)]
pub(super) struct PermitWaiter<K: FairKey> {
    pub(super) key: K,
    pub(super) kind: PermitKind,
    pub(super) granted: oneshot::Sender<FairPermit<K>>,
}

#[derive(Debug)]
pub(super) struct EvictablePermit<K: FairKey> {
    pub(super) key: K,
    pub(super) idle: bool,
    pub(super) notify: Arc<Notify>,
}

/// Whether a permit can be evicted, and its state when it is granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PermitKind {
    Permanent,
    Idle,
    InUse,
}

/// A permit that may be evicted next.
struct Candidate {
    id: u64,
    idle: bool,
    /// The number of permits that its key holds.
    held: usize,
}

impl<K: FairKey> State<K> {
    pub(super) fn new() -> Self {
        Self {
            next_id: 0,
            held: 0,
            keys: HashMap::new(),
            groups: HashMap::new(),
            waiting: BTreeMap::new(),
            waiting_of: HashMap::new(),
            evictable: BTreeMap::new(),
        }
    }

    pub(super) fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    pub(super) fn release(&mut self, id: u64, key: &K) {
        self.held -= 1;
        decrement(&mut self.groups, &key.group());
        self.evictable.remove(&id);
    }

    /// Removes and returns a waiter that may have a permit now: one of the group that holds the
    /// fewest. Among equals, the longest wait wins.
    pub(super) fn next_waiter(&mut self, per_key: usize) -> Option<PermitWaiter<K>> {
        let mut best: Option<(usize, u64)> = None;
        for (id, waiter) in &self.waiting {
            if count(&self.keys, &waiter.key) >= per_key {
                continue;
            }
            let held = count(&self.groups, &waiter.key.group());
            if best.is_none_or(|(fewest, _)| held < fewest) {
                best = Some((held, *id));
            }
            if held == 0 {
                break;
            }
        }
        best.and_then(|(_, id)| self.remove_waiter(id))
    }

    pub(super) fn remove_waiter(&mut self, id: u64) -> Option<PermitWaiter<K>> {
        let waiter = self.waiting.remove(&id)?;
        decrement(&mut self.waiting_of, &waiter.key.group());
        Some(waiter)
    }

    /// Makes room in the queue for `group`: drops the newest waiter of the group that has the most.
    /// Returns `false` if no group has more waiters than this one.
    pub(super) fn drop_waiter_for(&mut self, group: &K::Group) -> bool {
        let own = count(&self.waiting_of, group);
        let most = self.waiting_of.iter().max_by_key(|(_, waiting)| **waiting);
        let Some((most, _)) = most.filter(|(_, waiting)| **waiting > own) else {
            return false;
        };
        let newest = self
            .waiting
            .iter()
            .rev()
            .find(|(_, waiter)| waiter.key.group() == *most)
            .map(|(id, _)| *id);
        newest.and_then(|id| self.remove_waiter(id)).is_some()
    }

    /// Evicts a permit of another group that holds more than this key's, or else of another key in
    /// the same group. Returns `false` if no permit has to give way to this key.
    pub(super) fn evict_for(&mut self, key: &K) -> bool {
        let (own_group, own) = (key.group(), count(&self.keys, key));
        let own_of_group = count(&self.groups, &own_group);
        let largest = self.groups.iter().max_by_key(|(_, held)| **held);
        let of_other = largest
            .filter(|(_, held)| **held > own_of_group)
            .and_then(|(group, held)| Some((self.candidate(group)?, *held)))
            .filter(|(candidate, held)| candidate.gives_way(*held, own_of_group));
        let victim = of_other.map(|(candidate, _)| candidate).or_else(|| {
            self.candidate(&own_group)
                .filter(|candidate| candidate.gives_way(candidate.held, own))
        });
        victim.is_some_and(|victim| self.evict(victim.id))
    }

    /// Returns the permit that this group loses first.
    fn candidate(&self, group: &K::Group) -> Option<Candidate> {
        let of_group = self.keys.iter().filter(|(key, _)| key.group() == *group);
        let (most, held) = of_group.max_by_key(|(_, held)| **held)?;
        let of_most = || self.evictable.iter().filter(|(_, one)| one.key == *most);
        let (id, permit) = of_most()
            .find(|(_, one)| one.idle)
            .or_else(|| of_most().next_back())?;
        Some(Candidate {
            id: *id,
            idle: permit.idle,
            held: *held,
        })
    }

    pub(super) fn evict_oldest(&mut self, key: &K) {
        let oldest = self
            .evictable
            .iter()
            .find(|(_, one)| one.key == *key)
            .map(|(id, _)| *id);
        if let Some(id) = oldest {
            self.evict(id);
        }
    }

    fn evict(&mut self, id: u64) -> bool {
        let Some(victim) = self.evictable.remove(&id) else {
            return false;
        };
        decrement(&mut self.keys, &victim.key);
        self.release(id, &victim.key);
        victim.notify.notify_one();
        true
    }
}

impl Candidate {
    /// Returns whether a permit of a holder of `held` gives way to a holder of `other`.
    fn gives_way(&self, held: usize, other: usize) -> bool {
        held > other + usize::from(!self.idle)
    }
}

pub(super) fn count<T: std::hash::Hash + Eq>(counts: &HashMap<T, usize>, of: &T) -> usize {
    counts.get(of).copied().unwrap_or_default()
}

pub(super) fn decrement<T: std::hash::Hash + Eq>(counts: &mut HashMap<T, usize>, of: &T) {
    if let Some(count) = counts.get_mut(of) {
        *count -= 1;
        if *count == 0 {
            counts.remove(of);
        }
    }
}

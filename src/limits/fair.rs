//! A semaphore with a total limit and a limit per key, which stays fair when the total limit is
//! reached.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::timeout;

use super::FairKey;

mod permit;

pub use permit::FairPermit;

/// The longest wait of [`FairSemaphore::acquire_evicting`]. A token that waits in an exchange is
/// valid for at least 30 s more, or for a third of a shorter life.
pub const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(20);

/// A semaphore with `total` permits, at most `per_key` of them for one key. Clones share one state.
///
/// A released permit goes to a waiter of the group that holds the fewest permits, and among equals
/// to the one that has waited longest. When the queue is full, the newest waiter of the group with
/// the most waiters is dropped.
///
/// At the total limit, a permit that can be evicted gives way to a key that holds fewer: one of the
/// group that holds the most, and within it of the key that holds the most. The oldest idle permit
/// goes first, or else the newest. A permit in use gives way only if its group then still holds as
/// many as the other. Equal groups would otherwise evict each other without an end, and no long
/// work would ever be done.
#[derive(Debug)]
pub struct FairSemaphore<K: FairKey>(Arc<Inner<K>>);

/// The reason why no permit is available now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exhausted {
    /// This key holds as many permits as one key may.
    Key,
    /// All permits are held. This key's group holds the most, and no key of the group holds more
    /// than this one.
    Total,
}

#[derive(Debug)]
struct Inner<K: FairKey> {
    total: usize,
    per_key: usize,
    max_waiting: usize,
    state: Mutex<State<K>>,
}

#[derive(Debug)]
struct State<K: FairKey> {
    next_id: u64,
    /// The number of permits that count towards the total.
    held: usize,
    keys: HashMap<K, usize>,
    groups: HashMap<K::Group, usize>,
    /// The waiters, the oldest first.
    waiting: BTreeMap<u64, PermitWaiter<K>>,
    waiting_of: HashMap<K::Group, usize>,
    /// Permits that may be evicted in favour of other keys, the oldest first.
    evictable: BTreeMap<u64, Evictable<K>>,
}

#[derive(Debug)]
struct PermitWaiter<K: FairKey> {
    key: K,
    kind: PermitKind,
    granted: oneshot::Sender<FairPermit<K>>,
}

#[derive(Debug)]
struct Evictable<K: FairKey> {
    key: K,
    idle: bool,
    notify: Arc<Notify>,
}

/// Whether a permit can be evicted, and its state when it is granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PermitKind {
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

/// Removes its waiter from the queue when the wait ends.
struct WaitGuard<'l, K: FairKey> {
    limit: &'l Inner<K>,
    id: u64,
}

impl<K: FairKey> Clone for FairSemaphore<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K: FairKey> FairSemaphore<K> {
    /// Creates a semaphore of `total` permits, `per_key` for one key, each at least one. Any number
    /// of tasks may wait.
    pub fn new(total: usize, per_key: usize) -> Self {
        Self::with_waiting(total, per_key, usize::MAX)
    }

    /// Creates a semaphore that lets at most `max_waiting` tasks wait for a permit.
    pub fn with_waiting(total: usize, per_key: usize, max_waiting: usize) -> Self {
        let state = State {
            next_id: 0,
            held: 0,
            keys: HashMap::new(),
            groups: HashMap::new(),
            waiting: BTreeMap::new(),
            waiting_of: HashMap::new(),
            evictable: BTreeMap::new(),
        };
        let (total, per_key) = (total.max(1), per_key.max(1));
        Self(Arc::new(Inner {
            total,
            per_key,
            max_waiting,
            state: Mutex::new(state),
        }))
    }

    /// Does what [`FairSemaphore::acquire_evicting_within`] does, with [`ACQUIRE_TIMEOUT`].
    pub async fn acquire_evicting(&self, key: &K) -> Option<FairPermit<K>> {
        self.acquire_evicting_within(ACQUIRE_TIMEOUT, key).await
    }

    /// Waits for a permit, at most for `max_wait`. Returns `None` on timeout, or if the queue is
    /// full and no group has more waiters than this key's.
    pub async fn acquire_within(&self, max_wait: Duration, key: &K) -> Option<FairPermit<K>> {
        self.wait_within(max_wait, key, PermitKind::Permanent).await
    }

    /// Does the same for a permit that is in use at once, and that can be evicted later
    /// ([`FairPermit::evicted`]). At the total limit it evicts another permit instead of waiting.
    pub async fn acquire_evicting_within(
        &self,
        max_wait: Duration,
        key: &K,
    ) -> Option<FairPermit<K>> {
        self.wait_within(max_wait, key, PermitKind::InUse).await
    }

    async fn wait_within(
        &self,
        max_wait: Duration,
        key: &K,
        kind: PermitKind,
    ) -> Option<FairPermit<K>> {
        let (granted, guard) = match self.0.acquire_or_wait(key, kind) {
            Ok(permit) => return Some(permit),
            Err(None) => return None,
            Err(Some((granted, id))) => (granted, WaitGuard { limit: &self.0, id }),
        };
        let permit = timeout(max_wait, granted).await;
        drop(guard);
        permit.ok()?.ok()
    }

    /// Returns a permit if one is available now.
    pub fn try_acquire(&self, key: &K) -> Result<FairPermit<K>, Exhausted> {
        let mut state = self.0.state();
        self.0.check_key(&state, key)?;
        if state.held >= self.0.total {
            return Err(Exhausted::Total);
        }
        Ok(self.0.grant(&mut state, key, PermitKind::Permanent))
    }

    /// Returns a permit at once and always. It can be evicted later ([`FairPermit::evicted`]).
    ///
    /// At the key's own limit, the key's oldest permit is evicted. At the total limit, the victim
    /// is chosen as in [`FairSemaphore::try_acquire_evicting`], or else is the key's own oldest
    /// permit.
    pub fn admit(&self, key: &K) -> FairPermit<K> {
        let mut state = self.0.state();
        let is_key_full = self.0.check_key(&state, key).is_err();
        if is_key_full || (state.held >= self.0.total && !state.evict_for(key)) {
            state.evict_oldest(key);
        }
        self.0.grant(&mut state, key, PermitKind::Idle)
    }

    /// Returns an idle permit that can be evicted later ([`FairPermit::evicted`]). At the total
    /// limit it evicts another permit.
    pub fn try_acquire_evicting(&self, key: &K) -> Result<FairPermit<K>, Exhausted> {
        let mut state = self.0.state();
        self.0.check_key(&state, key)?;
        if state.held >= self.0.total && !state.evict_for(key) {
            return Err(Exhausted::Total);
        }
        Ok(self.0.grant(&mut state, key, PermitKind::Idle))
    }
}

impl<K: FairKey> Inner<K> {
    fn state(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_key(&self, state: &State<K>, key: &K) -> Result<(), Exhausted> {
        if count(&state.keys, key) < self.per_key {
            Ok(())
        } else {
            Err(Exhausted::Key)
        }
    }

    fn grant(self: &Arc<Self>, state: &mut State<K>, key: &K, kind: PermitKind) -> FairPermit<K> {
        let id = state.next_id();
        state.held += 1;
        *state.keys.entry(key.clone()).or_default() += 1;
        *state.groups.entry(key.group()).or_default() += 1;
        let eviction = (kind != PermitKind::Permanent).then(|| {
            let notify = Arc::new(Notify::new());
            let evictable = Evictable {
                key: key.clone(),
                idle: kind == PermitKind::Idle,
                notify: notify.clone(),
            };
            state.evictable.insert(id, evictable);
            notify
        });
        FairPermit {
            limit: self.clone(),
            key: key.clone(),
            id,
            released: AtomicBool::new(false),
            eviction,
        }
    }

    /// Returns a permit, or an entry in the queue, or `None` if the queue has no room for this key.
    #[expect(clippy::type_complexity, reason = "used once, right above")]
    fn acquire_or_wait(
        self: &Arc<Self>,
        key: &K,
        kind: PermitKind,
    ) -> Result<FairPermit<K>, Option<(oneshot::Receiver<FairPermit<K>>, u64)>> {
        let mut state = self.state();
        let may_evict = kind != PermitKind::Permanent;
        if self.check_key(&state, key).is_ok()
            && (state.held < self.total || (may_evict && state.evict_for(key)))
        {
            return Ok(self.grant(&mut state, key, kind));
        }
        if state.waiting.len() >= self.max_waiting && !state.drop_waiter_for(&key.group()) {
            return Err(None);
        }
        let (granted, receiver) = oneshot::channel();
        let id = state.next_id();
        *state.waiting_of.entry(key.group()).or_default() += 1;
        state.waiting.insert(
            id,
            PermitWaiter {
                key: key.clone(),
                kind,
                granted,
            },
        );
        Err(Some((receiver, id)))
    }

    /// Grants free permits to waiters.
    fn grant_to_waiters(self: &Arc<Self>, mut state: MutexGuard<'_, State<K>>) {
        let mut unclaimed = Vec::new();
        while state.held < self.total {
            let Some(waiter) = state.next_waiter(self.per_key) else {
                break;
            };
            let permit = self.grant(&mut state, &waiter.key, waiter.kind);
            // A waiter that has stopped waiting returns its permit here. It is dropped below, after
            // the lock that its drop takes.
            unclaimed.extend(waiter.granted.send(permit).err());
        }
        drop(state);
        drop(unclaimed);
    }
}

impl<K: FairKey> State<K> {
    fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn release(&mut self, id: u64, key: &K) {
        self.held -= 1;
        decrement(&mut self.groups, &key.group());
        self.evictable.remove(&id);
    }

    /// Removes and returns a waiter that may have a permit now: one of the group that holds the
    /// fewest. Among equals, the longest wait wins.
    fn next_waiter(&mut self, per_key: usize) -> Option<PermitWaiter<K>> {
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

    fn remove_waiter(&mut self, id: u64) -> Option<PermitWaiter<K>> {
        let waiter = self.waiting.remove(&id)?;
        decrement(&mut self.waiting_of, &waiter.key.group());
        Some(waiter)
    }

    /// Makes room in the queue for `group`: drops the newest waiter of the group that has the most.
    /// Returns `false` if no group has more waiters than this one.
    fn drop_waiter_for(&mut self, group: &K::Group) -> bool {
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
    fn evict_for(&mut self, key: &K) -> bool {
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

    fn evict_oldest(&mut self, key: &K) {
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

impl<K: FairKey> Drop for WaitGuard<'_, K> {
    fn drop(&mut self) {
        self.limit.state().remove_waiter(self.id);
    }
}

fn count<T: std::hash::Hash + Eq>(counts: &HashMap<T, usize>, of: &T) -> usize {
    counts.get(of).copied().unwrap_or_default()
}

fn decrement<T: std::hash::Hash + Eq>(counts: &mut HashMap<T, usize>, of: &T) {
    if let Some(count) = counts.get_mut(of) {
        *count -= 1;
        if *count == 0 {
            counts.remove(of);
        }
    }
}

#[cfg(test)]
mod tests;

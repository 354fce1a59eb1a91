//! A semaphore with a total limit and a limit per key, which stays fair when the total limit is
//! reached.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::timeout;

use super::FairKey;

mod permit;
mod state;

pub use permit::FairPermit;

use state::{EvictablePermit, PermitKind, PermitWaiter, State, count};

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
pub enum AcquireError {
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
        let (total, per_key) = (total.max(1), per_key.max(1));
        Self(Arc::new(Inner {
            total,
            per_key,
            max_waiting,
            state: Mutex::new(State::new()),
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

    /// Returns a permit if one is available now. Fails at the total limit, and at that of the key.
    pub fn try_acquire(&self, key: &K) -> Result<FairPermit<K>, AcquireError> {
        let mut state = self.0.state();
        self.0.check_key(&state, key)?;
        if state.held >= self.0.total {
            return Err(AcquireError::Total);
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
    /// limit it evicts another permit. Fails at the limit of the key, or if no other key has more.
    pub fn try_acquire_evicting(&self, key: &K) -> Result<FairPermit<K>, AcquireError> {
        let mut state = self.0.state();
        self.0.check_key(&state, key)?;
        if state.held >= self.0.total && !state.evict_for(key) {
            return Err(AcquireError::Total);
        }
        Ok(self.0.grant(&mut state, key, PermitKind::Idle))
    }
}

impl<K: FairKey> Inner<K> {
    fn state(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_key(&self, state: &State<K>, key: &K) -> Result<(), AcquireError> {
        if count(&state.keys, key) < self.per_key {
            Ok(())
        } else {
            Err(AcquireError::Key)
        }
    }

    fn grant(self: &Arc<Self>, state: &mut State<K>, key: &K, kind: PermitKind) -> FairPermit<K> {
        let id = state.next_id();
        state.held += 1;
        *state.keys.entry(key.clone()).or_default() += 1;
        *state.groups.entry(key.group()).or_default() += 1;
        let eviction = (kind != PermitKind::Permanent).then(|| {
            let notify = Arc::new(Notify::new());
            let evictable = EvictablePermit {
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

impl<K: FairKey> Drop for WaitGuard<'_, K> {
    fn drop(&mut self) {
        self.limit.state().remove_waiter(self.id);
    }
}

#[cfg(test)]
mod tests;

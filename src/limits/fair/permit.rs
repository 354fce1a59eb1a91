//! A permit of a [`super::FairSemaphore`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

use super::{Inner, decrement};
use crate::limits::FairKey;

/// A permit, which is released when it is dropped.
#[derive(Debug)]
pub struct FairPermit<K: FairKey> {
    pub(super) limit: Arc<Inner<K>>,
    pub(super) key: K,
    pub(super) id: u64,
    /// Whether `detach` has already taken the permit out of the total.
    pub(super) released: AtomicBool,
    pub(super) eviction: Option<Arc<Notify>>,
}

impl<K: FairKey> FairPermit<K> {
    /// Returns the key that holds this permit.
    pub fn key(&self) -> &K {
        &self.key
    }

    /// Waits until this permit has been evicted. By then it no longer counts.
    pub async fn evicted(&self) {
        match &self.eviction {
            Some(notify) => notify.notified().await,
            None => std::future::pending().await,
        }
    }

    /// Runs `work`, at most until this permit is evicted. By then the permit no longer counts, and
    /// `work` is dropped. Returns `None` in that case. A large `work` should be pinned, since the
    /// state of an async function has its arguments twice.
    pub async fn run<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            done = work => Some(done),
            () = self.evicted() => None,
        }
    }

    /// Marks the permit as in use: among one key's permits, those in use are evicted last.
    pub fn set_in_use(&self) {
        if let Some(one) = self.limit.state().evictable.get_mut(&self.id) {
            one.idle = false;
        }
    }

    /// Returns the permit to the total, for work that does not end. It still counts for its key.
    pub fn detach(&self) {
        let mut state = self.limit.state();
        if !self.released.swap(true, Ordering::Relaxed) {
            state.release(self.id, &self.key);
            self.limit.grant_to_waiters(state);
        }
    }
}

impl<K: FairKey> Drop for FairPermit<K> {
    fn drop(&mut self) {
        let mut state = self.limit.state();
        // An evicted permit no longer counts.
        let evicted = self.eviction.is_some() && !state.evictable.contains_key(&self.id);
        if !evicted {
            decrement(&mut state.keys, &self.key);
            if !self.released.load(Ordering::Relaxed) {
                state.release(self.id, &self.key);
            }
        }
        self.limit.grant_to_waiters(state);
    }
}

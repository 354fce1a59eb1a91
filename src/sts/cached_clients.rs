//! One client per server, and with it one pool of connections.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::error::Failure;

/// Clients by what they call. The configuration bounds their number.
///
/// Each has the number of times that CA certificates had been replaced when it was created: a later
/// one makes it outdated.
pub(crate) struct CachedClients<K, C>(Mutex<HashMap<K, (usize, C)>>);

impl<K: Clone + Eq + Hash, C: Clone> CachedClients<K, C> {
    /// Creates an empty one.
    pub(crate) fn new() -> Self {
        Self(Mutex::default())
    }

    /// Returns the client for `key`. Awaits `create` if there is none yet, or an outdated one.
    pub(crate) async fn get(
        &self,
        key: &K,
        replaced_roots: usize,
        create: impl Future<Output = Result<C, Failure>>,
    ) -> Result<C, Failure> {
        let is_current = |(before, _): &(usize, C)| *before == replaced_roots;
        let existing = self.lock().get(key).cloned();
        if let Some((_, client)) = existing.filter(is_current) {
            return Ok(client);
        }
        let created = create.await?;
        let mut clients = self.lock();
        // Keep the client of a concurrent call, and with it one pool of connections.
        if !clients.get(key).is_some_and(is_current) {
            clients.insert(key.clone(), (replaced_roots, created));
        }
        Ok(clients[key].1.clone())
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, HashMap<K, (usize, C)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

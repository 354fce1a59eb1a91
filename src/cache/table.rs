//! The table of all entries by SPIFFE ID, and its bounds.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry as At;

use super::CacheError;
use super::entry::{Entry, EntryState};
use crate::identity::SpiffeId;
use crate::policy::Policy;
use crate::role::Grant;

/// Maximum number of roles of one SPIFFE ID, cached failures included. A workload that requests
/// invented role names fills only its own entries (T22). Callers with other attested facts have
/// other entries. The sessions within chains do not count, since no request names one.
pub(super) const MAX_ROLES_PER_ID: usize = 16;

/// The table of entries. Its guards are held for moments, never across an await. An entry's lock is
/// taken inside a guard, never the other way round.
#[derive(Default)]
pub(super) struct EntryTable {
    by_spiffe_id: DashMap<SpiffeId, Vec<Arc<Entry>>>,
    count: AtomicUsize,
}

/// Finds the entry by the whole role definition (T17). Definitions are shared, so the comparison is
/// mostly one of addresses.
fn find_entry(entries: &[Arc<Entry>], grant: &Grant) -> Option<Arc<Entry>> {
    entries.iter().find(|entry| entry.grant == *grant).cloned()
}

impl EntryTable {
    pub(super) fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    pub(super) fn find(&self, grant: &Grant) -> Option<Arc<Entry>> {
        find_entry(&self.by_spiffe_id.get(&grant.spiffe_id)?, grant)
    }

    /// Returns all entries of a SPIFFE ID.
    pub(super) fn of(&self, spiffe_id: &SpiffeId) -> Vec<Arc<Entry>> {
        let entries = self.by_spiffe_id.get(spiffe_id);
        entries.map(|entries| entries.clone()).unwrap_or_default()
    }

    /// Returns the entry of `grant`, or adds one if `policy` is current. If a bound is reached, it
    /// first evicts an entry of the same SPIFFE ID, and calls `retire` for it.
    pub(super) fn find_or_add(
        &self,
        policy: &Arc<Policy>,
        grant: &Grant,
        is_current: &dyn Fn() -> bool,
        retire: impl Fn(&Arc<Entry>, &mut EntryState),
    ) -> Result<Arc<Entry>, CacheError> {
        let mut at = self.by_spiffe_id.entry(grant.spiffe_id.clone());
        if let At::Occupied(occupied) = &at
            && let Some(entry) = find_entry(occupied.get(), grant)
        {
            return Ok(entry);
        }
        // This shard of the table is locked. So either this finds the policy of a reload, or the
        // reload has yet to sweep this shard.
        if !is_current() {
            return Err(CacheError::Pending);
        }
        let is_of_limit = |entry: &Entry| {
            !entry.grant.is_hop() && entry.grant.details().facts == grant.details().facts
        };
        let counted = match &at {
            At::Occupied(occupied) => {
                let entries = occupied.get().iter();
                entries.filter(|entry| is_of_limit(entry)).count()
            }
            At::Vacant(_) => 0,
        };
        let at_role_limit = !grant.is_hop() && counted >= MAX_ROLES_PER_ID;
        if at_role_limit || !self.reserve(policy.limits.max_entries) {
            let evicted = match &mut at {
                At::Occupied(occupied) => {
                    let may_evict = |entry: &Entry| !at_role_limit || is_of_limit(entry);
                    evict_one(occupied.get_mut(), &retire, may_evict)
                }
                At::Vacant(_) => false,
            };
            if !evicted {
                return Err(if at_role_limit {
                    CacheError::TooManyRoles
                } else {
                    CacheError::Full
                });
            }
        }
        let entry = Entry::new(grant.clone(), policy.clone());
        at.or_default().push(entry.clone());
        Ok(entry)
    }

    fn reserve(&self, max_entries: usize) -> bool {
        let more = |count| (count < max_entries).then_some(count + 1);
        self.count
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .is_ok()
    }

    /// Removes a retired entry. The caller must hold neither an entry's lock nor a guard of the
    /// table.
    pub(super) fn remove(&self, entry: &Arc<Entry>) {
        let At::Occupied(mut occupied) = self.by_spiffe_id.entry(entry.grant.spiffe_id.clone())
        else {
            return;
        };
        let Some(index) = occupied
            .get()
            .iter()
            .position(|other| Arc::ptr_eq(other, entry))
        else {
            return;
        };
        occupied.get_mut().swap_remove(index);
        self.count.fetch_sub(1, Ordering::Relaxed);
        if occupied.get().is_empty() {
            occupied.remove();
        }
    }

    /// Removes the entries that `keep` rejects.
    pub(super) fn retain(&self, keep: impl Fn(&Arc<Entry>) -> bool) {
        self.by_spiffe_id.retain(|_, entries| {
            let previous = entries.len();
            entries.retain(&keep);
            self.count
                .fetch_sub(previous - entries.len(), Ordering::Relaxed);
            !entries.is_empty()
        });
    }

    pub(super) fn for_each(&self, mut visit: impl FnMut(&Arc<Entry>)) {
        self.by_spiffe_id
            .iter()
            .for_each(|entries| entries.iter().for_each(&mut visit));
    }
}

/// Evicts one entry that `may_evict`: one without credentials first, else the least recently used.
/// An entry with a running flight stays, since callers wait for it.
fn evict_one(
    entries: &mut Vec<Arc<Entry>>,
    retire: &impl Fn(&Arc<Entry>, &mut EntryState),
    may_evict: impl Fn(&Entry) -> bool,
) -> bool {
    let mut order: Vec<usize> = (0..entries.len()).collect();
    order.retain(|index| may_evict(&entries[*index]));
    order.sort_by_key(|index| {
        (
            entries[*index].current.load().is_some(),
            entries[*index].last_used(),
        )
    });
    for index in order {
        let mut state = entries[index].state();
        if state.flight.is_none() {
            retire(&entries[index], &mut state);
            drop(state);
            entries.swap_remove(index);
            return true;
        }
    }
    false
}

//! All places, by SPIFFE ID, and how many there may be.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry as At;

use super::entry::{CachedState, Entry};
use super::{CacheError, Generation};
use crate::identity::SpiffeId;
use crate::role::Grant;

/// Roles of one SPIFFE ID, negative answers included: one that makes up names of roles, where it may name them, fills its
/// own places only (attack 22).
pub(super) const MAX_ROLES_PER_ID: usize = 16;

/// The table. Its guards are held for moments, never over an await; places are locked inside, not the other way.
#[derive(Default)]
pub(super) struct EntryTable {
    by_owner: DashMap<SpiffeId, Vec<Arc<Entry>>>,
    count: AtomicUsize,
}

/// By the whole role definition (attack 17). Definitions are shared, so mostly their addresses tell.
fn find_entry(slots: &[Arc<Entry>], grant: &Grant) -> Option<Arc<Entry>> {
    slots.iter().find(|slot| slot.grant == *grant).cloned()
}

impl EntryTable {
    pub(super) fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    pub(super) fn find(&self, grant: &Grant) -> Option<Arc<Entry>> {
        find_entry(&self.by_owner.get(&grant.spiffe_id)?, grant)
    }

    /// The place for `grant`; a new one if that is allowed and there is room, or room can be made among those of the same
    /// SPIFFE ID. `end` is called for the one that goes.
    pub(super) fn find_or_add(
        &self,
        grant: &Grant,
        setup: &dyn Fn() -> Arc<Generation>,
        end: impl Fn(&Arc<Entry>, &mut CachedState),
    ) -> Result<Arc<Entry>, CacheError> {
        let mut at = self.by_owner.entry(grant.spiffe_id.clone());
        if let At::Occupied(owner) = &at
            && let Some(slot) = find_entry(owner.get(), grant)
        {
            return Ok(slot);
        }
        // While this part of the table is locked a reload can't pass by: either `keep` is the new one already, or the
        // reload is still to come here.
        let setup = setup();
        if !(setup.keep)(grant) {
            return Err(CacheError::Pending);
        }
        let crowded = matches!(&at, At::Occupied(owner) if owner.get().len() >= MAX_ROLES_PER_ID);
        if crowded || !self.reserve(setup.limits.max_entries) {
            let made = match &mut at {
                At::Occupied(owner) => evict_one(owner.get_mut(), &end),
                At::Vacant(_) => false,
            };
            if !made {
                return Err(if crowded {
                    CacheError::TooManyRoles
                } else {
                    CacheError::Full
                });
            }
        }
        let slot = Entry::new(grant.clone());
        at.or_default().push(slot.clone());
        Ok(slot)
    }

    fn reserve(&self, most: usize) -> bool {
        let more = |count| (count < most).then_some(count + 1);
        self.count
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .is_ok()
    }

    /// Takes out one that has ended. Nothing may be locked.
    pub(super) fn remove(&self, slot: &Arc<Entry>) {
        let At::Occupied(mut owner) = self.by_owner.entry(slot.grant.spiffe_id.clone()) else {
            return;
        };
        let Some(index) = owner
            .get()
            .iter()
            .position(|other| Arc::ptr_eq(other, slot))
        else {
            return;
        };
        owner.get_mut().swap_remove(index);
        self.count.fetch_sub(1, Ordering::Relaxed);
        if owner.get().is_empty() {
            owner.remove();
        }
    }

    /// Takes out those that `keep` is false for.
    pub(super) fn retain(&self, keep: impl Fn(&Arc<Entry>) -> bool) {
        self.by_owner.retain(|_, slots| {
            let before = slots.len();
            slots.retain(&keep);
            self.count
                .fetch_sub(before - slots.len(), Ordering::Relaxed);
            !slots.is_empty()
        });
    }

    pub(super) fn for_each(&self, mut look: impl FnMut(&Arc<Entry>)) {
        self.by_owner
            .iter()
            .for_each(|slots| slots.iter().for_each(&mut look));
    }
}

/// Ends one of them: one without credentials if there is one, else the least recently used; none with a flight under way,
/// since callers wait for those.
fn evict_one(slots: &mut Vec<Arc<Entry>>, end: &impl Fn(&Arc<Entry>, &mut CachedState)) -> bool {
    let mut order: Vec<usize> = (0..slots.len()).collect();
    order.sort_by_key(|index| {
        (
            slots[*index].current.load().is_some(),
            slots[*index].last_used(),
        )
    });
    for index in order {
        let mut state = slots[index].state();
        if state.flight.is_none() {
            end(&slots[index], &mut state);
            drop(state);
            slots.swap_remove(index);
            return true;
        }
    }
    false
}

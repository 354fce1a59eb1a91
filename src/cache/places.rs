//! All places, by SPIFFE ID, and how many there may be.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry as At;

use super::entry::{Slot, State};
use super::{CacheError, Setup};
use crate::identity::SpiffeId;
use crate::role::Grant;

/// Roles of one SPIFFE ID, negative answers included: one that makes up names of roles, where it may name them, fills its
/// own places only (attack 22).
pub(super) const ROLES_EACH: usize = 16;

/// The table. Its guards are held for moments, never over an await; places are locked inside, not the other way.
#[derive(Default)]
pub(super) struct Places {
    by_owner: DashMap<SpiffeId, Vec<Arc<Slot>>>,
    count: AtomicUsize,
}

/// By the whole role definition (attack 17). Definitions are shared, so mostly their addresses tell.
fn place_of(slots: &[Arc<Slot>], grant: &Grant) -> Option<Arc<Slot>> {
    slots.iter().find(|slot| slot.grant == *grant).cloned()
}

impl Places {
    pub(super) fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    pub(super) fn find(&self, grant: &Grant) -> Option<Arc<Slot>> {
        place_of(&self.by_owner.get(&grant.spiffe_id)?, grant)
    }

    /// The place for `grant`; a new one if that is allowed and there is room, or room can be made among those of the same
    /// SPIFFE ID. `end` is called for the one that goes.
    pub(super) fn find_or_add(
        &self,
        grant: &Grant,
        setup: &dyn Fn() -> Arc<Setup>,
        end: impl Fn(&Arc<Slot>, &mut State),
    ) -> Result<Arc<Slot>, CacheError> {
        let mut at = self.by_owner.entry(grant.spiffe_id.clone());
        if let At::Occupied(owner) = &at
            && let Some(slot) = place_of(owner.get(), grant)
        {
            return Ok(slot);
        }
        // While this part of the table is locked a reload can't pass by: either `keep` is the new one already, or the
        // reload is still to come here.
        let setup = setup();
        if !(setup.keep)(grant) {
            return Err(CacheError::Pending);
        }
        let crowded = matches!(&at, At::Occupied(owner) if owner.get().len() >= ROLES_EACH);
        if crowded || !self.take_place(setup.limits.max_entries) {
            let made = match &mut at {
                At::Occupied(owner) => make_room(owner.get_mut(), &end),
                At::Vacant(_) => false,
            };
            if !made {
                return Err(if crowded { CacheError::TooManyRoles } else { CacheError::Full });
            }
        }
        let slot = Slot::new(grant.clone());
        at.or_default().push(slot.clone());
        Ok(slot)
    }

    fn take_place(&self, most: usize) -> bool {
        let more = |count| (count < most).then_some(count + 1);
        self.count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    /// Takes out one that has ended. Nothing may be locked.
    pub(super) fn remove(&self, slot: &Arc<Slot>) {
        let At::Occupied(mut owner) = self.by_owner.entry(slot.grant.spiffe_id.clone()) else { return };
        let Some(index) = owner.get().iter().position(|other| Arc::ptr_eq(other, slot)) else { return };
        owner.get_mut().swap_remove(index);
        self.count.fetch_sub(1, Ordering::Relaxed);
        if owner.get().is_empty() {
            owner.remove();
        }
    }

    /// Takes out those that `keep` is false for.
    pub(super) fn retain(&self, keep: impl Fn(&Arc<Slot>) -> bool) {
        self.by_owner.retain(|_, slots| {
            let before = slots.len();
            slots.retain(&keep);
            self.count.fetch_sub(before - slots.len(), Ordering::Relaxed);
            !slots.is_empty()
        });
    }

    pub(super) fn each(&self, mut look: impl FnMut(&Arc<Slot>)) {
        self.by_owner.iter().for_each(|slots| slots.iter().for_each(&mut look));
    }
}

/// Ends one of them: one without credentials if there is one, else the least recently used; none with a flight under way,
/// since callers wait for those.
fn make_room(slots: &mut Vec<Arc<Slot>>, end: &impl Fn(&Arc<Slot>, &mut State)) -> bool {
    let mut order: Vec<usize> = (0..slots.len()).collect();
    order.sort_by_key(|index| (slots[*index].current.load().is_some(), slots[*index].last_used()));
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

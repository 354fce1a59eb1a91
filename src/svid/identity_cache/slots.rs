//! The slots that subjects take, and the removal of subjects when there are none left.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::Duration;

use tokio::time::Instant;

use super::IdentityCache;
use super::cached_identity::CachedIdentity;
use super::subject::Subject;
use crate::caller::WorkloadKey;

/// Slots of one workload. Subjects that a workload invents fill only its own slots (T22).
pub(super) const MAX_SUBJECTS_PER_WORKLOAD: usize = 1024;
/// Minimum interval between two searches for processes that are gone.
pub(super) const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

impl IdentityCache {
    /// Makes room if there is none. It first removes subjects that are gone, then the oldest of the
    /// same workload. If the total is too high, it removes the oldest of the workload with the most
    /// slots.
    pub(super) fn has_room(&mut self, workload: &WorkloadKey, slots: usize) -> bool {
        let fits = |memory: &Self| {
            memory.fits_workload(workload, slots) && memory.used_slots + slots <= memory.max_slots
        };
        if fits(self) {
            return true;
        }
        if self
            .last_sweep
            .is_none_or(|last_sweep| last_sweep.elapsed() >= SWEEP_INTERVAL)
        {
            self.last_sweep = Some(Instant::now());
            self.remove_gone();
        }
        while !fits(self) {
            let largest = || {
                self.counts
                    .iter()
                    .max_by_key(|(_, count)| **count)
                    .map(|(workload, _)| workload.clone())
            };
            let victim = if self.fits_workload(workload, slots) {
                largest()
            } else {
                Some(workload.clone())
            };
            if !victim.is_some_and(|victim| self.remove_oldest(&victim)) {
                return false;
            }
        }
        true
    }

    fn fits_workload(&self, workload: &WorkloadKey, slots: usize) -> bool {
        self.counts.get(workload).copied().unwrap_or_default() + slots <= MAX_SUBJECTS_PER_WORKLOAD
    }

    /// Removes the workload's oldest subject without a query in flight. Returns `false` if it has
    /// none.
    fn remove_oldest(&mut self, workload: &WorkloadKey) -> bool {
        let candidates = self
            .cached
            .iter()
            .filter(|(_, cached)| cached.workload == *workload && cached.in_flight.is_none());
        let Some(oldest) = candidates
            .min_by_key(|(_, cached)| cached.at)
            .map(|(subject, _)| subject.clone())
        else {
            return false;
        };
        if let Some(cached) = self.cached.remove(&oldest) {
            self.release_slots(&cached);
        }
        true
    }

    fn remove_gone(&mut self) {
        let is_gone = |subject: &Subject, cached: &CachedIdentity| {
            cached.in_flight.is_none() && !subject.is_alive(&cached.caller)
        };
        let gone: Vec<_> = self
            .cached
            .extract_if(|subject, cached| is_gone(subject, cached))
            .collect();
        gone.iter()
            .for_each(|(_, cached)| self.release_slots(cached));
    }

    /// Releases the slots of a subject that was removed.
    pub(super) fn release_slots(&mut self, cached: &CachedIdentity) {
        self.used_slots -= cached.slots;
        release(&mut self.counts, &cached.workload, cached.slots);
        if !self.counts.contains_key(&cached.workload) {
            self.pauses.remove(&cached.workload);
        }
    }
}

/// Subtracts from a workload's count.
pub(super) fn release(
    counts: &mut HashMap<WorkloadKey, usize>,
    workload: &WorkloadKey,
    number: usize,
) {
    if let Entry::Occupied(mut count) = counts.entry(workload.clone()) {
        *count.get_mut() -= number;
        if *count.get() == 0 {
            count.remove();
        }
    }
}

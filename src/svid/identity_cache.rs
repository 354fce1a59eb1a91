//! Cache of the identities that an agent returned for processes and pods, so that a known one costs
//! no call.
//!
//! It only stores results and their times. [`super::agent_source`] sends the queries.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::SourceError;
use crate::backoff::{Backoff, Jitter};
use crate::caller::{Caller, WorkloadKey};

mod agent_clock;
mod cached_identity;
mod slots;
mod subject;

pub(super) use cached_identity::{IdentityLookup, IdentityResult, Lane, QUICK_TIMEOUT};
pub(super) use subject::{FACTS_FOR_AGENT, Subject, has_all_facts};

use agent_clock::AgentClock;
use cached_identity::{CachedIdentity, REVALIDATE_AFTER};
use slots::release;

/// Number of subjects of one workload that requests may wait for at once. Further requests are
/// rejected at once. Behind so many others they would wait in vain, and soon use up the workload's
/// connections, beyond which connections are reset without a response.
const MAX_WAITING_PER_WORKLOAD: usize = 256;
/// Time for which a workload is not revalidated after a query about it timed out. It doubles with
/// each further timeout. An agent continues to hash a program after its client has given up.
const REVALIDATION_PAUSE: Duration = Duration::from_secs(30);
const MAX_REVALIDATION_PAUSE: Duration = Duration::from_secs(300);
const REVALIDATION_BACKOFF: Backoff =
    Backoff::new(REVALIDATION_PAUSE, MAX_REVALIDATION_PAUSE, Jitter::None);
/// An agent was unavailable if it answered no query for this long.
const OUTAGE_AFTER: Duration = Duration::from_secs(60);

/// Number of further queries about known subjects that may be in flight.
#[derive(Debug, Clone, Copy)]
pub(super) struct Capacity {
    /// Number of further queries in [`Lane::Quick`].
    pub(super) quick: usize,
    /// Number of further queries in [`Lane::Slow`].
    pub(super) slow: usize,
}

/// A query about a known subject. [`IdentityCache`] counts it as in flight until its result is
/// recorded.
#[derive(Debug)]
pub(super) struct Query {
    pub(super) subject: Subject,
    pub(super) caller: Arc<Caller>,
    pub(super) lane: Lane,
}

/// Subjects that are due at one moment.
#[derive(Debug, Default)]
pub(super) struct Revalidation {
    pub(super) queries: Vec<Query>,
    /// Callers with expired identities: the agent has not confirmed them for 10 minutes.
    pub(super) expired: Vec<Arc<Caller>>,
    /// True if the confirmation of a process is late.
    pub(super) is_overdue: bool,
}

/// One clock for processes and one for pods. A kubelet that does not respond only prevents the
/// attestation of pods.
#[derive(Debug, Default)]
struct Clocks {
    processes: AgentClock,
    pods: AgentClock,
}

impl Clocks {
    fn of(&self, subject: &Subject) -> &AgentClock {
        match subject {
            Subject::Process { .. } => &self.processes,
            Subject::Pod(_) => &self.pods,
        }
    }

    fn of_mut(&mut self, subject: &Subject) -> &mut AgentClock {
        match subject {
            Subject::Process { .. } => &mut self.processes,
            Subject::Pod(_) => &mut self.pods,
        }
    }
}

/// Time until which a workload is not revalidated.
#[derive(Debug)]
struct RevalidationPause {
    until: Instant,
    failures: u32,
}

impl Default for RevalidationPause {
    fn default() -> Self {
        Self {
            until: Instant::now(),
            failures: 0,
        }
    }
}

impl RevalidationPause {
    fn lengthen(&mut self, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        self.until = now + REVALIDATION_BACKOFF.delay(self.failures);
    }
}

/// Cache of all subjects that an agent was queried about.
#[derive(Debug)]
pub(super) struct IdentityCache {
    max_slots: usize,
    cached: HashMap<Subject, CachedIdentity>,
    /// Slots in use, in total and of each workload.
    used_slots: usize,
    counts: HashMap<WorkloadKey, usize>,
    /// Number of queries in flight of each workload that requests wait for.
    waiting: HashMap<WorkloadKey, usize>,
    /// Workloads with a revalidation in flight.
    revalidating: HashSet<WorkloadKey>,
    /// Workloads with a timeout in their last query. The agent may still be busy with it.
    pauses: HashMap<WorkloadKey, RevalidationPause>,
    /// Time of the agent's last answer.
    answered: Instant,
    clocks: Clocks,
    /// Time of the last search for subjects that are gone.
    last_sweep: Option<Instant>,
}

impl IdentityCache {
    /// Creates a cache with slots for `max_slots` processes, or for fewer with long names.
    pub(super) fn new(max_slots: usize) -> Self {
        Self {
            max_slots,
            cached: HashMap::new(),
            used_slots: 0,
            counts: HashMap::new(),
            waiting: HashMap::new(),
            revalidating: HashSet::new(),
            pauses: HashMap::new(),
            answered: Instant::now(),
            clocks: Clocks::default(),
            last_sweep: None,
        }
    }

    /// Returns the cached identities of `subject`, or the query to wait for. After
    /// [`IdentityLookup::Unknown`] the caller of this function has to send the query.
    pub(super) fn find(
        &mut self,
        subject: &Subject,
        caller: &Arc<Caller>,
    ) -> Result<IdentityLookup, SourceError> {
        let clock = *self.clocks.of(subject);
        if let Some(found) = self
            .cached
            .get(subject)
            .and_then(|cached| cached.lookup(clock))
        {
            return Ok(found);
        }
        let workload = caller.peer.workload_key();
        if self
            .waiting
            .get(&workload)
            .is_some_and(|waiting| *waiting >= MAX_WAITING_PER_WORKLOAD)
        {
            return Err(SourceError::Busy);
        }
        let cached = match self.cached.get_mut(subject) {
            Some(cached) => cached,
            None => self.add(subject, caller, &workload)?,
        };
        cached.caller = caller.clone();
        cached.has_waiters = true;
        let receiver = cached
            .in_flight
            .insert(watch::Sender::new(None))
            .subscribe();
        *self.waiting.entry(workload).or_default() += 1;
        Ok(IdentityLookup::Unknown(receiver))
    }

    /// Adds a new subject, if there is room.
    fn add(
        &mut self,
        subject: &Subject,
        caller: &Arc<Caller>,
        workload: &WorkloadKey,
    ) -> Result<&mut CachedIdentity, SourceError> {
        let cached = CachedIdentity::new(caller, workload);
        if !self.has_room(workload, cached.slots) {
            return Err(SourceError::Busy);
        }
        *self.counts.entry(workload.clone()).or_default() += cached.slots;
        self.used_slots += cached.slots;
        Ok(self
            .cached
            .entry(subject.clone())
            .insert_entry(cached)
            .into_mut())
    }

    /// Records the result of a query that took this long, and passes it to the requests that wait.
    pub(super) fn record(&mut self, subject: &Subject, result: IdentityResult, duration: Duration) {
        let Entry::Occupied(mut entry) = self.cached.entry(subject.clone()) else {
            return;
        };
        let cached = entry.get_mut();
        let now = Instant::now();
        let clock = self.clocks.of_mut(subject);
        let is_answer = result.is_ok();
        if std::mem::take(&mut cached.has_waiters) {
            release(&mut self.waiting, &cached.workload, 1);
        } else {
            self.revalidating.remove(&cached.workload);
            if is_answer {
                clock.advance(cached.answered);
                self.pauses.remove(&cached.workload);
            } else if duration >= QUICK_TIMEOUT {
                self.pauses
                    .entry(cached.workload.clone())
                    .or_default()
                    .lengthen(now);
            }
        }
        cached.at = now;
        if is_answer {
            cached.answered = now;
        }
        cached.lane = if duration < QUICK_TIMEOUT {
            Lane::Quick
        } else {
            Lane::Slow
        };
        let sender = cached.in_flight.take();
        let (result, keep) = cached.take(result, *clock);
        if !keep {
            let cached = entry.remove();
            self.release_slots(&cached);
        }
        if is_answer {
            self.record_agent_answer(now);
        }
        if let Some(sender) = sender {
            sender.send_replace(Some(result));
        }
    }

    /// Records that the agent confirmed the daemon's own identity again, after an earlier time
    /// `previous`. Must only be called while no subject waits for a slot. On a node where all
    /// callers are attested slowly, nothing else advances the clock.
    pub(super) fn record_own_confirmation(&mut self, previous: Instant) {
        self.clocks.processes.advance(previous);
        self.record_agent_answer(Instant::now());
    }

    /// Ends all pauses after an outage, during which every query failed.
    fn record_agent_answer(&mut self, now: Instant) {
        if now.duration_since(self.answered) >= OUTAGE_AFTER {
            self.pauses.clear();
        }
        self.answered = now;
    }

    /// Takes the subjects that are due for revalidation: the most overdue first, one of each
    /// workload. Removes subjects that have no identity, or an expired one.
    pub(super) fn take_due(&mut self, mut capacity: Capacity) -> Revalidation {
        let now = Instant::now();
        let (mut batch, mut due, mut removed) = (Revalidation::default(), Vec::new(), Vec::new());
        for (subject, cached) in &mut self.cached {
            let has_identity = cached.has_identity();
            let is_process = matches!(subject, Subject::Process { .. });
            batch.is_overdue |=
                is_process && has_identity && cached.answered + 2 * REVALIDATE_AFTER < now;
            if cached.in_flight.is_some() {
                continue;
            }
            if has_identity && !cached.is_valid(*self.clocks.of(subject)) {
                batch.expired.push(cached.caller.clone());
                removed.push(subject.clone());
            } else if cached.revalidate_at() > now {
            } else if has_identity {
                due.push((cached.revalidate_at(), subject, cached));
            } else {
                removed.push(subject.clone());
            }
        }
        due.sort_unstable_by_key(|(due, ..)| *due);
        for (_, subject, cached) in due {
            let free = if cached.lane == Lane::Quick {
                &mut capacity.quick
            } else {
                &mut capacity.slow
            };
            let is_paused = self
                .pauses
                .get(&cached.workload)
                .is_some_and(|pause| pause.until > now);
            if *free > 0 && !is_paused && self.revalidating.insert(cached.workload.clone()) {
                *free -= 1;
                cached.in_flight = Some(watch::Sender::new(None));
                let (subject, caller, lane) = (subject.clone(), cached.caller.clone(), cached.lane);
                batch.queries.push(Query {
                    subject,
                    caller,
                    lane,
                });
            }
        }
        for subject in removed {
            if let Some(cached) = self.cached.remove(&subject) {
                self.release_slots(&cached);
            }
        }
        batch
    }

    /// Returns the number of cached subjects.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.cached.len()
    }
}

#[cfg(test)]
mod tests;

//! What an agent has said of processes and pods, so that one that is known costs no call.
//!
//! Only what is remembered, and for how long; who asks is [`super::agent_source`].

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::SourceError;
use crate::caller::{Caller, WorkloadKey};

mod agent_clock;
mod known;
mod subject;

pub(super) use known::{IdentityLookup, IdentityResult, Lane, QUICK_TIMEOUT};
pub(super) use subject::{FACTS_FOR_AGENT, Subject, is_known};

use agent_clock::AgentClock;
use known::{CachedIdentity, REVALIDATE_AFTER};

/// Slots of one workload: what it makes up fills its own slots only (attack 22).
const MAX_SUBJECTS_PER_WORKLOAD: usize = 1024;
/// Processes of one workload that are asked about because of a request, or wait for that. The next are told at once to come
/// back: with more in front of them they would wait in vain, and as many connections as they may have would soon be open, of
/// which those beyond are reset without a word.
const MAX_WAITING_PER_WORKLOAD: usize = 256;
/// How long a workload is not revalidated after a query about it was not answered in time; doubled after each further one. An
/// agent goes on hashing a program after its client has given up.
const REVALIDATION_PAUSE: Duration = Duration::from_secs(30);
const MAX_REVALIDATION_PAUSE: Duration = Duration::from_secs(300);
/// An agent was unavailable if it answered no query for this long.
const OUTAGE_AFTER: Duration = Duration::from_secs(60);
/// Between two looks for processes that are gone.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// How many more queries about known subjects may be in flight.
#[derive(Debug, Clone, Copy)]
pub(super) struct Capacity {
    /// In [`Lane::Quick`].
    pub(super) quick: usize,
    /// In [`Lane::Slow`].
    pub(super) slow: usize,
}

/// A query about a known subject. [`IdentityCache`] counts it as in flight until its result is noted.
#[derive(Debug)]
pub(super) struct Query {
    pub(super) subject: Subject,
    pub(super) caller: Arc<Caller>,
    pub(super) lane: Lane,
}

/// What is due at one moment.
#[derive(Debug, Default)]
pub(super) struct Revalidation {
    pub(super) queries: Vec<Query>,
    /// Callers whose identities have expired: the agent has not confirmed them for 10 minutes.
    pub(super) expired: Vec<Arc<Caller>>,
    /// Whether the confirmation of a process is late.
    pub(super) is_overdue: bool,
}

/// One clock for processes and one for pods. A kubelet that does not answer keeps the agent from attesting pods alone.
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

/// Until when a workload is not revalidated.
#[derive(Debug)]
struct Pause {
    until: Instant,
    length: Duration,
}

impl Default for Pause {
    fn default() -> Self {
        Self {
            until: Instant::now(),
            length: REVALIDATION_PAUSE / 2,
        }
    }
}

impl Pause {
    fn lengthen(&mut self, now: Instant) {
        self.length = (self.length * 2).min(MAX_REVALIDATION_PAUSE);
        self.until = now + self.length;
    }
}

/// All processes that an agent has said something of.
#[derive(Debug)]
pub(super) struct IdentityCache {
    most: usize,
    known: HashMap<Subject, CachedIdentity>,
    /// Slots of all subjects, and of each owner's.
    slots_taken: usize,
    counts: HashMap<WorkloadKey, usize>,
    /// For how many of them a question is under way because of a request.
    waiting: HashMap<WorkloadKey, usize>,
    /// Owners with a revalidation in flight.
    revalidating: HashSet<WorkloadKey>,
    /// Owners whose last query was not answered in time. The agent may still be busy with it.
    paused: HashMap<WorkloadKey, Pause>,
    /// When the agent last answered a query.
    answered: Instant,
    clocks: Clocks,
    /// When those that are gone were last looked for.
    swept: Option<Instant>,
}

impl IdentityCache {
    /// Has slots for `most` processes, or for fewer with long names.
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            known: HashMap::new(),
            slots_taken: 0,
            counts: HashMap::new(),
            waiting: HashMap::new(),
            revalidating: HashSet::new(),
            paused: HashMap::new(),
            answered: Instant::now(),
            clocks: Clocks::default(),
            swept: None,
        }
    }

    /// What is known of `subject`. If nothing is, and nobody has asked yet, the caller has to.
    pub(super) fn find(
        &mut self,
        subject: &Subject,
        caller: &Arc<Caller>,
    ) -> Result<IdentityLookup, SourceError> {
        let clock = *self.clocks.of(subject);
        if let Some(found) = self.known.get(subject).and_then(|known| known.found(clock)) {
            return Ok(found);
        }
        let owner = WorkloadKey::of(caller);
        if self
            .waiting
            .get(&owner)
            .is_some_and(|waiting| *waiting >= MAX_WAITING_PER_WORKLOAD)
        {
            return Err(SourceError::Busy);
        }
        let known = match self.known.get_mut(subject) {
            Some(known) => known,
            None => self.add(subject, caller, &owner)?,
        };
        known.caller = caller.clone();
        known.is_waited_for = true;
        let asked = known.asking.insert(watch::Sender::new(None)).subscribe();
        *self.waiting.entry(owner).or_default() += 1;
        Ok(IdentityLookup::Unknown(asked))
    }

    /// A place for one that was not known.
    fn add(
        &mut self,
        subject: &Subject,
        caller: &Arc<Caller>,
        owner: &WorkloadKey,
    ) -> Result<&mut CachedIdentity, SourceError> {
        let known = CachedIdentity::new(caller, owner);
        if !self.has_room(owner, known.slots) {
            return Err(SourceError::Busy);
        }
        *self.counts.entry(owner.clone()).or_default() += known.slots;
        self.slots_taken += known.slots;
        Ok(self
            .known
            .entry(subject.clone())
            .insert_entry(known)
            .into_mut())
    }

    /// Records the result of a query that took this long, and passes it to the requests that wait.
    pub(super) fn record(&mut self, subject: &Subject, said: IdentityResult, took: Duration) {
        let Entry::Occupied(mut entry) = self.known.entry(subject.clone()) else {
            return;
        };
        let known = entry.get_mut();
        let now = Instant::now();
        let clock = self.clocks.of_mut(subject);
        let is_answer = said.is_ok();
        if std::mem::take(&mut known.is_waited_for) {
            give_back(&mut self.waiting, &known.owner, 1);
        } else {
            self.revalidating.remove(&known.owner);
            if is_answer {
                clock.advance(known.answered);
                self.paused.remove(&known.owner);
            } else if took >= QUICK_TIMEOUT {
                self.paused
                    .entry(known.owner.clone())
                    .or_default()
                    .lengthen(now);
            }
        }
        known.at = now;
        if is_answer {
            known.answered = now;
        }
        known.lane = if took < QUICK_TIMEOUT {
            Lane::Quick
        } else {
            Lane::Slow
        };
        let told = known.asking.take();
        let (said, keep) = known.take(said, *clock);
        if !keep {
            let known = entry.remove();
            self.forgotten(&known);
        }
        if is_answer {
            self.agent_answered(now);
        }
        if let Some(told) = told {
            told.send_replace(Some(said));
        }
    }

    /// Records that the agent confirmed the daemon's own identity, as it did before at `before`. Only to be called while no
    /// subject waits for a slot. Where all callers of a node are attested slowly, nothing else advances the clock.
    pub(super) fn own_confirmed(&mut self, before: Instant) {
        self.clocks.processes.advance(before);
        self.agent_answered(Instant::now());
    }

    /// Ends all pauses after an outage, during which every query failed.
    fn agent_answered(&mut self, now: Instant) {
        if now.duration_since(self.answered) >= OUTAGE_AFTER {
            self.paused.clear();
        }
        self.answered = now;
    }

    /// Takes the subjects that are due for revalidation: the most overdue first, one of each owner. Removes subjects that have
    /// no identity, or whose identity has expired.
    pub(super) fn take_due(&mut self, mut room: Capacity) -> Revalidation {
        let now = Instant::now();
        let (mut round, mut due, mut forgotten) = (Revalidation::default(), Vec::new(), Vec::new());
        for (subject, known) in &mut self.known {
            let has_identity = known.has_identity();
            let is_process = matches!(subject, Subject::Process { .. });
            round.is_overdue |=
                is_process && has_identity && known.answered + 2 * REVALIDATE_AFTER < now;
            if known.asking.is_some() {
                continue;
            }
            if has_identity && !known.is_valid(*self.clocks.of(subject)) {
                round.expired.push(known.caller.clone());
                forgotten.push(subject.clone());
            } else if known.revalidate_at() > now {
            } else if has_identity {
                due.push((known.revalidate_at(), subject, known));
            } else {
                forgotten.push(subject.clone());
            }
        }
        due.sort_unstable_by_key(|(due, ..)| *due);
        for (_, subject, known) in due {
            let free = if known.lane == Lane::Quick {
                &mut room.quick
            } else {
                &mut room.slow
            };
            let is_paused = self
                .paused
                .get(&known.owner)
                .is_some_and(|pause| pause.until > now);
            if *free > 0 && !is_paused && self.revalidating.insert(known.owner.clone()) {
                *free -= 1;
                known.asking = Some(watch::Sender::new(None));
                let (subject, caller, lane) = (subject.clone(), known.caller.clone(), known.lane);
                round.queries.push(Query {
                    subject,
                    caller,
                    lane,
                });
            }
        }
        for subject in forgotten {
            if let Some(known) = self.known.remove(&subject) {
                self.forgotten(&known);
            }
        }
        round
    }

    /// How many are remembered.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    /// Makes room if there is none: first by those that are gone, then by the oldest of the same owner, or of the owner that
    /// has the most where all together are too many.
    fn has_room(&mut self, owner: &WorkloadKey, slots: usize) -> bool {
        let fits = |memory: &Self| {
            memory.own_fits(owner, slots) && memory.slots_taken + slots <= memory.most
        };
        if fits(self) {
            return true;
        }
        if self
            .swept
            .is_none_or(|swept| swept.elapsed() >= SWEEP_INTERVAL)
        {
            self.swept = Some(Instant::now());
            self.forget_gone();
        }
        while !fits(self) {
            let greediest = || {
                self.counts
                    .iter()
                    .max_by_key(|(_, count)| **count)
                    .map(|(owner, _)| owner.clone())
            };
            let victim = if self.own_fits(owner, slots) {
                greediest()
            } else {
                Some(owner.clone())
            };
            if !victim.is_some_and(|victim| self.forget_oldest(&victim)) {
                return false;
            }
        }
        true
    }

    fn own_fits(&self, owner: &WorkloadKey, slots: usize) -> bool {
        self.counts.get(owner).copied().unwrap_or_default() + slots <= MAX_SUBJECTS_PER_WORKLOAD
    }

    /// Removes the owner's oldest subject without a query in flight. `false` if it has none.
    fn forget_oldest(&mut self, owner: &WorkloadKey) -> bool {
        let its = self
            .known
            .iter()
            .filter(|(_, known)| known.owner == *owner && known.asking.is_none());
        let Some(oldest) = its
            .min_by_key(|(_, known)| known.at)
            .map(|(subject, _)| subject.clone())
        else {
            return false;
        };
        if let Some(known) = self.known.remove(&oldest) {
            self.forgotten(&known);
        }
        true
    }

    fn forget_gone(&mut self) {
        let is_gone = |subject: &Subject, known: &CachedIdentity| {
            known.asking.is_none() && !subject.is_alive(&known.caller)
        };
        let gone: Vec<_> = self
            .known
            .extract_if(|subject, known| is_gone(subject, known))
            .collect();
        gone.iter().for_each(|(_, known)| self.forgotten(known));
    }

    /// Gives back the slots of a subject that was removed.
    fn forgotten(&mut self, known: &CachedIdentity) {
        self.slots_taken -= known.slots;
        give_back(&mut self.counts, &known.owner, known.slots);
        if !self.counts.contains_key(&known.owner) {
            self.paused.remove(&known.owner);
        }
    }
}

fn give_back(counts: &mut HashMap<WorkloadKey, usize>, owner: &WorkloadKey, number: usize) {
    if let Entry::Occupied(mut count) = counts.entry(owner.clone()) {
        *count.get_mut() -= number;
        if *count.get() == 0 {
            count.remove();
        }
    }
}

#[cfg(test)]
mod tests;

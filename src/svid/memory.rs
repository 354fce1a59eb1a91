//! What an agent has said of processes and pods, so that one that is known costs no call.
//!
//! Only what is remembered, and for how long; who asks is [`super::attesting`].

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::SourceError;
use crate::caller::{Caller, Owner};

mod agent_clock;
mod known;
mod subject;

pub(super) use known::{Found, Lane, QUICK, Said};
pub(super) use subject::{LOOKS, Subject, is_known};

use agent_clock::AgentClock;
use known::{ASK_AGAIN, Known};

/// Places of one workload: what it makes up fills its own places only (attack 22).
const EACH: usize = 1024;
/// Processes of one workload that are asked about because of a request, or wait for that. The next are told at once to come
/// back: with more in front of them they would wait in vain, and as many connections as they may have would soon be open, of
/// which those beyond are reset without a word.
const WAITING: usize = 256;
/// After a question that was not answered in time no process of the same workload is asked about again for so long, twice as
/// long after each one that follows: an agent does not stop hashing a program because nobody waits any more.
const PAUSE: Duration = Duration::from_secs(30);
const PAUSE_MAX: Duration = Duration::from_secs(300);
/// An agent that has answered about nobody for so long was unavailable.
const OUTAGE: Duration = Duration::from_secs(60);
/// Between two looks for processes that are gone.
const SWEEP: Duration = Duration::from_secs(1);

/// How many more questions about known subjects may be under way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    /// In [`Lane::Quick`].
    pub(super) quick: usize,
    /// In [`Lane::Slow`].
    pub(super) slow: usize,
}

/// A question about a known subject, which is under way once it is here.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) subject: Subject,
    pub(super) caller: Arc<Caller>,
    pub(super) lane: Lane,
}

/// What is to be done about those that are known.
#[derive(Debug, Default)]
pub(super) struct Round {
    pub(super) questions: Vec<Question>,
    /// Those that are believed no longer, and forgotten: see [`MAX_UNCONFIRMED`].
    pub(super) unbelieved: Vec<Arc<Caller>>,
    /// Whether a process is known that should have been confirmed long ago.
    pub(super) is_overdue: bool,
}

/// One clock for processes and one for pods: what keeps the agent from attesting the ones, such as a kubelet that does not
/// answer, may leave the others alone.
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

/// Until when nobody of a workload is asked about again.
#[derive(Debug)]
struct Pause {
    until: Instant,
    length: Duration,
}

impl Default for Pause {
    fn default() -> Self {
        Self { until: Instant::now(), length: PAUSE / 2 }
    }
}

impl Pause {
    fn lengthen(&mut self, now: Instant) {
        self.length = (self.length * 2).min(PAUSE_MAX);
        self.until = now + self.length;
    }
}

/// All processes that an agent has said something of.
#[derive(Debug)]
pub(super) struct Memory {
    most: usize,
    known: HashMap<Subject, Known>,
    /// Places, of all and of each owner.
    taken: usize,
    counts: HashMap<Owner, usize>,
    /// For how many of them a question is under way because of a request.
    waiting: HashMap<Owner, usize>,
    /// Whose processes are being asked about again.
    asking_again: HashSet<Owner>,
    /// Workloads whose last question was not answered in time: the agent may still be at work on it.
    paused: HashMap<Owner, Pause>,
    /// When the agent last answered about anybody.
    answered: Instant,
    clocks: Clocks,
    /// When those that are gone were last looked for.
    swept: Option<Instant>,
}

impl Memory {
    /// Room for `most` processes; for fewer where they have long names.
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            known: HashMap::new(),
            taken: 0,
            counts: HashMap::new(),
            waiting: HashMap::new(),
            asking_again: HashSet::new(),
            paused: HashMap::new(),
            answered: Instant::now(),
            clocks: Clocks::default(),
            swept: None,
        }
    }

    /// What is known of `subject`. If nothing is, and nobody has asked yet, the caller has to.
    pub(super) fn find(&mut self, subject: &Subject, caller: &Arc<Caller>) -> Result<Found, SourceError> {
        let clock = *self.clocks.of(subject);
        if let Some(found) = self.known.get(subject).and_then(|known| known.found(clock)) {
            return Ok(found);
        }
        let owner = Owner::of(caller);
        if self.waiting.get(&owner).is_some_and(|waiting| *waiting >= WAITING) {
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
        Ok(Found::Unknown(asked))
    }

    /// A place for one that was not known.
    fn add(&mut self, subject: &Subject, caller: &Arc<Caller>, owner: &Owner) -> Result<&mut Known, SourceError> {
        let known = Known::new(caller, owner);
        if !self.has_room(owner, known.places) {
            return Err(SourceError::Busy);
        }
        *self.counts.entry(owner.clone()).or_default() += known.places;
        self.taken += known.places;
        Ok(self.known.entry(subject.clone()).insert_entry(known).into_mut())
    }

    /// Notes what was said of `subject` after `took`, and tells it to all who wait.
    pub(super) fn note(&mut self, subject: &Subject, said: Said, took: Duration) {
        let Entry::Occupied(mut entry) = self.known.entry(subject.clone()) else { return };
        let known = entry.get_mut();
        let now = Instant::now();
        let clock = self.clocks.of_mut(subject);
        let is_answer = said.is_ok();
        if std::mem::take(&mut known.is_waited_for) {
            give_back(&mut self.waiting, &known.owner, 1);
        } else {
            self.asking_again.remove(&known.owner);
            if is_answer {
                clock.advance(known.answered);
                self.paused.remove(&known.owner);
            } else if took >= QUICK {
                self.paused.entry(known.owner.clone()).or_default().lengthen(now);
            }
        }
        known.at = now;
        if is_answer {
            known.answered = now;
        }
        known.lane = if took < QUICK { Lane::Quick } else { Lane::Slow };
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

    /// The agent has confirmed who the daemon itself is, as it last did at `before`, while nobody waited to be asked about. On
    /// a node where all others are attested slowly nothing else moves the clock.
    pub(super) fn own_confirmed(&mut self, before: Instant) {
        self.clocks.processes.advance(before);
        self.agent_answered(Instant::now());
    }

    /// After an outage nobody is asked about late because he was not answered during it.
    fn agent_answered(&mut self, now: Instant) {
        if now.duration_since(self.answered) >= OUTAGE {
            self.paused.clear();
        }
        self.answered = now;
    }

    /// Who is to be asked about again now: of each workload one at a time, and first those that have waited longest.
    /// Processes without an identity are forgotten instead.
    pub(super) fn round(&mut self, mut room: Room) -> Round {
        let now = Instant::now();
        let (mut round, mut due, mut forgotten) = (Round::default(), Vec::new(), Vec::new());
        for (subject, known) in &mut self.known {
            let has_identity = known.has_identity();
            let is_process = matches!(subject, Subject::Process { .. });
            round.is_overdue |= is_process && has_identity && known.answered + 2 * ASK_AGAIN < now;
            if known.asking.is_some() {
                continue;
            }
            if has_identity && !known.is_believed(*self.clocks.of(subject)) {
                round.unbelieved.push(known.caller.clone());
                forgotten.push(subject.clone());
            } else if known.due() > now {
            } else if has_identity {
                due.push((known.due(), subject, known));
            } else {
                forgotten.push(subject.clone());
            }
        }
        due.sort_unstable_by_key(|(due, ..)| *due);
        for (_, subject, known) in due {
            let free = if known.lane == Lane::Quick { &mut room.quick } else { &mut room.slow };
            let is_paused = self.paused.get(&known.owner).is_some_and(|pause| pause.until > now);
            if *free > 0 && !is_paused && self.asking_again.insert(known.owner.clone()) {
                *free -= 1;
                known.asking = Some(watch::Sender::new(None));
                let (subject, caller, lane) = (subject.clone(), known.caller.clone(), known.lane);
                round.questions.push(Question { subject, caller, lane });
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
    fn has_room(&mut self, owner: &Owner, places: usize) -> bool {
        let fits = |memory: &Self| memory.own_fits(owner, places) && memory.taken + places <= memory.most;
        if fits(self) {
            return true;
        }
        if self.swept.is_none_or(|swept| swept.elapsed() >= SWEEP) {
            self.swept = Some(Instant::now());
            self.forget_gone();
        }
        while !fits(self) {
            let greediest = || self.counts.iter().max_by_key(|(_, count)| **count).map(|(owner, _)| owner.clone());
            let victim = if self.own_fits(owner, places) { greediest() } else { Some(owner.clone()) };
            if !victim.is_some_and(|victim| self.forget_oldest(&victim)) {
                return false;
            }
        }
        true
    }

    fn own_fits(&self, owner: &Owner, places: usize) -> bool {
        self.counts.get(owner).copied().unwrap_or_default() + places <= EACH
    }

    /// Whether there was one, about which nobody is being asked.
    fn forget_oldest(&mut self, owner: &Owner) -> bool {
        let its = self.known.iter().filter(|(_, known)| known.owner == *owner && known.asking.is_none());
        let Some(oldest) = its.min_by_key(|(_, known)| known.at).map(|(subject, _)| subject.clone()) else {
            return false;
        };
        if let Some(known) = self.known.remove(&oldest) {
            self.forgotten(&known);
        }
        true
    }

    fn forget_gone(&mut self) {
        let is_gone = |subject: &Subject, known: &Known| known.asking.is_none() && !subject.is_there(&known.caller);
        let gone: Vec<_> = self.known.extract_if(|subject, known| is_gone(subject, known)).collect();
        gone.iter().for_each(|(_, known)| self.forgotten(known));
    }

    /// One that is in the table no more gives its places back.
    fn forgotten(&mut self, known: &Known) {
        self.taken -= known.places;
        give_back(&mut self.counts, &known.owner, known.places);
        if !self.counts.contains_key(&known.owner) {
            self.paused.remove(&known.owner);
        }
    }
}

fn give_back(counts: &mut HashMap<Owner, usize>, owner: &Owner, number: usize) {
    if let Entry::Occupied(mut count) = counts.entry(owner.clone()) {
        *count.get_mut() -= number;
        if *count.get() == 0 {
            count.remove();
        }
    }
}

#[cfg(test)]
mod tests;

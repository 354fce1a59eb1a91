//! What an agent has said of processes and pods, so that one that is known costs no call.
//!
//! Only what is remembered, and for how long; who asks is [`super::attesting`].

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::SourceError;
use crate::caller::{Caller, GroupDetail, Looks, Owner, Process, Refusal};
use crate::cgroup::{CgroupPath, PodUid};
use crate::role::Identity;

/// What was said so long ago is asked again.
pub(super) const ASK_AGAIN: Duration = Duration::from_secs(30);
/// Two definite answers this far apart, without another in between, are the agent's last word: one alone may be an attestor
/// that failed for a moment, which looks just the same.
pub(super) const DENIALS_APART: Duration = Duration::from_secs(10);
/// After a question without an answer, where one is due.
const TRY_AGAIN: Duration = Duration::from_secs(5);
/// How long a process that has no identity is told so without asking: somebody may be registering it right now.
const NO_IDENTITY: Duration = Duration::from_secs(2);
/// Processes of one workload that are remembered: what it makes up fills its own places only (attack 22).
const EACH: usize = 1024;
/// Processes of one workload that are asked about because of a request, or wait for that. The next are told at once to come
/// back: with more in front of them they would wait in vain, and as many connections as they may have would soon be open, of
/// which those beyond are reset without a word.
const WAITING: usize = 256;
/// Between two looks for processes that are gone.
const SWEEP: Duration = Duration::from_secs(1);

/// Whom an agent was asked about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Subject {
    /// One process, with everything of it that may decide what it is: whoever changes any of it is another subject.
    Process {
        /// The user id.
        uid: u32,
        /// Its cgroup.
        cgroup: Option<CgroupPath>,
        /// All that was looked at.
        process: Process,
    },
    /// A pod, whichever of its processes asks.
    Pod(PodUid),
}

/// What an agent has to be told apart by.
pub(super) const LOOKS: Looks = Looks { groups: GroupDetail::Digest, program: true, started: true };

impl Subject {
    /// Of a caller; of its pod if it is in one and `pods` says that the agent is told of those, else of its process, which was
    /// looked at then.
    pub(super) fn of(caller: &Caller, pods: bool) -> Result<Self, SourceError> {
        if let Some(pod) = caller.pod.as_ref().filter(|_| pods) {
            return Ok(Self::Pod(pod.uid.clone()));
        }
        if !is_known(caller) {
            return Err(SourceError::Reloaded);
        }
        let mut process = caller.process.clone().ok_or(SourceError::Reloaded)?;
        let exe = process.program.as_mut().and_then(|program| program.exe.as_mut()).ok_or(Refusal::UnseenProgram)?;
        // The file is what counts. Its path is what the process shows, and reads otherwise once an upgrade has replaced it.
        (exe.changed, exe.path) = ((0, 0), Path::new("").into());
        Ok(Self::Process { uid: caller.uid, cgroup: caller.cgroup.clone(), process })
    }

    /// Whether it is there still, as `caller` shows, who is it or in it.
    fn is_there(&self, caller: &Caller) -> bool {
        match self {
            Self::Process { .. } => caller.evidence.is_there(),
            Self::Pod(_) => caller.evidence.pod().is_ok(),
        }
    }
}

/// Whether everything is known of the caller's process that a subject is made of.
pub(super) fn is_known(caller: &Caller) -> bool {
    let known = |process: &Process| process.groups.is_some() && process.program.is_some() && process.started.is_some();
    caller.process.as_ref().is_some_and(known)
}

/// What is told to all who wait for one question.
pub(super) type Said = Result<Arc<[Identity]>, SourceError>;
type Told = watch::Sender<Option<Said>>;

/// What there is for a request.
#[derive(Debug)]
pub(super) enum Found {
    /// It is known.
    Known(Arc<[Identity]>),
    /// It is being asked for.
    Asked(watch::Receiver<Option<Said>>),
    /// It has to be asked for, by whoever finds this.
    Unknown(watch::Receiver<Option<Said>>),
}

#[derive(Debug)]
struct Known {
    /// With proof of which process or pod it is.
    caller: Arc<Caller>,
    owner: Owner,
    /// `None` before the first answer.
    identities: Option<Arc<[Identity]>>,
    /// When the last answer or the last try came.
    at: Instant,
    /// Since when it is denied.
    denied: Option<Instant>,
    /// Who waits for the question that is under way, if one is.
    asking: Option<Told>,
    /// Whether that was asked because of a request: then it counts in [`Memory::waiting`].
    is_waited_for: bool,
}

impl Known {
    /// What there is for a request; `None` if it has to be asked for.
    fn found(&self) -> Option<Found> {
        let identities = self.identities.as_ref().filter(|ids| !ids.is_empty() || self.due() > Instant::now());
        match (identities, &self.asking) {
            (Some(identities), _) => Some(Found::Known(identities.clone())),
            (None, Some(told)) => Some(Found::Asked(told.subscribe())),
            (None, None) => None,
        }
    }

    /// When it is to be asked about again.
    fn due(&self) -> Instant {
        match (self.denied, &self.identities) {
            // The second question, which decides.
            (Some(since), _) => (since + DENIALS_APART).max(self.at + TRY_AGAIN),
            (None, Some(identities)) if identities.is_empty() => self.at + NO_IDENTITY,
            (None, _) => self.at + ASK_AGAIN,
        }
    }
}

/// All processes that an agent has said something of.
#[derive(Debug)]
pub(super) struct Memory {
    most: usize,
    known: HashMap<Subject, Known>,
    counts: HashMap<Owner, usize>,
    /// For how many of them a question is under way because of a request.
    waiting: HashMap<Owner, usize>,
    /// When those that are gone were last looked for.
    swept: Option<Instant>,
}

impl Memory {
    /// Room for `most` processes.
    pub(super) fn new(most: usize) -> Self {
        Self { most, known: HashMap::new(), counts: HashMap::new(), waiting: HashMap::new(), swept: None }
    }

    /// What is known of `subject`. If nothing is, and nobody has asked yet, the caller has to.
    pub(super) fn find(&mut self, subject: &Subject, caller: &Arc<Caller>) -> Result<Found, SourceError> {
        if let Some(found) = self.known.get(subject).and_then(Known::found) {
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
        if !self.has_room(owner) {
            return Err(SourceError::Busy);
        }
        *self.counts.entry(owner.clone()).or_default() += 1;
        let (caller, owner) = (caller.clone(), owner.clone());
        let known = Known {
            caller,
            owner,
            identities: None,
            at: Instant::now(),
            denied: None,
            asking: None,
            is_waited_for: false,
        };
        Ok(self.known.entry(subject.clone()).insert_entry(known).into_mut())
    }

    /// Notes what was said of `subject`, and tells it to all who wait.
    pub(super) fn note(&mut self, subject: &Subject, said: Said) {
        let Entry::Occupied(mut entry) = self.known.entry(subject.clone()) else { return };
        let known = entry.get_mut();
        let now = Instant::now();
        known.at = now;
        let told = known.asking.take();
        if std::mem::take(&mut known.is_waited_for) {
            take_one(&mut self.waiting, &known.owner);
        }
        let (said, keep) = match said {
            Ok(identities) if !identities.is_empty() => {
                known.denied = None;
                known.identities = Some(identities.clone());
                (Ok(identities), true)
            }
            Ok(none) => match &known.identities {
                // Once is not enough to take something away.
                Some(before)
                    if !before.is_empty() && now.duration_since(*known.denied.get_or_insert(now)) < DENIALS_APART =>
                {
                    (Ok(before.clone()), true)
                }
                _ => {
                    known.denied = None;
                    known.identities = Some(none.clone());
                    (Ok(none), true)
                }
            },
            // It is not the process any more that it was.
            Err(error @ SourceError::Caller(_)) => (Err(error), false),
            Err(error) => match &known.identities {
                Some(before) if !before.is_empty() => (Ok(before.clone()), true),
                _ => (Err(error), false),
            },
        };
        if !keep {
            let known = entry.remove();
            self.one_less(&known.owner);
        }
        if let Some(told) = told {
            told.send_replace(Some(said));
        }
    }

    /// Those that are to be asked about again, at most `most`, of which questions are under way from now on. Processes
    /// without an identity are forgotten instead.
    pub(super) fn due(&mut self, most: usize) -> Vec<(Subject, Arc<Caller>)> {
        let now = Instant::now();
        let mut due = Vec::new();
        let mut forgotten = Vec::new();
        for (subject, known) in &mut self.known {
            if known.asking.is_some() || known.due() > now {
                continue;
            }
            if known.identities.as_ref().is_none_or(|identities| identities.is_empty()) {
                forgotten.push(subject.clone());
            } else if due.len() < most {
                known.asking = Some(watch::Sender::new(None));
                due.push((subject.clone(), known.caller.clone()));
            }
        }
        for subject in forgotten {
            if let Some(known) = self.known.remove(&subject) {
                self.one_less(&known.owner);
            }
        }
        due
    }

    /// How many are remembered.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    /// Makes room if there is none: first by those that are gone, then by the oldest of the same owner, or of the owner that
    /// has the most where all together are too many.
    fn has_room(&mut self, owner: &Owner) -> bool {
        let own = |memory: &Self| memory.counts.get(owner).copied().unwrap_or_default();
        if self.known.len() < self.most && own(self) < EACH {
            return true;
        }
        if self.swept.is_none_or(|swept| swept.elapsed() >= SWEEP) {
            self.swept = Some(Instant::now());
            self.forget_gone();
        }
        let victim = if own(self) >= EACH {
            owner.clone()
        } else if self.known.len() >= self.most {
            let Some((most, _)) = self.counts.iter().max_by_key(|(_, count)| **count) else { return false };
            most.clone()
        } else {
            return true;
        };
        let its = self.known.iter().filter(|(_, known)| known.owner == victim && known.asking.is_none());
        let Some(oldest) = its.min_by_key(|(_, known)| known.at).map(|(subject, _)| subject.clone()) else {
            return false;
        };
        self.known.remove(&oldest);
        self.one_less(&victim);
        true
    }

    fn forget_gone(&mut self) {
        let counts = &mut self.counts;
        self.known.retain(|subject, known| {
            let keep = known.asking.is_some() || subject.is_there(&known.caller);
            if !keep {
                take_one(counts, &known.owner);
            }
            keep
        });
    }

    fn one_less(&mut self, owner: &Owner) {
        take_one(&mut self.counts, owner);
    }
}

fn take_one(counts: &mut HashMap<Owner, usize>, owner: &Owner) {
    if let Entry::Occupied(mut count) = counts.entry(owner.clone()) {
        *count.get_mut() -= 1;
        if *count.get() == 0 {
            count.remove();
        }
    }
}

#[cfg(test)]
mod tests;

//! A model of one entry under reloads. Loom runs every interleaving of its threads up to a bound,
//! with the stale loads that the memory model allows.
//!
//! It has the steps of the code under their names: `credentials_for` of the service, `find`,
//! `verify` and `retire` of the cache, `find_or_add` of the table, and `reload`. An exchange is the
//! gap between two locks of the entry's state. Each [`Mutant`] lacks one step, and has to fail: so
//! no step is there without need, and the model can fail.

use std::thread;

use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::sync::{Arc, Mutex};

/// A policy by its effect on the one grant. It is current at its index in a history.
#[derive(Debug, Clone, Copy, PartialEq)]
struct ModelPolicy {
    basis: u8,
    grants: bool,
}

const GRANTS: ModelPolicy = ModelPolicy {
    basis: 0,
    grants: true,
};
const OTHER_BASIS: ModelPolicy = ModelPolicy { basis: 1, ..GRANTS };
const DENIES: ModelPolicy = ModelPolicy {
    grants: false,
    ..GRANTS
};

/// Policies in the order of the reloads.
const HISTORIES: [&[ModelPolicy]; 6] = [
    &[GRANTS, GRANTS],
    &[GRANTS, OTHER_BASIS],
    &[GRANTS, DENIES],
    &[GRANTS, GRANTS, GRANTS],
    &[GRANTS, OTHER_BASIS, GRANTS],
    &[GRANTS, DENIES, GRANTS],
];

/// Bound of switches from a thread that could go on. Each [`Mutant`] shows with one of them, since
/// loads may be stale. `LOOM_MAX_PREEMPTIONS=2` takes 20 times as long, and passes too.
const MAX_PREEMPTIONS: usize = 1;

/// An error in the code.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Mutant {
    /// A request answers though its policy is outdated.
    NoAnswerCheck,
    /// A request uses an entry that its policy has not verified.
    NoVerification,
    /// A request that verifies an entry does not compare its policy with the current one.
    NoCheckInVerification,
    /// It compares them before it finds the entry.
    CheckBeforeFind,
    /// A request whose policy is outdated adds an entry.
    NoCheckOfAddition,
    /// It compares the policies before it locks the shard.
    CheckOutsideLock,
    /// A reload does not visit the entries.
    NoSweep,
    /// A reload retires entries before it stores its policy.
    SweepBeforeStore,
}

/// Each error, with a history in which it shows.
const MUTANTS: [(Mutant, &[ModelPolicy]); 8] = [
    (Mutant::NoAnswerCheck, &[GRANTS, OTHER_BASIS]),
    (Mutant::NoVerification, &[GRANTS, OTHER_BASIS]),
    (Mutant::NoCheckInVerification, &[GRANTS, OTHER_BASIS]),
    (Mutant::CheckBeforeFind, &[GRANTS, OTHER_BASIS]),
    (Mutant::NoCheckOfAddition, &[GRANTS, DENIES]),
    (Mutant::CheckOutsideLock, &[GRANTS, DENIES]),
    (Mutant::NoSweep, &[GRANTS, DENIES, GRANTS]),
    (Mutant::SweepBeforeStore, &[GRANTS, DENIES]),
];

struct ModelCache {
    history: &'static [ModelPolicy],
    mutant: Option<Mutant>,
    policy: AtomicUsize,
    /// The policy of the last reload that has returned. The code has no such field.
    complete: AtomicUsize,
    shard: Mutex<Option<Arc<ModelEntry>>>,
}

struct ModelEntry {
    added_by: usize,
    policy: AtomicUsize,
    credentials: AtomicBool,
    retired: Mutex<bool>,
}

enum ModelAnswer {
    Credentials { added_by: usize },
    Denied,
    Pending,
}

impl ModelCache {
    fn new(history: &'static [ModelPolicy], mutant: Option<Mutant>) -> Arc<Self> {
        Arc::new(Self {
            history,
            mutant,
            policy: AtomicUsize::new(0),
            complete: AtomicUsize::new(0),
            shard: Mutex::new(None),
        })
    }

    fn has(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    fn is_current(&self, policy: usize) -> bool {
        self.policy.load(Ordering::Acquire) == policy
    }

    fn keeps(&self, policy: usize, previous: usize) -> bool {
        let (policy, previous) = (self.history[policy], self.history[previous]);
        policy.grants && policy.basis == previous.basis
    }

    fn credentials_for(&self) {
        loop {
            let policy = self.policy.load(Ordering::Acquire);
            let answer = if self.history[policy].grants {
                self.find(policy)
            } else {
                ModelAnswer::Denied
            };
            let complete = self.complete.load(Ordering::Acquire);
            if self.has(Mutant::NoAnswerCheck) || self.is_current(policy) {
                return self.check(policy, complete, &answer);
            }
        }
    }

    /// Checks an answer that is about to be released.
    fn check(&self, policy: usize, complete: usize, answer: &ModelAnswer) {
        assert!(policy >= complete, "an outdated decision is released");
        match answer {
            ModelAnswer::Denied => {}
            ModelAnswer::Pending => panic!("a caller gets an error because of a reload"),
            ModelAnswer::Credentials { added_by } => {
                assert!(*added_by <= policy, "credentials of a later policy");
                assert!(
                    (*added_by..=policy).all(|policy| self.keeps(policy, *added_by)),
                    "credentials that a reload has withdrawn"
                );
            }
        }
    }

    fn find(&self, policy: usize) -> ModelAnswer {
        loop {
            if self.has(Mutant::CheckBeforeFind) && !self.is_current(policy) {
                return ModelAnswer::Pending;
            }
            let Some(entry) = self.find_or_add(policy) else {
                return ModelAnswer::Pending;
            };
            match self.verify(&entry, policy) {
                None => return ModelAnswer::Pending,
                Some(true) => {
                    if let Some(answer) = self.serve(&entry) {
                        return answer;
                    }
                }
                Some(false) => {}
            }
            let mut shard = self.shard.lock().unwrap();
            if shard
                .as_ref()
                .is_some_and(|other| Arc::ptr_eq(other, &entry))
            {
                *shard = None;
            }
        }
    }

    fn find_or_add(&self, policy: usize) -> Option<Arc<ModelEntry>> {
        if self.has(Mutant::CheckOutsideLock) && !self.is_current(policy) {
            return None;
        }
        let mut shard = self.shard.lock().unwrap();
        if let Some(entry) = &*shard {
            return Some(entry.clone());
        }
        let is_unchecked =
            self.has(Mutant::NoCheckOfAddition) || self.has(Mutant::CheckOutsideLock);
        if !is_unchecked && !self.is_current(policy) {
            return None;
        }
        let entry = Arc::new(ModelEntry {
            added_by: policy,
            policy: AtomicUsize::new(policy),
            credentials: AtomicBool::new(false),
            retired: Mutex::new(false),
        });
        *shard = Some(entry.clone());
        Some(entry)
    }

    fn verify(&self, entry: &ModelEntry, policy: usize) -> Option<bool> {
        let verified_by = entry.policy.load(Ordering::Acquire);
        if verified_by == policy || self.has(Mutant::NoVerification) {
            return Some(true);
        }
        let is_unchecked =
            self.has(Mutant::NoCheckInVerification) || self.has(Mutant::CheckBeforeFind);
        if !is_unchecked && !self.is_current(policy) {
            return None;
        }
        if !self.keeps(policy, verified_by) {
            retire(entry);
            return Some(false);
        }
        entry.policy.store(policy, Ordering::Release);
        Some(true)
    }

    /// Returns the credentials of the entry, or those of an exchange.
    fn serve(&self, entry: &ModelEntry) -> Option<ModelAnswer> {
        let added_by = entry.added_by;
        if entry.credentials.load(Ordering::Acquire) {
            return Some(ModelAnswer::Credentials { added_by });
        }
        if *entry.retired.lock().unwrap() {
            return None;
        }
        // The exchange runs here.
        let retired = entry.retired.lock().unwrap();
        if *retired {
            return Some(ModelAnswer::Pending);
        }
        entry.credentials.store(true, Ordering::Release);
        Some(ModelAnswer::Credentials { added_by })
    }

    fn reload(&self, policy: usize) {
        if self.has(Mutant::SweepBeforeStore) {
            let mut shard = self.shard.lock().unwrap();
            if let Some(entry) =
                shard.take_if(|entry| !self.keeps(policy, entry.policy.load(Ordering::Acquire)))
            {
                retire(&entry);
            }
        }
        self.policy.swap(policy, Ordering::AcqRel);
        if !self.has(Mutant::NoSweep) && !self.has(Mutant::SweepBeforeStore) {
            let mut shard = self.shard.lock().unwrap();
            shard.take_if(|entry| self.verify(entry, policy) == Some(false));
        }
        self.complete.store(policy, Ordering::Release);
    }
}

fn retire(entry: &ModelEntry) {
    let mut retired = entry.retired.lock().unwrap();
    *retired = true;
    entry.credentials.store(false, Ordering::Release);
}

/// Runs two requests during all reloads of the history, and one after them.
fn run(history: &'static [ModelPolicy], mutant: Option<Mutant>) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = model.preemption_bound.or(Some(MAX_PREEMPTIONS));
    model.check(move || {
        let cache = ModelCache::new(history, mutant);
        let requests = [cache.clone(), cache.clone()]
            .map(|cache| loom::thread::spawn(move || cache.credentials_for()));
        let last = history.len() - 1;
        for policy in 1..=last {
            cache.reload(policy);
        }
        for request in requests {
            request.join().unwrap();
        }
        cache.credentials_for();
        let shard = cache.shard.lock().unwrap();
        if let Some(entry) = &*shard {
            let verified_by = entry.policy.load(Ordering::Acquire);
            assert_eq!(
                verified_by, last,
                "an entry that the last reload has not verified"
            );
        }
    });
}

#[test]
fn reload_is_right_in_every_interleaving() {
    for history in HISTORIES {
        run(history, None);
    }
}

#[test]
fn each_step_of_a_reload_is_needed() {
    for (mutant, history) in MUTANTS {
        let fails = thread::spawn(move || run(history, Some(mutant)))
            .join()
            .is_err();
        assert!(fails, "{mutant:?} passes");
    }
}

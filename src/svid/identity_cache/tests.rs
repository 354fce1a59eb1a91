use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::time::advance;

use super::cached_identity::{NO_IDENTITY_TTL, RETRY_AFTER};
use super::slots::MAX_SUBJECTS_PER_WORKLOAD;
use super::*;
use crate::caller::{
    AttestError, Executable, GroupDetail, Groups, ListenerKind, PeerFacts, PeerProof, Process,
    Program,
};
use crate::cgroup::CgroupPath;
use crate::identity::SpiffeId;
use crate::role::Identity;
use crate::svid::DENIAL_CONFIRMATION;

mod revalidation;

#[derive(Debug)]
struct AliveSwitch(Arc<AtomicBool>);

#[async_trait::async_trait]
impl PeerProof for AliveSwitch {
    async fn verify_unchanged(&self) -> Result<(), AttestError> {
        Ok(())
    }

    fn is_alive(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

fn groups(groups: &[u32]) -> Groups {
    Groups::new(groups.to_vec(), GroupDetail::Digest).unwrap()
}

/// Returns a process of this user, and a switch that ends it.
fn process(uid: u32, pid: u32) -> (Arc<Caller>, Arc<AtomicBool>) {
    let exe = Executable {
        device: 1,
        inode: 7,
        changed: (1, 2),
        path: PathBuf::from("/bin/shop").into(),
    };
    let process = Process {
        pid,
        gid: uid,
        groups: Some(groups(&[])),
        in_container: false,
        program: Some(Program { exe: Some(exe) }),
        started: Some(u64::from(pid)),
    };
    let lives = Arc::new(AtomicBool::new(true));
    let evidence = Box::new(AliveSwitch(lives.clone()));
    let caller = Caller {
        listener: ListenerKind::Unix,
        peer: PeerFacts::of_user(uid),
        process: Some(process),
        proof: evidence,
    };
    (Arc::new(caller), lives)
}

fn ids(names: &[&str]) -> Arc<[Identity]> {
    let id = |name: &&str| SpiffeId::parse(&format!("spiffe://example.org/{name}")).unwrap();
    names
        .iter()
        .map(|name| Identity {
            spiffe_id: id(name),
            hint: None,
        })
        .collect()
}

fn unavailable() -> IdentityResult {
    Err(SourceError::Unavailable("away".to_owned()))
}

/// Returns the cached identities for a request by `caller`, or `None` if a query has to be sent.
#[track_caller]
fn found(cache: &mut IdentityCache, caller: &Arc<Caller>) -> Option<Arc<[Identity]>> {
    match cache
        .find(&Subject::of(caller, true).unwrap(), caller)
        .unwrap()
    {
        IdentityLookup::Cached(identities) => Some(identities),
        IdentityLookup::InFlight(_) | IdentityLookup::Unknown(_) => None,
    }
}

fn note(cache: &mut IdentityCache, caller: &Arc<Caller>, result: IdentityResult) {
    cache.record(&Subject::of(caller, true).unwrap(), result, Duration::ZERO);
}

/// Starts the queries that are due, and returns the user IDs of their callers.
fn due_pids(cache: &mut IdentityCache, quick: usize, slow: usize) -> Vec<u32> {
    let due_pids = cache.take_due(Capacity { quick, slow });
    due_pids
        .queries
        .into_iter()
        .map(|question| question.caller.peer.uid)
        .collect()
}

fn due(cache: &mut IdentityCache) -> usize {
    due_pids(cache, 100, 100).len()
}

#[tokio::test(start_paused = true)]
async fn query_is_shared_and_its_result_cached() {
    let (mut cache, (caller, _)) = (IdentityCache::new(10), process(1, 1));
    let subject = Subject::of(&caller, true).unwrap();
    assert!(matches!(
        cache.find(&subject, &caller),
        Ok(IdentityLookup::Unknown(_))
    ));
    let Ok(IdentityLookup::InFlight(mut queried)) = cache.find(&subject, &caller) else {
        panic!("its query is running")
    };
    note(&mut cache, &caller, Ok(ids(&["shop"])));
    let result = queried
        .wait_for(Option::is_some)
        .await
        .unwrap()
        .clone()
        .unwrap();
    assert_eq!(result, Ok(ids(&["shop"])));
    assert_eq!(found(&mut cache, &caller), Some(ids(&["shop"])));
}

#[tokio::test(start_paused = true)]
async fn process_with_a_changed_fact_is_another_subject() {
    let (caller, _) = process(1, 1);
    let base = Subject::of(&caller, true).unwrap();
    let change = |change: &dyn Fn(&mut Caller)| {
        let (other, _) = process(1, 1);
        let mut other = Arc::into_inner(other).unwrap();
        change(&mut other);
        Subject::of(&other, true).unwrap()
    };
    let exe = |inode| Program {
        exe: Some(Executable {
            device: 1,
            inode,
            changed: (1, 2),
            path: PathBuf::from("/bin/shop").into(),
        }),
    };
    assert_eq!(change(&|_| {}), base);
    // An upgrade replaced the file, but the process still runs the same program.
    let replaced = Executable {
        device: 1,
        inode: 7,
        changed: (3, 4),
        path: PathBuf::from("/bin/shop (deleted)").into(),
    };
    let replaced = Program {
        exe: Some(replaced),
    };
    assert_eq!(
        change(&|other| other.process.as_mut().unwrap().program = Some(replaced.clone())),
        base
    );
    assert_ne!(change(&|other| other.peer.uid = 2), base);
    assert_ne!(
        change(&|other| other.peer.cgroup = CgroupPath::parse("/x")),
        base
    );
    assert_ne!(
        change(&|other| other.process.as_mut().unwrap().pid = 2),
        base
    );
    assert_ne!(
        change(&|other| other.process.as_mut().unwrap().gid = 2),
        base
    );
    assert_ne!(
        change(&|other| other.process.as_mut().unwrap().started = Some(9)),
        base
    );
    assert_ne!(
        change(&|other| other.process.as_mut().unwrap().groups = Some(groups(&[5]))),
        base
    );
    assert_ne!(
        change(&|other| other.process.as_mut().unwrap().program = Some(exe(8))),
        base
    );
}

#[test]
fn process_without_facts_is_not_a_subject() {
    let unseen = |change: &dyn Fn(&mut Process)| {
        let mut other = Arc::into_inner(process(1, 1).0).unwrap();
        change(other.process.as_mut().unwrap());
        Subject::of(&other, true).unwrap_err()
    };
    assert_eq!(
        unseen(&|process| process.groups = None),
        SourceError::Reloaded
    );
    assert_eq!(
        unseen(&|process| process.started = None),
        SourceError::Reloaded
    );
    assert_eq!(
        unseen(&|process| process.program = None),
        SourceError::Reloaded
    );
    let no_exe = unseen(&|process| process.program = Some(Program { exe: None }));
    assert_eq!(no_exe, SourceError::Caller(AttestError::ExecUnobservable));
}

#[tokio::test(start_paused = true)]
async fn identity_is_revalidated_and_survives_an_outage() {
    let (mut cache, (caller, _)) = (IdentityCache::new(10), process(1, 1));
    assert_eq!(found(&mut cache, &caller), None);
    note(&mut cache, &caller, Ok(ids(&["shop"])));
    advance(REVALIDATE_AFTER - Duration::from_secs(1)).await;
    assert_eq!(due(&mut cache), 0);
    for _ in 0..100 {
        advance(REVALIDATE_AFTER).await;
        assert_eq!(due(&mut cache), 1);
        assert_eq!(due(&mut cache), 0, "its query is running");
        assert_eq!(
            found(&mut cache, &caller),
            Some(ids(&["shop"])),
            "no caller waits"
        );
        note(&mut cache, &caller, unavailable());
    }
    advance(REVALIDATE_AFTER).await;
    assert_eq!(due(&mut cache), 1);
    note(&mut cache, &caller, Ok(ids(&["other"])));
    assert_eq!(
        found(&mut cache, &caller),
        Some(ids(&["other"])),
        "another answer counts at once"
    );
}

#[tokio::test(start_paused = true)]
async fn second_denial_after_ten_seconds_removes_the_identity() {
    let (mut cache, (caller, _)) = (IdentityCache::new(10), process(1, 1));
    found(&mut cache, &caller);
    note(&mut cache, &caller, Ok(ids(&["shop"])));
    advance(REVALIDATE_AFTER).await;
    assert_eq!(due(&mut cache), 1);
    note(&mut cache, &caller, Ok(ids(&[])));
    assert_eq!(found(&mut cache, &caller), Some(ids(&["shop"])));
    advance(DENIAL_CONFIRMATION - Duration::from_secs(1)).await;
    assert_eq!(due(&mut cache), 0);
    advance(Duration::from_secs(1)).await;
    assert_eq!(due(&mut cache), 1);
    note(&mut cache, &caller, Ok(ids(&[])));
    assert_eq!(
        found(&mut cache, &caller),
        Some(ids(&[])),
        "it gets that result without a query"
    );
    advance(NO_IDENTITY_TTL).await;
    assert_eq!(found(&mut cache, &caller), None, "for a moment");
}

#[tokio::test(start_paused = true)]
async fn success_or_failure_between_denials_does_not_confirm() {
    let (mut cache, (caller, _)) = (IdentityCache::new(10), process(1, 1));
    found(&mut cache, &caller);
    note(&mut cache, &caller, Ok(ids(&["shop"])));
    let steps = [
        (REVALIDATE_AFTER, Ok(ids(&[])), ids(&["shop"])),
        (DENIAL_CONFIRMATION, unavailable(), ids(&["shop"])),
        (RETRY_AFTER, Ok(ids(&["shop"])), ids(&["shop"])),
        // The first of two denials, again.
        (REVALIDATE_AFTER, Ok(ids(&[])), ids(&["shop"])),
        (DENIAL_CONFIRMATION, Ok(ids(&[])), ids(&[])),
    ];
    for (step, (after, result, cached)) in steps.into_iter().enumerate() {
        advance(after).await;
        assert_eq!(due(&mut cache), 1, "{step}");
        note(&mut cache, &caller, result);
        assert_eq!(found(&mut cache, &caller), Some(cached), "{step}");
    }
}

#[tokio::test(start_paused = true)]
async fn changed_process_is_removed_and_failures_are_not_cached() {
    let (mut cache, (caller, _)) = (IdentityCache::new(10), process(1, 1));
    found(&mut cache, &caller);
    note(&mut cache, &caller, unavailable());
    assert_eq!(cache.len(), 0);
    found(&mut cache, &caller);
    note(&mut cache, &caller, Ok(ids(&["shop"])));
    advance(REVALIDATE_AFTER).await;
    assert_eq!(due(&mut cache), 1);
    note(&mut cache, &caller, Err(AttestError::CallerGone.into()));
    assert_eq!((cache.len(), cache.counts.len()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn subject_without_identity_is_removed_when_unused() {
    let (mut cache, (caller, _)) = (IdentityCache::new(10), process(1, 1));
    found(&mut cache, &caller);
    note(&mut cache, &caller, Ok(ids(&[])));
    advance(NO_IDENTITY_TTL).await;
    assert_eq!((due(&mut cache), cache.len()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn workload_fills_its_own_slots_and_gone_ones_are_evicted_first() {
    let mut cache = IdentityCache::new(MAX_SUBJECTS_PER_WORKLOAD + 10);
    let first: Vec<_> = (0..5).map(|pid| process(2, pid)).collect();
    for (caller, _) in &first {
        found(&mut cache, caller);
        note(&mut cache, caller, Ok(ids(&["modest"])));
    }
    let many: Vec<_> = (0..u32::try_from(MAX_SUBJECTS_PER_WORKLOAD).unwrap() + 100)
        .map(|pid| process(1, 100 + pid))
        .collect();
    let cached = |cache: &IdentityCache, caller: &Arc<Caller>| {
        cache
            .cached
            .contains_key(&Subject::of(caller, true).unwrap())
    };
    many[3].1.store(false, Ordering::SeqCst);
    for (caller, _) in &many[..MAX_SUBJECTS_PER_WORKLOAD] {
        found(&mut cache, caller);
        note(&mut cache, caller, Ok(ids(&["greedy"])));
        advance(Duration::from_millis(1)).await;
    }
    assert!(cached(&cache, &many[3].0), "there was room");
    let last = &many[MAX_SUBJECTS_PER_WORKLOAD].0;
    found(&mut cache, last);
    assert!(
        !cached(&cache, &many[3].0) && cached(&cache, &many[0].0),
        "the one that is gone made room"
    );
    for (caller, _) in &many[MAX_SUBJECTS_PER_WORKLOAD..] {
        found(&mut cache, caller);
        note(&mut cache, caller, Ok(ids(&["greedy"])));
    }
    assert_eq!(
        cache.counts.get(&WorkloadKey::user(1)),
        Some(&MAX_SUBJECTS_PER_WORKLOAD)
    );
    assert!(!cached(&cache, &many[0].0), "its oldest");
    for (caller, _) in &first {
        assert_eq!(found(&mut cache, caller), Some(ids(&["modest"])));
    }
    // If the total is too high, the workload with the most loses one.
    for pid in 0..20 {
        let (caller, _) = process(3, pid);
        assert_eq!(found(&mut cache, &caller), None);
        note(&mut cache, &caller, Ok(ids(&["third"])));
        assert_eq!(found(&mut cache, &caller), Some(ids(&["third"])));
    }
    for (caller, _) in &first {
        assert_eq!(found(&mut cache, caller), Some(ids(&["modest"])));
    }
    assert_eq!(cache.len(), MAX_SUBJECTS_PER_WORKLOAD + 10);
}

#[tokio::test(start_paused = true)]
async fn waiting_requests_of_a_workload_are_bounded() {
    let mut cache = IdentityCache::new(MAX_SUBJECTS_PER_WORKLOAD);
    let many = |pids: std::ops::Range<u32>| pids.map(|pid| process(1, pid).0).collect::<Vec<_>>();
    let waiting = u32::try_from(MAX_WAITING_PER_WORKLOAD).unwrap();
    let (cached, new) = (many(0..500), many(1000..1000 + waiting));
    for caller in &cached {
        found(&mut cache, caller);
        note(&mut cache, caller, Ok(ids(&["shop"])));
    }
    for caller in &new {
        assert_eq!(found(&mut cache, caller), None);
    }
    let is_busy = |cache: &mut IdentityCache| {
        let (next, _) = process(1, 9000);
        cache
            .find(&Subject::of(&next, true).unwrap(), &next)
            .unwrap_err()
            == SourceError::Busy
    };
    assert!(is_busy(&mut cache));
    assert!(
        cached
            .iter()
            .all(|caller| found(&mut cache, caller).is_some()),
        "those that are known are answered"
    );
    assert_eq!(
        found(&mut cache, &new[0]),
        None,
        "those that wait go on waiting"
    );
    assert_eq!(
        found(&mut cache, &process(2, 1).0),
        None,
        "another workload's is queried"
    );
    // A slot is free as soon as one of the queries ends, with any result.
    let ends = [
        Ok(ids(&["shop"])),
        Ok(ids(&[])),
        unavailable(),
        Err(AttestError::CallerGone.into()),
    ];
    for (result, (caller, other)) in ends.into_iter().zip(new.iter().zip(many(2000..2004))) {
        note(&mut cache, caller, result);
        assert_eq!(found(&mut cache, &other), None);
        assert!(is_busy(&mut cache));
    }
    // A query without waiting requests does not count.
    advance(REVALIDATE_AFTER).await;
    assert_eq!(due(&mut cache), 1);
    cached
        .iter()
        .for_each(|caller| note(&mut cache, caller, Ok(ids(&["shop"]))));
    assert!(is_busy(&mut cache));
    assert_eq!(
        cache.waiting.get(&WorkloadKey::user(1)),
        Some(&MAX_WAITING_PER_WORKLOAD)
    );
}

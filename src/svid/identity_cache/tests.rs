use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::time::advance;

use super::known::{DENIAL_CONFIRMATION, NO_IDENTITY_TTL, RETRY_AFTER};
use super::*;
use crate::caller::{
    AttestError, Executable, GroupDetail, Groups, ListenerKind, PeerProof, Process, Program,
};
use crate::cgroup::CgroupPath;
use crate::identity::SpiffeId;
use crate::role::Identity;

mod revalidation;

#[derive(Debug)]
struct Living(Arc<AtomicBool>);

#[async_trait::async_trait]
impl PeerProof for Living {
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

/// A process of this user, and whether it lives.
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
    let evidence = Box::new(Living(lives.clone()));
    let caller = Caller {
        listener: ListenerKind::Unix,
        uid,
        cgroup: None,
        pod: None,
        namespace: None,
        process: Some(process),
        evidence,
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

/// What a request by `caller` finds: its identities, or `None` if they have to be asked for.
#[track_caller]
fn found(memory: &mut IdentityCache, caller: &Arc<Caller>) -> Option<Arc<[Identity]>> {
    match memory
        .find(&Subject::of(caller, true).unwrap(), caller)
        .unwrap()
    {
        IdentityLookup::Known(identities) => Some(identities),
        IdentityLookup::Asked(_) | IdentityLookup::Unknown(_) => None,
    }
}

fn note(memory: &mut IdentityCache, caller: &Arc<Caller>, said: IdentityResult) {
    memory.record(&Subject::of(caller, true).unwrap(), said, Duration::ZERO);
}

/// Starts the queries that are due; returns the user ids of their callers.
fn round(memory: &mut IdentityCache, quick: usize, slow: usize) -> Vec<u32> {
    let round = memory.take_due(Capacity { quick, slow });
    round
        .queries
        .into_iter()
        .map(|question| question.caller.uid)
        .collect()
}

fn due(memory: &mut IdentityCache) -> usize {
    round(memory, 100, 100).len()
}

#[tokio::test(start_paused = true)]
async fn one_question_for_all_who_ask_and_none_afterwards() {
    let (mut memory, (caller, _)) = (IdentityCache::new(10), process(1, 1));
    let subject = Subject::of(&caller, true).unwrap();
    assert!(matches!(
        memory.find(&subject, &caller),
        Ok(IdentityLookup::Unknown(_))
    ));
    let Ok(IdentityLookup::Asked(mut asked)) = memory.find(&subject, &caller) else {
        panic!("it is being asked for")
    };
    note(&mut memory, &caller, Ok(ids(&["shop"])));
    let said = asked
        .wait_for(Option::is_some)
        .await
        .unwrap()
        .clone()
        .unwrap();
    assert_eq!(said, Ok(ids(&["shop"])));
    assert_eq!(found(&mut memory, &caller), Some(ids(&["shop"])));
}

#[tokio::test(start_paused = true)]
async fn whoever_changes_anything_is_another() {
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
    // Its file was replaced by an upgrade: it is the same program still.
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
    assert_ne!(change(&|other| other.uid = 2), base);
    assert_ne!(
        change(&|other| other.cgroup = CgroupPath::parse("/x")),
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
fn a_process_that_was_not_looked_at_is_nobody() {
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
async fn it_is_asked_again_when_it_is_old_and_an_outage_takes_nothing_away() {
    let (mut memory, (caller, _)) = (IdentityCache::new(10), process(1, 1));
    assert_eq!(found(&mut memory, &caller), None);
    note(&mut memory, &caller, Ok(ids(&["shop"])));
    advance(REVALIDATE_AFTER - Duration::from_secs(1)).await;
    assert_eq!(due(&mut memory), 0);
    for _ in 0..100 {
        advance(REVALIDATE_AFTER).await;
        assert_eq!(due(&mut memory), 1);
        assert_eq!(due(&mut memory), 0, "it is being asked for");
        assert_eq!(
            found(&mut memory, &caller),
            Some(ids(&["shop"])),
            "nobody waits"
        );
        note(&mut memory, &caller, unavailable());
    }
    advance(REVALIDATE_AFTER).await;
    assert_eq!(due(&mut memory), 1);
    note(&mut memory, &caller, Ok(ids(&["other"])));
    assert_eq!(
        found(&mut memory, &caller),
        Some(ids(&["other"])),
        "another answer counts at once"
    );
}

#[tokio::test(start_paused = true)]
async fn two_definite_answers_ten_seconds_apart_take_it_away() {
    let (mut memory, (caller, _)) = (IdentityCache::new(10), process(1, 1));
    found(&mut memory, &caller);
    note(&mut memory, &caller, Ok(ids(&["shop"])));
    advance(REVALIDATE_AFTER).await;
    assert_eq!(due(&mut memory), 1);
    note(&mut memory, &caller, Ok(ids(&[])));
    assert_eq!(found(&mut memory, &caller), Some(ids(&["shop"])));
    advance(DENIAL_CONFIRMATION - Duration::from_secs(1)).await;
    assert_eq!(due(&mut memory), 0);
    advance(Duration::from_secs(1)).await;
    assert_eq!(due(&mut memory), 1);
    note(&mut memory, &caller, Ok(ids(&[])));
    assert_eq!(
        found(&mut memory, &caller),
        Some(ids(&[])),
        "it is told so without a question"
    );
    advance(NO_IDENTITY_TTL).await;
    assert_eq!(found(&mut memory, &caller), None, "for a moment");
}

#[tokio::test(start_paused = true)]
async fn a_success_between_two_denials_or_no_answer_is_not_the_second() {
    let (mut memory, (caller, _)) = (IdentityCache::new(10), process(1, 1));
    found(&mut memory, &caller);
    note(&mut memory, &caller, Ok(ids(&["shop"])));
    let steps = [
        (REVALIDATE_AFTER, Ok(ids(&[])), ids(&["shop"])),
        (DENIAL_CONFIRMATION, unavailable(), ids(&["shop"])),
        (RETRY_AFTER, Ok(ids(&["shop"])), ids(&["shop"])),
        // The first one of two again.
        (REVALIDATE_AFTER, Ok(ids(&[])), ids(&["shop"])),
        (DENIAL_CONFIRMATION, Ok(ids(&[])), ids(&[])),
    ];
    for (step, (after, said, known)) in steps.into_iter().enumerate() {
        advance(after).await;
        assert_eq!(due(&mut memory), 1, "{step}");
        note(&mut memory, &caller, said);
        assert_eq!(found(&mut memory, &caller), Some(known), "{step}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_process_that_is_not_what_it_was_is_forgotten_and_a_failure_is_not_remembered() {
    let (mut memory, (caller, _)) = (IdentityCache::new(10), process(1, 1));
    found(&mut memory, &caller);
    note(&mut memory, &caller, unavailable());
    assert_eq!(memory.len(), 0);
    found(&mut memory, &caller);
    note(&mut memory, &caller, Ok(ids(&["shop"])));
    advance(REVALIDATE_AFTER).await;
    assert_eq!(due(&mut memory), 1);
    note(&mut memory, &caller, Err(AttestError::CallerGone.into()));
    assert_eq!((memory.len(), memory.counts.len()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn who_has_no_identity_is_forgotten_when_nobody_asks() {
    let (mut memory, (caller, _)) = (IdentityCache::new(10), process(1, 1));
    found(&mut memory, &caller);
    note(&mut memory, &caller, Ok(ids(&[])));
    advance(NO_IDENTITY_TTL).await;
    assert_eq!((due(&mut memory), memory.len()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn one_workload_fills_its_own_places_and_those_that_are_gone_go_first() {
    let mut memory = IdentityCache::new(MAX_SUBJECTS_PER_WORKLOAD + 10);
    let first: Vec<_> = (0..5).map(|pid| process(2, pid)).collect();
    for (caller, _) in &first {
        found(&mut memory, caller);
        note(&mut memory, caller, Ok(ids(&["modest"])));
    }
    let many: Vec<_> = (0..u32::try_from(MAX_SUBJECTS_PER_WORKLOAD).unwrap() + 100)
        .map(|pid| process(1, 100 + pid))
        .collect();
    let known = |memory: &IdentityCache, caller: &Arc<Caller>| {
        memory
            .known
            .contains_key(&Subject::of(caller, true).unwrap())
    };
    many[3].1.store(false, Ordering::SeqCst);
    for (caller, _) in &many[..MAX_SUBJECTS_PER_WORKLOAD] {
        found(&mut memory, caller);
        note(&mut memory, caller, Ok(ids(&["greedy"])));
        advance(Duration::from_millis(1)).await;
    }
    assert!(known(&memory, &many[3].0), "there was room");
    let last = &many[MAX_SUBJECTS_PER_WORKLOAD].0;
    found(&mut memory, last);
    assert!(
        !known(&memory, &many[3].0) && known(&memory, &many[0].0),
        "the one that is gone made room"
    );
    for (caller, _) in &many[MAX_SUBJECTS_PER_WORKLOAD..] {
        found(&mut memory, caller);
        note(&mut memory, caller, Ok(ids(&["greedy"])));
    }
    assert_eq!(
        memory.counts.get(&WorkloadKey::user(1)),
        Some(&MAX_SUBJECTS_PER_WORKLOAD)
    );
    assert!(!known(&memory, &many[0].0), "its oldest");
    for (caller, _) in &first {
        assert_eq!(found(&mut memory, caller), Some(ids(&["modest"])));
    }
    // Where all together are too many, the one that has the most has one less.
    for pid in 0..20 {
        let (caller, _) = process(3, pid);
        assert_eq!(found(&mut memory, &caller), None);
        note(&mut memory, &caller, Ok(ids(&["third"])));
        assert_eq!(found(&mut memory, &caller), Some(ids(&["third"])));
    }
    for (caller, _) in &first {
        assert_eq!(found(&mut memory, caller), Some(ids(&["modest"])));
    }
    assert_eq!(memory.len(), MAX_SUBJECTS_PER_WORKLOAD + 10);
}

#[tokio::test(start_paused = true)]
async fn of_one_workload_only_so_many_wait_and_the_next_push_nobody_out() {
    let mut memory = IdentityCache::new(MAX_SUBJECTS_PER_WORKLOAD);
    let many = |pids: std::ops::Range<u32>| pids.map(|pid| process(1, pid).0).collect::<Vec<_>>();
    let waiting = u32::try_from(MAX_WAITING_PER_WORKLOAD).unwrap();
    let (known, new) = (many(0..500), many(1000..1000 + waiting));
    for caller in &known {
        found(&mut memory, caller);
        note(&mut memory, caller, Ok(ids(&["shop"])));
    }
    for caller in &new {
        assert_eq!(found(&mut memory, caller), None);
    }
    let is_busy = |memory: &mut IdentityCache| {
        let (next, _) = process(1, 9000);
        memory
            .find(&Subject::of(&next, true).unwrap(), &next)
            .unwrap_err()
            == SourceError::Busy
    };
    assert!(is_busy(&mut memory));
    assert!(
        known
            .iter()
            .all(|caller| found(&mut memory, caller).is_some()),
        "those that are known are answered"
    );
    assert_eq!(
        found(&mut memory, &new[0]),
        None,
        "those that wait go on waiting"
    );
    assert_eq!(
        found(&mut memory, &process(2, 1).0),
        None,
        "another workload's is asked about"
    );
    // There is a place as soon as one of them is done with, however that ends.
    let ends = [
        Ok(ids(&["shop"])),
        Ok(ids(&[])),
        unavailable(),
        Err(AttestError::CallerGone.into()),
    ];
    for (said, (caller, other)) in ends.into_iter().zip(new.iter().zip(many(2000..2004))) {
        note(&mut memory, caller, said);
        assert_eq!(found(&mut memory, &other), None);
        assert!(is_busy(&mut memory));
    }
    // A question that nobody waits for takes none.
    advance(REVALIDATE_AFTER).await;
    assert_eq!(due(&mut memory), 1);
    known
        .iter()
        .for_each(|caller| note(&mut memory, caller, Ok(ids(&["shop"]))));
    assert!(is_busy(&mut memory));
    assert_eq!(
        memory.waiting.get(&WorkloadKey::user(1)),
        Some(&MAX_WAITING_PER_WORKLOAD)
    );
}

//! The order of revalidation, and what becomes of subjects without an answer.

use super::known::{BYTES_PER_SLOT, MAX_UNCONFIRMED};
use super::*;

/// What the agent says of one of these.
fn shop() -> IdentityResult {
    Ok(ids(&["shop"]))
}

fn learn(memory: &mut IdentityCache, uid: u32, pid: u32) -> Arc<Caller> {
    let (caller, _) = process(uid, pid);
    assert_eq!(found(memory, &caller), None);
    note(memory, &caller, shop());
    caller
}

fn note_slow(memory: &mut IdentityCache, caller: &Arc<Caller>, said: IdentityResult) {
    memory.record(&Subject::of(caller, true).unwrap(), said, QUICK_TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn round_takes_the_most_overdue_first_and_one_of_each_workload() {
    let mut memory = IdentityCache::new(1000);
    let mut greedy = Vec::new();
    for pid in 0..100 {
        greedy.push(learn(&mut memory, 1, pid));
        advance(Duration::from_millis(1)).await;
    }
    let mut others = Vec::new();
    for uid in [5, 3, 4, 2] {
        others.push(learn(&mut memory, uid, 1000));
        advance(Duration::from_millis(1)).await;
    }
    advance(REVALIDATE_AFTER).await;
    assert_eq!(round(&mut memory, 3, 9), [1, 5, 3]);
    assert_eq!(round(&mut memory, 1, 9), [4]);
    note(&mut memory, &others[0], unavailable());
    note(&mut memory, &greedy[0], shop());
    assert_eq!(
        round(&mut memory, 9, 9),
        [1, 2],
        "its next one, after one of its has ended"
    );
    assert_eq!(round(&mut memory, 9, 9), [0; 0], "nobody else's is due");
    assert!(
        memory
            .take_due(Capacity { quick: 9, slow: 9 })
            .queries
            .is_empty()
    );
}

#[tokio::test(start_paused = true)]
async fn slow_subjects_take_no_quick_place_until_they_are_quick_again() {
    let mut memory = IdentityCache::new(1000);
    let slow: Vec<_> = (0..10).map(|uid| learn(&mut memory, uid, 1)).collect();
    // One was slow when it was new.
    note_slow(&mut memory, &slow[0], shop());
    advance(REVALIDATE_AFTER).await;
    assert_eq!(round(&mut memory, 100, 1).len(), 10);
    slow.iter()
        .for_each(|caller| note_slow(&mut memory, caller, unavailable()));
    let modest = learn(&mut memory, 77, 1);
    advance(REVALIDATE_AFTER).await;
    assert_eq!(round(&mut memory, 100, 0), [77]);
    assert_eq!(round(&mut memory, 0, 3).len(), 3);
    note(&mut memory, &modest, shop());
    slow.iter()
        .for_each(|caller| note(&mut memory, caller, shop()));
    advance(REVALIDATE_AFTER).await;
    assert_eq!(round(&mut memory, 100, 0).len(), 11, "all are quick again");
}

#[tokio::test(start_paused = true)]
async fn a_workload_is_asked_about_less_often_the_more_of_it_is_slow() {
    let mut memory = IdentityCache::new(1000);
    let slow: Vec<_> = (0..200).map(|pid| learn(&mut memory, 1, pid)).collect();
    let modest = learn(&mut memory, 2, 1000);
    let (start, mut pauses, mut last) = (Instant::now(), Vec::new(), Instant::now());
    while start.elapsed() < Duration::from_secs(1200) {
        for question in memory.take_due(Capacity { quick: 8, slow: 4 }).queries {
            if question.caller.uid == 2 {
                note(&mut memory, &modest, shop());
            } else {
                pauses.push(last.elapsed().as_secs());
                last = Instant::now();
                memory.record(&question.subject, unavailable(), QUICK_TIMEOUT);
            }
        }
        advance(Duration::from_secs(1)).await;
    }
    assert_eq!(pauses, [30, 30, 60, 120, 240]);
    assert_eq!(
        (memory.len(), memory.paused.len()),
        (1, 0),
        "they are believed no longer, and leave nothing"
    );
    // An answer ends that, however long it takes.
    slow.iter()
        .for_each(|caller| assert_eq!(found(&mut memory, caller), None));
    slow.iter()
        .for_each(|caller| note(&mut memory, caller, shop()));
    for said in [unavailable(), shop(), shop()] {
        advance(REVALIDATE_AFTER).await;
        let questions = memory.take_due(Capacity { quick: 8, slow: 4 }).queries;
        let asked = questions
            .iter()
            .find(|question| question.caller.uid == 1)
            .expect("it is not paused");
        memory.record(&asked.subject, said, QUICK_TIMEOUT);
        note(&mut memory, &modest, shop());
    }
    assert!(memory.paused.is_empty());
}

#[tokio::test(start_paused = true)]
async fn after_an_outage_nobody_is_paused() {
    for is_own in [false, true] {
        let mut memory = IdentityCache::new(1000);
        let all: Vec<_> = (0..10).map(|uid| learn(&mut memory, uid, 1)).collect();
        // An agent that hangs.
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(1800) {
            for question in memory
                .take_due(Capacity {
                    quick: 100,
                    slow: 100,
                })
                .queries
            {
                memory.record(&question.subject, unavailable(), QUICK_TIMEOUT);
            }
            advance(Duration::from_secs(1)).await;
        }
        assert_eq!(
            (memory.paused.len(), round(&mut memory, 100, 100)),
            (10, vec![])
        );
        match is_own {
            true => memory.own_confirmed(start),
            false => drop(learn(&mut memory, 99, 1)),
        }
        assert_eq!(round(&mut memory, 100, 100).len(), 10);
        all.iter()
            .for_each(|caller| note(&mut memory, caller, shop()));
    }
}

/// Asks about all that are due for so long; only of those that are not `slow` there is an answer.
async fn revalidate(
    memory: &mut IdentityCache,
    time: Duration,
    all: &[Arc<Caller>],
    slow: impl Fn(u32) -> bool,
) {
    let until = Instant::now() + time;
    while Instant::now() < until {
        let round = memory.take_due(Capacity {
            quick: 1000,
            slow: 1000,
        });
        for question in round.queries {
            assert!(
                all.iter()
                    .any(|caller| Arc::ptr_eq(caller, &question.caller))
            );
            let said = if slow(question.caller.uid) {
                unavailable()
            } else {
                shop()
            };
            memory.record(&question.subject, said, Duration::ZERO);
        }
        advance(Duration::from_secs(1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_never_confirmed_is_believed_no_longer_while_others_are() {
    let mut memory = IdentityCache::new(1000);
    let all: Vec<_> = (0..10).map(|uid| learn(&mut memory, uid, 1)).collect();
    let is_slow = |uid| uid < 5;
    revalidate(
        &mut memory,
        MAX_UNCONFIRMED - REVALIDATE_AFTER,
        &all,
        is_slow,
    )
    .await;
    assert!(
        all.iter()
            .all(|caller| found(&mut memory, caller).is_some()),
        "not before its time"
    );
    revalidate(&mut memory, REVALIDATE_AFTER * 4, &all, is_slow).await;
    assert_eq!(memory.len(), 5, "what is believed no longer takes no place");
    let (slow, quick) = all.split_at(5);
    assert!(
        quick
            .iter()
            .all(|caller| found(&mut memory, caller).is_some())
    );
    assert!(
        slow.iter()
            .all(|caller| found(&mut memory, caller).is_none()),
        "it has to be asked for"
    );
    // An outage at that moment does not bring it back.
    slow.iter()
        .for_each(|caller| note(&mut memory, caller, unavailable()));
    assert!(
        slow.iter()
            .all(|caller| found(&mut memory, caller).is_none())
    );
}

#[tokio::test(start_paused = true)]
async fn a_question_under_way_keeps_nothing_believed() {
    let mut memory = IdentityCache::new(1000);
    let all: Vec<_> = (0..2).map(|uid| learn(&mut memory, uid, 1)).collect();
    advance(REVALIDATE_AFTER).await;
    assert_eq!(round(&mut memory, 1, 1).len(), 1);
    let asked = all
        .iter()
        .find(|caller| {
            memory.known[&Subject::of(caller, true).unwrap()]
                .asking
                .is_some()
        })
        .unwrap();
    let other = asked.uid ^ 1;
    revalidate(&mut memory, MAX_UNCONFIRMED * 2, &all, |uid| uid != other).await;
    let Ok(IdentityLookup::Asked(mut said)) =
        memory.find(&Subject::of(asked, true).unwrap(), asked)
    else {
        panic!("it is not believed, and being asked for")
    };
    note(&mut memory, asked, unavailable());
    assert_eq!(
        *said.wait_for(Option::is_some).await.unwrap(),
        Some(unavailable())
    );
}

#[tokio::test(start_paused = true)]
async fn an_outage_or_a_long_queue_ages_nobody() {
    let mut memory = IdentityCache::new(1000);
    let all: Vec<_> = (0..200).map(|uid| learn(&mut memory, uid, 1)).collect();
    let all_are_known =
        |memory: &mut IdentityCache| all.iter().all(|caller| found(memory, caller).is_some());
    revalidate(&mut memory, Duration::from_secs(7200), &all, |_| true).await;
    assert!(
        all_are_known(&mut memory),
        "an agent that is away takes nothing away"
    );
    // It is back, and answers one question in five seconds: a round takes longer than anybody may be unconfirmed.
    assert!(Duration::from_secs(5) * 200 > MAX_UNCONFIRMED);
    for _ in 0..2000 {
        let round = memory.take_due(Capacity { quick: 1, slow: 0 });
        advance(Duration::from_secs(5)).await;
        for question in round.queries {
            memory.record(&question.subject, shop(), Duration::ZERO);
        }
        assert!(all_are_known(&mut memory));
    }
}

#[tokio::test(start_paused = true)]
async fn the_daemons_own_answer_counts_where_there_is_no_other() {
    let mut memory = IdentityCache::new(1000);
    let alone = learn(&mut memory, 1, 1);
    let (learnt, mut answered) = (Instant::now(), Instant::now());
    let nobody = Capacity { quick: 0, slow: 0 };
    while memory.take_due(nobody).expired.is_empty() {
        assert_eq!(
            memory.take_due(nobody).is_overdue,
            learnt.elapsed() > REVALIDATE_AFTER * 2
        );
        assert!(found(&mut memory, &alone).is_some());
        advance(REVALIDATE_AFTER).await;
        memory.own_confirmed(answered);
        answered = Instant::now();
        assert!(learnt.elapsed() < MAX_UNCONFIRMED * 2);
    }
    assert!(learnt.elapsed() >= MAX_UNCONFIRMED);
    assert_eq!(found(&mut memory, &alone), None);
}

#[tokio::test(start_paused = true)]
async fn long_texts_take_more_places() {
    let mut memory = IdentityCache::new(10 * MAX_SUBJECTS_PER_WORKLOAD);
    let of_length = |pid, length| {
        let mut caller = Arc::into_inner(process(1, pid).0).unwrap();
        caller.cgroup = CgroupPath::parse(&format!("/shop.service/{}", "x".repeat(length)));
        Arc::new(caller)
    };
    let learn = |memory: &mut IdentityCache, caller: &Arc<Caller>| {
        assert_eq!(found(memory, caller), None);
        note(memory, caller, shop());
    };
    for pid in 0..u32::try_from(MAX_SUBJECTS_PER_WORKLOAD).unwrap() {
        learn(&mut memory, &of_length(pid, BYTES_PER_SLOT));
        advance(Duration::from_millis(1)).await;
    }
    assert_eq!(
        (memory.len(), memory.slots_taken),
        (MAX_SUBJECTS_PER_WORKLOAD / 4, MAX_SUBJECTS_PER_WORKLOAD),
        "its path is kept three times"
    );
    for pid in 0..u32::try_from(MAX_SUBJECTS_PER_WORKLOAD).unwrap() {
        learn(&mut memory, &of_length(10_000 + pid, 1));
    }
    assert_eq!(
        (memory.len(), memory.slots_taken),
        (MAX_SUBJECTS_PER_WORKLOAD, MAX_SUBJECTS_PER_WORKLOAD)
    );
    assert_eq!(
        memory.counts.values().sum::<usize>(),
        MAX_SUBJECTS_PER_WORKLOAD
    );
}

//! The decision on what is due for an entry, with random entries.

use super::*;
use crate::random_cases::for_random_cases;
use entry::{CredentialTimes, MIN_REMAINING};
use failure::FailureTimes;
use refresh::{DueActions, EntrySnapshot, decide};

const CASES: u64 = 100_000;

/// Returns a duration of up to two hours, often one of the bounds, or close to it.
fn duration(random: &mut fastrand::Rng) -> Duration {
    let bounds = [Duration::ZERO, MIN_REMAINING, HOUR];
    match random.usize(..6) {
        bound @ 0..3 => bounds[bound],
        bound @ 3..5 => bounds[bound - 2].saturating_sub(Duration::from_nanos(random.u64(..3))),
        _ => Duration::from_millis(random.u64(..7_200_000)),
    }
}

fn snapshot(random: &mut fastrand::Rng, start: Instant) -> EntrySnapshot {
    let at = |random: &mut fastrand::Rng| start + duration(random);
    let has_failure = random.bool();
    EntrySnapshot {
        now: start + HOUR,
        has_flight: random.bool(),
        unused_for: duration(random),
        credentials: random.bool().then(|| CredentialTimes {
            remaining: duration(random),
            lifetime: duration(random),
            refresh_at_remaining: duration(random),
        }),
        failure: has_failure.then(|| FailureTimes {
            cached_until: at(random),
            retry_at: at(random),
        }),
        grace_end: (has_failure && random.bool()).then(|| at(random)),
    }
}

/// Checks what has to hold for each entry, in other words than `decide` has.
fn check(entry: &EntrySnapshot) {
    let DueActions { clear, then } = decide(entry);
    let grace_end = entry.grace_end;
    let servable = entry.credentials.as_ref().is_some_and(|credentials| {
        credentials.remaining > MIN_REMAINING && grace_end.is_none_or(|end| end > entry.now)
    });
    assert_eq!(
        clear.is_some(),
        entry.credentials.is_some() && !servable,
        "credentials are cleared when they may not be served"
    );
    match then {
        Action::Wait(at) => assert!(at > entry.now, "the task runs without end"),
        Action::Refresh(end) => {
            assert!(end > entry.now, "the task runs without end");
            assert!(
                servable && !entry.has_flight,
                "only requests fetch the first credentials"
            );
        }
        Action::Remove(_) => assert!(!entry.has_flight, "callers wait for the flight"),
    }
    if let (Action::Wait(end) | Action::Refresh(end), true, Some(credentials)) =
        (then, servable, &entry.credentials)
    {
        let last = entry.now + (credentials.remaining - MIN_REMAINING);
        let last = grace_end.map_or(last, |end| end.min(last));
        assert!(end <= last, "the credentials are served for too long");
    }
    if clear.is_some() {
        let cleared = EntrySnapshot {
            credentials: None,
            ..entry.clone()
        };
        assert_eq!(decide(&cleared), DueActions { clear: None, then });
    }
}

#[test]
fn decision_is_right_for_random_entries() {
    let start = Instant::now();
    for_random_cases(CASES, |random| check(&snapshot(random, start)));
}

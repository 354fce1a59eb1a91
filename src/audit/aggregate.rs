//! Requests of one kind that come in masses become one record with a count, so that one workload cannot drown the records of
//! others (attacks 23 and 30).

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::audit::CacheResult;
use crate::caller::{ListenerKind, WorkloadKey};
use crate::writer::{Line, Priority};

/// So many requests of one caller that are alike are written one by one,
const MAX_INDIVIDUAL: u64 = 10;
/// in each stretch of this length.
const WINDOW: Duration = Duration::from_secs(1);
/// How often stretches that are over are looked for, while there are any.
pub(super) const SWEEP: Duration = Duration::from_millis(500);
/// Callers and kinds that have a count of their own at one time.
const MAX_KEYS: usize = 1024;

/// What is counted together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct AggregateKey {
    /// `None`: of any caller.
    pub(super) owner: Option<WorkloadKey>,
    pub(super) listener: ListenerKind,
    pub(super) reason: &'static str,
    /// The access key id of the credentials, and whether they were due for a refresh.
    pub(super) issued: Option<(String, CacheResult)>,
}

/// What comes of requests beyond the keys that there are at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Beyond {
    /// They are counted by their reason alone.
    Counted,
    /// Each is written.
    Written,
}

/// Counts requests.
#[derive(Debug)]
pub(super) struct RefusalAggregator {
    beyond: Beyond,
    state: Mutex<AggregateState>,
}

#[derive(Debug, Default)]
struct AggregateState {
    stretches: HashMap<AggregateKey, Window>,
    swept: bool,
}

#[derive(Debug)]
struct Window {
    since: Instant,
    seen: u64,
    /// The first one that is not written singly; it stands for all that follow.
    held: Vec<u8>,
}

/// What comes of one request.
#[derive(Debug, Default)]
pub(super) struct Emission {
    /// The record that stands for several before it.
    pub(super) before: Option<Line>,
    /// Its own record is to be written now.
    pub(super) singly: bool,
    /// Somebody has to call [`RefusalAggregator::sweep`] from now on, until it says that it is done.
    pub(super) begin_sweep: bool,
}

impl RefusalAggregator {
    pub(super) fn new(beyond: Beyond) -> Self {
        Self {
            beyond,
            state: Mutex::default(),
        }
    }

    /// Takes one request. `line` renders the record that stands for it and others, with the caller or without.
    pub(super) fn take(
        &self,
        mut key: AggregateKey,
        now: Instant,
        line: impl FnOnce(bool) -> Vec<u8>,
    ) -> Emission {
        let mut state = self.state();
        let mut turn = Emission::default();
        if state.stretches.len() >= MAX_KEYS && !state.stretches.contains_key(&key) {
            match self.beyond {
                Beyond::Counted => key.owner = None,
                Beyond::Written => {
                    return Emission {
                        singly: true,
                        ..turn
                    };
                }
            }
        }
        turn.begin_sweep = !std::mem::replace(&mut state.swept, true);
        let owner = key.owner.clone();
        let stretch = state
            .stretches
            .entry(key)
            .or_insert_with(|| Window::new(now));
        if now >= stretch.since + WINDOW {
            turn.before = std::mem::replace(stretch, Window::new(now)).summary(owner.clone());
        }
        stretch.seen += 1;
        turn.singly = stretch.seen <= MAX_INDIVIDUAL;
        if stretch.seen == MAX_INDIVIDUAL + 1 {
            stretch.held = line(owner.is_some());
        }
        turn
    }

    /// Ends the stretches that are over, all of them if `now` is `None`. Gives what is to be written, and whether none is
    /// left, in which case sweeping ends.
    pub(super) fn sweep(&self, now: Option<Instant>) -> (Vec<Line>, bool) {
        let mut state = self.state();
        let is_over = |stretch: &Window| now.is_none_or(|now| now >= stretch.since + WINDOW);
        let over = state.stretches.extract_if(|_, stretch| is_over(stretch));
        let lines = over
            .filter_map(|(key, stretch)| stretch.summary(key.owner))
            .collect();
        state.swept = !state.stretches.is_empty();
        (lines, !state.swept)
    }

    fn state(&self) -> MutexGuard<'_, AggregateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Window {
    fn new(since: Instant) -> Self {
        Self {
            since,
            seen: 0,
            held: Vec::new(),
        }
    }

    /// The held record, as one that stands for several.
    fn summary(mut self, owner: Option<WorkloadKey>) -> Option<Line> {
        let stands_for = self
            .seen
            .checked_sub(MAX_INDIVIDUAL)
            .filter(|more| *more > 0)?;
        // It ends with `}` and a newline, and has fields before that.
        self.held.truncate(self.held.len().saturating_sub(2));
        self.held
            .extend(format!(",\"repeated\":{stands_for}}}\n").bytes());
        Some(Line {
            bytes: self.held,
            stands_for,
            owner,
            priority: Priority::High,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(reason: &'static str, number: u32) -> AggregateKey {
        AggregateKey {
            owner: Some(WorkloadKey::user(number)),
            listener: ListenerKind::Tcp,
            reason,
            issued: None,
        }
    }

    fn floods() -> RefusalAggregator {
        RefusalAggregator::new(Beyond::Counted)
    }

    /// Takes `count` requests; the lines that came of them.
    fn take(
        floods: &RefusalAggregator,
        key: &AggregateKey,
        now: Instant,
        count: usize,
    ) -> Vec<String> {
        let line = |of_one: bool| {
            format!("{{\"reason\":\"{}\",\"uid\":{of_one}}}\n", key.reason).into_bytes()
        };
        let turns = (0..count).map(|_| floods.take(key.clone(), now, line));
        turns
            .flat_map(|turn| {
                text(turn.before)
                    .into_iter()
                    .chain(turn.singly.then(|| "single".to_owned()))
            })
            .collect()
    }

    fn text(lines: impl IntoIterator<Item = Line>) -> Vec<String> {
        let text = |line: Line| String::from_utf8(line.bytes).unwrap().trim_end().to_owned();
        lines.into_iter().map(text).collect()
    }

    #[test]
    fn ten_a_second_are_written_and_the_rest_counted() {
        let (floods, start) = (floods(), Instant::now());
        assert_eq!(take(&floods, &key("host", 1), start, 10).len(), 10);
        assert!(take(&floods, &key("host", 1), start + WINDOW / 2, 90).is_empty());
        // Neither another caller nor another reason is concerned, nor other credentials.
        assert_eq!(take(&floods, &key("host", 2), start, 10).len(), 10);
        assert_eq!(take(&floods, &key("path", 1), start, 10).len(), 10);
        let issued = |id: &str| AggregateKey {
            issued: Some((id.to_owned(), CacheResult::Hit)),
            ..key("ok", 1)
        };
        assert_eq!(take(&floods, &issued("ASIA1"), start, 100).len(), 10);
        assert_eq!(take(&floods, &issued("ASIA2"), start, 100).len(), 10);
        // The next stretch begins with what is left of the one before.
        let lines = take(&floods, &key("host", 1), start + WINDOW, 1);
        assert_eq!(
            lines,
            [r#"{"reason":"host","uid":true,"repeated":90}"#, "single"]
        );
    }

    #[test]
    fn sweeping_ends_what_is_over_and_then_itself() {
        let (floods, start) = (floods(), Instant::now());
        let line = |_| b"{\"reason\":\"host\"}\n".to_vec();
        assert!(floods.take(key("host", 1), start, line).begin_sweep);
        assert!(
            !floods
                .take(key("path", 1), start + WINDOW / 2, line)
                .begin_sweep
        );
        take(&floods, &key("host", 1), start, 12);
        let (lines, done) = floods.sweep(Some(start + WINDOW / 2));
        assert!(lines.is_empty() && !done);
        let (lines, done) = floods.sweep(Some(start + WINDOW));
        assert_eq!(
            (text(lines), done),
            (
                vec![r#"{"reason":"host","uid":true,"repeated":3}"#.to_owned()],
                false
            )
        );
        let (lines, done) = floods.sweep(Some(start + WINDOW * 2));
        assert!(lines.is_empty() && done);
        assert!(
            floods
                .take(key("host", 1), start + WINDOW * 3, line)
                .begin_sweep
        );
    }

    #[test]
    fn the_number_of_callers_that_are_told_apart_is_bounded() {
        let (floods, start) = (floods(), Instant::now());
        let written: usize = (0..100_000)
            .map(|number| take(&floods, &key("host", number), start, 1).len())
            .sum();
        assert_eq!(written, MAX_KEYS + 10);
        let kept = floods.state().stretches.len();
        assert_eq!(kept, MAX_KEYS + 1);
        // Those beyond are nobody's in particular.
        let (lines, done) = floods.sweep(None);
        let beyond = 100_000 - MAX_KEYS - 10;
        assert_eq!(
            text(lines),
            [format!(
                r#"{{"reason":"host","uid":false,"repeated":{beyond}}}"#
            )]
        );
        assert!(done);
    }

    #[test]
    fn where_each_first_one_counts_it_is_written_however_many_there_are() {
        let (floods, start) = (RefusalAggregator::new(Beyond::Written), Instant::now());
        let written: usize = (0..10_000)
            .map(|number| take(&floods, &key("ok", number), start, 1).len())
            .sum();
        assert_eq!(written, 10_000);
        assert_eq!(floods.state().stretches.len(), MAX_KEYS);
    }
}

//! Refusals that come in masses become one record with a count, so that nobody can drown the records of others (attack 23).

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::caller::{Listener, Owner};

/// So many refusals of one caller for one reason are written one by one,
const SINGLY: u64 = 10;
/// in each stretch of this length.
const STRETCH: Duration = Duration::from_secs(1);
/// How often stretches that are over are looked for, while there are any.
pub(super) const SWEEP: Duration = Duration::from_millis(500);
/// Callers and reasons that are told apart at one time. What comes beyond them is counted by reason alone.
const KEYS: usize = 1024;

/// What is counted together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// `None`: of any caller.
    pub(super) owner: Option<Owner>,
    pub(super) listener: Listener,
    pub(super) reason: &'static str,
}

/// Counts refusals.
#[derive(Debug, Default)]
pub(super) struct Floods(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    stretches: HashMap<Key, Stretch>,
    swept: bool,
}

#[derive(Debug)]
struct Stretch {
    since: Instant,
    seen: u64,
    /// The first one that is not written singly; it stands for all that follow.
    held: Vec<u8>,
}

/// What comes of one refusal.
#[derive(Debug, Default)]
pub(super) struct Turn {
    /// To be written now; empty if it is only counted.
    pub(super) lines: Vec<u8>,
    /// Somebody has to call [`Floods::sweep`] from now on, until it says that it is done.
    pub(super) begin_sweep: bool,
}

impl Floods {
    /// Takes one refusal. `line` renders its record, with the caller or without.
    pub(super) fn take(&self, mut key: Key, now: Instant, line: impl Fn(bool) -> Vec<u8>) -> Turn {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut turn = Turn { begin_sweep: !state.swept, ..Turn::default() };
        state.swept = true;
        if state.stretches.len() >= KEYS && !state.stretches.contains_key(&key) {
            key.owner = None;
        }
        let of_one = key.owner.is_some();
        let stretch = state.stretches.entry(key).or_insert_with(|| Stretch::new(now));
        if now >= stretch.since + STRETCH {
            turn.lines = std::mem::replace(stretch, Stretch::new(now)).summary();
        }
        stretch.seen += 1;
        if stretch.seen <= SINGLY {
            turn.lines.extend(line(true));
        } else if stretch.seen == SINGLY + 1 {
            stretch.held = line(of_one);
        }
        turn
    }

    /// Ends the stretches that are over, all of them if `now` is `None`. Gives what is to be written, and whether none is
    /// left, in which case sweeping ends.
    pub(super) fn sweep(&self, now: Option<Instant>) -> (Vec<u8>, bool) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_over = |stretch: &Stretch| now.is_none_or(|now| now >= stretch.since + STRETCH);
        let over = state.stretches.extract_if(|_, stretch| is_over(stretch));
        let lines = over.flat_map(|(_, stretch)| stretch.summary()).collect();
        state.swept = !state.stretches.is_empty();
        (lines, !state.swept)
    }
}

impl Stretch {
    fn new(since: Instant) -> Self {
        Self { since, seen: 0, held: Vec::new() }
    }

    /// The held record, as one that stands for several.
    fn summary(mut self) -> Vec<u8> {
        if self.held.is_empty() {
            return self.held;
        }
        // It ends with `}` and a newline, and has fields before that.
        self.held.truncate(self.held.len().saturating_sub(2));
        self.held.extend(format!(",\"repeated\":{}}}\n", self.seen - SINGLY).bytes());
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(reason: &'static str, number: u32) -> Key {
        Key { owner: Some(Owner::user(number)), listener: Listener::Tcp, reason }
    }

    /// Takes `count` refusals; the lines that came of them.
    fn take(floods: &Floods, key: &Key, now: Instant, count: usize) -> Vec<String> {
        let line = |of_one: bool| format!("{{\"reason\":\"{}\",\"uid\":{of_one}}}\n", key.reason).into_bytes();
        let lines = (0..count).flat_map(|_| floods.take(key.clone(), now, line).lines).collect();
        text(lines)
    }

    fn text(lines: Vec<u8>) -> Vec<String> {
        String::from_utf8(lines).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn ten_a_second_are_written_and_the_rest_counted() {
        let (floods, start) = (Floods::default(), Instant::now());
        assert_eq!(take(&floods, &key("host", 1), start, 10).len(), 10);
        assert!(take(&floods, &key("host", 1), start + STRETCH / 2, 90).is_empty());
        // Neither another caller nor another reason is concerned.
        assert_eq!(take(&floods, &key("host", 2), start, 10).len(), 10);
        assert_eq!(take(&floods, &key("path", 1), start, 10).len(), 10);
        // The next stretch begins with what is left of the one before.
        let lines = take(&floods, &key("host", 1), start + STRETCH, 1);
        assert_eq!(lines, [r#"{"reason":"host","uid":true,"repeated":90}"#, r#"{"reason":"host","uid":true}"#]);
    }

    #[test]
    fn sweeping_ends_what_is_over_and_then_itself() {
        let (floods, start) = (Floods::default(), Instant::now());
        let line = |_| b"{\"reason\":\"host\"}\n".to_vec();
        assert!(floods.take(key("host", 1), start, line).begin_sweep);
        assert!(!floods.take(key("path", 1), start + STRETCH / 2, line).begin_sweep);
        take(&floods, &key("host", 1), start, 12);
        assert_eq!(floods.sweep(Some(start + STRETCH / 2)), (Vec::new(), false));
        let (lines, done) = floods.sweep(Some(start + STRETCH));
        assert_eq!((text(lines), done), (vec![r#"{"reason":"host","uid":true,"repeated":3}"#.to_owned()], false));
        assert_eq!(floods.sweep(Some(start + STRETCH * 2)), (Vec::new(), true));
        assert!(floods.take(key("host", 1), start + STRETCH * 3, line).begin_sweep);
    }

    #[test]
    fn the_number_of_callers_that_are_told_apart_is_bounded() {
        let (floods, start) = (Floods::default(), Instant::now());
        let written: usize = (0..100_000).map(|number| take(&floods, &key("host", number), start, 1).len()).sum();
        assert_eq!(written, KEYS + 10);
        let kept = floods.0.lock().unwrap().stretches.len();
        assert_eq!(kept, KEYS + 1);
        // Those beyond are nobody's in particular.
        let (lines, done) = floods.sweep(None);
        let beyond = 100_000 - KEYS - 10;
        assert_eq!(text(lines), [format!(r#"{{"reason":"host","uid":false,"repeated":{beyond}}}"#)]);
        assert!(done);
    }
}

//! Many requests of one kind become one record with a number, so that one workload cannot drown the
//! records of others (T23, T30).

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::audit::CacheResult;
use crate::caller::{ListenerKind, WorkloadKey};
use crate::protocol::Protocol;
use crate::writer::{Line, Priority};

/// The requests of one kind and caller that have records of their own in each [`COUNT_WINDOW`].
const MAX_INDIVIDUAL: u64 = 10;
/// The time in which requests of one kind are counted together.
const COUNT_WINDOW: Duration = Duration::from_secs(1);
/// The time between searches for windows that have ended.
pub(super) const SWEEP_INTERVAL: Duration = Duration::from_millis(500);
/// The windows that are open at one time, one for each kind and caller. Further requests are
/// counted by their caller, whatever their credentials.
const MAX_KEYS: usize = 1024;
/// The windows of those callers. Further requests are counted without a caller.
const MAX_CALLERS: usize = 1024;
/// The pairs of a caller and a key beyond [`MAX_KEYS`] whose first request in a [`COUNT_WINDOW`]
/// still /// has a record of its own.
const MAX_FIRST: usize = 16_384;

/// The kind and the caller of requests that are counted together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct AggregateKey {
    /// The workload; `None` for requests of any.
    pub(super) owner: Option<WorkloadKey>,
    pub(super) listener: ListenerKind,
    pub(super) protocol: Protocol,
    pub(super) reason: &'static str,
    /// The access key id of the credentials, and the result of the lookup.
    pub(super) issued: Option<(String, CacheResult)>,
}

/// The requests for which a record stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RecordScope {
    /// Requests of one kind and caller.
    OneKind,
    /// Requests of one caller for several credentials.
    OneCaller,
    /// Requests of several callers.
    ManyCallers,
}

/// Counts requests by kind and caller, and combines those that are many.
#[derive(Debug, Default)]
pub(super) struct RecordAggregator {
    state: Mutex<AggregateState>,
}

#[derive(Debug, Default)]
struct AggregateState {
    windows: HashMap<AggregateKey, Window>,
    swept: bool,
    /// The keys beyond [`MAX_KEYS`] that had a request since `first_since`, as hashes to save
    /// memory. No caller can choose keys with equal hashes.
    first: HashSet<u64>,
    first_since: Option<Instant>,
    hasher: RandomState,
}

#[derive(Debug)]
struct Window {
    since: Instant,
    count: u64,
    /// The record of the first request that has none of its own. It stands for all that follow.
    held: Vec<u8>,
}

/// The records to write after one request.
#[derive(Debug, Default)]
pub(super) struct Emission {
    /// The combined record of the window before.
    pub(super) before: Option<Line>,
    /// The request has a record of its own.
    pub(super) own_record: bool,
    /// The caller has to call [`RecordAggregator::sweep`] from now on, until it returns true.
    pub(super) begin_sweep: bool,
}

impl RecordAggregator {
    /// Counts one request. `line` renders its record for the case that it stands for others too.
    pub(super) fn take(
        &self,
        mut key: AggregateKey,
        now: Instant,
        line: impl FnOnce(RecordScope) -> Vec<u8>,
    ) -> Emission {
        let mut state = self.state();
        let mut emission = Emission::default();
        let is_hit = key.issued.is_some();
        let exact = state.hasher.hash_one(&key);
        let scope = state.find_room(&mut key);
        if scope != RecordScope::OneKind && is_hit && state.is_first(exact, now) {
            emission.own_record = true;
            return emission;
        }
        emission.begin_sweep = !std::mem::replace(&mut state.swept, true);
        let owner = key.owner.clone();
        let window = state.windows.entry(key).or_insert_with(|| Window::new(now));
        if now >= window.since + COUNT_WINDOW {
            emission.before = std::mem::replace(window, Window::new(now)).summary(owner.clone());
        }
        window.count += 1;
        emission.own_record = window.count <= MAX_INDIVIDUAL;
        if window.count == MAX_INDIVIDUAL + 1 {
            window.held = line(scope);
        }
        emission
    }

    /// Closes the windows that have ended, or all if `now` is `None`. Returns the combined records,
    /// and whether no window is left.
    pub(super) fn sweep(&self, now: Option<Instant>) -> (Vec<Line>, bool) {
        let mut state = self.state();
        let is_over = |window: &Window| now.is_none_or(|now| now >= window.since + COUNT_WINDOW);
        let over = state.windows.extract_if(|_, window| is_over(window));
        let lines = over
            .filter_map(|(key, window)| window.summary(key.owner))
            .collect();
        state.swept = !state.windows.is_empty();
        if !state.swept {
            state.first = HashSet::new();
        }
        (lines, !state.swept)
    }

    fn state(&self) -> MutexGuard<'_, AggregateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AggregateState {
    /// Makes the key less exact if its window does not fit. Returns the scope of the window that it
    /// has then.
    fn find_room(&self, key: &mut AggregateKey) -> RecordScope {
        let is_open = |key: &AggregateKey| self.windows.contains_key(key);
        if self.windows.len() < MAX_KEYS || is_open(key) {
            return RecordScope::OneKind;
        }
        if key.issued.take().is_some()
            && (self.windows.len() < MAX_KEYS + MAX_CALLERS || is_open(key))
        {
            return RecordScope::OneCaller;
        }
        key.owner = None;
        RecordScope::ManyCallers
    }

    /// Returns whether this is the first request of a key without a window of its own.
    fn is_first(&mut self, key: u64, now: Instant) -> bool {
        if self
            .first_since
            .is_none_or(|since| now >= since + COUNT_WINDOW)
        {
            self.first.clear();
            self.first_since = Some(now);
        }
        self.first.len() < MAX_FIRST && self.first.insert(key)
    }
}

impl Window {
    fn new(since: Instant) -> Self {
        Self {
            since,
            count: 0,
            held: Vec::new(),
        }
    }

    /// Returns the held record with the number of requests for which it stands.
    fn summary(mut self, owner: Option<WorkloadKey>) -> Option<Line> {
        let stands_for = self
            .count
            .checked_sub(MAX_INDIVIDUAL)
            .filter(|more| *more > 0)?;
        // The record ends with `}` and a line feed, and has fields before that.
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
            protocol: Protocol::Container,
            reason,
            issued: None,
        }
    }

    fn aggregator() -> RecordAggregator {
        RecordAggregator::default()
    }

    /// Counts `count` requests and returns the lines to write.
    fn take(
        aggregator: &RecordAggregator,
        key: &AggregateKey,
        now: Instant,
        count: usize,
    ) -> Vec<String> {
        let line = |scope: RecordScope| {
            let of_one = scope != RecordScope::ManyCallers;
            format!("{{\"reason\":\"{}\",\"uid\":{of_one}}}\n", key.reason).into_bytes()
        };
        let emissions = (0..count).map(|_| aggregator.take(key.clone(), now, line));
        emissions
            .flat_map(|emission| {
                text(emission.before)
                    .into_iter()
                    .chain(emission.own_record.then(|| "single".to_owned()))
            })
            .collect()
    }

    fn text(lines: impl IntoIterator<Item = Line>) -> Vec<String> {
        let text = |line: Line| String::from_utf8(line.bytes).unwrap().trim_end().to_owned();
        lines.into_iter().map(text).collect()
    }

    #[test]
    fn ten_requests_a_second_have_records_of_their_own() {
        let (aggregator, start) = (aggregator(), Instant::now());
        assert_eq!(take(&aggregator, &key("host", 1), start, 10).len(), 10);
        assert!(take(&aggregator, &key("host", 1), start + COUNT_WINDOW / 2, 90).is_empty());
        // Another caller, another reason and other credentials have windows of their own.
        assert_eq!(take(&aggregator, &key("host", 2), start, 10).len(), 10);
        assert_eq!(take(&aggregator, &key("path", 1), start, 10).len(), 10);
        let issued = |id: &str| AggregateKey {
            issued: Some((id.to_owned(), CacheResult::Hit)),
            ..key("ok", 1)
        };
        assert_eq!(take(&aggregator, &issued("ASIA1"), start, 100).len(), 10);
        assert_eq!(take(&aggregator, &issued("ASIA2"), start, 100).len(), 10);
        // The next window begins with the combined record of the one before.
        let lines = take(&aggregator, &key("host", 1), start + COUNT_WINDOW, 1);
        assert_eq!(
            lines,
            [r#"{"reason":"host","uid":true,"repeated":90}"#, "single"]
        );
    }

    #[test]
    fn sweep_closes_ended_windows() {
        let (aggregator, start) = (aggregator(), Instant::now());
        let line = |_| b"{\"reason\":\"host\"}\n".to_vec();
        assert!(aggregator.take(key("host", 1), start, line).begin_sweep);
        assert!(
            !aggregator
                .take(key("path", 1), start + COUNT_WINDOW / 2, line)
                .begin_sweep
        );
        take(&aggregator, &key("host", 1), start, 12);
        let (lines, done) = aggregator.sweep(Some(start + COUNT_WINDOW / 2));
        assert!(lines.is_empty() && !done);
        let (lines, done) = aggregator.sweep(Some(start + COUNT_WINDOW));
        assert_eq!(
            (text(lines), done),
            (
                vec![r#"{"reason":"host","uid":true,"repeated":3}"#.to_owned()],
                false
            )
        );
        let (lines, done) = aggregator.sweep(Some(start + COUNT_WINDOW * 2));
        assert!(lines.is_empty() && done);
        assert!(
            aggregator
                .take(key("host", 1), start + COUNT_WINDOW * 3, line)
                .begin_sweep
        );
    }

    #[test]
    fn number_of_windows_is_bounded() {
        let (aggregator, start) = (aggregator(), Instant::now());
        let written: usize = (0..100_000)
            .map(|number| take(&aggregator, &key("host", number), start, 1).len())
            .sum();
        assert_eq!(written, MAX_KEYS + 10);
        let count = aggregator.state().windows.len();
        assert_eq!(count, MAX_KEYS + 1);
        // The requests beyond the bound have no caller.
        let (lines, done) = aggregator.sweep(None);
        let beyond = 100_000 - MAX_KEYS - 10;
        assert_eq!(
            text(lines),
            [format!(
                r#"{{"reason":"host","uid":false,"repeated":{beyond}}}"#
            )]
        );
        assert!(done);
    }

    fn hit(workload: u32, key_id: u32) -> AggregateKey {
        AggregateKey {
            issued: Some((format!("ASIA{key_id}"), CacheResult::Hit)),
            ..key("ok", workload)
        }
    }

    /// Covers T30: workloads with many roles use up all windows.
    #[test]
    fn hits_beyond_the_bound_are_counted_by_their_caller() {
        let (aggregator, start) = (aggregator(), Instant::now());
        for number in 0..u32::try_from(MAX_KEYS).unwrap() {
            take(&aggregator, &hit(number / 96, number), start, 1);
        }
        // Neither these workloads nor others write as many records as they send requests.
        let flood = |workload: u32, first: u32| -> usize {
            (0..1000)
                .map(|number| {
                    take(&aggregator, &hit(workload, first + number % 16), start, 1).len()
                })
                .sum()
        };
        assert_eq!(flood(5, 10_000), 16 + 10);
        assert_eq!(flood(7000, 20_000), 16 + 10);
        // The first request of another caller still has a record.
        assert_eq!(take(&aggregator, &hit(8000, 30_000), start, 1), ["single"]);
        let mut counted = text(aggregator.sweep(None).0);
        counted.sort();
        assert_eq!(counted, [r#"{"reason":"ok","uid":true,"repeated":974}"#; 2]);
    }

    #[test]
    fn number_of_windows_of_hits_is_bounded() {
        let (aggregator, start) = (aggregator(), Instant::now());
        let written: usize = (0..100_000)
            .map(|number| take(&aggregator, &hit(number, number), start, 1).len())
            .sum();
        assert_eq!(written, MAX_KEYS + MAX_FIRST + MAX_CALLERS + 10);
        {
            let state = aggregator.state();
            let count = (state.windows.len(), state.first.len());
            assert_eq!(count, (MAX_KEYS + MAX_CALLERS + 1, MAX_FIRST));
        }
        let beyond = 100_000 - written;
        assert_eq!(
            text(aggregator.sweep(None).0),
            [format!(
                r#"{{"reason":"ok","uid":false,"repeated":{beyond}}}"#
            )]
        );
        assert!(aggregator.state().first.is_empty());
    }
}

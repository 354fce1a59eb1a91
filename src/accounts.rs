//! The numbers of the users and groups that rules name, as the name service (NSS, `nsswitch.conf(5)`) gives them.
//!
//! A lookup blocks for as long as a directory server does not answer, and its answers change while the daemon runs: users that
//! come after the daemon (SSSD or LDAP at boot), or that get another number. So lookups run in the background, on threads for
//! blocking work, and are repeated. Requests only read what was answered last; one that depends on a name without an answer
//! waits for a bounded time.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use crate::metrics::Metrics;
use crate::workload_rule::{AccountName, Known, OVERFLOW_ID};

mod local;
mod nss;
mod rules;

pub use local::LocalAccounts;
pub use nss::{NameService, Nss};
pub use rules::{LiveRules, Undecided};

/// How long a number is believed before the name is looked up again. A user who gets another number has it here by then.
const RECHECK: Duration = Duration::from_secs(60);
/// After the first lookup without a number; each further one waits twice as long, at most [`RECHECK`].
const RETRY: Duration = Duration::from_secs(1);
/// How long after an answer a request does not cause another lookup of the same name.
const PAUSE: Duration = Duration::from_secs(1);
/// How long a request waits for a lookup.
const LOOKUP_WAIT: Duration = Duration::from_secs(2);
/// How long a name that does not exist any more keeps its number, as long as no other name has the number: some name services
/// report that there is no such name while they restart.
const ABSENT_GRACE: Duration = Duration::from_secs(300);
/// Lookups at one time of names that the local files do not have. One of a name that they have runs beside them.
const MAX_LOOKUPS: usize = 8;

/// All names that the configuration has, and what is known of them. Clones share it.
#[derive(Clone)]
pub struct Accounts(Arc<AccountsInner>);

struct AccountsInner {
    service: Arc<dyn NameService>,
    state: Mutex<AccountsState>,
    numbers: watch::Sender<Arc<Numbers>>,
    wake: Notify,
    metrics: Metrics,
}

#[derive(Default)]
struct AccountsState {
    names: BTreeMap<AccountName, AccountEntry>,
    is_running: bool,
}

/// What is known of the names of one configuration.
#[derive(Debug, Default)]
pub struct Numbers {
    known: BTreeMap<AccountName, Known>,
    local: Arc<LocalAccounts>,
}

/// One name.
#[derive(Debug)]
struct AccountEntry {
    /// Where the configuration has it.
    lines: Vec<usize>,
    known: Known,
    /// Why the last lookup failed.
    error: Option<Errno>,
    /// When the last answer or failure came.
    answered: Option<Instant>,
    /// Since when the name service denies a name whose number is still in use.
    absent_since: Option<Instant>,
    next: Instant,
    retry: Duration,
    is_wanted: bool,
    is_running: bool,
}

/// What came of one lookup.
struct LookupResult {
    name: AccountName,
    number: Result<Option<u32>, Errno>,
    /// Where the name does not exist any more: which other name has its number now.
    successor: Option<String>,
    local: Arc<LocalAccounts>,
}

impl fmt::Debug for Accounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Accounts")
            .field("names", &self.0.state().names)
            .finish_non_exhaustive()
    }
}

impl Numbers {
    /// What is known of `name`.
    pub fn get(&self, name: &AccountName) -> Known {
        self.known.get(name).copied().unwrap_or(Known::Unanswered)
    }

    /// Whether a user or group with this number has another name than `name`: by the local files, or since another name of the
    /// configuration has that number.
    pub fn is_other(&self, name: &AccountName, id: u32) -> bool {
        let is_same_kind =
            |other: &AccountName| std::mem::discriminant(other) == std::mem::discriminant(name);
        let has_id = |(other, known): (&AccountName, &Known)| {
            other != name && is_same_kind(other) && *known == Known::Number(id)
        };
        self.local.is_other(name, id) || self.known.iter().any(has_id)
    }
}

impl Accounts {
    /// Knows no names yet.
    pub fn new(service: impl NameService + 'static, metrics: Metrics) -> Self {
        let (numbers, _) = watch::channel(Arc::default());
        let (service, state) = (Arc::new(service), Mutex::default());
        Self(Arc::new(AccountsInner {
            service,
            state,
            numbers,
            wake: Notify::new(),
            metrics,
        }))
    }

    /// Goes on with the names of another configuration, each with the lines that it stands in. Has all of them looked up and
    /// waits for that, for at most `patience`; until then what is known already stays. To be called within a tokio runtime.
    pub async fn follow(&self, names: BTreeMap<AccountName, Vec<usize>>, patience: Duration) {
        let wanted: Vec<AccountName> = names.keys().cloned().collect();
        if self.0.set(names) {
            tokio::spawn(run(self.0.clone()));
        }
        if !self.await_lookup(&wanted, patience).await {
            self.0.log_silence();
        }
    }

    /// What is known now.
    pub fn numbers(&self) -> Arc<Numbers> {
        self.0.numbers.borrow().clone()
    }

    /// Has these names looked up soon, without waiting for that.
    pub fn want(&self, names: &[AccountName]) {
        let now = Instant::now();
        let mut state = self.0.state();
        for name in names {
            if !state.has_answer(name, now.checked_sub(PAUSE))
                && let Some(entry) = state.names.get_mut(name)
            {
                entry.is_wanted = true;
            }
        }
        drop(state);
        self.0.wake.notify_one();
    }

    /// Has these names looked up, unless that was done a moment ago, and waits for it; `false` if that takes longer than
    /// `patience`.
    async fn await_lookup(&self, names: &[AccountName], patience: Duration) -> bool {
        let since = Instant::now().checked_sub(PAUSE);
        self.want(names);
        self.0
            .wait(patience, |state| {
                names.iter().all(|name| state.has_answer(name, since))
            })
            .await
    }
}

impl AccountsInner {
    fn state(&self) -> MutexGuard<'_, AccountsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over the names; whether the background task has to be started.
    fn set(&self, names: BTreeMap<AccountName, Vec<usize>>) -> bool {
        let mut state = self.state();
        let mut before = std::mem::take(&mut state.names);
        for (name, lines) in names {
            let mut entry = before.remove(&name).unwrap_or_else(AccountEntry::new);
            entry.lines = lines;
            state.names.insert(name, entry);
        }
        let start = !state.is_running && !state.names.is_empty();
        state.is_running |= start;
        self.publish(&state, None);
        start
    }

    /// Waits until `is_met`, which every answer may change; `false` after `patience`.
    async fn wait(&self, patience: Duration, is_met: impl Fn(&AccountsState) -> bool) -> bool {
        let mut answers = self.numbers.subscribe();
        let met = async {
            // Not under the channel's own lock: the sender holds that of the state.
            while !is_met(&self.state()) {
                // The sender is `self`'s, so there is no error.
                let _ = answers.changed().await;
            }
        };
        timeout(patience, met).await.is_ok()
    }

    /// Publishes the numbers as they are now, which wakes each task that waits for an answer.
    fn publish(&self, state: &AccountsState, local: Option<Arc<LocalAccounts>>) {
        let known: BTreeMap<_, _> = state
            .names
            .iter()
            .map(|(name, entry)| (name.clone(), entry.known))
            .collect();
        let unknown = known
            .values()
            .filter(|known| !matches!(known, Known::Number(_)))
            .count();
        self.metrics
            .unknown_accounts
            .set(i64::try_from(unknown).unwrap_or(i64::MAX));
        self.numbers.send_modify(|numbers| {
            let local = local.unwrap_or_else(|| numbers.local.clone());
            if numbers.known != known || !Arc::ptr_eq(&numbers.local, &local) {
                *numbers = Arc::new(Numbers { known, local });
            }
        });
    }

    /// Takes what a lookup came to.
    fn take(&self, finding: LookupResult) {
        let mut state = self.state();
        if let Some(entry) = state.names.get_mut(&finding.name) {
            entry.take(&finding, Instant::now());
        }
        self.publish(&state, Some(finding.local));
    }

    fn log_silence(&self) {
        for (name, entry) in self
            .state()
            .names
            .iter()
            .filter(|(_, entry)| entry.answered.is_none())
        {
            tracing::warn!(
                account = %name, lines = ?entry.lines,
                "the name service does not answer: the workload rule is inactive until it does"
            );
        }
    }
}

impl AccountsState {
    /// Whether there is an answer, or a failure, that is not older than `since`.
    fn has_answer(&self, name: &AccountName, since: Option<Instant>) -> bool {
        // One that was removed meanwhile is not waited for.
        self.names.get(name).is_none_or(|entry| {
            entry
                .answered
                .is_some_and(|answered| since.is_none_or(|since| answered >= since))
        })
    }

    /// The next name to look up, and the number that it had. Names of the local files come first: what they ask is answered.
    fn next(&mut self, local: &LocalAccounts, now: Instant) -> Option<(AccountName, Option<u32>)> {
        let running = self.names.iter().filter(|(_, entry)| entry.is_running);
        let (running_local, running): (Vec<_>, Vec<_>) =
            running.partition(|(name, _)| local.has(name));
        let (may_local, may_other) = (running_local.is_empty(), running.len() < MAX_LOOKUPS);
        let is_due =
            |entry: &AccountEntry| !entry.is_running && (entry.is_wanted || entry.next <= now);
        let due = self.names.iter_mut().filter(|(_, entry)| is_due(entry));
        let allowed = due.filter(|(name, _)| {
            if local.has(name) {
                may_local
            } else {
                may_other
            }
        });
        let (name, entry) =
            allowed.min_by_key(|(name, entry)| (!local.has(name), entry.answered))?;
        (entry.is_running, entry.is_wanted) = (true, false);
        let number = match entry.known {
            Known::Number(number) => Some(number),
            Known::Absent | Known::Unanswered => None,
        };
        Some((name.clone(), number))
    }

    /// When the next name becomes due. Those that are due already wait for a lookup to end.
    fn due_after(&self, now: Instant) -> Option<Instant> {
        self.names
            .values()
            .map(|entry| entry.next)
            .filter(|next| *next > now)
            .min()
    }
}

impl AccountEntry {
    fn new() -> Self {
        Self {
            lines: Vec::new(),
            known: Known::Unanswered,
            error: None,
            answered: None,
            absent_since: None,
            next: Instant::now(),
            retry: RETRY,
            is_wanted: false,
            is_running: false,
        }
    }

    fn take(&mut self, finding: &LookupResult, now: Instant) {
        let before = (self.known, self.error, self.answered.is_none());
        (self.is_running, self.answered) = (false, Some(now));
        match (finding.number, self.known) {
            (Ok(Some(number)), _) => {
                (self.known, self.error, self.absent_since) = (Known::Number(number), None, None);
            }
            (Ok(None), Known::Number(_)) => {
                let since = *self.absent_since.get_or_insert(now);
                if finding.successor.is_some() || now >= since + ABSENT_GRACE {
                    (self.known, self.error, self.absent_since) = (Known::Absent, None, None);
                }
            }
            (Ok(None), _) => (self.known, self.error) = (Known::Absent, None),
            // What was known before holds: that it can't be looked up says nothing about it.
            (Err(error), Known::Number(_)) => self.error = Some(error),
            (Err(error), _) => (self.known, self.error) = (Known::Unanswered, Some(error)),
        }
        if matches!(finding.number, Ok(Some(_))) {
            (self.retry, self.next) = (RETRY, now + RECHECK);
        } else {
            self.next = now + self.retry;
            self.retry = (self.retry * 2).min(RECHECK);
        }
        self.log(finding, before);
    }

    /// Logs each change once.
    fn log(&self, finding: &LookupResult, (known, error, is_first): (Known, Option<Errno>, bool)) {
        let (account, lines) = (&finding.name, &self.lines);
        let cause = self.error.map(Errno::desc);
        match (known, self.known) {
            (before, Known::Number(OVERFLOW_ID)) if before != self.known => tracing::warn!(
                %account, ?lines, number = OVERFLOW_ID,
                "the workload rule matches no caller: the kernel shows this number for ids that it cannot map"
            ),
            (Known::Number(before), Known::Number(number)) if before != number => {
                tracing::warn!(%account, ?lines, before, number, "the name has another number");
            }
            (Known::Number(_), Known::Number(_)) => {
                if error.is_none()
                    && let Some(cause) = cause
                {
                    tracing::warn!(%account, ?lines, cause, "the name cannot be looked up: its last number stays in use");
                }
            }
            (_, Known::Number(number)) if !is_first => {
                tracing::info!(%account, ?lines, number, "the name is known: the workload rule is active");
            }
            (_, Known::Number(_)) => {}
            (Known::Number(_), _) => {
                let successor = finding.successor.as_deref();
                tracing::warn!(
                    %account, ?lines, successor, "the name does not exist any more: the workload rule is inactive"
                );
            }
            (before, now) if is_first || before != now => match cause {
                Some(cause) => tracing::warn!(
                    %account, ?lines, cause, "the name cannot be looked up: the workload rule is inactive until it can"
                ),
                None => tracing::warn!(
                    %account, ?lines, "the name is not known on this node: the workload rule is inactive until it is"
                ),
            },
            _ => {}
        }
    }
}

/// Looks names up when they are due or wanted, for as long as the runtime lives.
async fn run(shared: Arc<AccountsInner>) {
    let mut running = JoinSet::new();
    let mut local = read_local(&shared.service).await;
    loop {
        let now = Instant::now();
        while let Some((name, number)) = shared.state().next(&local, now) {
            let (service, local) = (shared.service.clone(), local.clone());
            running.spawn_blocking(move || find(&*service, name, number, local));
        }
        let due = shared.state().due_after(now);
        tokio::select! {
            Some(found) = running.join_next() => match found {
                Ok(finding) => {
                    local = finding.local.clone();
                    shared.take(finding);
                }
                // The name keeps what is known of it.
                Err(error) => tracing::error!(%error, "a lookup of the name service broke off"),
            },
            () = shared.wake.notified() => {}
            () = sleep_until(due.unwrap_or(now + RECHECK)) => {}
        }
    }
}

/// The local files, for the order of the first lookups. Even those may be on a file system that does not answer.
async fn read_local(service: &Arc<dyn NameService>) -> Arc<LocalAccounts> {
    let service = service.clone();
    let reading = tokio::task::spawn_blocking(move || service.local(&Arc::default()));
    timeout(PAUSE, reading)
        .await
        .ok()
        .and_then(Result::ok)
        .unwrap_or_default()
}

/// Blocks.
fn find(
    service: &dyn NameService,
    name: AccountName,
    had: Option<u32>,
    local: Arc<LocalAccounts>,
) -> LookupResult {
    let local = service.local(&local);
    let number = service.number(&name);
    let successor = had
        .filter(|_| number == Ok(None))
        .and_then(|had| service.name(&name, had).ok().flatten())
        .filter(|successor| *successor != name.as_str());
    LookupResult {
        name,
        number,
        successor,
        local,
    }
}

#[cfg(test)]
mod tests;

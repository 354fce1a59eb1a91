//! Numbers of the users and groups that rules name, from the name service (NSS,
//! `nsswitch.conf(5)`).
//!
//! A lookup blocks while a directory server does not answer. Its answer can change while the daemon
//! runs: SSSD or LDAP may start after the daemon, or a user gets another number. So lookups run in
//! the background, on threads for blocking work, and are repeated. Requests only read the last
//! answers. A request that depends on a name without an answer waits for a bounded time.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use crate::config::ConfigLine;
use crate::metrics::Metrics;
use crate::workload_rule::{AccountName, AccountState, OVERFLOW_ID};

mod local;
mod nss;
mod rules;

pub use local::LocalAccounts;
pub use nss::{NameService, Nss};
pub use rules::{IdentifyError, LiveRules};

/// Interval between lookups of a name with a number. It bounds the time until a changed number
/// takes effect.
const RECHECK_INTERVAL: Duration = Duration::from_secs(60);
/// Delay after the first lookup without a number. Each further delay is twice as long, at most
/// [`RECHECK_INTERVAL`].
const RETRY_DELAY: Duration = Duration::from_secs(1);
/// Minimum age of an answer before a request causes another lookup of the same name.
const MIN_LOOKUP_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum time that a request waits for a lookup.
const LOOKUP_WAIT: Duration = Duration::from_secs(2);
/// Time for which a name that was removed keeps its number, unless another name gets the number:
/// some name services report that a name does not exist while they restart.
const ABSENT_GRACE: Duration = Duration::from_secs(300);
/// Maximum concurrent lookups of names that are not in the local files. One lookup of a local name
/// may run in addition.
const MAX_LOOKUPS: usize = 8;

/// All names in the configuration, with their numbers. During a reload also the names of the new
/// configuration. Clones share the state.
#[derive(Clone)]
pub struct Accounts(Arc<AccountsInner>);

struct AccountsInner {
    service: Arc<dyn NameService>,
    state: Mutex<AccountsState>,
    numbers: watch::Sender<Arc<AccountIds>>,
    wake: Notify,
    metrics: Metrics,
}

#[derive(Default)]
struct AccountsState {
    names: BTreeMap<AccountName, AccountEntry>,
    is_running: bool,
}

/// Numbers of the names.
#[derive(Debug, Default)]
pub struct AccountIds {
    known: BTreeMap<AccountName, AccountState>,
    local: Arc<LocalAccounts>,
}

#[derive(Debug)]
struct AccountEntry {
    /// Lines of the configuration that contain the name.
    lines: Vec<ConfigLine>,
    known: AccountState,
    /// Error of the last lookup, if it failed.
    error: Option<Errno>,
    /// Time of the last answer or failure.
    answered: Option<Instant>,
    /// Time since which the name service denies a name, while the number of the name is in use.
    absent_since: Option<Instant>,
    next: Instant,
    retry: Duration,
    is_wanted: bool,
    is_running: bool,
}

/// Result of one lookup.
struct LookupResult {
    name: AccountName,
    number: Result<Option<u32>, Errno>,
    /// The other name that has the number now, if the name was removed.
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

impl AccountIds {
    /// Returns the state of `name`.
    pub fn get(&self, name: &AccountName) -> AccountState {
        self.known
            .get(name)
            .copied()
            .unwrap_or(AccountState::Unanswered)
    }

    /// Reports whether a user or group with this number has another name than `name`: by the local
    /// files, or because another name of the configuration has that number.
    pub fn is_other(&self, name: &AccountName, id: u32) -> bool {
        let is_same_kind =
            |other: &AccountName| std::mem::discriminant(other) == std::mem::discriminant(name);
        let has_id = |(other, known): (&AccountName, &AccountState)| {
            other != name && is_same_kind(other) && *known == AccountState::Number(id)
        };
        self.local.is_other(name, id) || self.known.iter().any(has_id)
    }
}

impl Accounts {
    /// Creates the table, without any names.
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

    /// Returns the names, each with the lines of the configuration that contain it.
    pub fn names(&self) -> BTreeMap<AccountName, Vec<ConfigLine>> {
        let state = self.0.state();
        let lines =
            |(name, entry): (&AccountName, &AccountEntry)| (name.clone(), entry.lines.clone());
        state.names.iter().map(lines).collect()
    }

    /// Adds the names of another configuration, which does not count yet.
    ///
    /// Starts a lookup of all of them and waits for at most `patience`. Until a lookup ends, a name
    /// keeps its state. Has to be called within a tokio runtime.
    pub async fn add(&self, names: BTreeMap<AccountName, Vec<ConfigLine>>, patience: Duration) {
        let wanted: Vec<AccountName> = names.keys().cloned().collect();
        if self.0.add(names) {
            tokio::spawn(run(self.0.clone()));
        }
        if !self.await_lookup(&wanted, patience).await {
            self.0.log_silence();
        }
    }

    /// Drops all other names, and gives these their lines.
    pub fn keep(&self, names: &BTreeMap<AccountName, Vec<ConfigLine>>) {
        let mut state = self.0.state();
        state.names.retain(|name, entry| {
            let lines = names.get(name);
            entry.lines = lines.cloned().unwrap_or_default();
            lines.is_some()
        });
        self.0.publish(&state, None);
    }

    /// Returns the numbers of this moment.
    pub fn numbers(&self) -> Arc<AccountIds> {
        self.0.numbers.borrow().clone()
    }

    /// Schedules lookups of these names, without waiting for them.
    pub fn request_lookup(&self, names: &[AccountName]) {
        let now = Instant::now();
        let mut state = self.0.state();
        for name in names {
            if !state.has_answer(name, now.checked_sub(MIN_LOOKUP_INTERVAL))
                && let Some(entry) = state.names.get_mut(name)
            {
                entry.is_wanted = true;
            }
        }
        drop(state);
        self.0.wake.notify_one();
    }

    /// Schedules lookups of these names, unless that was done a moment ago, and waits for
    /// them. Returns `false` after `patience`.
    async fn await_lookup(&self, names: &[AccountName], patience: Duration) -> bool {
        let since = Instant::now().checked_sub(MIN_LOOKUP_INTERVAL);
        self.request_lookup(names);
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

    /// Adds names. Returns whether the background task has to be started.
    fn add(&self, names: BTreeMap<AccountName, Vec<ConfigLine>>) -> bool {
        let mut state = self.state();
        for (name, lines) in names {
            let entry = state.names.entry(name).or_insert_with(AccountEntry::new);
            entry.lines = lines;
        }
        let start = !state.is_running && !state.names.is_empty();
        state.is_running |= start;
        self.publish(&state, None);
        start
    }

    /// Waits until `is_met`, which is checked after each answer. Returns `false` after `patience`.
    async fn wait(&self, patience: Duration, is_met: impl Fn(&AccountsState) -> bool) -> bool {
        let mut answers = self.numbers.subscribe();
        let met = async {
            // Not under the channel's own lock: the sender holds the lock of the state.
            while !is_met(&self.state()) {
                // `self` owns the sender, so this does not fail.
                let _ = answers.changed().await;
            }
        };
        timeout(patience, met).await.is_ok()
    }

    /// Publishes the current numbers, which wakes each task that waits for an answer.
    fn publish(&self, state: &AccountsState, local: Option<Arc<LocalAccounts>>) {
        let known: BTreeMap<_, _> = state
            .names
            .iter()
            .map(|(name, entry)| (name.clone(), entry.known))
            .collect();
        let unknown = known
            .values()
            .filter(|known| !matches!(known, AccountState::Number(_)))
            .count();
        self.metrics
            .unknown_accounts
            .set(i64::try_from(unknown).unwrap_or(i64::MAX));
        self.numbers.send_modify(|numbers| {
            let local = local.unwrap_or_else(|| numbers.local.clone());
            if numbers.known != known || !Arc::ptr_eq(&numbers.local, &local) {
                *numbers = Arc::new(AccountIds { known, local });
            }
        });
    }

    /// Applies the result of a lookup.
    fn take(&self, result: LookupResult) {
        let mut state = self.state();
        if let Some(entry) = state.names.get_mut(&result.name) {
            entry.take(&result, Instant::now());
        }
        self.publish(&state, Some(result.local));
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
                "workload rule inactive: the name service does not answer"
            );
        }
    }
}

impl AccountsState {
    /// Reports whether there is an answer or a failure that is not older than `since`.
    fn has_answer(&self, name: &AccountName, since: Option<Instant>) -> bool {
        // A name that was removed meanwhile is not waited for.
        self.names.get(name).is_none_or(|entry| {
            entry
                .answered
                .is_some_and(|answered| since.is_none_or(|since| answered >= since))
        })
    }

    /// Returns the next name to resolve, and its last number. Names in the local files come first,
    /// because their lookups do not hang.
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
            AccountState::Number(number) => Some(number),
            AccountState::Absent | AccountState::Unanswered => None,
        };
        Some((name.clone(), number))
    }

    /// Returns when the next name becomes due. Names that are due already wait for a running lookup
    /// to end.
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
            known: AccountState::Unanswered,
            error: None,
            answered: None,
            absent_since: None,
            next: Instant::now(),
            retry: RETRY_DELAY,
            is_wanted: false,
            is_running: false,
        }
    }

    fn take(&mut self, result: &LookupResult, now: Instant) {
        let before = (self.known, self.error, self.answered.is_none());
        (self.is_running, self.answered) = (false, Some(now));
        match (result.number, self.known) {
            (Ok(Some(number)), _) => {
                (self.known, self.error, self.absent_since) =
                    (AccountState::Number(number), None, None);
            }
            (Ok(None), AccountState::Number(_)) => {
                let since = *self.absent_since.get_or_insert(now);
                if result.successor.is_some() || now >= since + ABSENT_GRACE {
                    (self.known, self.error, self.absent_since) =
                        (AccountState::Absent, None, None);
                }
            }
            (Ok(None), _) => (self.known, self.error) = (AccountState::Absent, None),
            // The last number stays valid: a failed lookup is not evidence against it.
            (Err(error), AccountState::Number(_)) => self.error = Some(error),
            (Err(error), _) => (self.known, self.error) = (AccountState::Unanswered, Some(error)),
        }
        if matches!(result.number, Ok(Some(_))) {
            (self.retry, self.next) = (RETRY_DELAY, now + RECHECK_INTERVAL);
        } else {
            self.next = now + self.retry;
            self.retry = (self.retry * 2).min(RECHECK_INTERVAL);
        }
        self.log(result, before);
    }

    fn log(
        &self,
        result: &LookupResult,
        (known, error, is_first): (AccountState, Option<Errno>, bool),
    ) {
        let (account, lines) = (&result.name, &self.lines);
        let cause = self.error.map(Errno::desc);
        match (known, self.known) {
            (before, AccountState::Number(OVERFLOW_ID)) if before != self.known => tracing::warn!(
                %account, ?lines, number = OVERFLOW_ID,
                "workload rule matches no caller: the kernel shows this number for ids that it cannot map"
            ),
            (AccountState::Number(before), AccountState::Number(number)) if before != number => {
                tracing::warn!(%account, ?lines, before, number, "account number changed");
            }
            (AccountState::Number(_), AccountState::Number(_)) => {
                if error.is_none()
                    && let Some(cause) = cause
                {
                    tracing::warn!(%account, ?lines, cause, "account lookup failed: its last number stays in use");
                }
            }
            (_, AccountState::Number(number)) if !is_first => {
                tracing::info!(%account, ?lines, number, "workload rule active: the account has a number");
            }
            (_, AccountState::Number(_)) => {}
            (AccountState::Number(_), _) => {
                let successor = result.successor.as_deref();
                tracing::warn!(
                    %account, ?lines, successor, "workload rule inactive: the account was removed"
                );
            }
            (before, now) if is_first || before != now => match cause {
                Some(cause) => tracing::warn!(
                    %account, ?lines, cause, "workload rule inactive: account lookup failed"
                ),
                None => tracing::warn!(
                    %account, ?lines, "workload rule inactive: the account does not exist on this node"
                ),
            },
            _ => {}
        }
    }
}

/// Resolves names that are due or requested, for as long as the runtime lives.
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
                Ok(result) => {
                    local = result.local.clone();
                    shared.take(result);
                }
                // The name keeps its state.
                Err(error) => tracing::error!(%error, "account lookup panicked"),
            },
            () = shared.wake.notified() => {}
            () = sleep_until(due.unwrap_or(now + RECHECK_INTERVAL)) => {}
        }
    }
}

/// Reads the local files, which decide the order of the first lookups. They too may be on a file
/// system that hangs.
async fn read_local(service: &Arc<dyn NameService>) -> Arc<LocalAccounts> {
    let service = service.clone();
    let reading = tokio::task::spawn_blocking(move || service.local(&Arc::default()));
    timeout(MIN_LOOKUP_INTERVAL, reading)
        .await
        .ok()
        .and_then(Result::ok)
        .unwrap_or_default()
}

/// Resolves one name. Blocks.
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

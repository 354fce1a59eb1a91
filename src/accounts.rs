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

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};

use crate::config::ConfigLine;
use crate::metrics::Metrics;
use crate::workload_rule::{AccountName, AccountState};

mod entry;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod local;
mod lookup;
mod nss;
mod rules;
mod user_names;

pub use local::LocalAccounts;
pub use nss::{NameService, Nss};
pub use rules::{IdentifyError, LiveRules};
pub use user_names::UserNames;

use entry::{AccountEntry, LookupResult};

/// Minimum age of an answer before a request causes another lookup of the same name.
const MIN_LOOKUP_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum time that a request waits for a lookup.
const LOOKUP_WAIT: Duration = Duration::from_secs(2);

/// All names in the configuration, with their numbers. During a reload also the names of the new
/// configuration. Clones share the state.
#[derive(Clone)]
pub struct Accounts(Arc<AccountsInner>);

struct AccountsInner {
    service: Arc<dyn NameService>,
    state: Mutex<AccountsState>,
    ids: watch::Sender<Arc<AccountIds>>,
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
    states: BTreeMap<AccountName, AccountState>,
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
        self.states
            .get(name)
            .copied()
            .unwrap_or(AccountState::Unanswered)
    }

    /// Reports whether a user or group with this number has another name than `name`: by the local
    /// files, or because another name of the configuration has that number.
    pub fn is_other(&self, name: &AccountName, id: u32) -> bool {
        let is_same_kind =
            |other: &AccountName| std::mem::discriminant(other) == std::mem::discriminant(name);
        let has_id = |(other, state): (&AccountName, &AccountState)| {
            other != name && is_same_kind(other) && *state == AccountState::Id(id)
        };
        self.local.is_other(name, id) || self.states.iter().any(has_id)
    }
}

impl Accounts {
    /// Creates the table, without any names.
    pub fn new(service: impl NameService + 'static, metrics: Metrics) -> Self {
        let (ids, _) = watch::channel(Arc::default());
        let (service, state) = (Arc::new(service), Mutex::default());
        Self(Arc::new(AccountsInner {
            service,
            state,
            ids,
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
        let added: Vec<AccountName> = names.keys().cloned().collect();
        if self.0.add(names) {
            tokio::spawn(lookup::run(self.0.clone()));
        }
        if !self.await_lookup(&added, patience).await {
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
    pub fn ids(&self) -> Arc<AccountIds> {
        self.0.ids.borrow().clone()
    }

    /// Schedules lookups of these names, without waiting for them.
    pub fn request_lookup(&self, names: &[AccountName]) {
        let now = Instant::now();
        let mut state = self.0.state();
        for name in names {
            if !state.has_answer(name, now.checked_sub(MIN_LOOKUP_INTERVAL))
                && let Some(entry) = state.names.get_mut(name)
            {
                entry.is_requested = true;
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
        let mut answers = self.ids.subscribe();
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
        let states: BTreeMap<_, _> = state
            .names
            .iter()
            .map(|(name, entry)| (name.clone(), entry.state))
            .collect();
        let unknown = states
            .values()
            .filter(|state| !matches!(state, AccountState::Id(_)))
            .count();
        self.metrics
            .unknown_accounts
            .set(i64::try_from(unknown).unwrap_or(i64::MAX));
        self.ids.send_modify(|ids| {
            let local = local.unwrap_or_else(|| ids.local.clone());
            if ids.states != states || !Arc::ptr_eq(&ids.local, &local) {
                *ids = Arc::new(AccountIds { states, local });
            }
        });
    }

    /// Applies the result of a lookup.
    fn apply(&self, result: LookupResult) {
        let mut state = self.state();
        if let Some(entry) = state.names.get_mut(&result.name) {
            entry.apply(&result, Instant::now());
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
}

#[cfg(test)]
mod tests;

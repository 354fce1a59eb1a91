//! Evaluation of rules with the account IDs of the moment.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::time::{Instant, timeout};

use super::{AccountIds, Accounts, LOOKUP_WAIT};
use crate::caller::{CallerFacts, ProcessFacts};
use crate::clock::REQUEST_HOLD;
use crate::identity::SpiffeId;
use crate::workload_rule::{
    AccountName, AccountState, Decision, ExeMatcher, NamedRule, ResolvedRules, WorkloadRule,
};

/// The `[[workload]]` rules of one configuration.
#[derive(Debug)]
pub struct LiveRules {
    rules: Arc<[NamedRule]>,
    accounts: Option<Accounts>,
    current: ArcSwap<CurrentRules>,
}

#[derive(Debug)]
struct CurrentRules {
    ids: Arc<AccountIds>,
    resolved: ResolvedRules,
}

/// Reason why the rules cannot identify a caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdentifyError {
    /// The decision depends on the process, which was not read.
    NeedsProcess,
    /// The decision depends on a user or group without a number, because the name service does not
    /// answer. A later rule that matches may not be the caller's rule.
    UnknownAccount(AccountName),
    /// The decision depends on a program's file on a file system that hangs or returns an error.
    Unresponsive,
}

impl LiveRules {
    /// Creates the rules, with the IDs of `accounts`, which has to follow the names in them.
    pub fn new(rules: impl Into<Arc<[NamedRule]>>, accounts: &Accounts) -> Self {
        let rules: Arc<[NamedRule]> = rules.into();
        let has_names = rules.iter().any(|rule| rule.names().next().is_some());
        let ids = accounts.ids();
        let current = ArcSwap::from_pointee(CurrentRules::new(&rules, ids));
        Self {
            rules,
            accounts: has_names.then(|| accounts.clone()),
            current,
        }
    }

    /// Returns the SPIFFE ID of a caller. `None` if no rule matches.
    ///
    /// Waits for a bounded time for the file systems of programs. Does the same for the name
    /// service where the result depends on a name without an answer or with a recent denial. Fails
    /// if the result depends on a name that the name service has not answered, or on a file that
    /// does not respond.
    pub async fn identify(
        &self,
        caller: CallerFacts<'_>,
    ) -> Result<Option<SpiffeId>, IdentifyError> {
        let request_time = Instant::now();
        let mut is_resolved = false;
        loop {
            let names = match self.evaluate(caller, request_time) {
                RulesOutcome::Decided(decided) => return decided,
                RulesOutcome::NeedsFile(file) => {
                    // A file system that hangs delays only callers that its rule may match.
                    if !timeout(REQUEST_HOLD, file.refresh_stat())
                        .await
                        .unwrap_or(false)
                    {
                        return Err(IdentifyError::Unresponsive);
                    }
                    continue;
                }
                RulesOutcome::Unanswered(names) if is_resolved => {
                    return names
                        .into_iter()
                        .next()
                        .map_or(Ok(None), |name| Err(IdentifyError::UnknownAccount(name)));
                }
                RulesOutcome::NoMatchYet(_) if is_resolved => return Ok(None),
                RulesOutcome::Unanswered(names) | RulesOutcome::NoMatchYet(names) => names,
            };
            let Some(accounts) = &self.accounts else {
                return Ok(None);
            };
            accounts.await_lookup(&names, LOOKUP_WAIT).await;
            is_resolved = true;
        }
    }

    fn evaluate(&self, caller: CallerFacts<'_>, request_time: Instant) -> RulesOutcome {
        let current = self.current();
        let decision = current.resolved.decide(caller, request_time);
        let is_other = |name: &AccountName, id| current.ids.is_other(name, id);
        let missing = match current
            .resolved
            .missing(caller, &decision, is_other, request_time)
        {
            Ok(missing) => missing,
            Err(file) => return RulesOutcome::NeedsFile(file.clone()),
        };
        if !missing.unanswered.is_empty() {
            return RulesOutcome::Unanswered(missing.unanswered);
        }
        match decision {
            Decision::NeedsProcess => RulesOutcome::Decided(Err(IdentifyError::NeedsProcess)),
            Decision::NeedsFile(file) => RulesOutcome::NeedsFile(file.clone()),
            Decision::NoMatch if missing.absent.is_empty() => RulesOutcome::Decided(Ok(None)),
            Decision::NoMatch => RulesOutcome::NoMatchYet(missing.absent),
            Decision::Matched(rule) => {
                // A user that was created a moment ago is found by its next request.
                if let Some(accounts) = self
                    .accounts
                    .as_ref()
                    .filter(|_| !missing.absent.is_empty())
                {
                    accounts.request_lookup(&missing.absent);
                }
                RulesOutcome::Decided(Ok(Some(rule.spiffe_id.clone())))
            }
        }
    }

    /// Returns the facts that have to be read from the caller's process. `None` if the known facts
    /// decide.
    pub fn facts_needed(&self, caller: CallerFacts<'_>) -> Option<ProcessFacts> {
        let current = self.current();
        current
            .resolved
            .facts_needed(caller, |name, id| current.ids.is_other(name, id))
    }

    /// Returns the rules for this SPIFFE ID, as they are written.
    pub fn of(&self, id: &SpiffeId) -> Vec<NamedRule> {
        self.rules
            .iter()
            .filter(|rule| rule.spiffe_id() == id)
            .cloned()
            .collect()
    }

    /// Returns the SPIFFE IDs of all rules, each once, in the order of the rules.
    pub fn ids(&self) -> Vec<&SpiffeId> {
        let mut ids: Vec<&SpiffeId> = Vec::new();
        for id in self.rules.iter().map(NamedRule::spiffe_id) {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        ids
    }

    fn current(&self) -> Arc<CurrentRules> {
        let current = self.current.load_full();
        let Some(accounts) = &self.accounts else {
            return current;
        };
        let ids = accounts.ids();
        if Arc::ptr_eq(&current.ids, &ids) {
            return current;
        }
        let newer = Arc::new(CurrentRules::new(&self.rules, ids));
        self.current.store(newer.clone());
        newer
    }
}

/// Result of the rules for a caller, with the IDs of one moment.
enum RulesOutcome {
    Decided(Result<Option<SpiffeId>, IdentifyError>),
    /// The result depends on the current state of this file.
    NeedsFile(ExeMatcher),
    /// The result depends on these names.
    Unanswered(Vec<AccountName>),
    /// No rule matches, unless one of these names exists by now.
    NoMatchYet(Vec<AccountName>),
}

impl CurrentRules {
    fn new(rules: &[NamedRule], ids: Arc<AccountIds>) -> Self {
        let resolved = ResolvedRules::new(rules, |name| ids.get(name));
        Self { ids, resolved }
    }
}

/// Rules without account names.
impl<T: IntoIterator<Item = WorkloadRule>> From<T> for LiveRules {
    fn from(rules: T) -> Self {
        let rules: Arc<[NamedRule]> = rules.into_iter().map(NamedRule::from).collect();
        let ids = Arc::<AccountIds>::default();
        let resolved = ResolvedRules::new(&rules, |_| AccountState::Unanswered);
        Self {
            rules,
            accounts: None,
            current: ArcSwap::from_pointee(CurrentRules { ids, resolved }),
        }
    }
}

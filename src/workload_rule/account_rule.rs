//! Rules with the name of a user or a group, and their result with the numbers that are known.

use std::fmt;

use tokio::time::Instant;

use crate::caller::{Caller, ProcessFacts};
use crate::file_threads::FileThreads;
use crate::identity::SpiffeId;
use crate::workload_rule::{Decision, ExeMatcher, OVERFLOW_ID, WorkloadRule, decide, facts_needed};

/// A user or a group, by its name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AccountName {
    /// The name of a user.
    User(String),
    /// The name of a group.
    Group(String),
}

/// The answer of the name service about a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccountState {
    /// The id of the user or group.
    Id(u32),
    /// The user or group does not exist.
    Absent,
    /// The name service has not responded yet, or has failed.
    Unanswered,
}

/// A `[[workload]]` rule as it is in the configuration. Keys with a name are missing in `rule`.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NamedRule {
    /// The rule, with its keys that have a number.
    pub rule: WorkloadRule,
    pub user: Option<AccountName>,
    pub group: Option<AccountName>,
    /// The name of one of the supplementary groups.
    pub supplementary_group: Option<AccountName>,
}

/// Rules with the numbers that were known at one time.
#[derive(Debug, Default)]
pub struct ResolvedRules {
    /// The rules in the order of the configuration. An unknown name is replaced by [`OVERFLOW_ID`],
    /// which matches no caller. It still causes the process to be read where the known number
    /// would.
    rules: Vec<WorkloadRule>,
    incomplete: Vec<IncompleteRule>,
}

/// A rule with an unknown name.
#[derive(Debug)]
struct IncompleteRule {
    /// The index of the rule.
    index: usize,
    /// The rule without that name. It matches at least the callers that the rule would match.
    without: WorkloadRule,
    user: UnknownName,
    group: UnknownName,
    supplementary_group: UnknownName,
}

/// A name, and the reason why its number is unknown.
type UnknownName = Option<(AccountName, AccountState)>;

/// The names on which the decision about one caller depends.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct MissingNames {
    /// The names without a user or group, by the answer of the name service.
    pub absent: Vec<AccountName>,
    /// The names that the name service has not answered.
    pub unanswered: Vec<AccountName>,
}

impl AccountName {
    /// Returns the text of the name.
    pub fn as_str(&self) -> &str {
        let (Self::User(name) | Self::Group(name)) = self;
        name
    }
}

impl fmt::Display for AccountName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(name) => write!(f, "user {name:?}"),
            Self::Group(name) => write!(f, "group {name:?}"),
        }
    }
}

impl From<WorkloadRule> for NamedRule {
    fn from(rule: WorkloadRule) -> Self {
        Self {
            rule,
            user: None,
            group: None,
            supplementary_group: None,
        }
    }
}

impl NamedRule {
    /// Returns the SPIFFE ID of callers that match.
    pub fn spiffe_id(&self) -> &SpiffeId {
        &self.rule.spiffe_id
    }

    /// Makes its file's reads share these threads with other rules.
    pub fn with_threads(mut self, threads: &FileThreads) -> Self {
        let exe = self.rule.exe.take();
        self.rule.exe = exe.map(|exe| exe.with_threads(threads.clone()));
        self
    }

    /// Returns the names in the rule.
    pub fn names(&self) -> impl Iterator<Item = &AccountName> {
        [&self.user, &self.group, &self.supplementary_group]
            .into_iter()
            .flatten()
    }

    /// Returns whether a caller on the host's TCP listeners can match it by its socket alone.
    pub fn socket_decides(&self) -> bool {
        let is_root = self
            .user
            .as_ref()
            .is_some_and(|user| user.as_str() == "root");
        let has_group = self.group.is_some() || self.supplementary_group.is_some();
        !is_root && !has_group && self.rule.socket_decides()
    }

    /// Returns the rule with all numbers, or `None` if one is unknown.
    pub fn resolve(&self, number: impl Fn(&AccountName) -> AccountState) -> Option<WorkloadRule> {
        let is_known = |name: &AccountName| matches!(number(name), AccountState::Id(_));
        self.names()
            .all(is_known)
            .then(|| self.with_numbers(&number))
    }

    fn with_numbers(&self, number: impl Fn(&AccountName) -> AccountState) -> WorkloadRule {
        let id = |name: &Option<AccountName>| {
            name.as_ref().map(|name| match number(name) {
                AccountState::Id(id) => id,
                AccountState::Absent | AccountState::Unanswered => OVERFLOW_ID,
            })
        };
        WorkloadRule {
            uid: id(&self.user).or(self.rule.uid),
            gid: id(&self.group).or(self.rule.gid),
            supplementary_group: id(&self.supplementary_group).or(self.rule.supplementary_group),
            ..self.rule.clone()
        }
    }
}

impl ResolvedRules {
    /// Resolves the rules. `number` returns the known answer for a name.
    pub fn new(rules: &[NamedRule], number: impl Fn(&AccountName) -> AccountState) -> Self {
        let unknown = |name: &Option<AccountName>| {
            let name = name.clone()?;
            let known = number(&name);
            (!matches!(known, AccountState::Id(_))).then_some((name, known))
        };
        let incomplete = rules.iter().enumerate().filter_map(|(index, named)| {
            let [user, group, supplementary_group] =
                [&named.user, &named.group, &named.supplementary_group].map(unknown);
            let with = named.with_numbers(&number);
            let without = WorkloadRule {
                uid: with.uid.filter(|_| user.is_none()),
                gid: with.gid.filter(|_| group.is_none()),
                supplementary_group: with
                    .supplementary_group
                    .filter(|_| supplementary_group.is_none()),
                ..with
            };
            let is_incomplete = user.is_some() || group.is_some() || supplementary_group.is_some();
            is_incomplete.then_some(IncompleteRule {
                index,
                without,
                user,
                group,
                supplementary_group,
            })
        });
        let incomplete = incomplete.collect();
        Self {
            incomplete,
            rules: rules
                .iter()
                .map(|named| named.with_numbers(&number))
                .collect(),
        }
    }

    /// Returns the first rule that matches, as [`decide`] does.
    pub fn decide(&self, caller: &Caller, since: Instant) -> Decision<'_> {
        decide(&self.rules, caller, since)
    }

    /// Returns the facts of the caller's process that have to be read, or `None` if the known facts
    /// decide. For a user that an unknown name may mean, it includes the facts for the rule with
    /// that name, since its number may arrive before the decision.
    pub fn facts_needed(
        &self,
        caller: &Caller,
        is_other: impl Fn(&AccountName, u32) -> bool,
    ) -> Option<ProcessFacts> {
        let needed = facts_needed(&self.rules, caller);
        let may_be = |incomplete: &&IncompleteRule| {
            incomplete.user.is_some() && incomplete.can_be_of(caller, &is_other)
        };
        let by_unknown = self.incomplete.iter().filter(may_be);
        let by_unknown =
            by_unknown.filter_map(|rule| facts_needed(std::slice::from_ref(&rule.without), caller));
        by_unknown.fold(needed, |all, more| {
            Some(all.map_or(more, |all| all.and(more)))
        })
    }

    /// Returns the names that could change `decision`: those of earlier rules that match this
    /// caller in everything else. `is_other` returns true if the user or group with this number has
    /// another name. Fails if the result depends on the current file at a path.
    pub fn missing(
        &self,
        caller: &Caller,
        decision: &Decision<'_>,
        is_other: impl Fn(&AccountName, u32) -> bool,
        since: Instant,
    ) -> Result<MissingNames, &ExeMatcher> {
        let end = match decision {
            Decision::Matched(rule) => self.rules.iter().position(|one| std::ptr::eq(one, *rule)),
            Decision::NoMatch | Decision::NeedsProcess | Decision::NeedsFile(_) => None,
        };
        let before = |incomplete: &&IncompleteRule| end.is_none_or(|end| incomplete.index < end);
        let mut missing = MissingNames::default();
        for incomplete in self.incomplete.iter().filter(before) {
            if incomplete.could_match(caller, &is_other, since)? {
                incomplete.add_to(&mut missing);
            }
        }
        Ok(missing)
    }
}

impl IncompleteRule {
    /// Returns whether the rule would match with some number for each unknown name. Facts that were
    /// not read exclude nothing.
    fn could_match(
        &self,
        caller: &Caller,
        is_other: impl Fn(&AccountName, u32) -> bool,
        since: Instant,
    ) -> Result<bool, &ExeMatcher> {
        if !self.can_be_of(caller, is_other) {
            return Ok(false);
        }
        match self.without.matches(caller, since) {
            Ok(matches) => Ok(matches),
            Err(super::UndecidedFact::Process) => Ok(true),
            Err(super::UndecidedFact::File(file)) => Err(file),
        }
    }

    /// Returns whether the caller may be the user, and in the groups, that the unknown names mean.
    fn can_be_of(&self, caller: &Caller, is_other: impl Fn(&AccountName, u32) -> bool) -> bool {
        let process = caller.process.as_ref();
        let can_be = |unknown: &UnknownName, ids: Option<&[u32]>| match (unknown, ids) {
            (Some((name, _)), Some(ids)) => ids
                .iter()
                .any(|id| *id != OVERFLOW_ID && !is_other(name, *id)),
            _ => true,
        };
        can_be(&self.user, Some(&[caller.uid]))
            && can_be(
                &self.group,
                process.map(|process| std::slice::from_ref(&process.gid)),
            )
            && can_be(
                &self.supplementary_group,
                process.and_then(|process| process.groups.as_ref()?.list()),
            )
    }

    /// Adds the unknown names of the rule. If one of them does not exist, the rule matches no
    /// caller, and only such names count.
    fn add_to(&self, missing: &mut MissingNames) {
        let unknown = || {
            [&self.user, &self.group, &self.supplementary_group]
                .into_iter()
                .flatten()
        };
        let is_absent = unknown().any(|(_, known)| *known == AccountState::Absent);
        for (name, known) in unknown() {
            let list = if is_absent {
                &mut missing.absent
            } else {
                &mut missing.unanswered
            };
            if is_absent == (*known == AccountState::Absent) && !list.contains(name) {
                list.push(name.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests;

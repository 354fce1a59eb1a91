//! The last answer for one name, and the time of its next lookup.

use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use tokio::time::Instant;

use super::LocalAccounts;
use crate::backoff::{Backoff, Jitter};
use crate::config::ConfigLine;
use crate::workload_rule::{AccountName, AccountState, OVERFLOW_ID};

/// Interval between lookups of a name with a number. It bounds the time until a changed number
/// takes effect.
pub(super) const RECHECK_INTERVAL: Duration = Duration::from_secs(60);
/// Delays after lookups without a number.
const RETRY: Backoff = Backoff::new(Duration::from_secs(1), RECHECK_INTERVAL, Jitter::None);
/// Time for which a name that was removed keeps its number, unless another name gets the number:
/// some name services report that a name does not exist while they restart.
pub(super) const ABSENT_GRACE: Duration = Duration::from_secs(300);

/// Result of one lookup.
pub(super) struct LookupResult {
    pub(super) name: AccountName,
    pub(super) id: Result<Option<u32>, Errno>,
    /// The other name that has the number now, if the name was removed.
    pub(super) successor: Option<String>,
    pub(super) local: Arc<LocalAccounts>,
}

/// A name's last answer, and the schedule of its lookups.
#[derive(Debug)]
pub(super) struct AccountEntry {
    /// Lines of the configuration that contain the name.
    pub(super) lines: Vec<ConfigLine>,
    pub(super) state: AccountState,
    /// Error of the last lookup, if it failed.
    error: Option<Errno>,
    /// Time of the last answer or failure.
    pub(super) answered: Option<Instant>,
    /// Time since which the name service denies a name, while the number of the name is in use.
    absent_since: Option<Instant>,
    pub(super) next: Instant,
    /// The number of lookups in a row without a number.
    failures: u32,
    pub(super) is_requested: bool,
    pub(super) is_running: bool,
}

impl AccountEntry {
    pub(super) fn new() -> Self {
        Self {
            lines: Vec::new(),
            state: AccountState::Unanswered,
            error: None,
            answered: None,
            absent_since: None,
            next: Instant::now(),
            failures: 0,
            is_requested: false,
            is_running: false,
        }
    }

    /// Applies the result of a lookup.
    pub(super) fn apply(&mut self, result: &LookupResult, now: Instant) {
        let before = (self.state, self.error, self.answered.is_none());
        (self.is_running, self.answered) = (false, Some(now));
        match (result.id, self.state) {
            (Ok(Some(id)), _) => {
                (self.state, self.error, self.absent_since) = (AccountState::Id(id), None, None);
            }
            (Ok(None), AccountState::Id(_)) => {
                let since = *self.absent_since.get_or_insert(now);
                if result.successor.is_some() || now >= since + ABSENT_GRACE {
                    (self.state, self.error, self.absent_since) =
                        (AccountState::Absent, None, None);
                }
            }
            (Ok(None), _) => (self.state, self.error) = (AccountState::Absent, None),
            // The last number stays valid: a failed lookup is not evidence against it.
            (Err(error), AccountState::Id(_)) => self.error = Some(error),
            (Err(error), _) => (self.state, self.error) = (AccountState::Unanswered, Some(error)),
        }
        if matches!(result.id, Ok(Some(_))) {
            (self.failures, self.next) = (0, now + RECHECK_INTERVAL);
        } else {
            self.failures = self.failures.saturating_add(1);
            self.next = now + RETRY.delay(self.failures);
        }
        self.log(result, before);
    }

    fn log(
        &self,
        result: &LookupResult,
        (previous, error, is_first): (AccountState, Option<Errno>, bool),
    ) {
        let (account, lines) = (&result.name, &self.lines);
        let cause = self.error.map(Errno::desc);
        match (previous, self.state) {
            (before, AccountState::Id(OVERFLOW_ID)) if before != self.state => tracing::warn!(
                %account, ?lines, number = OVERFLOW_ID,
                "workload rule matches no caller: the kernel shows this number for ids that it cannot map"
            ),
            (AccountState::Id(before), AccountState::Id(number)) if before != number => {
                tracing::warn!(%account, ?lines, before, number, "account number changed");
            }
            (AccountState::Id(_), AccountState::Id(_)) => {
                if error.is_none()
                    && let Some(cause) = cause
                {
                    tracing::warn!(%account, ?lines, cause, "account lookup failed: its last number stays in use");
                }
            }
            (_, AccountState::Id(number)) if !is_first => {
                tracing::info!(%account, ?lines, number, "workload rule active: the account has a number");
            }
            (_, AccountState::Id(_)) => {}
            (AccountState::Id(_), _) => {
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

//! The background task that resolves names.

use std::sync::Arc;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::entry::{AccountEntry, LookupResult, RECHECK_INTERVAL};
use super::{AccountsInner, AccountsState, LocalAccounts, MIN_LOOKUP_INTERVAL, NameService};
use crate::workload_rule::{AccountName, AccountState};

/// Maximum concurrent lookups of names that are not in the local files. One lookup of a local name
/// may run in addition.
pub(super) const MAX_LOOKUPS: usize = 8;

impl AccountsState {
    /// Returns the next name to resolve, and its last number. Names in the local files come first,
    /// because their lookups do not hang.
    fn next(&mut self, local: &LocalAccounts, now: Instant) -> Option<(AccountName, Option<u32>)> {
        let running = self.names.iter().filter(|(_, entry)| entry.is_running);
        let (running_local, running): (Vec<_>, Vec<_>) =
            running.partition(|(name, _)| local.has(name));
        let (may_local, may_other) = (running_local.is_empty(), running.len() < MAX_LOOKUPS);
        let is_due =
            |entry: &AccountEntry| !entry.is_running && (entry.is_requested || entry.next <= now);
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
        (entry.is_running, entry.is_requested) = (true, false);
        let id = match entry.state {
            AccountState::Id(id) => Some(id),
            AccountState::Absent | AccountState::Unanswered => None,
        };
        Some((name.clone(), id))
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

/// Resolves names that are due or requested, for as long as the runtime lives.
pub(super) async fn run(shared: Arc<AccountsInner>) {
    let mut running = JoinSet::new();
    let mut local = read_local(&shared.service).await;
    loop {
        let now = Instant::now();
        while let Some((name, id)) = shared.state().next(&local, now) {
            let (service, local) = (shared.service.clone(), local.clone());
            running.spawn_blocking(move || resolve(&*service, name, id, local));
        }
        let due = shared.state().due_after(now);
        tokio::select! {
            Some(found) = running.join_next() => match found {
                Ok(result) => {
                    local = result.local.clone();
                    shared.apply(result);
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
fn resolve(
    service: &dyn NameService,
    name: AccountName,
    previous: Option<u32>,
    local: Arc<LocalAccounts>,
) -> LookupResult {
    let local = service.local(&local);
    let id = service.id(&name);
    let successor = previous
        .filter(|_| id == Ok(None))
        .and_then(|previous| service.name(&name, previous).ok().flatten())
        .filter(|successor| *successor != name.as_str());
    LookupResult {
        name,
        id,
        successor,
        local,
    }
}

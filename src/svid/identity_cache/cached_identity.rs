//! Cached identities of one subject, and the time for which they are valid.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::agent_clock::AgentClock;
use crate::caller::{Caller, WorkloadKey};
use crate::role::Identity;
use crate::svid::{DENIAL_CONFIRMATION, SourceError};

/// Age at which identities are queried again.
pub(super) const REVALIDATE_AFTER: Duration = Duration::from_secs(30);
/// Delay after a failed query, if a query is due.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(5);
/// Time for which the result "no identity" is cached. It is short, since an operator may be
/// registering the workload right now.
pub(super) const NO_IDENTITY_TTL: Duration = Duration::from_secs(2);
/// A subject takes one slot, and one more for each of these many bytes of names that the workload
/// chose.
pub(super) const BYTES_PER_SLOT: usize = 2048;
/// A query that takes longer is slow: the next one about this subject runs in [`Lane::Slow`] (T28).
pub(in crate::svid) const QUICK_TIMEOUT: Duration = Duration::from_secs(5);
/// An identity expires if the agent has not confirmed it for this long while it confirmed others.
/// Otherwise a workload that is attested slowly would keep the identity of a deleted entry. This
/// exceeds a restart of the kubelet, the container runtime or the agent. It is below the shortest
/// session, so credentials issued before outlast it in any case.
pub(super) const MAX_UNCONFIRMED: Duration = Duration::from_secs(600);

/// Result of a query, for all requests that wait for it.
pub(in crate::svid) type IdentityResult = Result<Arc<[Identity]>, SourceError>;
pub(super) type ResultSender = watch::Sender<Option<IdentityResult>>;

/// The limit that a query about a known subject counts against, so that slow queries do not delay
/// quick ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::svid) enum Lane {
    /// Lane of queries that end after [`QUICK_TIMEOUT`].
    Quick,
    /// Lane of queries that may last as long as any call to the agent.
    Slow,
}

/// Result of a lookup for a request.
#[derive(Debug)]
pub(in crate::svid) enum IdentityLookup {
    /// The identities are cached.
    Cached(Arc<[Identity]>),
    /// A query is in flight.
    InFlight(watch::Receiver<Option<IdentityResult>>),
    /// No query is in flight. The receiver of this result has to send one.
    Unknown(watch::Receiver<Option<IdentityResult>>),
}

#[derive(Debug)]
pub(super) struct CachedIdentity {
    /// The caller that proves which process or pod it is.
    pub(super) caller: Arc<Caller>,
    pub(super) workload: WorkloadKey,
    /// `None` before the first answer.
    pub(super) identities: Option<Arc<[Identity]>>,
    /// Time of the last answer or failed query.
    pub(super) at: Instant,
    /// Time of the last answer.
    pub(super) answered: Instant,
    /// Time of the last answer with identities.
    pub(super) confirmed: Instant,
    /// Time of the first denial since then.
    pub(super) denied: Option<Instant>,
    /// Sender for the requests that wait for the query in flight, if there is one.
    pub(super) in_flight: Option<ResultSender>,
    /// True if a request caused that query. Then it counts against the limit of waiting requests.
    pub(super) has_waiters: bool,
    pub(super) lane: Lane,
    pub(super) slots: usize,
}

impl CachedIdentity {
    pub(super) fn new(caller: &Arc<Caller>, workload: &WorkloadKey) -> Self {
        let now = Instant::now();
        Self {
            caller: caller.clone(),
            workload: workload.clone(),
            identities: None,
            at: now,
            answered: now,
            confirmed: now,
            denied: None,
            in_flight: None,
            has_waiters: false,
            lane: Lane::Quick,
            slots: slots(caller),
        }
    }

    /// Returns the result for a request, or `None` if a query has to be sent.
    pub(super) fn lookup(&self, clock: AgentClock) -> Option<IdentityLookup> {
        let is_good = |ids: &&Arc<[Identity]>| match ids.is_empty() {
            true => self.revalidate_at() > Instant::now(),
            false => self.is_valid(clock),
        };
        match (self.identities.as_ref().filter(is_good), &self.in_flight) {
            (Some(identities), _) => Some(IdentityLookup::Cached(identities.clone())),
            (None, Some(sender)) => Some(IdentityLookup::InFlight(sender.subscribe())),
            (None, None) => None,
        }
    }

    pub(super) fn has_identity(&self) -> bool {
        self.identities
            .as_ref()
            .is_some_and(|identities| !identities.is_empty())
    }

    pub(super) fn is_valid(&self, clock: AgentClock) -> bool {
        self.has_identity() && clock.age(self.confirmed) < MAX_UNCONFIRMED
    }

    /// Returns the time of the next query.
    pub(super) fn revalidate_at(&self) -> Instant {
        match (self.denied, &self.identities) {
            // The second query, which decides.
            (Some(since), _) => (since + DENIAL_CONFIRMATION).max(self.at + RETRY_AFTER),
            (None, Some(identities)) if identities.is_empty() => self.at + NO_IDENTITY_TTL,
            (None, _) => self.at + REVALIDATE_AFTER,
        }
    }

    /// Applies the result of a query. Returns the result for the requests that wait, and whether to
    /// keep the subject.
    pub(super) fn take(
        &mut self,
        result: IdentityResult,
        clock: AgentClock,
    ) -> (IdentityResult, bool) {
        let now = Instant::now();
        let previous = self.identities.clone().filter(|_| self.is_valid(clock));
        match (result, previous) {
            (Ok(identities), _) if !identities.is_empty() => {
                self.denied = None;
                self.confirmed = now;
                self.identities = Some(identities.clone());
                (Ok(identities), true)
            }
            // A single denial does not remove the identity.
            (Ok(_), Some(previous))
                if now.duration_since(*self.denied.get_or_insert(now)) < DENIAL_CONFIRMATION =>
            {
                (Ok(previous), true)
            }
            (Ok(none), _) => {
                self.denied = None;
                self.identities = Some(none.clone());
                (Ok(none), true)
            }
            // The process is not the same any more.
            (Err(error @ SourceError::Caller(_)), _) | (Err(error), None) => (Err(error), false),
            (Err(_), Some(previous)) => (Ok(previous), true),
        }
    }
}

/// Counts the slots for the names of a caller: its cgroup's path three times, and its program's
/// path.
fn slots(caller: &Caller) -> usize {
    let cgroup = caller
        .peer
        .cgroup
        .as_ref()
        .map_or(0, |cgroup| cgroup.as_str().len());
    let program = caller
        .process
        .as_ref()
        .and_then(|process| process.program.as_ref()?.exe.as_ref());
    let program = program.map_or(0, |exe| exe.path.as_os_str().len());
    1 + (3 * cgroup + program) / BYTES_PER_SLOT
}

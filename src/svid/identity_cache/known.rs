//! What is known of one subject, and for how long.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::agent_clock::AgentClock;
use crate::caller::{Caller, WorkloadKey};
use crate::role::Identity;
use crate::svid::SourceError;

/// What was said so long ago is asked again.
pub(super) const REVALIDATE_AFTER: Duration = Duration::from_secs(30);
/// Two definite answers this far apart, without another in between, are the agent's last word: one alone may be an attestor
/// that failed for a moment, which looks just the same.
pub(super) const DENIAL_CONFIRMATION: Duration = Duration::from_secs(10);
/// After a question without an answer, where one is due.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(5);
/// How long a process that has no identity is told so without asking: somebody may be registering it right now.
pub(super) const NO_IDENTITY_TTL: Duration = Duration::from_secs(2);
/// A subject takes one slot, and one more for each so many bytes of names that the workload chose.
pub(super) const BYTES_PER_SLOT: usize = 2048;
/// A query that takes longer is slow: the next one about this subject runs in [`Lane::Slow`] (attack 28).
pub(in crate::svid) const QUICK_TIMEOUT: Duration = Duration::from_secs(5);
/// An identity expires if the agent has not confirmed it for this long while it confirmed others. Else a workload that is
/// attested slowly would keep the identity of a deleted entry. This is longer than a restart of the kubelet, the container
/// runtime or the agent, and shorter than the shortest session: credentials issued before outlast it in any case.
pub(super) const MAX_UNCONFIRMED: Duration = Duration::from_secs(600);

/// What is told to all who wait for one question.
pub(in crate::svid) type IdentityResult = Result<Arc<[Identity]>, SourceError>;
pub(super) type ResultSender = watch::Sender<Option<IdentityResult>>;

/// Which limit a query about a known subject counts against, so that slow queries do not delay quick ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::svid) enum Lane {
    /// Ends after [`QUICK_TIMEOUT`].
    Quick,
    /// Lasts as long as a query to the agent may last.
    Slow,
}

/// What there is for a request.
#[derive(Debug)]
pub(in crate::svid) enum IdentityLookup {
    /// It is known.
    Known(Arc<[Identity]>),
    /// It is being asked for.
    Asked(watch::Receiver<Option<IdentityResult>>),
    /// It has to be asked for, by whoever finds this.
    Unknown(watch::Receiver<Option<IdentityResult>>),
}

#[derive(Debug)]
pub(super) struct CachedIdentity {
    /// With proof of which process or pod it is.
    pub(super) caller: Arc<Caller>,
    pub(super) owner: WorkloadKey,
    /// `None` before the first answer.
    pub(super) identities: Option<Arc<[Identity]>>,
    /// When the last answer or the last try came.
    pub(super) at: Instant,
    /// When the last answer came.
    pub(super) answered: Instant,
    /// When the last answer with identities came.
    pub(super) confirmed: Instant,
    /// Since when it is denied.
    pub(super) denied: Option<Instant>,
    /// Who waits for the question that is under way, if one is.
    pub(super) asking: Option<ResultSender>,
    /// Whether that was asked because of a request. Such a question counts against the limit of those that wait.
    pub(super) is_waited_for: bool,
    pub(super) lane: Lane,
    pub(super) slots: usize,
}

impl CachedIdentity {
    pub(super) fn new(caller: &Arc<Caller>, owner: &WorkloadKey) -> Self {
        let now = Instant::now();
        Self {
            caller: caller.clone(),
            owner: owner.clone(),
            identities: None,
            at: now,
            answered: now,
            confirmed: now,
            denied: None,
            asking: None,
            is_waited_for: false,
            lane: Lane::Quick,
            slots: slots(caller),
        }
    }

    /// What there is for a request; `None` if it has to be asked for.
    pub(super) fn found(&self, clock: AgentClock) -> Option<IdentityLookup> {
        let is_good = |ids: &&Arc<[Identity]>| match ids.is_empty() {
            true => self.revalidate_at() > Instant::now(),
            false => self.is_valid(clock),
        };
        match (self.identities.as_ref().filter(is_good), &self.asking) {
            (Some(identities), _) => Some(IdentityLookup::Known(identities.clone())),
            (None, Some(told)) => Some(IdentityLookup::Asked(told.subscribe())),
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

    /// When it is to be asked about again.
    pub(super) fn revalidate_at(&self) -> Instant {
        match (self.denied, &self.identities) {
            // The second question, which decides.
            (Some(since), _) => (since + DENIAL_CONFIRMATION).max(self.at + RETRY_AFTER),
            (None, Some(identities)) if identities.is_empty() => self.at + NO_IDENTITY_TTL,
            (None, _) => self.at + REVALIDATE_AFTER,
        }
    }

    /// Applies the result of a query. Returns the result for the requests that wait, and whether to keep the subject.
    pub(super) fn take(
        &mut self,
        said: IdentityResult,
        clock: AgentClock,
    ) -> (IdentityResult, bool) {
        let now = Instant::now();
        let before = self.identities.clone().filter(|_| self.is_valid(clock));
        match (said, before) {
            (Ok(identities), _) if !identities.is_empty() => {
                self.denied = None;
                self.confirmed = now;
                self.identities = Some(identities.clone());
                (Ok(identities), true)
            }
            // Once is not enough to take something away.
            (Ok(_), Some(before))
                if now.duration_since(*self.denied.get_or_insert(now)) < DENIAL_CONFIRMATION =>
            {
                (Ok(before), true)
            }
            (Ok(none), _) => {
                self.denied = None;
                self.identities = Some(none.clone());
                (Ok(none), true)
            }
            // It is not the process any more that it was.
            (Err(error @ SourceError::Caller(_)), _) | (Err(error), None) => (Err(error), false),
            (Err(_), Some(before)) => (Ok(before), true),
        }
    }
}

/// Counts the names that are kept of a caller: its cgroup's path three times, and its program's path.
fn slots(caller: &Caller) -> usize {
    let cgroup = caller
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

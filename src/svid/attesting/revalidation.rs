//! Asks the agent again, in the background, about those that are known.
//!
//! The agent attests a process, and how long that takes is in the process's hands: a program file of 200 GB is hashed for
//! minutes. So there is an order (whoever has waited longest), one question at a time for each workload, a short end to it, and
//! room apart for those that were slow the last time: nobody hides another's deleted entry (attack 28).

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::Shared;
use crate::caller::Caller;
use crate::svid::SourceError;
use crate::svid::log_limit::LogPermit;
use crate::svid::memory::{Lane, QUICK, Question, Room};

/// Questions under way about subjects that were quickly answered the last time ...
const MAX_QUICK: usize = 8;
/// ... and about those that were not.
const MAX_SLOW: usize = 4;
/// Between two looks at who is to be asked about again.
pub(super) const ROUND: Duration = Duration::from_secs(1);
/// How old the daemon's own identity may be where it stands for all that the agent answers.
const OWN_AGE: Duration = Duration::from_secs(30);

/// Runs until the source is dropped.
pub(super) async fn run(shared: Weak<Shared>) {
    let (mut quick, mut slow, mut own_asked) = (JoinSet::new(), JoinSet::new(), None);
    loop {
        let Some(shared) = shared.upgrade() else { return };
        while quick.try_join_next().is_some() {}
        while slow.try_join_next().is_some() {}
        let room = Room { quick: MAX_QUICK - quick.len(), slow: MAX_SLOW - slow.len() };
        let round = shared.memory().round(room);
        shared.log_unbelieved(&round.unbelieved);
        for question in round.questions {
            let lane = if question.lane == Lane::Quick { &mut quick } else { &mut slow };
            lane.spawn(shared.clone().ask_again(question));
        }
        // Only while nobody waits for room: in a queue the daemon's own answer would say nothing of the others'.
        let is_idle = quick.len() < MAX_QUICK;
        if round.is_overdue && is_idle && own_asked.is_none_or(|at: Instant| at.elapsed() >= OWN_AGE) {
            own_asked = Some(Instant::now());
            quick.spawn(shared.clone().confirm_own());
        }
        drop(shared);
        tokio::select! {
            Some(_) = quick.join_next() => {}
            Some(_) = slow.join_next() => {}
            () = sleep(ROUND) => {}
        }
    }
}

impl Shared {
    async fn ask_again(self: Arc<Self>, Question { subject, caller, lane }: Question) {
        let asked = Instant::now();
        let asking = self.clone().identities(&caller, None);
        let said = match lane {
            Lane::Quick => timeout(QUICK, asking).await.unwrap_or_else(|_| {
                Err(SourceError::Unavailable(format!("the SPIFFE agent did not answer within {QUICK:?}")))
            }),
            Lane::Slow => asking.await,
        };
        self.memory().note(&subject, said, asked.elapsed());
    }

    /// Has the agent confirm who the daemon itself is. On a node where all others are slow it shows that the agent answers.
    async fn confirm_own(self: Arc<Self>) {
        // Of an agent that is told of pods it is known without a question about a process.
        if self.agent.names_pods() {
            return;
        }
        let before = self.own_confirmed();
        let _ = timeout(QUICK, self.own(OWN_AGE)).await;
        if let (Some(before), Some(now)) = (before, self.own_confirmed())
            && now > before
        {
            self.memory().own_confirmed(before);
        }
    }

    fn log_unbelieved(&self, callers: &[Arc<Caller>]) {
        for caller in callers {
            let text = format!("unbelieved {}", caller.uid);
            if let Some(LogPermit { missed }) = self.log.admit(&text) {
                let (uid, pid) = (caller.uid, caller.process.as_ref().map(|process| process.pid));
                tracing::warn!(
                    uid,
                    pid,
                    missed,
                    "the SPIFFE agent has not confirmed a workload's identity for 10 minutes, while it confirmed others': it is \
                     believed no longer; if the agent hashes large programs, set `workload_size_limit` in its unix plugin"
                );
            }
        }
    }
}

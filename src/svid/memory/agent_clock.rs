//! How old a confirmation is, in time during which the agent went on to confirm others.

use std::time::Duration;

use tokio::time::Instant;

/// A step of the clock that is longer than this is an outage, before which all ages end.
const STEP_MAX: Duration = Duration::from_secs(120);

/// A clock that follows the agent's progress.
///
/// Subjects are asked about again in the order of their last confirmation. So when the agent confirms one that it confirmed at
/// time t before, all others that were confirmed before t have had their turn, and the clock moves to t. It stands still while
/// the agent answers nobody, and where there is more to ask than the agent can answer it is late by a whole round: no outage and
/// no queue makes anybody old.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct AgentClock {
    now: Option<Instant>,
    /// From when on the agent has answered without an outage.
    since: Option<Instant>,
}

impl AgentClock {
    /// The agent has answered about a subject, of which its answer before was of this time.
    pub(super) fn advance(&mut self, answered_before: Instant) {
        let step = self.now.map(|now| answered_before.checked_duration_since(now));
        match step {
            Some(None) => return,
            Some(Some(step)) if step <= STEP_MAX => {}
            _ => self.since = Some(answered_before),
        }
        self.now = Some(answered_before);
    }

    /// How old a confirmation of this time is.
    pub(super) fn age(&self, confirmed: Instant) -> Duration {
        let (Some(now), Some(since)) = (self.now, self.since) else { return Duration::ZERO };
        now.saturating_duration_since(confirmed.max(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_clock_follows_those_that_are_confirmed_again() {
        let (mut clock, start) = (AgentClock::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(clock.age(start), Duration::ZERO);
        // The first answer tells only where it begins; answers out of order move nothing back.
        for (answered_before, age) in [(5, 0), (0, 0), (35, 30), (30, 30), (65, 60), (65, 60), (185, 180)] {
            clock.advance(at(answered_before));
            assert_eq!(clock.age(at(0)), Duration::from_secs(age), "{answered_before}");
        }
        assert_eq!(clock.age(at(180)), Duration::from_secs(5));
        assert_eq!(clock.age(at(190)), Duration::ZERO, "its turn has not come");
    }

    #[test]
    fn agent_clock_begins_anew_after_an_outage() {
        let (mut clock, start) = (AgentClock::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        for answered_before in [0, 100, 7200, 7230] {
            clock.advance(at(answered_before));
        }
        assert_eq!(clock.age(at(0)), Duration::from_secs(30));
        assert_eq!(clock.age(at(7220)), Duration::from_secs(10));
    }
}

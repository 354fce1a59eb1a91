//! Clock that measures the age of a confirmation by the time in which the agent confirmed other
//! subjects.

use std::time::Duration;

use tokio::time::Instant;

/// A longer step of the clock is an outage. Ages start again after it.
const MAX_STEP: Duration = Duration::from_secs(120);

/// A clock that follows the agent's progress.
///
/// Subjects are revalidated in the order of their last confirmation. When the agent confirms a
/// subject that it confirmed before at time t, the queries about all subjects with older
/// confirmations have been sent. So the clock advances to t. It stands still while the agent
/// answers no query, and lags by the length of the queue. Neither an outage nor a queue ages a
/// subject.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct AgentClock {
    now: Option<Instant>,
    /// Time at which the last outage ended.
    since: Option<Instant>,
}

impl AgentClock {
    /// Advances to the time of the previous answer for the subject that has just been confirmed.
    pub(super) fn advance(&mut self, previous_answer: Instant) {
        let step = self
            .now
            .map(|now| previous_answer.checked_duration_since(now));
        match step {
            Some(None) => return,
            Some(Some(step)) if step <= MAX_STEP => {}
            _ => self.since = Some(previous_answer),
        }
        self.now = Some(previous_answer);
    }

    /// Returns the age of a confirmation.
    pub(super) fn age(&self, confirmed: Instant) -> Duration {
        let (Some(now), Some(since)) = (self.now, self.since) else {
            return Duration::ZERO;
        };
        now.saturating_duration_since(confirmed.max(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_follows_repeated_confirmations() {
        let (mut clock, start) = (AgentClock::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(clock.age(start), Duration::ZERO);
        // The first answer only sets the clock. Answers out of order do not set it back.
        for (previous_answer, age) in [
            (5, 0),
            (0, 0),
            (35, 30),
            (30, 30),
            (65, 60),
            (65, 60),
            (185, 180),
        ] {
            clock.advance(at(previous_answer));
            assert_eq!(
                clock.age(at(0)),
                Duration::from_secs(age),
                "{previous_answer}"
            );
        }
        assert_eq!(clock.age(at(180)), Duration::from_secs(5));
        assert_eq!(clock.age(at(190)), Duration::ZERO, "it is not due yet");
    }

    #[test]
    fn clock_restarts_after_an_outage() {
        let (mut clock, start) = (AgentClock::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        for previous_answer in [0, 100, 7200, 7230] {
            clock.advance(at(previous_answer));
        }
        assert_eq!(clock.age(at(0)), Duration::from_secs(30));
        assert_eq!(clock.age(at(7220)), Duration::from_secs(10));
    }
}

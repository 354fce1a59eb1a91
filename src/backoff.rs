//! Delays before retries, which grow with each failure in a row.

use std::time::Duration;

/// The spread of a delay. It keeps many nodes, or many entries, from retrying together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Jitter {
    /// The delay itself, where one caller waits for it.
    None,
    /// 0.5 to 1 of the delay, where it is an upper bound.
    Down,
    /// 0.5 to 1.5 of the delay, which is the mean.
    Around,
}

impl Jitter {
    /// Returns a random delay within the spread.
    pub fn apply(self, delay: Duration) -> Duration {
        match self {
            Self::None => delay,
            Self::Down => delay.mul_f64(0.5 + 0.5 * fastrand::f64()),
            Self::Around => delay.mul_f64(0.5 + fastrand::f64()),
        }
    }
}

/// An exponential backoff: the first delay doubles with each failure, up to a maximum.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    jitter: Jitter,
}

impl Backoff {
    /// Creates a backoff from `first` to `max`, both before the jitter.
    pub const fn new(first: Duration, max: Duration, jitter: Jitter) -> Self {
        Self { first, max, jitter }
    }

    /// Returns the delay after this many failures in a row: zero after none.
    pub fn delay(&self, failures: u32) -> Duration {
        let Some(doublings) = failures.checked_sub(1) else {
            return Duration::ZERO;
        };
        let factor = 1_u32.checked_shl(doublings).unwrap_or(u32::MAX);
        self.jitter
            .apply(self.first.saturating_mul(factor).min(self.max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn delay_doubles_up_to_the_maximum() {
        let backoff = Backoff::new(SECOND, 10 * SECOND, Jitter::None);
        let delays = [0, 1, 2, 3, 4, 5, 6, 33, u32::MAX].map(|failures| backoff.delay(failures));
        let expected = [0, 1, 2, 4, 8, 10, 10, 10, 10].map(Duration::from_secs);
        assert_eq!(delays, expected);
    }

    #[test]
    fn jitter_stays_within_its_spread_and_varies() {
        for (jitter, low, high) in [(Jitter::Down, 0.5, 1.0), (Jitter::Around, 0.5, 1.5)] {
            let delays: Vec<f64> = (0..1000)
                .map(|_| jitter.apply(SECOND).as_secs_f64())
                .collect();
            assert!(
                delays.iter().all(|delay| (low..=high).contains(delay)),
                "{jitter:?}"
            );
            let least = delays.iter().copied().fold(high, f64::min);
            let most = delays.iter().copied().fold(low, f64::max);
            assert!(most - least > 0.8 * (high - low), "{jitter:?}");
        }
    }
}

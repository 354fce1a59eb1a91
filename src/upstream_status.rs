//! The state of the identity source and of each STS, for `/status` and for metrics. It includes the
//! text of the latest error, which contains no secret.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use serde::Serialize;

/// The latest answers of all upstreams. A clone is cheap and shares them.
#[derive(Debug, Clone, Default)]
pub struct UpstreamStatus(Arc<Mutex<UpstreamTimes>>);

#[derive(Debug, Default)]
struct UpstreamTimes {
    source: Option<(String, AnswerTimes)>,
    sts: BTreeMap<String, AnswerTimes>,
}

#[derive(Debug, Default)]
struct AnswerTimes {
    success: Option<SystemTime>,
    error: Option<(SystemTime, LastError)>,
}

/// The error of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastError {
    /// The error in words.
    pub text: String,
    /// The label of the error in metrics.
    pub reason: &'static str,
    /// The error concerns all workloads: an outage, not the denial of one of them.
    pub outage: bool,
}

/// The state of one upstream, for people. Times are in UTC.
#[derive(Debug, Serialize, PartialEq, Eq)]
pub struct UpstreamReport {
    /// The source's name, or the STS endpoint: its URL, or AWS's region.
    pub name: String,
    /// `ok`, or `failing` during an outage.
    pub state: &'static str,
    /// The time of the latest success.
    pub last_success_at: Option<String>,
    /// The latest error or denial, if there was no success since.
    pub last_error: Option<String>,
    /// The label of that error in metrics.
    pub last_error_reason: Option<&'static str>,
    /// The time of that error.
    pub last_error_at: Option<String>,
}

impl UpstreamStatus {
    /// Records a call to the source called `name`, and returns whether the source is up.
    pub fn source(&self, name: String, error: Option<LastError>, at: SystemTime) -> bool {
        let mut times = self.times();
        // After a reload the source may be another one.
        let answers = times
            .source
            .take()
            .filter(|(before, _)| *before == name)
            .map(|(_, answers)| answers);
        let mut answers = answers.unwrap_or_default();
        answers.note(error, at);
        let is_up = !answers.is_failing();
        times.source = Some((name, answers));
        is_up
    }

    /// Records a call to the STS called `name`, and returns whether that STS is up.
    pub fn sts(&self, name: &str, error: Option<LastError>, at: SystemTime) -> bool {
        let mut times = self.times();
        let answers = times.sts.entry(name.to_owned()).or_default();
        answers.note(error, at);
        !answers.is_failing()
    }

    /// Drops the answers of the STS called `name`.
    pub fn remove_sts(&self, name: &str) {
        self.times().sts.remove(name);
    }

    /// Returns the source, if it was called, and each STS that was.
    pub fn reports(&self) -> (Option<UpstreamReport>, Vec<UpstreamReport>) {
        let times = self.times();
        let source = times
            .source
            .as_ref()
            .map(|(name, answers)| answers.report(name));
        (
            source,
            times
                .sts
                .iter()
                .map(|(name, answers)| answers.report(name))
                .collect(),
        )
    }

    fn times(&self) -> MutexGuard<'_, UpstreamTimes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AnswerTimes {
    fn note(&mut self, error: Option<LastError>, at: SystemTime) {
        match error {
            None => {
                *self = Self {
                    success: Some(at),
                    error: None,
                }
            }
            // The denial of one workload does not hide an outage.
            Some(error) if !error.outage && self.is_failing() => {}
            Some(error) => self.error = Some((at, error)),
        }
    }

    fn is_failing(&self) -> bool {
        self.error.as_ref().is_some_and(|(_, error)| error.outage)
    }

    fn report(&self, name: &str) -> UpstreamReport {
        let date = |time: SystemTime| humantime::format_rfc3339_seconds(time).to_string();
        let error = self.error.as_ref();
        UpstreamReport {
            name: name.to_owned(),
            state: if self.is_failing() { "failing" } else { "ok" },
            last_success_at: self.success.map(date),
            last_error: error.map(|(_, error)| error.text.clone()),
            last_error_reason: error.map(|(_, error)| error.reason),
            last_error_at: error.map(|(at, _)| date(*at)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    fn error(text: &str, outage: bool) -> Option<LastError> {
        Some(LastError {
            text: text.to_owned(),
            reason: "r",
            outage,
        })
    }

    fn at(second: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(second)
    }

    fn seen(health: &UpstreamStatus) -> (&'static str, Option<String>) {
        let report = health.reports().0.unwrap();
        (report.state, report.last_error)
    }

    #[test]
    fn outage_outlasts_denial_and_ends_with_success() {
        let health = UpstreamStatus::default();
        assert_eq!(health.reports(), (None, Vec::new()));
        let note = |error, second| {
            health.source("a".to_owned(), error, at(second));
        };
        note(None, 1);
        assert_eq!(seen(&health), ("ok", None));
        note(error("denied", false), 2);
        assert_eq!(seen(&health), ("ok", Some("denied".to_owned())));
        note(error("away", true), 3);
        note(error("denied", false), 4);
        assert_eq!(seen(&health), ("failing", Some("away".to_owned())));
        assert_eq!(
            health.reports().0.unwrap().last_success_at.unwrap(),
            "1970-01-01T00:00:01Z"
        );
        note(None, 5);
        assert_eq!(seen(&health), ("ok", None));
    }

    #[test]
    fn each_sts_has_its_own_state_and_new_source_has_none() {
        let health = UpstreamStatus::default();
        health.sts("b", error("away", true), at(1));
        health.sts("a", None, at(1));
        let states: Vec<_> = health
            .reports()
            .1
            .into_iter()
            .map(|report| (report.name, report.state))
            .collect();
        assert_eq!(
            states,
            [("a".to_owned(), "ok"), ("b".to_owned(), "failing")]
        );
        health.source("a".to_owned(), error("away", true), at(1));
        health.source("b".to_owned(), error("denied", false), at(2));
        assert_eq!(seen(&health), ("ok", Some("denied".to_owned())));
    }
}

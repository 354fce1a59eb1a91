//! What the log says about places: once per change, not per try, and bounded, since an outage concerns all workloads of the
//! node at once. `/status` and the metrics have the rest.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::entry::Entry;
use crate::exchange::ExchangeError;
use crate::telemetry::LogQuota;

/// So many lines at once ...
const BURST: u32 = 20;
/// ... and after that.
const EVERY: Duration = Duration::from_secs(10);

/// How many lines may be written still, and how many were left out.
#[derive(Debug)]
pub(super) struct EventLog(Mutex<LogQuota>);

impl Default for EventLog {
    fn default() -> Self {
        Self(Mutex::new(LogQuota::new(BURST, EVERY)))
    }
}

impl EventLog {
    /// Whether one may be written now; if so, how many were left out since the last.
    pub(super) fn allows(&self) -> Option<u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Something to tell operators. To be told with nothing locked: a log may be slow.
pub(super) enum CacheEvent {
    /// The first failure, or the first of its kind, and how many lines were left out before it.
    Failed {
        error: ExchangeError,
        kept: bool,
        missed: u64,
    },
    /// A success after a failure that the log has.
    Again,
    /// The source has withdrawn the identity.
    Withdrawn(ExchangeError),
    /// What is there has come to its end, or to that of the grace.
    Over(ExchangeError),
}

impl CacheEvent {
    pub(super) fn emit(self, slot: &Entry, log: &EventLog) {
        let (spiffe_id, role_arn) = (&slot.grant.spiffe_id, &slot.grant.role_arn);
        if let Self::Failed {
            error,
            kept,
            missed,
        } = self
        {
            // `kept`: those that were issued before are still handed out.
            tracing::warn!(%spiffe_id, %role_arn, %error, kept, missed, "credentials were not issued");
            return;
        }
        let Some(missed) = log.allows() else { return };
        match self {
            Self::Failed { .. } => {}
            Self::Again => {
                tracing::info!(%spiffe_id, %role_arn, missed, "credentials are issued again")
            }
            Self::Withdrawn(error) => {
                tracing::warn!(%spiffe_id, %role_arn, %error, missed, "the identity is withdrawn, its credentials are ended");
            }
            Self::Over(error) => {
                tracing::warn!(%spiffe_id, %role_arn, %error, missed, "credentials are ended that could not be renewed");
            }
        }
    }
}

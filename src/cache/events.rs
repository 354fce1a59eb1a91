//! The events that the cache logs. It logs once per change, not per try. The rate is limited, since
//! an outage concerns all workloads of the node at once. `/status` and the metrics have the rest.

use std::time::Duration;

use super::entry::Entry;
use crate::exchange::ExchangeError;
use crate::limits::LogQuota;

/// Number of log lines at once.
const LOG_BURST: u32 = 20;
/// Interval between log lines after [`LOG_BURST`].
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Returns the limit of the log lines.
pub(super) fn log_quota() -> LogQuota {
    LogQuota::new(LOG_BURST, LOG_INTERVAL)
}

/// An event for operators. It is emitted with no lock held, since a log may be slow.
pub(super) enum CacheEvent {
    /// The first failure, or the first of its kind, with the number of log lines dropped before it.
    Failed {
        error: ExchangeError,
        kept: bool,
        missed: u64,
    },
    /// A success after a failure that was logged.
    Recovered,
    /// The source has withdrawn the identity.
    Withdrawn(ExchangeError),
    /// The credentials or the grace have expired.
    Expired(ExchangeError),
}

impl CacheEvent {
    pub(super) fn emit(self, entry: &Entry, log: &LogQuota) {
        let (spiffe_id, role_arn) = (&entry.grant.spiffe_id, entry.grant.issued_role_arn());
        if let Self::Failed {
            error,
            kept,
            missed,
        } = self
        {
            // `kept` is true if the previous credentials are still served.
            tracing::warn!(%spiffe_id, %role_arn, %error, kept, missed, "exchange failed");
            return;
        }
        let Some(missed) = log.take() else { return };
        match self {
            Self::Failed { .. } => {}
            Self::Recovered => {
                tracing::info!(%spiffe_id, %role_arn, missed, "exchange succeeded again")
            }
            Self::Withdrawn(error) => {
                tracing::warn!(%spiffe_id, %role_arn, %error, missed, "identity withdrawn: credentials removed");
            }
            Self::Expired(error) => {
                tracing::warn!(%spiffe_id, %role_arn, %error, missed, "credentials removed: refresh failed");
            }
        }
    }
}

//! The log of queries to the kernel that failed, so that their callers were rejected.

use std::time::Duration;

use super::error_response::RequestError;
use crate::caller::AttestError;
use crate::limits::LogQuota;

/// The interval of the lines. A caller can cause a failure with each of its requests.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// The lines about queries that failed, with what the answers to the callers leave out.
#[derive(Debug)]
pub struct KernelFailures(LogQuota);

impl Default for KernelFailures {
    fn default() -> Self {
        Self(LogQuota::new(1, LOG_INTERVAL))
    }
}

impl KernelFailures {
    /// Logs operation and errno if `error` is a failure of the kernel, at most once in 10 seconds.
    pub(super) fn log(&self, error: &RequestError) {
        let RequestError::Caller(AttestError::Kernel { operation, errno }) = error else {
            return;
        };
        let Some(missed) = self.0.take() else { return };
        let errno = errno.map_or("invalid reply", |errno| errno.desc());
        tracing::warn!(operation, errno, missed, "query to the kernel failed");
    }
}

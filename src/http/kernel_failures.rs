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

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;
    use crate::captured_log::CapturedLog;

    #[test]
    fn log_has_operation_and_errno_of_the_first_failure() {
        let failed = |errno| RequestError::Caller(AttestError::kernel("PIDFD_GET_INFO", errno));
        // A line that another thread writes first, without a log, would be disabled for this one.
        KernelFailures::default().log(&failed(None));
        let (failures, log) = (KernelFailures::default(), CapturedLog::start());
        failures.log(&RequestError::Caller(AttestError::CallerGone));
        assert_eq!(log.text(), "");
        failures.log(&failed(Some(Errno::EPERM)));
        failures.log(&failed(None));
        let text = log.text();
        assert_eq!(text.lines().count(), 1, "{text}");
        for words in ["PIDFD_GET_INFO", "Operation not permitted", "missed=0"] {
            assert!(text.contains(words), "{words}: {text}");
        }
        // The caller sees neither.
        let body =
            failed(Some(Errno::EPERM)).body(crate::telemetry::RequestId { boot: 1, number: 1 });
        let body = String::from_utf8(body).unwrap();
        assert!(
            body.contains("kernel_error") && !body.contains("permitted"),
            "{body}"
        );
    }
}

//! The request for which a task runs, so that each line of the log can be joined with the audit
//! record and with the answer.
//!
//! This is a task-local value, not a span of `tracing`. Most requests log nothing, and a span would
//! allocate and format its fields for each of them. The formats of the log read this value only
//! when a line is written.

use std::fmt;

use tokio::task_local;

use crate::caller::ListenerKind;
use crate::cgroup::PodUid;

/// The number of a request: the same in its audit record, in its answer and in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestId {
    /// A random number of this run of the daemon.
    pub boot: u32,
    /// The number of the connection since its start. One connection is one request.
    pub number: u64,
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}-{}", self.boot, self.number)
    }
}

/// The fields that each line of the log has while a request is served.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "the fields are named as in the log")]
pub struct RequestScope {
    pub id: RequestId,
    pub listener: ListenerKind,
    pub uid: Option<u32>,
    pub pod: Option<PodUid>,
}

task_local! {
    static CURRENT: Option<RequestScope>;
}

impl RequestScope {
    /// Runs `work` for this request.
    pub fn run<F: Future>(self, work: F) -> impl Future<Output = F::Output> {
        // Not an async function: its state would have `work` twice.
        CURRENT.scope(Some(self), work)
    }

    /// Calls `read` with the current request, if there is one.
    pub(super) fn with_current<T>(read: impl FnOnce(&Self) -> T) -> Option<T> {
        CURRENT
            .try_with(|current| current.as_ref().map(read))
            .ok()
            .flatten()
    }
}

/// Returns `work` so that a task of its own runs it for the request that is current now.
pub fn in_current_request<F: Future>(work: F) -> impl Future<Output = F::Output> {
    CURRENT.scope(RequestScope::with_current(RequestScope::clone), work)
}

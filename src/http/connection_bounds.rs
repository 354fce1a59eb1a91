//! The bounds of a connection, and the reason for its end.

use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;

use nix::sys::socket::{MsgFlags, Shutdown, send, shutdown};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use tokio::time::{Instant, timeout_at};

use crate::attest::PodAttestor;
use crate::limits::AcquireError;
use crate::listen::{CONNECTION_TIMEOUT, LazySocket, OpenConnection};
use crate::metrics::{Metrics, ReasonLabel};

/// The reason for which a connection ended without an answer.
#[derive(Debug, Clone, Copy)]
pub(super) enum DropReason {
    /// Its workload has too many connections.
    WorkloadLimit,
    /// All workloads together have too many, and none has more than its own.
    TotalLimit,
    /// All workloads together have too many, and its own had the most.
    Evicted,
    /// The head did not arrive in time.
    SlowHead,
    /// The bytes are not a head of HTTP/1, or are too many.
    BadRequest,
    /// The client closed the connection before its answer.
    Closed,
    /// The whole connection took too long.
    TooSlow,
    /// A read of the caller's process does not return.
    Unresponsive,
}

impl DropReason {
    /// All reasons for which a connection ends without an answer.
    pub(super) const ALL: [Self; 8] = [
        Self::WorkloadLimit,
        Self::TotalLimit,
        Self::Evicted,
        Self::SlowHead,
        Self::BadRequest,
        Self::Closed,
        Self::TooSlow,
        Self::Unresponsive,
    ];

    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::WorkloadLimit => "too_many_of_one",
            Self::TotalLimit => "too_many",
            Self::Evicted => "evicted",
            Self::SlowHead => "slow_head",
            Self::BadRequest => "bad_request",
            Self::Closed => "closed",
            Self::TooSlow => "too_slow",
            Self::Unresponsive => "process_unresponsive",
        }
    }

    /// Returns whether the connection is reset, which leaves no port in TIME_WAIT.
    fn resets(self) -> bool {
        matches!(self, Self::WorkloadLimit | Self::TotalLimit | Self::Evicted)
    }
}

impl From<AcquireError> for DropReason {
    fn from(error: AcquireError) -> Self {
        match error {
            AcquireError::Key => Self::WorkloadLimit,
            AcquireError::Total => Self::TotalLimit,
        }
    }
}

/// The bounds of one connection, which move with it from thread to thread.
pub(super) struct ConnectionBounds {
    deadline: Instant,
    descriptor: Arc<OwnedFd>,
    /// The pod that has the network namespace of the connection; `None` for the host's.
    pod: Option<Arc<PodAttestor>>,
    /// The only metric that it needs. A clone of all of them takes as long as a system call.
    dropped: Family<ReasonLabel, Counter>,
    _open: OpenConnection,
}

impl ConnectionBounds {
    /// Starts the time of the connection.
    pub(super) fn new(
        descriptor: Arc<OwnedFd>,
        pod: Option<Arc<PodAttestor>>,
        metrics: &Metrics,
        open: OpenConnection,
    ) -> Self {
        let dropped = metrics.connections_dropped.clone();
        Self {
            deadline: Instant::now() + CONNECTION_TIMEOUT,
            descriptor,
            pod,
            dropped,
            _open: open,
        }
    }

    /// Runs a part of the connection, which is pinned so that it is not copied into this function's
    /// state. Returns `None` if the connection ended, after its reason was counted. The end of a
    /// pod's namespace is not counted.
    pub(super) async fn run<T>(
        &self,
        part: Pin<&mut impl Future<Output = Result<T, DropReason>>>,
    ) -> Option<T> {
        let ended = tokio::select! {
            biased;
            ended = timeout_at(self.deadline, part) => ended.unwrap_or(Err(DropReason::TooSlow)),
            () = self.pod_closed() => return None,
        };
        let dropped = match ended {
            Ok(done) => return Some(done),
            Err(dropped) => dropped,
        };
        if dropped.resets() {
            LazySocket::reset_on_close(&self.descriptor);
        }
        self.dropped
            .get_or_create(&ReasonLabel {
                reason: dropped.reason(),
            })
            .inc();
        None
    }

    /// Returns a function that ends the connection with `answer`, for the case that the task of the
    /// connection blocks its thread.
    pub(super) fn on_abandon(
        &self,
        answer: impl FnOnce() -> Vec<u8> + Send + 'static,
    ) -> impl FnOnce() + Send + 'static {
        let (descriptor, dropped) = (self.descriptor.clone(), self.dropped.clone());
        move || {
            // A client that is gone, or does not read, gets no answer.
            let _ = send(
                descriptor.as_raw_fd(),
                &answer(),
                MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
            );
            let _ = shutdown(descriptor.as_raw_fd(), Shutdown::Write);
            dropped
                .get_or_create(&ReasonLabel {
                    reason: DropReason::Unresponsive.reason(),
                })
                .inc();
        }
    }

    async fn pod_closed(&self) {
        match &self.pod {
            Some(pod) => pod.closed().await,
            None => std::future::pending().await,
        }
    }
}

//! Listeners inside pods' network namespaces, so that each workload reaches the endpoint on its own
//! loopback address.
//!
//! A container runtime mounts each namespace on a file in one directory. On any change there the
//! daemon scans the whole directory and adapts its listeners to the result. So it depends neither
//! on file names, nor on the order of events, nor on a complete sequence of them.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::file_threads::FileThreads;
use crate::http::CredentialEndpoint;
use crate::listen::DrainHandle;
use crate::metrics::Metrics;
use crate::netns::{NamespaceError, NetNs};

mod failure_log;
mod handover_protocol;
mod netns_directory;
mod netns_watch;
mod pod;
mod reconciler;
mod sys;
mod takeover;

use failure_log::FailureLog;
use handover_protocol::HandoverSocket;
use netns_directory::NetnsDirectory;
use pod::PodService;
use reconciler::Reconciler;
use takeover::HandoverRole;

/// Minimum interval between log lines about a lasting failure.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Reason why the daemon cannot serve pods.
#[derive(Debug, Error)]
pub enum PodsError {
    /// The daemon may not enter network namespaces.
    #[error(
        "[pods] enabled: {0}; in Kubernetes add SYS_ADMIN to the container's securityContext.capabilities.add, under systemd \
         add CAP_SYS_ADMIN to CapabilityBoundingSet= and AmbientCapabilities="
    )]
    Denied(NamespaceError),
    /// The directory of namespaces cannot be watched.
    #[error("[pods] netns_dir {}: {source}", path.display())]
    Watch {
        /// Path of the directory.
        path: PathBuf,
        /// Error of the system call.
        source: io::Error,
    },
}

/// The listeners of all pods.
#[derive(Debug)]
pub struct PodListeners {
    pods: Reconciler,
    /// Path of the socket on which the next instance gets the listeners.
    handover: Option<PathBuf>,
    successors: Option<HandoverSocket>,
    /// Set when a failure to bind that socket was logged.
    logged_unbound: bool,
    role: HandoverRole,
    /// The connection on which this instance took over, and the connections of earlier takeovers
    /// that may still be open. While one is open, the instance at its other end knows that a later
    /// instance is alive.
    earlier: Vec<Arc<OwnedFd>>,
    /// Set when this instance could serve pods' workloads.
    could_serve: watch::Receiver<bool>,
}

/// The condition on which readiness and the pod listeners wait for each other.
#[derive(Debug, Clone)]
pub struct TakeoverGate {
    could_serve: watch::Sender<bool>,
    first_scan: watch::Receiver<bool>,
}

impl TakeoverGate {
    /// Reports that all other dependencies answered, so that the listeners can be taken over.
    /// Returns when pods are served.
    pub async fn pass(&mut self) {
        self.could_serve.send_replace(true);
        // An error means that the daemon ends.
        let _ = self.first_scan.wait_for(|first_scan| *first_scan).await;
    }
}

impl PodListeners {
    /// Checks that namespaces can be entered, and starts to watch the directory.
    ///
    /// On return the present namespaces are served, unless another instance serves them and passes
    /// its listeners once the gate is passed, or the directory does not respond.
    pub async fn start(
        (directory, handover): (&Path, Option<&Path>),
        endpoint: Arc<CredentialEndpoint>,
        threads: FileThreads,
        metrics: Metrics,
        drain: DrainHandle,
    ) -> Result<(Self, TakeoverGate), PodsError> {
        let failed = |source| PodsError::Watch {
            path: directory.to_owned(),
            source,
        };
        // Entering its own namespace needs the same privilege as entering another.
        let own = NetNs::own()
            .and_then(|own| own.run_in(|| ()).map(|()| own.id()))
            .map_err(PodsError::Denied)?;
        let service = PodService {
            endpoint,
            drain,
            loops: TaskTracker::new(),
        };
        let ((could_serve, can_serve), (first_scan, first_scan_done)) =
            (watch::channel(false), watch::channel(false));
        let mut log = FailureLog::new(metrics.clone());
        let directory = NetnsDirectory::watch(directory, own, threads, &mut log).await;
        let directory = directory.map_err(failed)?;
        let mut pods = Self {
            pods: Reconciler::new(directory, service, log, metrics, first_scan),
            handover: handover.map(Path::to_owned),
            successors: None,
            logged_unbound: false,
            role: HandoverRole::Active,
            earlier: Vec::new(),
            could_serve: can_serve,
        };
        pods.begin().await;
        Ok((
            pods,
            TakeoverGate {
                could_serve,
                first_scan: first_scan_done,
            },
        ))
    }
}

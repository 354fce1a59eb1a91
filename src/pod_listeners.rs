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
use crate::limits::LogOnce;
use crate::listen::DrainHandle;
use crate::metrics::Metrics;
use crate::netns::{NamespaceError, NetNs};

mod failure_log;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod gate;
mod handover_protocol;
mod metadata;
mod metadata_log;
mod netns_directory;
mod netns_watch;
mod opt_in;
mod pod;
mod probe;
mod reconciler;
mod sys;
mod takeover;

use failure_log::FailureLog;
use gate::Coverage;
pub use gate::TakeoverGate;
use handover_protocol::HandoverSocket;
use netns_directory::NetnsDirectory;
use pod::PodService;
use reconciler::Reconciler;
pub(crate) use sys::watch as watch_descriptor;
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
    reconciler: Reconciler,
    /// Path of the socket on which the next instance gets the listeners.
    handover_path: Option<PathBuf>,
    /// That socket, while this instance serves and it can be bound.
    handover_socket: Option<HandoverSocket>,
    /// Set when a failure to bind that socket was logged.
    logged_unbound: LogOnce,
    role: HandoverRole,
    /// The connection on which this instance took over, and the connections of earlier takeovers
    /// that may still be open. While one is open, the instance at its other end knows that a later
    /// instance is alive.
    earlier: Vec<Arc<OwnedFd>>,
    /// Set when this instance could serve pods' workloads.
    could_serve: watch::Receiver<bool>,
}

impl PodListeners {
    /// Checks that namespaces can be entered, and starts to watch the directory.
    ///
    /// On return the present namespaces are served, unless another instance serves them and passes
    /// its listeners once the gate is passed, or the directory does not respond. Fails if
    /// namespaces cannot be entered here, for which the daemon lacks a privilege. With
    /// `serves_metadata` pods may opt in to the metadata address.
    pub async fn start(
        directory: &Path,
        handover: Option<&Path>,
        serves_metadata: bool,
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
            serves_metadata,
        };
        let ((could_serve, can_serve), (first_scan, first_scan_done)) =
            (watch::channel(false), watch::channel(false));
        let (coverage, latest_coverage) = watch::channel(Coverage::default());
        let mut log = FailureLog::new(metrics.clone());
        let watched = NetnsDirectory::watch(directory, own, threads.clone(), &mut log).await;
        let watched = watched.map_err(failed)?;
        let mut pods = Self {
            reconciler: Reconciler::new(watched, service, log, metrics, first_scan, coverage),
            handover_path: handover.map(Path::to_owned),
            handover_socket: None,
            logged_unbound: LogOnce::default(),
            role: HandoverRole::Active,
            earlier: Vec::new(),
            could_serve: can_serve,
        };
        pods.begin().await;
        Ok((
            pods,
            TakeoverGate {
                directory: directory.to_owned(),
                own,
                own_cookie: sys::cookie_here().ok(),
                threads,
                could_serve,
                first_scan: first_scan_done,
                coverage: latest_coverage,
            },
        ))
    }
}

//! Listeners inside pods' network namespaces, so that each workload reaches the endpoint on its own
//! loopback address.
//!
//! A container runtime mounts each namespace on a file in one directory. On any change there the
//! daemon scans the whole directory and adapts its listeners to the result. So it depends neither
//! on file names, nor on the order of events, nor on a complete sequence of them.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::task::TaskTracker;

use crate::http::CredentialEndpoint;
use crate::listen::{ConnectionTracker, NetnsRef, POD_ADDRESSES};
use crate::metrics::{Metrics, PodListenerFailure};
use crate::netns::{NamespaceError, NamespaceId, NetNs};
use crate::telemetry::LogQuota;

mod gate;
mod handover_protocol;
mod netns_watch;
mod pod;
mod ports;
mod sys;
mod takeover;

use gate::Coverage;
pub use gate::TakeoverGate;
use handover_protocol::{Handover, HandoverKey};
use netns_watch::{Change, NetnsWatch};
use pod::{BindFailure, ListenedPod, NamespaceSockets, PodService, ReceivedSockets};
pub(crate) use sys::watch as watch_descriptor;
use takeover::HandoverRole;

/// Maximum time for which a file without a mount may belong to a pod that the runtime is creating.
///
/// Creation takes milliseconds, and some seconds when an overloaded machine creates hundreds.
const MOUNT_GRACE: Duration = Duration::from_secs(10);
/// Interval between checks of a file without a mount, for mounts that no event reports.
const MOUNT_POLL: Duration = Duration::from_millis(50);
/// Interval between attempts to bind an address that is in use.
const BIND_RETRY: Duration = Duration::from_secs(1);
/// Minimum interval between log lines about a lasting failure.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Delay before the scan after a mount event, while no pod is being created.
const RESCAN_DEBOUNCE: Duration = Duration::from_millis(100);

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
    directory: PathBuf,
    watch: NetnsWatch,
    service: PodService,
    metrics: Metrics,
    /// The daemon's own namespace, which does not belong to a pod.
    own: NamespaceId,
    pods: HashMap<NamespaceId, ListenedPod>,
    /// Files without a mount, since when. `None` after that was logged.
    waiting: HashMap<PathBuf, Option<Instant>>,
    /// Namespaces that could not be entered or served, for a retry.
    failed: HashSet<NamespaceId>,
    /// Namespaces that are not to be served.
    unserved: HashSet<NamespaceId>,
    /// Namespaces that cannot be served until the kernel attests callers over TCP.
    unsupported: HashSet<NamespaceId>,
    logged: LoggedOnce,
    /// Path of the socket on which the next instance gets the listeners.
    handover: Option<PathBuf>,
    successors: Option<Handover>,
    stage: HandoverRole,
    /// The connection on which this instance took over, and the connections of earlier takeovers
    /// that may still be open. While one is open, the instance at its other end knows that a later
    /// instance is alive.
    earlier: Vec<OwnedFd>,
    /// Set when this instance could serve pods' workloads.
    could_serve: watch::Receiver<bool>,
    /// Set when the namespaces that were there at the start have been tried.
    first_scan: watch::Sender<bool>,
    coverage: watch::Sender<Coverage>,
}

/// State of log lines that appear once, though each pod may give a reason, or at a bounded rate.
#[derive(Debug)]
struct LoggedOnce {
    no_directory: bool,
    not_mounted: bool,
    denied: bool,
    no_handover: bool,
    unguarded: bool,
    unwatched: Mutex<LogQuota>,
}

impl LoggedOnce {
    /// Returns the number of suppressed lines if a line may be logged now.
    fn unwatched_quota(&self) -> Option<u64> {
        self.unwatched
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

impl PodListeners {
    /// Checks that namespaces can be entered, and starts to watch the directory.
    ///
    /// On return the present namespaces are served, unless another instance serves them and passes
    /// its listeners once the gate is passed.
    pub async fn start(
        (directory, handover): (&Path, Option<&Path>),
        endpoint: Arc<CredentialEndpoint>,
        connections: ConnectionTracker,
        metrics: Metrics,
        stop: watch::Receiver<bool>,
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
            connections,
            stop,
            loops: TaskTracker::new(),
        };
        let ((could_serve, can_serve), (first_scan, first_scan_done)) =
            (watch::channel(false), watch::channel(false));
        let (coverage, latest_coverage) = watch::channel(Coverage::default());
        let mut pods = Self {
            directory: directory.to_owned(),
            watch: NetnsWatch::new(directory).map_err(failed)?,
            service,
            metrics,
            own,
            pods: HashMap::new(),
            waiting: HashMap::new(),
            failed: HashSet::new(),
            unserved: HashSet::new(),
            unsupported: HashSet::new(),
            logged: LoggedOnce {
                no_directory: false,
                not_mounted: false,
                denied: false,
                no_handover: false,
                unguarded: false,
                unwatched: Mutex::new(LogQuota::new(1, LOG_INTERVAL)),
            },
            handover: handover.map(Path::to_owned),
            successors: None,
            stage: HandoverRole::Active,
            earlier: Vec::new(),
            could_serve: can_serve,
            first_scan,
            coverage,
        };
        // Logged also where the first scan has to wait for the previous instance.
        pods.warn_no_directory();
        pods.begin().await;
        Ok((
            pods,
            TakeoverGate {
                directory: directory.to_owned(),
                own,
                could_serve,
                first_scan: first_scan_done,
                coverage: latest_coverage,
            },
        ))
    }

    /// Listens in the namespaces that are in the directory, and in no others.
    async fn reconcile(&mut self) {
        self.reconcile_dir(HashMap::new()).await;
    }

    /// Does the same with listeners received from the previous instance.
    async fn reconcile_dir(&mut self, mut received: HashMap<HandoverKey, OwnedFd>) {
        // Only root can mount there, but a mount that hangs must not stop an I/O thread.
        let found = tokio::task::block_in_place(|| {
            self.renew_watch();
            self.scan()
        });
        self.pods.retain(|id, pod| {
            let path = found.get(id);
            match path {
                Some(path) => pod.netns.update_path(path),
                None => {
                    tracing::debug!(namespace = %pod.path().display(), "network namespace removed")
                }
            }
            path.is_some()
        });
        self.failed.retain(|id| found.contains_key(id));
        self.unserved.retain(|id| found.contains_key(id));
        self.unsupported.retain(|id| found.contains_key(id));
        if !self.unsupported.is_empty()
            && self.service.endpoint.attestor.missing_for_tcp().is_none()
        {
            self.unsupported.clear();
        }
        let new = found.into_iter().filter(|(id, _)| {
            !self.pods.contains_key(id)
                && !self.unserved.contains(id)
                && !self.unsupported.contains(id)
        });
        let mut received = |id| {
            POD_ADDRESSES
                .into_iter()
                .filter_map(|address| Some((address, received.remove(&(id, address))?)))
                .collect()
        };
        let new = new.map(|(id, path)| (Arc::new(NetnsRef::new(id, path)), received(id)));
        self.add_namespaces(new.collect()).await;
        self.bind_missing().await;
        self.check_ports().await;
        self.coverage.send_replace(self.coverage());
        self.first_scan.send_replace(true);
        self.metrics
            .pod_listeners
            .set(i64::try_from(self.pods.len()).unwrap_or(i64::MAX));
    }

    fn coverage(&self) -> Coverage {
        let unbound = self.pods.values().filter(|pod| !pod.missing.is_empty());
        let unbound = unbound.count();
        // Not those with a port that a pod's own process has taken.
        let denied = if self.logged.denied { unbound } else { 0 };
        Coverage {
            served: self.pods.len() - unbound,
            unserved: denied + self.failed.len() + self.unsupported.len(),
        }
    }

    fn renew_watch(&mut self) {
        if let Err(error) = self.watch.renew()
            && let Some(missed) = self.logged.unwatched_quota()
        {
            let directory = self.directory.display();
            tracing::error!(%error, %directory, missed, "the directory of network namespaces cannot be watched");
        }
        self.warn_no_directory();
    }

    /// Scans the directory. Returns the namespaces in it, each with one of its files, and records
    /// the files without a mount.
    fn scan(&mut self) -> HashMap<NamespaceId, PathBuf> {
        let (mut found, mut waiting) = (HashMap::new(), HashMap::new());
        let files = fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .filter_map(Result::ok);
        for file in files.filter(|file| file.file_type().is_ok_and(|kind| kind.is_file())) {
            let path = file.path();
            match NamespaceId::at(&path, self.own) {
                Ok(Some(id)) if id == self.own => {}
                Ok(Some(id)) => drop(found.insert(id, path)),
                Ok(None) => {
                    let since = self
                        .waiting
                        .get(&path)
                        .copied()
                        .unwrap_or_else(|| Some(Instant::now()));
                    waiting.insert(path, since);
                }
                // The runtime has just removed it.
                Err(_) => {}
            }
        }
        self.waiting = waiting;
        self.warn_waiting();
        found
    }

    fn warn_no_directory(&mut self) {
        if !self.watch.has_directory() && !std::mem::replace(&mut self.logged.no_directory, true) {
            tracing::warn!(
                directory = %self.directory.display(),
                "[pods] netns_dir does not exist yet; in Kubernetes mount the host's directory by a hostPath volume"
            );
        }
    }

    fn warn_waiting(&mut self) {
        for (path, since) in &mut self.waiting {
            if since.is_none_or(|since| since.elapsed() < MOUNT_GRACE) {
                continue;
            }
            *since = None;
            self.metrics
                .pod_listener_failures
                .get_or_create(&PodListenerFailure::NotMounted.into())
                .inc();
            if !std::mem::replace(&mut self.logged.not_mounted, true) {
                tracing::warn!(
                    path = %path.display(),
                    directory = %self.directory.display(),
                    "no network namespace is mounted on a file in [pods] netns_dir; in Kubernetes set \
                     mountPropagation: HostToContainer on the directory's volumeMount"
                );
            }
        }
    }

    /// Makes the sockets that each of these namespaces needs, and serves there.
    async fn add_namespaces(&mut self, namespaces: Vec<(Arc<NetnsRef>, ReceivedSockets)>) {
        if namespaces.is_empty() {
            return;
        }
        let making = tokio::task::spawn_blocking(move || {
            namespaces
                .into_iter()
                .map(|(netns, received)| (NamespaceSockets::inside(&netns, received), netns))
                .collect::<Vec<_>>()
        });
        for (made, netns) in making.await.unwrap_or_default() {
            let id = netns.id();
            let served = match made {
                Ok(made) => ListenedPod::serve(netns.clone(), made, &self.service)
                    .map_err(NamespaceError::Io),
                Err(error) => Err(error),
            };
            match served {
                Ok(Some((pod, unbound))) => {
                    tracing::debug!(namespace = %netns.path().display(), "serving a pod's network namespace");
                    self.failed.remove(&id);
                    self.warn_unbound(&pod, unbound);
                    self.pods.insert(id, pod);
                }
                Ok(None) => {
                    self.unsupported.insert(id);
                    self.record_failures(PodListenerFailure::UnsupportedKernel);
                }
                Err(error @ NamespaceError::Machines) => {
                    self.unserved.insert(id);
                    let namespace = netns.path();
                    tracing::warn!(%error, namespace = %namespace.display(), "a network namespace is not a pod's");
                }
                // It was removed meanwhile. Otherwise an event follows.
                Err(NamespaceError::NotMounted) => {}
                Err(error) => {
                    if self.failed.insert(id) {
                        let path = netns.path();
                        tracing::warn!(%error, namespace = %path.display(), "a pod's network namespace cannot be served");
                        self.record_failures(PodListenerFailure::Error);
                    }
                }
            }
        }
    }

    /// Retries the binds that failed.
    async fn bind_missing(&mut self) {
        let missing = self.pods.values().filter(|pod| !pod.missing.is_empty());
        let missing: Vec<_> = missing
            .map(|pod| (pod.netns.clone(), pod.missing.clone()))
            .collect();
        if missing.is_empty() {
            return;
        }
        let binding = tokio::task::spawn_blocking(move || {
            let bound = missing
                .into_iter()
                .map(|(netns, missing)| (netns.id(), pod::bind(&netns, &missing)));
            bound.collect::<Vec<_>>()
        });
        for (id, bound) in binding.await.unwrap_or_default() {
            if let (Some(pod), Ok(bound)) = (self.pods.get_mut(&id), bound) {
                let missing_before = pod.missing.len();
                // The cause of the failure was logged before.
                pod.add(bound, &self.service);
                if pod.missing.len() < missing_before {
                    tracing::info!(
                        namespace = %pod.path().display(),
                        "port 974 is served in a pod's network namespace: it is free now"
                    );
                }
                if let Some(owner) = pod.warn_missing_with_owner() {
                    tracing::warn!(
                        namespace = %pod.path().display(),
                        pod = %owner,
                        "port 974 is in use in a network namespace of this pod"
                    );
                }
            }
        }
    }

    fn record_failures(&self, failure: PodListenerFailure) {
        self.metrics
            .pod_listener_failures
            .get_or_create(&failure.into())
            .inc();
    }

    fn warn_unbound(&mut self, pod: &ListenedPod, unbound: Vec<BindFailure>) {
        let path = pod.path();
        for (i, unbound) in unbound.into_iter().enumerate() {
            let failure = match &unbound {
                BindFailure::Taken => PodListenerFailure::PortTaken,
                BindFailure::Denied => PodListenerFailure::PortDenied,
                BindFailure::Failed(_) => PodListenerFailure::Error,
            };
            // The other address failed for the same reason.
            if i > 0 {
                continue;
            }
            self.record_failures(failure);
            match unbound {
                BindFailure::Taken => tracing::warn!(
                    namespace = %path.display(),
                    "port 974 is in use: the pod is not served; stop the process that listens on it"
                ),
                BindFailure::Denied if std::mem::replace(&mut self.logged.denied, true) => {}
                BindFailure::Denied => tracing::warn!(
                    namespace = %path.display(),
                    "port 974 cannot be bound: CAP_NET_BIND_SERVICE is missing; in Kubernetes add NET_BIND_SERVICE to \
                     the container's securityContext.capabilities.add, under systemd CAP_NET_BIND_SERVICE to \
                     CapabilityBoundingSet= and AmbientCapabilities="
                ),
                BindFailure::Failed(error) => {
                    tracing::warn!(%error, namespace = %path.display(), "port 974 cannot be bound");
                }
            }
        }
    }

    /// Waits until the directory has to be scanned, or a bind retried.
    async fn wait_for_change(&self) {
        let waiting = self.waiting.values().any(Option::is_some);
        let failed = self.pods.values().any(|pod| !pod.missing.is_empty())
            || !self.failed.is_empty()
            || !self.unsupported.is_empty();
        let again = match (
            waiting,
            failed || (self.handover.is_some() && self.successors.is_none()),
        ) {
            (true, _) => Some(Instant::now() + MOUNT_POLL),
            (false, true) => Some(Instant::now() + BIND_RETRY),
            (false, false) => self.next_ports_check(),
        };
        tokio::select! {
            biased;
            changed = self.watch.changed() => match changed {
                Ok(Change::Mounts) if !waiting => drop(timeout(RESCAN_DEBOUNCE, self.watch.files()).await),
                Ok(_) => {}
                Err(error) => {
                    if let Some(missed) = self.logged.unwatched_quota() {
                        tracing::error!(%error, missed, "network namespaces cannot be watched");
                    }
                    tokio::time::sleep(BIND_RETRY).await;
                }
            },
            () = at(again) => {}
        }
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

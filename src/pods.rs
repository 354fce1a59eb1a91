//! Listeners inside pods' network namespaces, where each workload finds the endpoint on its own loopback address.
//!
//! A container runtime mounts each namespace on a file in one directory. That directory is looked at again whenever
//! something about it changes, and what is listened in follows what is there: nothing depends on the names of files, on the
//! order of events, or on whether each of them was seen.

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
use crate::namespace::{NamespaceError, NamespaceId, NetNs};
use crate::telemetry::LogQuota;

mod handover;
mod life;
mod pod;
mod ports;
mod sys;
mod watching;

use handover::{Handover, HandoverKey};
use life::HandoverRole;
use pod::{BindFailure, ListenedPod, NamespaceSockets, PodService, ReceivedSockets};
use watching::{Change, NetnsWatch};

/// A file on which nothing is mounted for so long is not one whose pod is just being made: that takes milliseconds, and some
/// seconds where hundreds are being made on a machine that can't keep up.
const MOUNT_GRACE: Duration = Duration::from_secs(10);
/// Between looks at a file that may still be waited for, if no event says that something is mounted on it.
const MOUNT_POLL: Duration = Duration::from_millis(50);
/// Between tries to bind an address that is taken.
const BIND_RETRY: Duration = Duration::from_secs(1);
/// Between lines of the log about what does not pass.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Where no pod is being made, a mount somewhere on the host is no reason to hurry.
const RESCAN_DEBOUNCE: Duration = Duration::from_millis(100);

/// Why the daemon can't listen in pods.
#[derive(Debug, Error)]
pub enum PodsError {
    /// A capability is missing.
    #[error(
        "[listen] pods: {0}; in Kubernetes add SYS_ADMIN to the container's securityContext.capabilities.add, under systemd \
         add CAP_SYS_ADMIN to CapabilityBoundingSet= and AmbientCapabilities="
    )]
    Denied(NamespaceError),
    /// The directory can't be watched.
    #[error("[listen] pods_dir {}: {source}", path.display())]
    Watch {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// All pods' listeners.
#[derive(Debug)]
pub struct PodListeners {
    directory: PathBuf,
    watch: NetnsWatch,
    service: PodService,
    metrics: Metrics,
    /// The daemon's own namespace, which is no pod's.
    own: NamespaceId,
    pods: HashMap<NamespaceId, ListenedPod>,
    /// Files without a namespace, since when; `None` if that was told.
    waiting: HashMap<PathBuf, Option<Instant>>,
    /// Namespaces that could not be had, to be tried again.
    failed: HashSet<NamespaceId>,
    /// Those that are not to be served, or that this kernel lets nobody serve.
    unserved: HashSet<NamespaceId>,
    told: LoggedOnce,
    /// Where the next daemon gets the listeners from.
    handover: Option<PathBuf>,
    successors: Option<Handover>,
    stage: HandoverRole,
    /// The connection on which this daemon took over, and those on which daemons before took over that may be there still: as
    /// long as one is open, the daemon at its other end knows that somebody lives who came after it.
    before: Vec<OwnedFd>,
    /// Whether this daemon could serve pods' workloads.
    able: watch::Receiver<bool>,
    /// Whether the namespaces that were there at the start have been tried.
    tried: watch::Sender<bool>,
}

/// How readiness and pods wait for each other.
#[derive(Debug, Clone)]
pub struct TakeoverGate {
    able: watch::Sender<bool>,
    tried: watch::Receiver<bool>,
}

impl TakeoverGate {
    /// Says that everything else has answered, so that listeners can pass from the daemon before; returns when pods are
    /// listened in.
    pub async fn pass(&mut self) {
        self.able.send_replace(true);
        // An error says that the daemon ends.
        let _ = self.tried.wait_for(|tried| *tried).await;
    }
}

/// What the log has once, though it may be so in every pod, or seldom.
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
    /// Whether the log may have a line about it now, and how many it did not have since the last.
    fn is_unwatched(&self) -> Option<u64> {
        self.unwatched
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

impl PodListeners {
    /// Looks whether namespaces can be entered, and begins to watch the directory. When it returns, what is there is
    /// listened in, unless another daemon does that and hands it over once the gate is passed.
    pub async fn start(
        (directory, handover): (&Path, Option<&Path>),
        front: Arc<CredentialEndpoint>,
        connections: ConnectionTracker,
        metrics: Metrics,
        stop: watch::Receiver<bool>,
    ) -> Result<(Self, TakeoverGate), PodsError> {
        let failed = |source| PodsError::Watch {
            path: directory.to_owned(),
            source,
        };
        // Into its own, which asks for the same privilege as into another.
        let own = NetNs::own()
            .and_then(|own| own.run_in(|| ()).map(|()| own.id()))
            .map_err(PodsError::Denied)?;
        let service = PodService {
            front,
            connections,
            stop,
            loops: TaskTracker::new(),
        };
        let ((able, is_able), (tried, is_tried)) = (watch::channel(false), watch::channel(false));
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
            told: LoggedOnce {
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
            before: Vec::new(),
            able: is_able,
            tried,
        };
        // Also where the first look has to wait for the daemon before.
        pods.warn_no_directory();
        pods.begin().await;
        Ok((
            pods,
            TakeoverGate {
                able,
                tried: is_tried,
            },
        ))
    }

    /// Listens in the namespaces that there are, and in no other.
    async fn reconcile(&mut self) {
        self.reconcile_dir(HashMap::new()).await;
    }

    /// The same, by listeners that the daemon before has given.
    async fn reconcile_dir(&mut self, mut given: HashMap<HandoverKey, OwnedFd>) {
        if let Err(error) = self.watch.renew()
            && let Some(missed) = self.told.is_unwatched()
        {
            let directory = self.directory.display();
            tracing::error!(%error, %directory, missed, "the directory of network namespaces cannot be watched");
        }
        self.warn_no_directory();
        let found = self.scan();
        self.pods.retain(|id, pod| {
            let there = found.get(id);
            match there {
                Some(path) => pod.place.update_path(path),
                None => tracing::debug!(namespace = %pod.path().display(), "the network namespace is gone"),
            }
            there.is_some()
        });
        self.failed.retain(|id| found.contains_key(id));
        self.unserved.retain(|id| found.contains_key(id));
        let new = found
            .into_iter()
            .filter(|(id, _)| !self.pods.contains_key(id) && !self.unserved.contains(id));
        let mut given = |id| {
            POD_ADDRESSES
                .into_iter()
                .filter_map(|address| Some((address, given.remove(&(id, address))?)))
                .collect()
        };
        let new = new.map(|(id, path)| (Arc::new(NetnsRef::new(id, path)), given(id)));
        self.add_namespaces(new.collect()).await;
        self.bind_missing().await;
        self.look_at_ports().await;
        self.tried.send_replace(true);
        self.metrics
            .pod_listeners
            .set(i64::try_from(self.pods.len()).unwrap_or(i64::MAX));
    }

    /// The namespaces in the directory, each with one of its files. Also notes the files on which none is mounted (yet).
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
                // It has just been removed.
                Err(_) => {}
            }
        }
        self.waiting = waiting;
        self.warn_waiting();
        found
    }

    fn warn_no_directory(&mut self) {
        if !self.watch.has_directory() && !std::mem::replace(&mut self.told.no_directory, true) {
            tracing::warn!(
                "[listen] pods_dir: {} is not there; it is waited for. In Kubernetes mount the host's directory by a hostPath volume",
                self.directory.display()
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
            if !std::mem::replace(&mut self.told.not_mounted, true) {
                tracing::warn!(
                    "no network namespace is mounted on {}; if it is a pod's, the host's mounts do not reach this daemon: in \
                     Kubernetes set mountPropagation: HostToContainer on the volumeMount of {}",
                    path.display(),
                    self.directory.display()
                );
            }
        }
    }

    /// Makes what is needed in each of these namespaces, and serves there.
    async fn add_namespaces(&mut self, places: Vec<(Arc<NetnsRef>, ReceivedSockets)>) {
        if places.is_empty() {
            return;
        }
        let making = tokio::task::spawn_blocking(move || {
            places
                .into_iter()
                .map(|(place, given)| (NamespaceSockets::inside(&place, given), place))
                .collect::<Vec<_>>()
        });
        for (made, place) in making.await.unwrap_or_default() {
            let id = place.id();
            let served = match made {
                Ok(made) => ListenedPod::serve(place.clone(), made, &self.service)
                    .map_err(NamespaceError::Io),
                Err(error) => Err(error),
            };
            match served {
                Ok(Some((pod, unbound))) => {
                    tracing::debug!(namespace = %place.path().display(), "listening in a pod's network namespace");
                    self.failed.remove(&id);
                    self.warn_unbound(&pod, unbound);
                    self.pods.insert(id, pod);
                }
                Ok(None) => {
                    self.unserved.insert(id);
                    self.record_failures(PodListenerFailure::UnsupportedKernel);
                }
                Err(error @ NamespaceError::Machines) => {
                    self.unserved.insert(id);
                    tracing::warn!(
                        "{}: {error}; nobody is served there as in a pod",
                        place.path().display()
                    );
                }
                // It went while it was entered; if not, there will be an event.
                Err(NamespaceError::NotMounted) => {}
                Err(error) => {
                    if self.failed.insert(id) {
                        let path = place.path();
                        tracing::warn!(%error, "a pod's network namespace cannot be listened in: {}", path.display());
                        self.record_failures(PodListenerFailure::Error);
                    }
                }
            }
        }
    }

    /// Tries again to listen where that failed.
    async fn bind_missing(&mut self) {
        let missing = self.pods.values().filter(|pod| !pod.missing.is_empty());
        let missing: Vec<_> = missing
            .map(|pod| (pod.place.clone(), pod.missing.clone()))
            .collect();
        if missing.is_empty() {
            return;
        }
        let binding = tokio::task::spawn_blocking(move || {
            let bound = missing
                .into_iter()
                .map(|(place, missing)| (place.id(), pod::bind(&place, &missing)));
            bound.collect::<Vec<_>>()
        });
        for (id, bound) in binding.await.unwrap_or_default() {
            if let (Some(pod), Ok(bound)) = (self.pods.get_mut(&id), bound) {
                let before = pod.missing.len();
                // What is in the way was told of.
                pod.add(bound, &self.service);
                if pod.missing.len() < before {
                    tracing::info!(
                        "{}: the port is free now, and listened on",
                        pod.path().display()
                    );
                }
                if let Some(owner) = pod.warn_missing_with_owner() {
                    tracing::warn!(
                        "{}, where port 974 is taken, is the network of the pod {owner}",
                        pod.path().display()
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
            // The other address has failed for the same reason.
            if i > 0 {
                continue;
            }
            self.record_failures(failure);
            match unbound {
                BindFailure::Taken => tracing::warn!(
                    "port 974 is taken in the network namespace {}: the workloads of that pod are not served there until \
                     whoever has it lets it go",
                    path.display()
                ),
                BindFailure::Denied if std::mem::replace(&mut self.told.denied, true) => {}
                BindFailure::Denied => tracing::warn!(
                    "the daemon may not listen on port 974 in {}; in Kubernetes add NET_BIND_SERVICE to the container's \
                     securityContext.capabilities.add, under systemd CAP_NET_BIND_SERVICE",
                    path.display()
                ),
                BindFailure::Failed(error) => {
                    tracing::warn!(%error, "port 974 cannot be listened on in {}", path.display());
                }
            }
        }
    }

    /// Waits until there is something to look at.
    async fn wait_for_change(&self) {
        let waiting = self.waiting.values().any(Option::is_some);
        let failed =
            self.pods.values().any(|pod| !pod.missing.is_empty()) || !self.failed.is_empty();
        let again = match (
            waiting,
            failed || (self.handover.is_some() && self.successors.is_none()),
        ) {
            (true, _) => Some(Instant::now() + MOUNT_POLL),
            (false, true) => Some(Instant::now() + BIND_RETRY),
            (false, false) => self.next_look_at_ports(),
        };
        tokio::select! {
            biased;
            changed = self.watch.changed() => match changed {
                Ok(Change::Mounts) if !waiting => drop(timeout(RESCAN_DEBOUNCE, self.watch.files()).await),
                Ok(_) => {}
                Err(error) => {
                    if let Some(missed) = self.told.is_unwatched() {
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

//! Adapts the listeners to the namespaces that are in the directory.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::listen::{NetnsRef, POD_ADDRESSES};
use crate::metrics::{Metrics, PodListenerFailure};
use crate::netns::{NamespaceError, NamespaceId};
use crate::pod_listeners::failure_log::FailureLog;
use crate::pod_listeners::gate::Coverage;
use crate::pod_listeners::handover_protocol::HandoverKey;
use crate::pod_listeners::metadata_log::MetadataLog;
use crate::pod_listeners::netns_directory::NetnsDirectory;
use crate::pod_listeners::netns_watch::Change;
use crate::pod_listeners::pod::{self, ListenedPod, NamespaceSockets, PodService, ReceivedSockets};

mod metadata;

/// Interval between checks of a file without a mount, for mounts that no event reports.
const MOUNT_POLL: Duration = Duration::from_millis(50);
/// Interval between attempts to bind an address that is in use, and to read a directory that does
/// not respond.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Delay before the scan after a mount event, while no pod is being created.
const RESCAN_DEBOUNCE: Duration = Duration::from_millis(100);

/// The listeners in the namespaces of the directory.
#[derive(Debug)]
pub(super) struct Reconciler {
    directory: NetnsDirectory,
    pub(super) service: PodService,
    metrics: Metrics,
    pods: HashMap<NamespaceId, ListenedPod>,
    /// Namespaces that could not be entered or served, for a retry.
    failed: HashSet<NamespaceId>,
    /// Namespaces that are not to be served.
    unserved: HashSet<NamespaceId>,
    /// Namespaces that cannot be served until the kernel attests callers over TCP.
    unsupported: HashSet<NamespaceId>,
    log: FailureLog,
    metadata_log: MetadataLog,
    /// Set when the namespaces that were there at the start have been tried.
    first_scan: watch::Sender<bool>,
    coverage: watch::Sender<Coverage>,
}

impl Reconciler {
    pub(super) fn new(
        directory: NetnsDirectory,
        service: PodService,
        log: FailureLog,
        metrics: Metrics,
        first_scan: watch::Sender<bool>,
        coverage: watch::Sender<Coverage>,
    ) -> Self {
        Self {
            directory,
            service,
            metadata_log: MetadataLog::new(metrics.clone()),
            metrics,
            pods: HashMap::new(),
            failed: HashSet::new(),
            unserved: HashSet::new(),
            unsupported: HashSet::new(),
            log,
            first_scan,
            coverage,
        }
    }

    /// Listens in the namespaces that are in the directory, and in no others. `received` are the
    /// listeners of another instance. Those of namespaces that are gone are closed.
    pub(super) async fn reconcile(&mut self, mut received: HashMap<HandoverKey, Arc<OwnedFd>>) {
        let Some(found) = self.directory.scan(&mut self.log).await else {
            return;
        };
        self.drop_all_but(&found);
        for (id, path) in &found {
            if let Some(pod) = self.pods.get(id) {
                pod.netns.update_path(path);
            }
        }
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
        let mut received_in = |id| {
            POD_ADDRESSES
                .into_iter()
                .filter_map(|address| Some((address, received.remove(&(id, address))?)))
                .collect()
        };
        let new = new.map(|(id, path)| (Arc::new(NetnsRef::new(id, path)), received_in(id)));
        let new: Vec<_> = new.collect();
        self.add_namespaces(new).await;
        self.bind_missing().await;
        self.serve_metadata(received).await;
        self.check_ports().await;
        self.coverage.send_replace(self.coverage());
        if self.directory.responds() {
            self.first_scan.send_replace(true);
        }
        self.metrics
            .pod_listeners
            .set(i64::try_from(self.pods.len()).unwrap_or(i64::MAX));
    }

    fn coverage(&self) -> Coverage {
        let unbound = self.pods.values().filter(|pod| !pod.missing.is_empty());
        let unbound = unbound.count();
        // Not those with a port that a pod's own process has taken.
        let denied = if self.log.has_denied() { unbound } else { 0 };
        Coverage {
            served: self.pods.len() - unbound,
            unserved: denied + self.failed.len() + self.unsupported.len(),
        }
    }

    /// Drops the listeners in namespaces that are gone, and adds none.
    pub(super) async fn drop_removed(&mut self) {
        if let Some(found) = self.directory.scan(&mut self.log).await {
            self.drop_all_but(&found);
        }
    }

    /// Returns the listeners that accept.
    pub(super) fn listening(&self) -> Vec<(HandoverKey, Arc<OwnedFd>)> {
        let pods = self.pods.values();
        pods.flat_map(ListenedPod::listening).collect()
    }

    /// Stops accepting. `kept` are the listeners that another instance serves from here on.
    pub(super) fn pause(&mut self, kept: &[(HandoverKey, Arc<OwnedFd>)]) {
        self.pods.values_mut().for_each(|pod| pod.pause(kept));
        self.metrics.pod_listeners.set(0);
        self.metrics.imds_namespaces.set(0);
    }

    /// Accepts again after a pause.
    pub(super) fn resume(&mut self) {
        let pods = self.pods.values_mut();
        pods.for_each(|pod| pod.resume(&self.service));
    }

    /// Drops the listeners, and returns when the open connections have ended. Then removes the
    /// metadata address from the pods in which no other instance serves it: before that, answers
    /// would not reach their callers. `is_resumed` is set if the previous instance serves again.
    pub(super) async fn end(mut self, is_resumed: bool) {
        self.pods.values_mut().for_each(ListenedPod::release);
        self.service.loops.close();
        let (loops, drain) = (self.service.loops.clone(), self.service.drain.clone());
        // Loops and connections end by themselves, or with their pod.
        let mut ended = pin!(async {
            loops.wait().await;
            drain.connections_ended().await;
        });
        loop {
            tokio::select! {
                biased;
                () = &mut ended => break,
                () = self.changed(false) => self.drop_removed().await,
            }
        }
        if !is_resumed {
            self.remove_metadata().await;
        }
    }

    fn drop_all_but<T>(&mut self, found: &HashMap<NamespaceId, T>) {
        self.pods.retain(|id, pod| {
            let is_there = found.contains_key(id);
            if !is_there {
                tracing::debug!(namespace = %pod.path().display(), "network namespace removed");
            }
            is_there
        });
        for ids in [&mut self.failed, &mut self.unserved, &mut self.unsupported] {
            ids.retain(|id| found.contains_key(id));
        }
    }

    /// Makes the sockets that each of these namespaces needs, and serves there.
    async fn add_namespaces(&mut self, namespaces: Vec<(Arc<NetnsRef>, ReceivedSockets)>) {
        if namespaces.is_empty() {
            return;
        }
        let serves_metadata = self.service.serves_metadata;
        let opening = self.directory.run(&self.log, move || {
            let opened = namespaces.into_iter().map(|(netns, received)| {
                let sockets = NamespaceSockets::open(&netns, received, serves_metadata);
                (sockets, netns)
            });
            opened.collect::<Vec<_>>()
        });
        for (opened, netns) in opening.await.unwrap_or_default() {
            let served = match opened {
                Ok(sockets) => ListenedPod::serve(netns.clone(), sockets, &self.service)
                    .map_err(NamespaceError::Io),
                Err(error) => Err(error),
            };
            match served {
                Ok(Some((pod, unbound))) => {
                    let namespace = netns.path();
                    tracing::debug!(namespace = %namespace.display(), "serving a pod's network namespace");
                    self.failed.remove(&netns.id());
                    self.log.unbound(&namespace, &unbound);
                    self.pods.insert(netns.id(), pod);
                }
                Ok(None) => {
                    self.unsupported.insert(netns.id());
                    self.log.count(PodListenerFailure::UnsupportedKernel);
                }
                Err(error) => self.record_failure(&netns, error),
            }
        }
    }

    /// Records that a namespace is not served.
    fn record_failure(&mut self, netns: &NetnsRef, error: NamespaceError) {
        let (id, path) = (netns.id(), netns.path());
        let namespace = path.display();
        match error {
            error @ NamespaceError::Initial => {
                self.unserved.insert(id);
                tracing::warn!(%error, %namespace, "a network namespace is not a pod's");
            }
            // It was removed meanwhile. Otherwise an event follows.
            NamespaceError::NotMounted => {}
            error => {
                if self.failed.insert(id) {
                    tracing::warn!(%error, %namespace, "a pod's network namespace cannot be served");
                    self.log.count(PodListenerFailure::Error);
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
        let binding = self.directory.run(&self.log, move || {
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

    /// Reads once in each namespace that is old enough whether any user may bind the endpoint's
    /// port there.
    async fn check_ports(&mut self) {
        let now = Instant::now();
        let namespaces: Vec<_> = self
            .pods
            .values_mut()
            .filter_map(|pod| pod.take_port_check(now))
            .collect();
        if namespaces.is_empty() {
            return;
        }
        let reading = self.directory.run(&self.log, move || {
            namespaces
                .iter()
                .filter_map(|netns| pod::unprivileged_port_start(netns))
                .collect::<Vec<_>>()
        });
        for (namespace, first) in reading.await.unwrap_or_default() {
            self.log.unprivileged_ports(&namespace, first);
        }
    }

    /// Waits until the directory has to be scanned, or a bind retried. `retry` makes it return
    /// after 1 s at the latest.
    pub(super) async fn changed(&self, retry: bool) {
        self.changed_before(None, retry).await;
    }

    /// Waits like [`Reconciler::changed`], until `limit` at most. Returns whether the directory has
    /// to be scanned.
    pub(super) async fn changed_before(&self, limit: Option<Instant>, retry: bool) -> bool {
        let mounting = self.directory.awaits_mounts();
        let retry = retry
            || !self.directory.responds()
            || self.pods.values().any(|pod| !pod.missing.is_empty())
            || !self.failed.is_empty()
            || !self.unsupported.is_empty();
        let again = if mounting {
            Some(Instant::now() + MOUNT_POLL)
        } else if retry {
            Some(Instant::now() + RETRY_INTERVAL)
        } else {
            self.pods.values().filter_map(ListenedPod::port_check).min()
        };
        tokio::select! {
            biased;
            changed = self.directory.changed() => self.settle(changed, mounting, limit).await,
            () = wait_until(again) => {}
            () = wait_until(limit) => return false,
        }
        true
    }

    /// Waits until a scan after this change is likely to find all that belongs to it. The event is
    /// consumed, so it returns at `limit` instead of being dropped.
    async fn settle(&self, changed: io::Result<Change>, mounting: bool, limit: Option<Instant>) {
        match changed {
            Ok(Change::Mounts) if !mounting => {
                let debounced = Instant::now() + RESCAN_DEBOUNCE;
                let until = limit.map_or(debounced, |limit| limit.min(debounced));
                drop(timeout_at(until, self.directory.files_changed()).await);
            }
            Ok(_) => {}
            Err(error) => {
                self.log.unwatched(self.directory.path(), &error);
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
        }
    }
}

async fn wait_until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

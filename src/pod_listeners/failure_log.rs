//! Log lines and counts of the pods and namespaces that are not served.
//!
//! Each pod may give the same reason. So a line appears once, or at a bounded rate.

use std::io;
use std::path::Path;

use crate::limits::{LogOnce, LogQuota};
use crate::metrics::{Metrics, PodListenerFailure};
use crate::pod_listeners::LOG_INTERVAL;
use crate::pod_listeners::pod::BindFailure;

/// Counts a failure in one namespace.
pub(super) fn count(metrics: &Metrics, failure: PodListenerFailure) {
    let failures = &metrics.pod_listener_failures;
    failures.get_or_create(&failure.into()).inc();
}

/// The log of failures of the pod listeners.
#[derive(Debug)]
pub(super) struct FailureLog {
    metrics: Metrics,
    no_directory: LogOnce,
    not_mounted: LogOnce,
    denied: LogOnce,
    unprivileged_ports: LogQuota,
    unwatched: LogQuota,
}

impl FailureLog {
    pub(super) fn new(metrics: Metrics) -> Self {
        let [unprivileged_ports, unwatched] = [(); 2].map(|()| LogQuota::new(1, LOG_INTERVAL));
        Self {
            metrics,
            no_directory: LogOnce::default(),
            not_mounted: LogOnce::default(),
            denied: LogOnce::default(),
            unprivileged_ports,
            unwatched,
        }
    }

    /// Returns whether a port could not be bound because the daemon lacks the capability.
    pub(super) fn has_denied(&self) -> bool {
        self.denied.is_logged()
    }

    /// Counts a namespace, or an address in one, that is not served.
    pub(super) fn count(&self, failure: PodListenerFailure) {
        count(&self.metrics, failure);
    }

    /// The directory of namespaces does not exist.
    pub(super) fn no_directory(&self, directory: &Path) {
        if self.no_directory.first() {
            tracing::warn!(
                directory = %directory.display(),
                "[pods] netns_dir does not exist yet; in Kubernetes mount the host's directory by a hostPath volume"
            );
        }
    }

    /// The directory, or the namespaces on its files, cannot be watched, read or entered.
    pub(super) fn unwatched(&self, directory: &Path, error: &io::Error) {
        if let Some(missed) = self.unwatched.take() {
            let directory = directory.display();
            if error.kind() == io::ErrorKind::TimedOut {
                tracing::error!(
                    %directory,
                    missed,
                    "[pods] netns_dir does not respond: new pods are not served; unmount the file system that hangs there"
                );
            } else {
                tracing::error!(%error, %directory, missed, "the directory of network namespaces cannot be watched");
            }
        }
    }

    /// No namespace was mounted on a file for a while.
    pub(super) fn not_mounted(&self, path: &Path, directory: &Path) {
        self.count(PodListenerFailure::NotMounted);
        if self.not_mounted.first() {
            tracing::warn!(
                path = %path.display(),
                directory = %directory.display(),
                "no network namespace is mounted on a file in [pods] netns_dir; in Kubernetes set \
                 mountPropagation: HostToContainer on the directory's volumeMount"
            );
        }
    }

    /// Addresses of one namespace cannot be bound.
    pub(super) fn unbound(&self, namespace: &Path, failures: &[BindFailure]) {
        // The other address failed for the same reason.
        let Some(failure) = failures.first() else {
            return;
        };
        let namespace = namespace.display();
        match failure {
            BindFailure::Taken => {
                self.count(PodListenerFailure::PortTaken);
                tracing::warn!(
                    %namespace,
                    "port 974 is in use: the pod is not served; stop the process that listens on it"
                );
            }
            BindFailure::Denied => {
                self.count(PodListenerFailure::PortDenied);
                if self.denied.first() {
                    tracing::warn!(
                        %namespace,
                        "port 974 cannot be bound: CAP_NET_BIND_SERVICE is missing; in Kubernetes add NET_BIND_SERVICE to \
                         the container's securityContext.capabilities.add, under systemd CAP_NET_BIND_SERVICE to \
                         CapabilityBoundingSet= and AmbientCapabilities="
                    );
                }
            }
            BindFailure::Failed(error) => {
                self.count(PodListenerFailure::Error);
                tracing::warn!(%error, %namespace, "port 974 cannot be bound");
            }
        }
    }

    /// Any user of a pod may bind the port of the endpoint.
    pub(super) fn unprivileged_ports(&self, namespace: &Path, first: u16) {
        if let Some(missed) = self.unprivileged_ports.take() {
            tracing::warn!(
                namespace = %namespace.display(),
                ip_unprivileged_port_start = first,
                missed,
                "any user of a pod can bind port 974 while it is free, and answer the pod's other containers; set \
                 `enable_unprivileged_ports = false` in containerd's configuration, or the sysctl \
                 net.ipv4.ip_unprivileged_port_start to 1024 in the pods' securityContext"
            );
        }
    }
}

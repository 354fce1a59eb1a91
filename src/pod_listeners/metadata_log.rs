//! Log lines and counts of the pods in which the metadata address is not served.

use std::net::IpAddr;
use std::path::Path;

use crate::limits::{LogOnce, LogQuota};
use crate::metrics::{Metrics, PodListenerFailure};
use crate::pod_listeners::LOG_INTERVAL;
use crate::pod_listeners::failure_log::count;
use crate::pod_listeners::metadata::MetadataObstacle;

/// The log of failures at the metadata address.
#[derive(Debug)]
pub(super) struct MetadataLog {
    metrics: Metrics,
    routed: LogQuota,
    answered: LogQuota,
    port_taken: LogQuota,
    failed: LogQuota,
    removed: LogQuota,
    denied: LogOnce,
}

impl MetadataLog {
    pub(super) fn new(metrics: Metrics) -> Self {
        let [routed, answered, port_taken, failed, removed] =
            [(); 5].map(|()| LogQuota::new(1, LOG_INTERVAL));
        Self {
            metrics,
            routed,
            answered,
            port_taken,
            failed,
            removed,
            denied: LogOnce::default(),
        }
    }

    /// A pod has opted in, and is not served at this address.
    pub(super) fn unserved(&self, namespace: &Path, address: IpAddr, obstacle: &MetadataObstacle) {
        if let Some(failure) = obstacle.failure() {
            count(&self.metrics, failure);
        }
        let namespace = namespace.display();
        match obstacle {
            MetadataObstacle::NotReady => {}
            MetadataObstacle::Routed(route) => {
                if let Some(missed) = self.routed.take() {
                    tracing::warn!(
                        %namespace, %address, route, missed,
                        fix = "remove the route, or the pod's opt-in",
                        "a pod opted in to 169.254.169.254, but a route leads there"
                    );
                }
            }
            MetadataObstacle::Answered => {
                if let Some(missed) = self.answered.take() {
                    tracing::warn!(
                        %namespace, %address, missed,
                        fix = "block that service for the pod by a network policy, or remove the pod's opt-in",
                        "a pod opted in to 169.254.169.254, but another service answers there"
                    );
                }
            }
            MetadataObstacle::PortTaken => {
                if let Some(missed) = self.port_taken.take() {
                    tracing::warn!(
                        %namespace, %address, missed,
                        fix = "let the pod's server listen on another port or on the pod's address, or remove the pod's opt-in",
                        "a pod opted in to 169.254.169.254, but port 80 is in use"
                    );
                }
            }
            MetadataObstacle::Denied => {
                if self.denied.first() {
                    tracing::warn!(
                        %namespace, %address,
                        fix = "in Kubernetes add NET_ADMIN to the container's securityContext.capabilities.add, under systemd \
                               CAP_NET_ADMIN to CapabilityBoundingSet= and AmbientCapabilities=",
                        "169.254.169.254 cannot be set up in pods: CAP_NET_ADMIN is missing"
                    );
                }
            }
            MetadataObstacle::Failed(error) => {
                if let Some(missed) = self.failed.take() {
                    tracing::warn!(%error, %namespace, %address, missed, "169.254.169.254 cannot be set up in a pod");
                }
            }
        }
    }

    /// A process of the pod had removed the address.
    pub(super) fn removed(&self, namespace: &Path) {
        count(&self.metrics, PodListenerFailure::ImdsRemoved);
        if let Some(missed) = self.removed.take() {
            tracing::warn!(
                namespace = %namespace.display(), missed,
                "a pod has removed 169.254.169.254: it was added again"
            );
        }
    }
}

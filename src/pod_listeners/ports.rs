//! Check whether a pod's unprivileged users can bind the endpoint's port in its network namespace.

use std::time::Duration;

use tokio::time::Instant;

use crate::listen::{POD_ADDRESSES, first_unprivileged_port, unprivileged_ports};
use crate::pod_listeners::PodListeners;

/// Age at which a namespace has its final setting. The runtime creates it with the kernel's
/// default, and sets another value with the pod's first container.
const SETTLE_TIME: Duration = Duration::from_secs(5);

impl PodListeners {
    /// Reports whether a namespace's setting is still to be read. After the first one that is too
    /// low no other is read.
    pub(super) fn has_unchecked_ports(&self) -> bool {
        !self.logged.unguarded && self.pods.values().any(|pod| !pod.ports_checked)
    }

    /// Reads the settings of the namespaces that are old enough.
    pub(super) async fn check_ports(&mut self) {
        if self.logged.unguarded {
            return;
        }
        let settled = self
            .pods
            .values_mut()
            .filter(|pod| !pod.ports_checked && pod.since + SETTLE_TIME <= Instant::now());
        let namespaces: Vec<_> = settled
            .map(|pod| {
                pod.ports_checked = true;
                pod.netns.clone()
            })
            .collect();
        if namespaces.is_empty() {
            return;
        }
        let looking = tokio::task::spawn_blocking(move || {
            namespaces.into_iter().find_map(|netns| {
                // The namespace may be gone.
                let first = netns.run_in(first_unprivileged_port).ok()?;
                (!unprivileged_ports(&POD_ADDRESSES, first).is_empty())
                    .then(|| (netns.path(), first))
            })
        });
        if let Some((path, first)) = looking.await.unwrap_or_default() {
            self.logged.unguarded = true;
            tracing::warn!(
                namespace = %path.display(),
                ip_unprivileged_port_start = first,
                "any user of a pod can bind port 974 while it is free, and answer the pod's other containers; set \
                 `enable_unprivileged_ports = false` in containerd's configuration, or the sysctl \
                 net.ipv4.ip_unprivileged_port_start to 1024 in the pods' securityContext"
            );
        }
    }

    /// Returns the time of the next check.
    pub(super) fn next_ports_check(&self) -> Option<Instant> {
        self.has_unchecked_ports()
            .then(|| Instant::now() + SETTLE_TIME)
    }
}

//! Whether a pod's unprivileged users can bind the endpoint's port in its network namespace.

use std::time::Duration;

use tokio::time::Instant;

use crate::listen::{POD_ADDRESSES, first_unprivileged_port, unprivileged_ports};
use crate::pod_listeners::PodListeners;

/// So long after a namespace is there its setting is what it stays: a runtime makes it with the kernel's default and sets
/// another one with the pod's first container.
const SETTLED: Duration = Duration::from_secs(5);

impl PodListeners {
    /// Whether there is a namespace whose setting was not read yet. After the first that is too low no other is read.
    pub(super) fn has_unseen_ports(&self) -> bool {
        !self.told.unguarded && self.pods.values().any(|pod| !pod.ports_seen)
    }

    /// Reads the settings that are settled now.
    pub(super) async fn look_at_ports(&mut self) {
        if self.told.unguarded {
            return;
        }
        let settled = self
            .pods
            .values_mut()
            .filter(|pod| !pod.ports_seen && pod.since + SETTLED <= Instant::now());
        let places: Vec<_> = settled
            .map(|pod| {
                pod.ports_seen = true;
                pod.place.clone()
            })
            .collect();
        if places.is_empty() {
            return;
        }
        let looking = tokio::task::spawn_blocking(move || {
            places.into_iter().find_map(|place| {
                // It may be gone.
                let first = place.run_in(first_unprivileged_port).ok()?;
                (!unprivileged_ports(&POD_ADDRESSES, first).is_empty())
                    .then(|| (place.path(), first))
            })
        });
        if let Some((path, first)) = looking.await.unwrap_or_default() {
            self.told.unguarded = true;
            tracing::warn!(
                "any user of a pod can take port 974 in the pod's network while it is free, and answer the pod's other containers: \
                 net.ipv4.ip_unprivileged_port_start is {first} in {}, and perhaps in others; set `enable_unprivileged_ports = false` in \
                 containerd's configuration, or that sysctl to 1024 in the pods' securityContext",
                path.display()
            );
        }
    }

    /// When to do so.
    pub(super) fn next_look_at_ports(&self) -> Option<Instant> {
        self.has_unseen_ports().then(|| Instant::now() + SETTLED)
    }
}

//! Serves the metadata address in the namespaces of pods that have opted in.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::time::Instant;

use super::Reconciler;
use crate::listen::{METADATA_ADDRESSES, NetnsRef};
use crate::pod_listeners::handover_protocol::HandoverKey;
use crate::pod_listeners::metadata::{self, MetadataStep, MetadataTarget, Opened};

impl Reconciler {
    /// Returns the time at which [`Reconciler::serve_metadata`] has to be called.
    pub(in crate::pod_listeners) fn metadata_due(&self) -> Option<Instant> {
        self.pods
            .values()
            .filter_map(|pod| pod.metadata.due())
            .min()
    }

    /// Does what is due: finds the pods that have opted in, adds the address there, checks that it
    /// still is where it was added, and adds that of IPv6 where a pod has got IPv6 since.
    /// `received` are the listeners of another instance.
    pub(in crate::pod_listeners) async fn serve_metadata(
        &mut self,
        mut received: HashMap<HandoverKey, Arc<OwnedFd>>,
    ) {
        let now = Instant::now();
        let (mut targets, mut served, mut foreign) = (Vec::new(), Vec::new(), Vec::new());
        for (id, pod) in &mut self.pods {
            let listeners = METADATA_ADDRESSES.into_iter().filter_map(|address| {
                let listener = received.remove(&(*id, address))?;
                Some((address, listener))
            });
            let received: Vec<_> = listeners.collect();
            match pod.metadata.step(now) {
                Some(MetadataStep::Open { is_young }) => targets.push(MetadataTarget {
                    netns: pod.netns.clone(),
                    is_young,
                    served: Vec::new(),
                    received,
                }),
                Some(MetadataStep::Check) => {
                    served.push((pod.netns.clone(), pod.metadata_addresses()));
                }
                // The pod has not opted in.
                None if !received.is_empty() => foreign.push((pod.netns.clone(), received)),
                None => {}
            }
        }
        if !targets.is_empty() {
            self.open_metadata(targets).await;
        }
        if !served.is_empty() {
            self.check_metadata(served).await;
        }
        if !foreign.is_empty() {
            let removing = self.directory.run(&self.log, move || {
                for (netns, received) in foreign {
                    let addresses = received.iter().map(|(address, _)| *address);
                    metadata::remove(&netns, &addresses.collect::<Vec<_>>());
                    drop(received);
                }
            });
            let _ = removing.await;
        }
        self.count_metadata();
    }

    async fn open_metadata(&mut self, targets: Vec<MetadataTarget>) {
        let opening = move || metadata::open_all(targets);
        let opened = self.directory.run(&self.log, opening).await;
        for (netns, opened) in opened.unwrap_or_default() {
            self.record_opened(&netns, opened);
        }
    }

    fn record_opened(&mut self, netns: &NetnsRef, opened: Opened) {
        let Some(pod) = self.pods.get_mut(&netns.id()) else {
            return;
        };
        let path = netns.path();
        let Opened { listeners, missing } = opened;
        let added = pod.add_metadata(listeners, &self.service);
        let served = pod.metadata_addresses();
        match added.err().or(missing) {
            None => {
                pod.metadata.set_served(served);
                tracing::debug!(namespace = %path.display(), "serving 169.254.169.254 in a pod");
            }
            Some((address, obstacle)) => {
                if pod.metadata.set_unserved(&obstacle, served) {
                    self.metadata_log.unserved(&path, address, &obstacle);
                }
            }
        }
    }

    async fn check_metadata(&mut self, served: Vec<(Arc<NetnsRef>, Vec<SocketAddr>)>) {
        let checking = self.directory.run(&self.log, move || {
            let checks = served.into_iter().map(|(netns, addresses)| {
                let checked = metadata::check(&netns, &addresses);
                (netns, checked)
            });
            checks.collect::<Vec<_>>()
        });
        let mut later = Vec::new();
        for (netns, checked) in checking.await.unwrap_or_default() {
            let Some(pod) = self.pods.get_mut(&netns.id()) else {
                continue;
            };
            pod.metadata.set_checked();
            match checked {
                Ok(check) => {
                    if check.was_removed {
                        self.metadata_log.removed(&netns.path());
                    }
                    if check.needs_more && pod.metadata.may_retry() {
                        later.push(MetadataTarget {
                            netns,
                            is_young: false,
                            served: pod.metadata_addresses(),
                            received: Vec::new(),
                        });
                    }
                }
                // The namespace may have ended, which the next scan finds.
                Err(obstacle) => {
                    let path = netns.path();
                    tracing::debug!(?obstacle, namespace = %path.display(), "169.254.169.254 cannot be checked in a pod");
                }
            }
        }
        if !later.is_empty() {
            self.open_metadata(later).await;
        }
    }

    fn count_metadata(&self) {
        let served = self.pods.values().filter(|pod| pod.metadata.is_served());
        let count = i64::try_from(served.count()).unwrap_or(i64::MAX);
        self.metrics.imds_namespaces.set(count);
    }

    /// Leaves the addresses of these listeners to the instance that has them now.
    pub(in crate::pod_listeners) fn leave_metadata(
        &mut self,
        sent: &[(HandoverKey, Arc<OwnedFd>)],
    ) {
        for ((id, _), _) in sent {
            if let Some(pod) = self.pods.get_mut(id) {
                pod.leave_metadata(sent);
            }
        }
    }

    /// Removes the addresses that this instance serves. Those of the pods themselves stay.
    pub(super) async fn remove_metadata(&mut self) {
        let served = self.pods.values().filter(|pod| pod.metadata.is_served());
        let served = served.map(|pod| (pod.netns(), pod.metadata.addresses().to_vec()));
        let served: Vec<_> = served.collect();
        if served.is_empty() {
            return;
        }
        let count = served.len();
        let removing = self.directory.run(&self.log, move || {
            for (netns, addresses) in served {
                metadata::remove(&netns, &addresses);
            }
        });
        if removing.await.is_some() {
            tracing::info!(namespaces = count, "removed 169.254.169.254 from pods");
        }
    }
}

//! One connection, from its socket to the answer.

use std::pin::pin;
use std::sync::Arc;

use crate::attest::{Attestation, Peer, PodAttestor, Rejection};
use crate::caller::{AttestError, ListenerKind, PeerFacts, WorkloadKey};
use crate::http::CredentialEndpoint;
use crate::http::connection_bounds::{ConnectionBounds, DropReason};
use crate::http::error_response::RequestError;
use crate::http::request_validation::HostRule;
use crate::imds::is_metadata;
use crate::limits::FairPermit;
use crate::listen::{AcceptedStream, LazySocket, PendingConnection, is_metadata_address};
use crate::netns::NamespaceId;
use crate::telemetry::{RequestId, RequestScope};

/// The facts about a request that are known before its peer.
#[derive(Clone, Copy)]
pub(super) struct RequestOrigin {
    pub(super) id: RequestId,
    pub(super) listener: ListenerKind,
    /// The way in which the listener serves metadata, if it does.
    metadata: Option<MetadataListener>,
}

/// The way in which a listener serves the instance metadata service.
#[derive(Debug, Clone, Copy)]
pub(super) struct MetadataListener {
    /// The network namespace of its metadata tokens.
    pub(super) netns: NamespaceId,
    pub(super) host_rule: HostRule,
}

impl RequestOrigin {
    /// Returns the way in which the path is served as metadata, or `None` if it belongs to the
    /// container credential endpoint. At the metadata address nothing belongs to that.
    pub(super) fn metadata(&self, path: &str) -> Option<MetadataListener> {
        self.metadata
            .filter(|listener| listener.host_rule == HostRule::Metadata || is_metadata(path))
    }

    /// Returns what each line of the log about this request contains.
    fn scope(self, peer: Option<&PeerFacts>) -> RequestScope {
        let pod = peer.and_then(|peer| peer.pod.as_ref());
        RequestScope {
            id: self.id,
            listener: self.listener,
            uid: peer.map(|peer| peer.uid),
            pod: pod.map(|pod| pod.uid.clone()),
        }
    }
}

impl CredentialEndpoint {
    /// Serves one connection to its end. `pod` is `None` for a listener of the host.
    ///
    /// The order of the steps matters. Nothing is read from the connection before the peer has a
    /// permit, and nothing that the peer controls can block this thread.
    pub async fn serve_connection(
        self: Arc<Self>,
        stream: AcceptedStream,
        pending: PendingConnection,
        pod: Option<Arc<PodAttestor>>,
    ) {
        let id = self.audit.next_request();
        let origin = RequestOrigin {
            id,
            listener: listener_kind(&stream, pod.as_deref()),
            metadata: self.metadata_listener(&stream, pod.as_deref()),
        };
        let descriptor = stream.socket().descriptor().clone();
        let bounds = ConnectionBounds::new(descriptor, pod.clone(), &self.metrics, pending.open);
        let admission = async {
            // 1. The facts of the peer by its socket, or the reason why they are not known.
            let peer = self
                .attestor
                .read_peer(&stream, pod.as_ref(), pending.permit)
                .await;
            // 2. A permit of its workload. Peers that are rejected are read and answered too, so
            // they need a permit as well.
            let workload = peer
                .as_ref()
                .map_or_else(Rejection::workload_key, Peer::workload_key);
            let permit = self.connections.try_acquire_evicting(&workload)?;
            // 3. The facts of its process that the policy needs, and the first step of the
            // attestation.
            let attestation = peer.and_then(|peer| {
                let facts_needed = self.service.facts_needed(peer.facts());
                peer.begin_attestation(facts_needed)
            });
            Ok((attestation, permit))
        };
        let admitted = origin.scope(None).run(bounds.run(pin!(admission))).await;
        let Some((attestation, permit)) = admitted else {
            return;
        };
        let scope = origin.scope(peer_facts(&attestation));
        let may_wait = attestation.as_ref().is_ok_and(Attestation::may_wait);
        let stream = stream.into_socket();
        // 4. The rest of the attestation, the request, and the answer. Reads of a process may block
        // for as long as the caller likes (T25). So a connection that needs them moves to a lookup
        // thread, and the caller is answered from here if that thread does not return in time.
        if !may_wait {
            let served = self.attest_and_answer(stream, origin, attestation, permit);
            scope.run(bounds.run(pin!(served))).await;
            return;
        }
        let (workload, lookups) = (permit.key().clone(), self.attestor.lookup_threads().clone());
        let on_abandon = bounds.on_abandon(move || {
            RequestError::Caller(AttestError::ProcessUnresponsive).raw_response(id)
        });
        let served = scope.run(async move {
            let served = self.attest_and_answer(stream, origin, attestation, permit);
            bounds.run(pin!(served)).await;
        });
        lookups.spawn(workload, served, on_abandon);
    }

    fn metadata_listener(
        &self,
        stream: &AcceptedStream,
        pod: Option<&PodAttestor>,
    ) -> Option<MetadataListener> {
        let (AcceptedStream::Tcp { server, .. }, Some(imds)) = (stream, &self.imds) else {
            return None;
        };
        Some(MetadataListener {
            netns: pod.map_or(imds.netns, PodAttestor::netns),
            host_rule: match is_metadata_address(*server) {
                true => HostRule::Metadata,
                false => HostRule::Loopback,
            },
        })
    }

    /// Finishes the attestation and then serves the request, until the connection ends or gives way
    /// to another.
    async fn attest_and_answer(
        &self,
        stream: LazySocket,
        origin: RequestOrigin,
        attestation: Result<Attestation, Rejection>,
        permit: FairPermit<WorkloadKey>,
    ) -> Result<(), DropReason> {
        let served = pin!(async {
            let caller = match attestation {
                Ok(attestation) => attestation.finish().await,
                Err(rejection) => Err(rejection),
            };
            self.serve_request(stream, origin, caller, &permit).await
        });
        permit.run(served).await.unwrap_or(Err(DropReason::Evicted))
    }
}

fn listener_kind(stream: &AcceptedStream, pod: Option<&PodAttestor>) -> ListenerKind {
    match (stream, pod) {
        (AcceptedStream::Unix(_), _) => ListenerKind::Unix,
        (AcceptedStream::Tcp { .. }, None) => ListenerKind::Tcp,
        (AcceptedStream::Tcp { .. }, Some(_)) => ListenerKind::Pod,
    }
}

fn peer_facts(attestation: &Result<Attestation, Rejection>) -> Option<&PeerFacts> {
    match attestation {
        Ok(attestation) => Some(attestation.peer_facts()),
        Err(rejection) => rejection.peer.as_ref(),
    }
}

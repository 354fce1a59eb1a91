//! The container credential endpoint: one connection, one request, one answer.
//!
//! hyper parses the request. Each rejection has a reason of its own, which is counted, and audited
//! once the head is complete.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Notify;

use crate::attest::{Attestor, PodAttestor, Unattested};
use crate::audit::{self, Audit, CacheResult, Outcome, Record};
use crate::cache::{CachedBody, CachedCredentials};
use crate::caller::{AttestError, Caller, ListenerKind, PeerFacts, ProcessFacts, WorkloadKey};
use crate::credential_service::CredentialService;
use crate::limits::{FairPermit, FairSemaphore};
use crate::listen::{AcceptedStream, LazySocket, PendingConnection, PendingPermit};
use crate::metrics::Metrics;
use crate::telemetry::{RequestId, RequestScope};

mod connection_bounds;
mod error_response;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod guarded_stream;
mod kernel_failures;
mod own_probe;
mod request_validation;

pub use kernel_failures::KernelFailures;
pub use own_probe::OwnProbe;
pub use request_validation::{Authorization, RequestHead};

use connection_bounds::{ConnectionBounds, DropReason};
use error_response::RequestError;
use guarded_stream::{GuardedStream, ResponseState};

/// The longest time for a complete head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// The largest head in bytes. SDKs send less than 2 kB.
const MAX_HEAD_BYTES: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;

/// The endpoint that serves the connections of all listeners.
#[derive(Debug)]
pub struct CredentialEndpoint {
    /// Attests the caller of a connection.
    pub attestor: Arc<Attestor>,
    /// Selects the role, and returns the credentials.
    pub service: Arc<CredentialService>,
    /// The destination of a record for each request.
    pub audit: Arc<Audit>,
    /// The metrics of connections and requests.
    pub metrics: Metrics,
    /// The header that callers over TCP have to send.
    pub authorization: Authorization,
    /// Is notified when a request over TCP lacks the header, or has another token.
    pub token_needed: Arc<Notify>,
    /// The mark of the daemon's own requests.
    pub own_probe: OwnProbe,
    /// The limit of connections, in total and for each workload.
    pub connections: FairSemaphore<WorkloadKey>,
    /// The log of queries to the kernel that failed.
    pub kernel_failures: KernelFailures,
}

type HttpResponse = Response<Full<Bytes>>;

/// The facts about a request that are known before its peer is attested.
#[derive(Clone, Copy)]
struct RequestOrigin {
    id: RequestId,
    listener: ListenerKind,
}

/// A connection that counts among those of its workload.
struct AdmittedConnection {
    peer: Result<Caller, Unattested>,
    /// The facts of the caller's process that the rules need; `None` if they need none.
    facts_needed: Option<ProcessFacts>,
    permit: FairPermit<WorkloadKey>,
}

impl AdmittedConnection {
    fn may_wait(&self) -> bool {
        matches!((&self.peer, self.facts_needed), (Ok(caller), Some(facts)) if caller.may_wait(facts))
    }

    /// Returns what each line of the log about this connection contains.
    fn scope(&self, RequestOrigin { id, listener }: RequestOrigin) -> RequestScope {
        let (uid, pod) = match &self.peer {
            Ok(caller) => (Some(caller.uid), caller.pod.as_ref()),
            Err(Unattested {
                peer: Some(peer), ..
            }) => (Some(peer.uid), peer.pod.as_ref()),
            Err(Unattested { peer: None, .. }) => (None, None),
        };
        RequestScope {
            id,
            listener,
            uid,
            pod: pod.map(|pod| pod.uid.clone()),
        }
    }
}

impl CredentialEndpoint {
    /// Serves one connection to its end. `pod` is `None` for a listener of the host.
    pub async fn serve_connection(
        self: Arc<Self>,
        stream: AcceptedStream,
        pending: PendingConnection,
        pod: Option<Arc<PodAttestor>>,
    ) {
        let listener = match (&stream, &pod) {
            (AcceptedStream::Unix(_), _) => ListenerKind::Unix,
            (AcceptedStream::Tcp { .. }, None) => ListenerKind::Tcp,
            (AcceptedStream::Tcp { .. }, Some(_)) => ListenerKind::Pod,
        };
        let PendingConnection {
            permit: pending_permit,
            open,
        } = pending;
        let id = self.audit.next_request();
        let descriptor = stream.socket().descriptor().clone();
        let origin = RequestOrigin { id, listener };
        let life = ConnectionBounds::new(descriptor, pod.clone(), &self.metrics, open);
        let unattested = RequestScope {
            id,
            listener,
            uid: None,
            pod: None,
        };
        let admitted = unattested
            .run(life.run(pin!(self.admit(&stream, pending_permit, pod.as_deref()))))
            .await;
        let Some(admitted) = admitted else {
            return;
        };
        let scope = admitted.scope(origin);
        if !admitted.may_wait() {
            let served = self.serve_admitted(stream.into_socket(), origin, admitted);
            scope.run(life.run(pin!(served))).await;
            return;
        }
        let (workload, lookups) = (
            admitted.permit.key().clone(),
            self.attestor.lookup_threads().clone(),
        );
        let give_up = life.give_up(move || {
            RequestError::Caller(AttestError::ProcessUnresponsive).raw_response(id)
        });
        let served = scope.run(async move {
            let served = self.serve_admitted(stream.into_socket(), origin, admitted);
            life.run(pin!(served)).await;
        });
        lookups.spawn(workload, served, give_up);
    }

    /// Attests the peer by its socket, and acquires a permit for its workload. Nothing is read from
    /// the connection before.
    async fn admit(
        &self,
        stream: &AcceptedStream,
        pending_permit: PendingPermit,
        pod: Option<&PodAttestor>,
    ) -> Result<AdmittedConnection, DropReason> {
        let peer = self.attest_socket(stream, pending_permit, pod).await;
        // Peers that are not attested are read and answered too, so they need a permit as well.
        let workload = peer
            .as_ref()
            .map_or_else(Unattested::workload_key, WorkloadKey::of);
        let permit = self.connections.try_acquire_evicting(&workload)?;
        let facts_needed = peer
            .as_ref()
            .ok()
            .and_then(|caller| caller.facts_to_read(self.service.facts_needed(caller)));
        Ok(AdmittedConnection {
            peer,
            facts_needed,
            permit,
        })
    }

    /// Reads the caller's process if the rules need it, and then serves the request, until the
    /// connection ends or gives way to another.
    async fn serve_admitted(
        &self,
        stream: LazySocket,
        origin: RequestOrigin,
        admitted: AdmittedConnection,
    ) -> Result<(), DropReason> {
        let AdmittedConnection {
            peer,
            facts_needed,
            permit,
        } = admitted;
        let served = async {
            let caller = match (peer, facts_needed) {
                (Ok(caller), Some(facts)) => {
                    let seen = PeerFacts::of(&caller);
                    let caller = caller.with_process(facts).await;
                    caller.map_err(|refusal| Unattested {
                        refusal,
                        peer: Some(seen),
                    })
                }
                (peer, _) => peer,
            };
            self.serve_request(stream, origin, caller, &permit).await
        };
        let served = pin!(served);
        permit.run(served).await.unwrap_or(Err(DropReason::Evicted))
    }

    /// Attests the peer by its socket alone.
    async fn attest_socket(
        &self,
        stream: &AcceptedStream,
        pending_permit: PendingPermit,
        pod: Option<&PodAttestor>,
    ) -> Result<Caller, Unattested> {
        let on_wait = || drop(pending_permit);
        match (stream, pod) {
            (AcceptedStream::Unix(stream), _) => self.attestor.unix(stream).await,
            (AcceptedStream::Tcp { client, server, .. }, None) => {
                self.attestor.tcp(*client, *server, on_wait).await
            }
            (AcceptedStream::Tcp { client, server, .. }, Some(pod)) => {
                pod.tcp(*client, *server, on_wait).await
            }
        }
    }

    /// Reads one request and answers it. Rejected callers get an answer too, so that their SDK
    /// shows the reason.
    async fn serve_request(
        &self,
        stream: LazySocket,
        origin: RequestOrigin,
        caller: Result<Caller, Unattested>,
        permit: &FairPermit<WorkloadKey>,
    ) -> Result<(), DropReason> {
        let caller = caller.map(Arc::new);
        let (state, has_body) = (ResponseState::default(), AtomicBool::new(false));
        let service = service_fn(|request: Request<Incoming>| {
            state.answering();
            permit.set_in_use();
            has_body.store(request_validation::has_body(&request), Ordering::Relaxed);
            let (caller, state) = (caller.clone(), &state);
            async move {
                let answer = state
                    .waiting(pin!(self.answer(&request, origin, caller)))
                    .await;
                Ok::<_, Infallible>(answer)
            }
        });
        let mut wire = GuardedStream::new(stream, origin.listener != ListenerKind::Unix, &state);
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .keep_alive(false)
            .max_buf_size(MAX_HEAD_BYTES)
            .max_header_size(MAX_HEAD_BYTES)
            .max_headers(MAX_HEADERS)
            .serve_connection(TokioIo::new(&mut wire), service)
            .await;
        let refused = match served {
            Ok(()) if state.is_answering() => {
                if has_body.load(Ordering::Relaxed) {
                    wire.drain_input().await;
                }
                return Ok(());
            }
            _ if wire.saw_bare_lf() => RequestError::Malformed,
            Err(error) if error.is_timeout() => return Err(DropReason::SlowHead),
            Err(error) if error.is_parse_too_large() => RequestError::HeadTooLarge,
            Err(error) if error.is_parse() => RequestError::Malformed,
            Ok(()) | Err(_) => return Err(DropReason::Closed),
        };
        tracing::debug!(reason = refused.reason(), "head rejected");
        // A client that is gone by now gets no answer.
        let _ = wire.write_raw(&refused.raw_response(origin.id)).await;
        wire.drain_input().await;
        Err(DropReason::BadRequest)
    }

    /// Answers one request, and records it. hyper drops this future if the client closes the
    /// connection; the record is then `aborted`.
    async fn answer(
        &self,
        request: &Request<Incoming>,
        RequestOrigin { id, listener }: RequestOrigin,
        caller: Result<Arc<Caller>, Unattested>,
    ) -> HttpResponse {
        let mut record = self
            .audit
            .begin(id, listener, caller.as_ref().ok().cloned());
        let caller = caller.map_err(|Unattested { refusal, peer }| {
            record.set_peer(peer);
            refusal
        });
        if self.own_probe.sent(request.uri().path(), request.headers()) {
            record.mark_own_probe();
        }
        match self.issue(request, listener, caller, &mut record).await {
            Ok((issued, cache_result)) => {
                let fields = audit::IssuedFields {
                    access_key_id: &issued.access_key_id,
                    expiration: issued.expiration,
                    cache_result,
                };
                match record.finish(Outcome::Issued, "ok", Some(fields)).await {
                    true => json_response(200, Bytes::from_owner(SharedBody(issued.body.clone()))),
                    false => error_response(&RequestError::NotAudited, id),
                }
            }
            Err(refused) => {
                self.kernel_failures.log(&refused);
                let outcome = refused.outcome();
                record.finish(outcome, refused.reason(), None).await;
                error_response(&refused, id)
            }
        }
    }

    async fn issue(
        &self,
        request: &Request<Incoming>,
        listener: ListenerKind,
        caller: Result<Arc<Caller>, AttestError>,
        record: &mut Record,
    ) -> Result<(Arc<CachedCredentials>, CacheResult), RequestError> {
        let caller = caller.map_err(RequestError::Caller)?;
        let head = RequestHead::of(request);
        let requested = request_validation::validate(&head, listener, &self.authorization)
            .inspect_err(|error| {
                if matches!(
                    error,
                    RequestError::NoAuthorization | RequestError::WrongToken
                ) {
                    self.token_needed.notify_one();
                }
            })?;
        let (issued, cache_result) = self
            .service
            .credentials_for(&caller, &requested, record)
            .await
            .map_err(|error| {
                record.set_requested_role(&requested);
                RequestError::from_service(error, &caller, &requested)
            })?;
        if cache_result == CacheResult::Stale {
            tracing::debug!("answered from credentials that are due for a refresh");
        }
        Ok((issued, cache_result))
    }
}

/// Returns the outcome and the reason of each way in which a request ends without credentials.
pub fn request_failures() -> BTreeSet<(&'static str, &'static str)> {
    let samples = RequestError::samples().into_iter();
    samples
        .map(|error| (error.outcome().name(), error.reason()))
        .collect()
}

/// Returns the reasons for which a connection of a workload ends without an answer.
pub fn drop_reasons() -> impl Iterator<Item = &'static str> {
    DropReason::ALL.into_iter().map(DropReason::reason)
}

/// A cached body that hyper writes without a copy of the secrets.
struct SharedBody(CachedBody);

impl AsRef<[u8]> for SharedBody {
    fn as_ref(&self) -> &[u8] {
        &self.0.0
    }
}

fn error_response(refused: &RequestError, id: RequestId) -> HttpResponse {
    let mut response = json_response(refused.status(), Bytes::from(refused.body(id)));
    if let Some(seconds) = refused.retry_after() {
        response
            .headers_mut()
            .insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    if let Some(methods) = refused.allow() {
        response
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static(methods));
    }
    response
}

/// Returns an answer with `Connection: close`: one connection is one attestation, and one SDK never
/// closes its own.
fn json_response(status: u16, body: Bytes) -> HttpResponse {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() =
        hyper::StatusCode::from_u16(status).unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

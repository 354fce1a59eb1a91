//! One request, from its head to the answer.

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

use crate::attest::Rejection;
use crate::audit::{self, CacheResult, Outcome, Record, RequestPeer};
use crate::cache::CachedCredentials;
use crate::caller::{Caller, ListenerKind, WorkloadKey};
use crate::credentials::RenderedBody;
use crate::http::connection::RequestOrigin;
use crate::http::connection_bounds::DropReason;
use crate::http::error_response::RequestError;
use crate::http::guarded_stream::{GuardedStream, ResponseState};
use crate::http::{CredentialEndpoint, RequestHead, request_validation};
use crate::limits::FairPermit;
use crate::listen::LazySocket;
use crate::protocol::Protocol;
use crate::telemetry::RequestId;

/// The longest time for a complete head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// The largest head in bytes. SDKs send less than 2 kB.
const MAX_HEAD_BYTES: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;

pub(super) type HttpResponse = Response<Full<Bytes>>;

impl CredentialEndpoint {
    /// Reads one request and answers it. Rejected callers get an answer too, so that their SDK
    /// shows the reason.
    pub(super) async fn serve_request(
        &self,
        stream: LazySocket,
        origin: RequestOrigin,
        caller: Result<Caller, Rejection>,
        permit: &FairPermit<WorkloadKey>,
    ) -> Result<(), DropReason> {
        let caller = caller.map(Arc::new);
        let (state, has_body) = (ResponseState::default(), AtomicBool::new(false));
        let service = service_fn(|request: Request<Incoming>| {
            state.set_answering();
            permit.set_in_use();
            has_body.store(request_validation::has_body(&request), Ordering::Relaxed);
            let (caller, state) = (caller.clone(), &state);
            async move {
                let answer = state
                    .wait_for(pin!(self.answer(&request, origin, caller)))
                    .await;
                Ok::<_, Infallible>(answer)
            }
        });
        let mut guarded = GuardedStream::new(stream, origin.listener != ListenerKind::Unix, &state);
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .keep_alive(false)
            .max_buf_size(MAX_HEAD_BYTES)
            .max_header_size(MAX_HEAD_BYTES)
            .max_headers(MAX_HEADERS)
            .serve_connection(TokioIo::new(&mut guarded), service)
            .await;
        let error = match served {
            Ok(()) if state.is_answering() => {
                if has_body.load(Ordering::Relaxed) {
                    guarded.drain_input().await;
                }
                return Ok(());
            }
            _ if guarded.saw_bare_lf() => RequestError::Malformed,
            Err(error) if error.is_timeout() => return Err(DropReason::SlowHead),
            Err(error) if error.is_parse_too_large() => RequestError::HeadTooLarge,
            Err(error) if error.is_parse() => RequestError::Malformed,
            Ok(()) | Err(_) => return Err(DropReason::Closed),
        };
        tracing::debug!(reason = error.reason(), "head rejected");
        // A client that is gone by now gets no answer.
        let _ = guarded.write_raw(&error.raw_response(origin.id)).await;
        guarded.drain_input().await;
        Err(DropReason::BadRequest)
    }

    /// Answers one request, and records it. hyper drops this future if the client closes the
    /// connection; the record is then `aborted`.
    async fn answer(
        &self,
        request: &Request<Incoming>,
        origin: RequestOrigin,
        caller: Result<Arc<Caller>, Rejection>,
    ) -> HttpResponse {
        let peer = match &caller {
            Ok(caller) => RequestPeer::Attested(caller.clone()),
            Err(rejection) => RequestPeer::Rejected(rejection.peer.clone()),
        };
        let RequestOrigin { id, listener, .. } = origin;
        if let (Some(imds), Some(at)) = (&self.imds, origin.metadata(request.uri().path())) {
            let record = self.audit.begin(id, (listener, Protocol::Imds), peer);
            // On the heap, so that the other requests are no larger for it.
            let answer = self.answer_metadata((imds, at), request, (id, caller), record);
            return Box::pin(answer).await;
        }
        let mut record = self.audit.begin(id, (listener, Protocol::Container), peer);
        if self.own_probe.sent(request.uri().path(), request.headers()) {
            record.mark_own_probe();
        }
        match self
            .issue(request, listener, caller.as_ref(), &mut record)
            .await
        {
            Ok((issued, cache_result)) => {
                let fields = audit::IssuedFields {
                    access_key_id: &issued.access_key_id,
                    first_session_name: issued.first_session_name(),
                    expiration: issued.expiration,
                    cache_result,
                };
                match record.finish(Outcome::Issued, "ok", Some(fields)).await {
                    true => json_response(200, Bytes::from_owner(SharedBody(issued.body.clone()))),
                    false => error_response(&RequestError::NotAudited, id),
                }
            }
            Err(error) => {
                self.kernel_failures.log(&error);
                record.finish(error.outcome(), error.reason(), None).await;
                error_response(&error, id)
            }
        }
    }

    /// Validates the request and returns the credentials. `record` gets the facts of the decision.
    /// [`Self::answer`] finishes it, also after an error.
    async fn issue(
        &self,
        request: &Request<Incoming>,
        listener: ListenerKind,
        caller: Result<&Arc<Caller>, &Rejection>,
        record: &mut Record,
    ) -> Result<(Arc<CachedCredentials>, CacheResult), RequestError> {
        let caller = caller.map_err(|rejection| RequestError::Caller(rejection.error.clone()))?;
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
            .credentials_for(caller, &requested, record)
            .await
            .map_err(|error| {
                record.set_requested_role(&requested);
                RequestError::from_service(error, caller, &requested)
            })?;
        if cache_result == CacheResult::Stale {
            tracing::debug!("answered from credentials that are due for a refresh");
        }
        Ok((issued, cache_result))
    }
}

/// A cached body that hyper writes without a copy of the secrets.
struct SharedBody(Arc<RenderedBody>);

impl AsRef<[u8]> for SharedBody {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

fn error_response(error: &RequestError, id: RequestId) -> HttpResponse {
    let mut response = json_response(error.status(), Bytes::from(error.body(id)));
    set_retry_after(&mut response, error);
    if let Some(methods) = error.allow() {
        response
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static(methods));
    }
    response
}

/// Sets the time after which the SDK may retry, if that is useful.
pub(super) fn set_retry_after(response: &mut HttpResponse, error: &RequestError) {
    if let Some(seconds) = error.retry_after() {
        response
            .headers_mut()
            .insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
}

/// Returns an answer in JSON.
fn json_response(status: u16, body: Bytes) -> HttpResponse {
    response(status, "application/json", body)
}

/// Returns an answer with `Connection: close`: one connection is one attestation, and one SDK never
/// closes its own.
pub(super) fn response(status: u16, content_type: &'static str, body: Bytes) -> HttpResponse {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() =
        hyper::StatusCode::from_u16(status).unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

//! The front: one connection, one request, one answer, in the contract of the container credential endpoint.
//!
//! hyper parses. Everything that is refused here has its own reason, which is counted, and audited if a head arrived.

use std::convert::Infallible;
use std::os::fd::AsFd;
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
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use crate::attest::{Attestor, PodAttestor};
use crate::audit::{self, Audit, Freshness, Outcome, Record};
use crate::broker::Broker;
use crate::cache::{Body, Issued};
use crate::caller::{Caller, Listener, Owner, Refusal, Stranger};
use crate::listen::{Arrival, CONNECTION_LIFE, Place, Shares, Socket, Stream};
use crate::metrics::{Metrics, Reason};

mod answer;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod rules;
mod wire;

pub use rules::{Asked, Authorization};

use answer::Refused;
use wire::{Stage, Wire};

/// A head that is not complete after this is given up.
const HEAD: Duration = Duration::from_secs(5);
/// The largest head. SDKs send well under 2 kB.
const HEAD_BYTES: usize = 16 * 1024;
const HEADERS: usize = 64;

/// Serves connections of all listeners.
#[derive(Debug)]
pub struct Front {
    /// Who asks.
    pub attestor: Attestor,
    /// What they get.
    pub broker: Arc<Broker>,
    /// Who got what.
    pub audit: Arc<Audit>,
    /// Counts.
    pub metrics: Metrics,
    /// What TCP callers have to show.
    pub authorization: Authorization,
    /// How many connections each workload may have.
    pub shares: Shares,
}

type Answer = Response<Full<Bytes>>;

/// Why a connection ended without a request.
#[derive(Debug, Clone, Copy)]
enum Dropped {
    /// Its workload has too many.
    OverShare,
    /// All together have too many.
    TooMany,
    /// The head did not come in time.
    SlowHead,
    /// What came is no head of HTTP/1, or too long a one.
    BadRequest,
    /// The client went away.
    Closed,
    /// The whole connection took too long.
    TooSlow,
}

impl Dropped {
    fn reason(self) -> &'static str {
        match self {
            Self::OverShare => "too_many_of_one",
            Self::TooMany => "too_many",
            Self::SlowHead => "slow_head",
            Self::BadRequest => "bad_request",
            Self::Closed => "closed",
            Self::TooSlow => "too_slow",
        }
    }
}

/// Why somebody was not attested, and what his socket had told by then.
type Unknown = (Refusal, Option<Stranger>);

impl Front {
    /// Serves one connection to its end, to a listener of the host's or in a pod's network namespace. The caller is attested
    /// before a byte is read.
    pub async fn connection(self: Arc<Self>, stream: Stream, arrival: Arrival, pod: Option<Arc<PodAttestor>>) {
        let served = timeout(CONNECTION_LIFE, self.attest_and_serve(stream, arrival, pod.as_deref())).await;
        if let Err(dropped) = served.unwrap_or(Err(Dropped::TooSlow)) {
            self.metrics.connections_dropped.get_or_create(&Reason { reason: dropped.reason() }).inc();
        }
    }

    async fn attest_and_serve(
        &self,
        stream: Stream,
        arrival: Arrival,
        pod: Option<&PodAttestor>,
    ) -> Result<(), Dropped> {
        let (mut arrival, mut places) = (Some(arrival), Err(Dropped::TooMany));
        let mut seen = None;
        // Before a byte is read, and over TCP before a process is searched for.
        let mut admit = |owner| {
            if let Some(arrival) = arrival.take() {
                places = self.admit(owner, arrival);
            }
            places.is_ok()
        };
        let (listener, caller) = match &stream {
            Stream::Unix(stream) => (Listener::Unix, self.attestor.unix(stream.as_fd())),
            Stream::Tcp { client, server, .. } => {
                let admit = |caller: &Caller| {
                    seen = Some(Stranger::of(caller));
                    admit(Owner::of(caller))
                };
                match pod {
                    None => (Listener::Tcp, self.attestor.tcp(*client, *server, admit).await),
                    Some(pod) => (Listener::Pod, pod.tcp(*client, *server, admit).await),
                }
            }
        };
        // Those who are not attested are read and answered, too, so they have a share as well.
        admit(caller.as_ref().map_or_else(|_| Owner::unknown(), Owner::of));
        let caller = caller.map_err(|refusal| (refusal, seen));
        let _places = match places {
            Ok(places) => places,
            Err(dropped) => {
                stream.reset();
                return Err(dropped);
            }
        };
        let (Stream::Unix(stream) | Stream::Tcp { stream, .. }) = stream;
        self.request(stream, listener, caller).await
    }

    /// A place among the connections of one workload, and one among all.
    fn admit(&self, owner: Owner, arrival: Arrival) -> Result<(Place, OwnedSemaphorePermit), Dropped> {
        let place = self.shares.enter(owner).ok_or(Dropped::OverShare)?;
        Ok((place, arrival.admit().ok_or(Dropped::TooMany)?))
    }

    /// Reads one request and answers it. A refused caller is still read and answered, so that its SDK shows why.
    async fn request(
        &self,
        stream: Socket,
        listener: Listener,
        caller: Result<Caller, Unknown>,
    ) -> Result<(), Dropped> {
        let caller = caller.map(Arc::new);
        let (stage, more_comes) = (Stage::default(), AtomicBool::new(false));
        let service = service_fn(|request: Request<Incoming>| {
            stage.answering();
            more_comes.store(rules::has_body(&request), Ordering::Relaxed);
            let (caller, stage) = (caller.clone(), &stage);
            async move {
                let answer = stage.waiting(pin!(self.answer(&request, listener, caller))).await;
                Ok::<_, Infallible>(answer)
            }
        });
        let mut wire = Wire::new(stream, listener != Listener::Unix, &stage);
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD)
            .keep_alive(false)
            .max_buf_size(HEAD_BYTES)
            .max_header_size(HEAD_BYTES)
            .max_headers(HEADERS)
            .serve_connection(TokioIo::new(&mut wire), service)
            .await;
        let refused = match served {
            Ok(()) if stage.is_answering() => {
                if more_comes.load(Ordering::Relaxed) {
                    wire.discard().await;
                }
                return Ok(());
            }
            _ if wire.line_feed_alone() => Refused::Malformed,
            Err(error) if error.is_timeout() => return Err(Dropped::SlowHead),
            Err(error) if error.is_parse_too_large() => Refused::HeadTooLarge,
            Err(error) if error.is_parse() => Refused::Malformed,
            Ok(()) | Err(_) => return Err(Dropped::Closed),
        };
        // A client that is gone by now is no further concern.
        let _ = wire.say(&refused.bare_answer()).await;
        wire.discard().await;
        Err(Dropped::BadRequest)
    }

    /// Opens the audit record, decides, closes it. If the client goes away hyper drops this future, and the record says so.
    async fn answer(
        &self,
        request: &Request<Incoming>,
        listener: Listener,
        caller: Result<Arc<Caller>, Unknown>,
    ) -> Answer {
        let mut record = self.audit.begin(listener, caller.as_ref().ok().cloned());
        if let Err((refusal, seen)) = &caller {
            record.refused(refusal, seen.as_ref());
        }
        let caller = caller.map_err(|(refusal, _)| refusal);
        let id = record.request_id();
        match self.decide(request, listener, caller, &mut record).await {
            Ok((issued, freshness)) => {
                let said =
                    audit::Issued { access_key_id: &issued.access_key_id, expiration: issued.expiration, freshness };
                match record.finish(Outcome::Issued, "ok", Some(said)).await {
                    true => respond(200, Bytes::from_owner(SharedBody(issued.body.clone()))),
                    false => refuse(&Refused::NotAudited, id),
                }
            }
            Err(refused) => {
                record.finish(refused.outcome(), refused.reason(), None).await;
                refuse(&refused, id)
            }
        }
    }

    async fn decide(
        &self,
        request: &Request<Incoming>,
        listener: Listener,
        caller: Result<Arc<Caller>, Refusal>,
        record: &mut Record,
    ) -> Result<(Arc<Issued>, Freshness), Refused> {
        let caller = caller.map_err(Refused::Caller)?;
        let wanted = rules::read(&Asked::of(request), listener, &self.authorization)?;
        let (issued, freshness) =
            self.broker.serve(&caller, &wanted, record).await.map_err(|error| Refused::broker(error, &caller))?;
        if freshness == Freshness::Stale {
            tracing::debug!("answered from credentials that are due for a refresh");
        }
        Ok((issued, freshness))
    }
}

/// Lets hyper write the cached body without a copy of the secrets.
struct SharedBody(Body);

impl AsRef<[u8]> for SharedBody {
    fn as_ref(&self) -> &[u8] {
        &self.0.0
    }
}

fn refuse(refused: &Refused, id: audit::RequestId) -> Answer {
    let mut response = respond(refused.status(), Bytes::from(refused.body(Some(id))));
    if let Some(seconds) = refused.retry_after() {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    if let Some(methods) = refused.allow() {
        response.headers_mut().insert(ALLOW, HeaderValue::from_static(methods));
    }
    response
}

/// `Connection: close` on every answer: one connection is one attestation, and one SDK never closes its own.
fn respond(status: u16, body: Bytes) -> Answer {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = hyper::StatusCode::from_u16(status).unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

//! The front: one connection, one request, one answer, in the contract of the container credential endpoint.
//!
//! hyper parses. Everything that is refused here has its own reason, which is counted and audited.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use crate::attest::Attestor;
use crate::audit::{Audit, Freshness, Issued, Outcome, Record};
use crate::broker::Broker;
use crate::cache::Body;
use crate::caller::{Caller, Listener, Refusal};
use crate::listen::{CONNECTION_LIFE, Shares, Stream};
use crate::metrics::{Metrics, Reason};

mod answer;
mod rules;

pub use rules::{Asked, Authorization};

use answer::Refused;

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

/// Why a connection ended without an answer.
enum Dropped {
    /// Its workload has too many.
    OverShare,
    /// hyper gave it up.
    Http(hyper::Error),
}

impl From<hyper::Error> for Dropped {
    fn from(error: hyper::Error) -> Self {
        Self::Http(error)
    }
}

impl Front {
    /// Serves one connection to its end. The caller is attested before a byte is read.
    pub async fn connection(self: Arc<Self>, stream: Stream) {
        let served = timeout(CONNECTION_LIFE, self.attest_and_serve(stream)).await;
        let dropped = match served {
            Ok(Ok(())) => return,
            Ok(Err(Dropped::OverShare)) => "too_many_of_one",
            Ok(Err(Dropped::Http(error))) if error.is_timeout() => "slow_head",
            Ok(Err(Dropped::Http(error))) if error.is_parse() => "bad_request",
            Ok(Err(Dropped::Http(_))) => "closed",
            Err(_) => "too_slow",
        };
        self.metrics.connections_dropped.get_or_create(&Reason { reason: dropped }).inc();
    }

    async fn attest_and_serve(&self, stream: Stream) -> Result<(), Dropped> {
        let (listener, caller) = match &stream {
            Stream::Unix(stream) => (Listener::Unix, self.attestor.unix(stream)),
            Stream::Tcp { client, server, .. } => (Listener::Tcp, self.attestor.tcp(*client, *server).await),
        };
        let place = caller.as_ref().ok().map(|caller| self.shares.enter(caller));
        if let Some(None) = place {
            stream.reset();
            return Err(Dropped::OverShare);
        }
        match stream {
            Stream::Unix(stream) => self.request(TokioIo::new(stream), listener, caller).await?,
            Stream::Tcp { stream, .. } => self.request(TokioIo::new(stream), listener, caller).await?,
        }
        Ok(())
    }

    /// Reads one request and answers it. A refused caller is still read and answered, so that its SDK shows why.
    async fn request<S>(&self, io: TokioIo<S>, listener: Listener, caller: Result<Caller, Refusal>) -> hyper::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let caller = caller.map(Arc::new);
        let service = service_fn(|request| {
            let caller = caller.clone();
            async move { Ok::<_, Infallible>(self.answer(&request, listener, caller).await) }
        });
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD)
            .keep_alive(false)
            .max_buf_size(HEAD_BYTES)
            .max_headers(HEADERS)
            .serve_connection(io, service)
            .await
    }

    /// Opens the audit record, decides, closes it. If the client goes away hyper drops this future, and the record says so.
    async fn answer(
        &self,
        request: &Request<Incoming>,
        listener: Listener,
        caller: Result<Arc<Caller>, Refusal>,
    ) -> Answer {
        let mut record = self.audit.begin(listener, caller.as_ref().ok().cloned());
        match self.decide(request, listener, caller, &mut record).await {
            Ok((body, issued)) => match record.finish(Outcome::Issued, "ok", Some(&issued)) {
                true => respond(200, Bytes::from_owner(SharedBody(body)), None),
                false => refuse(&Refused::NotAudited, "-"),
            },
            Err(refused) => {
                let id = record.request_id().to_owned();
                record.finish(refused.outcome(), refused.reason(), None);
                refuse(&refused, &id)
            }
        }
    }

    async fn decide(
        &self,
        request: &Request<Incoming>,
        listener: Listener,
        caller: Result<Arc<Caller>, Refusal>,
        record: &mut Record,
    ) -> Result<(Body, Issued), Refused> {
        let caller = caller.map_err(Refused::Caller)?;
        let wanted = rules::read(&Asked::of(request), listener, &self.authorization)?;
        let (issued, freshness) =
            self.broker.serve(&caller, &wanted, record).await.map_err(|error| Refused::broker(error, &caller))?;
        if freshness == Freshness::Stale {
            tracing::debug!("answered from credentials that are due for a refresh");
        }
        let said = Issued { access_key_id: issued.access_key_id.clone(), expiration: issued.expiration, freshness };
        Ok((issued.body.clone(), said))
    }
}

/// Lets hyper write the cached body without a copy of the secrets.
struct SharedBody(Body);

impl AsRef<[u8]> for SharedBody {
    fn as_ref(&self) -> &[u8] {
        &self.0.0
    }
}

fn refuse(refused: &Refused, request_id: &str) -> Answer {
    respond(refused.status(), Bytes::from(refused.body(request_id)), refused.retry_after())
}

/// `Connection: close` on every answer: one connection is one attestation, and one SDK never closes its own.
fn respond(status: u16, body: Bytes, retry_after: Option<u64>) -> Answer {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = hyper::StatusCode::from_u16(status).unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    if let Some(seconds) = retry_after {
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

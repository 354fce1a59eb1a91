//! For operators: health and metrics over TCP, and on its own unix socket (mode 0600) what is cached.
//!
//! The TCP address may be reached from the network, so it tells nothing of single workloads (attack 19).

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::metrics::gauge::Gauge;
use serde::Serialize;
use tokio::time::timeout;

use crate::cache::{CredentialCache, Entry};
use crate::health::Report;
use crate::listen::{Arrival, CONNECTION_LIFE, Stream};
use crate::metrics::Metrics;

const HEAD: Duration = Duration::from_secs(5);

/// Whether the daemon can do its work. Once it could, it stays ready through outages of others, since it can then still
/// serve what is cached; those show in the metrics.
#[derive(Debug, Default)]
pub struct Readiness {
    ready: AtomicBool,
    ending: AtomicBool,
    gauge: Gauge,
}

impl Readiness {
    /// Not ready yet. `gauge` shows it in the metrics.
    pub fn new(gauge: Gauge) -> Self {
        Self { gauge, ..Self::default() }
    }

    /// Everything that is needed has answered once.
    pub fn reached(&self) {
        self.ready.store(true, Ordering::Release);
        self.gauge.set(1);
    }

    /// The daemon was told to end.
    pub fn ending(&self) {
        self.ending.store(true, Ordering::Release);
    }

    /// What `/readyz` says.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire) && !self.ending.load(Ordering::Acquire)
    }
}

/// Which of the two addresses a connection came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Address {
    /// `/healthz`, `/readyz`, `/metrics`.
    Admin,
    /// `/status`.
    Status,
}

/// Answers operators.
#[derive(Debug)]
pub struct Admin {
    /// Counts.
    pub metrics: Metrics,
    /// For `/readyz`.
    pub readiness: Arc<Readiness>,
    /// For `/status`.
    pub cache: CredentialCache,
}

#[derive(Serialize)]
struct Status {
    version: &'static str,
    ready: bool,
    connections: i64,
    source: Option<Report>,
    sts: Vec<Report>,
    credentials: Vec<Entry>,
}

impl Admin {
    /// Serves one connection to its end.
    pub async fn connection(self: Arc<Self>, address: Address, stream: Stream, arrival: Arrival) {
        let _arrival = arrival;
        let service = service_fn(|request: Request<Incoming>| {
            let answer = self.answer(address, request.method(), request.uri().path());
            async move { Ok::<_, Infallible>(answer) }
        });
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(HEAD).keep_alive(false);
        let served = builder.serve_connection(TokioIo::new(stream.into_socket()), service);
        // An operator's client that is slow or gone is nobody's concern.
        let _ = timeout(CONNECTION_LIFE, served).await;
    }

    fn answer(&self, address: Address, method: &Method, path: &str) -> Response<Full<Bytes>> {
        if method != Method::GET {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
        }
        match (address, path) {
            (Address::Admin, "/healthz") => text(StatusCode::OK, "ok\n"),
            (Address::Admin, "/readyz") if self.readiness.is_ready() => text(StatusCode::OK, "ready\n"),
            (Address::Admin, "/readyz") => text(StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
            (Address::Admin, "/metrics") => {
                self.cache.count();
                let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                reply(StatusCode::OK, kind, self.metrics.encode().into())
            }
            (Address::Status, "/status") => self.status(),
            _ => text(StatusCode::NOT_FOUND, "not found\n"),
        }
    }

    fn status(&self) -> Response<Full<Bytes>> {
        let (source, sts) = self.metrics.health.reports();
        let status = Status {
            version: env!("CARGO_PKG_VERSION"),
            ready: self.readiness.is_ready(),
            connections: self.metrics.connections.get(),
            source,
            sts,
            credentials: self.cache.entries(),
        };
        // Strings and booleans: writing them to memory cannot fail.
        let body = serde_json::to_vec_pretty(&status).unwrap_or_default();
        reply(StatusCode::OK, "application/json", body.into())
    }
}

fn text(status: StatusCode, body: &'static str) -> Response<Full<Bytes>> {
    reply(status, "text/plain; charset=utf-8", Bytes::from_static(body.as_bytes()))
}

fn reply(status: StatusCode, kind: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

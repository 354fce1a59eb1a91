//! The endpoints for operators: health and metrics over TCP, and on a unix socket of mode 0600 also
//! the state of the cache.
//!
//! The TCP address may be open to the network, so it shows no facts about single workloads (T19).
//! One client cannot block another (T26): at the bound of connections, the oldest gives way to a
//! new one. The unix socket is root's, has a bound of its own, and serves the probes of the node.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
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
use tokio::time::{Instant, timeout};

use crate::attest::Attestor;
use crate::cache::{CredentialCache, EntryStatus};
use crate::config::ListenConfig;
use crate::limits::FairSemaphore;
use crate::listen::{AcceptedStream, LazySocket, PendingConnection};
use crate::metrics::{Exposition, Metrics, ReasonLabel};
use crate::upstream_status::UpstreamReport;

mod format;

use format::{MetricsFormat, RenderedMetrics};

/// Maximum time for a complete head. A probe sends it with its connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum time of a connection. `/status` may have some megabytes over a slow network.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum age of rendered metrics that are served at the TCP address. Prometheus scrapes every few
/// seconds.
const RENDER_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum number of connections at the TCP address. This is more than the daemon accepts before it
/// reads the first.
const MAX_CONNECTIONS: usize = 512;
/// Maximum number of connections at the TCP address from one source address.
const MAX_CONNECTIONS_PER_PEER: usize = 160;
/// The reason of a connection that gives way to a newer one.
pub const TOO_MANY_OPERATORS: &str = "too_many_operators";
/// Maximum number of connections at the unix socket.
const MAX_STATUS_CONNECTIONS: usize = 160;

/// The readiness of the daemon. It stays ready through outages of the source and of STS, because it
/// still serves cached credentials. The metrics show such outages.
#[derive(Debug, Default)]
pub struct Readiness {
    ready: AtomicBool,
    ending: AtomicBool,
    /// The missing conditions, for people.
    missing: Mutex<Option<String>>,
    gauge: Gauge,
}

impl Readiness {
    /// Returns a state that is not ready yet. `gauge` shows it in the metrics.
    pub fn new(gauge: Gauge) -> Self {
        Self {
            gauge,
            ..Self::default()
        }
    }

    /// Records the conditions that the daemon does not meet yet.
    pub fn missing(&self, what: &str) {
        *self.missing.lock().unwrap_or_else(PoisonError::into_inner) = Some(what.to_owned());
    }

    /// Records that each listener, the source and STS have answered once.
    pub fn set_ready(&self) {
        self.ready.store(true, Ordering::Release);
        self.gauge.set(1);
    }

    /// Records that the daemon ends.
    pub fn set_draining(&self) {
        self.ending.store(true, Ordering::Release);
    }

    /// Returns whether `/readyz` is 200.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire) && !self.ending.load(Ordering::Acquire)
    }

    /// Returns the reason for which the daemon is not ready; `None` if it is.
    fn why_not(&self) -> Option<String> {
        if self.is_ready() {
            return None;
        }
        if self.ending.load(Ordering::Acquire) {
            return Some("awsvid is ending".to_owned());
        }
        let missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        Some(
            missing
                .clone()
                .unwrap_or_else(|| "awsvid has just started".to_owned()),
        )
    }
}

/// The address of a connection of an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Address {
    /// The TCP address, with `/healthz`, `/readyz` and `/metrics`.
    Admin,
    /// The unix socket, with the same paths, current metrics, and `/status`.
    Status,
}

/// The server of both addresses for operators.
#[derive(Debug)]
pub struct Admin {
    metrics: Metrics,
    readiness: Arc<Readiness>,
    cache: CredentialCache,
    attestor: Arc<Attestor>,
    listen: ListenConfig,
    serves_pods: bool,
    /// The configuration's source names processes to an agent.
    names_processes: AtomicBool,
    /// Connections by source address. All at the unix socket have the same one.
    remote: FairSemaphore<IpAddr>,
    local: FairSemaphore<IpAddr>,
    /// The metrics of the latest rendering, for which concurrent scrapes wait.
    rendered: tokio::sync::Mutex<Option<(Instant, RenderedMetrics)>>,
}

#[derive(Serialize)]
struct StatusReport {
    version: &'static str,
    ready: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_ready: Option<String>,
    connections: i64,
    /// The callers that cannot be attested on this kernel, with the missing feature.
    unsupported_kernel: Vec<String>,
    /// `None` if the source gets no process ids.
    counts_executions: Option<bool>,
    source: Option<UpstreamReport>,
    sts: Vec<UpstreamReport>,
    credentials: Vec<EntryStatus>,
}

impl Admin {
    /// Returns a server for these parts. `attestor` attests the callers of `listen`, and those in
    /// pods if `serves_pods`.
    pub fn new(
        metrics: Metrics,
        readiness: Arc<Readiness>,
        cache: CredentialCache,
        attestor: Arc<Attestor>,
        listen: ListenConfig,
        serves_pods: bool,
    ) -> Self {
        Self {
            attestor,
            listen,
            serves_pods,
            names_processes: AtomicBool::default(),
            metrics,
            readiness,
            cache,
            remote: FairSemaphore::new(MAX_CONNECTIONS, MAX_CONNECTIONS_PER_PEER),
            local: FairSemaphore::new(MAX_STATUS_CONNECTIONS, MAX_STATUS_CONNECTIONS),
            rendered: tokio::sync::Mutex::default(),
        }
    }

    /// Records whether the configuration in effect names processes to an agent.
    pub fn names_processes(&self, names_processes: bool) {
        self.names_processes
            .store(names_processes, Ordering::Release);
    }

    /// Serves one connection to its end, or until a newer one needs its permit.
    ///
    /// A probe sends its request with its connection and reads the answer at once, so it never
    /// gives way. A client that sends no request, or does not read its answer, does (T26).
    pub async fn connection(
        self: Arc<Self>,
        address: Address,
        stream: AcceptedStream,
        pending: PendingConnection,
    ) {
        let PendingConnection {
            permit: arriving,
            open: _open,
        } = pending;
        // From here on the connection is counted by its client's address.
        drop(arriving);
        let permit = match (address, &stream) {
            // A listener for both families reports IPv4 as `::ffff:a.b.c.d`.
            (Address::Admin, AcceptedStream::Tcp { client, .. }) => {
                self.remote.admit(&client.ip().to_canonical())
            }
            _ => self.local.admit(&IpAddr::from(Ipv4Addr::LOCALHOST)),
        };
        let service = service_fn(|request: Request<Incoming>| {
            let admin = &self;
            async move { Ok::<_, Infallible>(admin.answer(address, &request).await) }
        });
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .keep_alive(false);
        let descriptor = stream.socket().descriptor().clone();
        let served = timeout(
            CONNECTION_TIMEOUT,
            builder.serve_connection(TokioIo::new(stream.into_socket()), service),
        );
        // A client that is slow or gone gets no answer.
        if permit.run(pin!(served)).await.is_none() {
            let reason = TOO_MANY_OPERATORS;
            self.metrics
                .connections_dropped
                .get_or_create(&ReasonLabel { reason })
                .inc();
            LazySocket::reset_on_close(&descriptor);
        }
    }

    async fn answer(&self, address: Address, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if request.method() != Method::GET {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
        }
        let format = MetricsFormat::negotiate(request.headers());
        match (address, request.uri().path()) {
            (_, "/healthz") => text(StatusCode::OK, "ok\n"),
            (_, "/readyz") => self.ready(address),
            (Address::Admin, "/metrics") => format.reply(&self.rendered().await),
            (Address::Status, "/metrics") => format.reply(&self.render()),
            (Address::Status, "/status") => {
                self.attestor.retry_tcp().await;
                self.status()
            }
            _ => text(StatusCode::NOT_FOUND, "not found\n"),
        }
    }

    /// Returns the answer of `/readyz`. Its reason may contain the SPIFFE ID of a workload, so only
    /// the unix socket shows it.
    fn ready(&self, address: Address) -> Response<Full<Bytes>> {
        match (self.readiness.why_not(), address) {
            (None, _) => text(StatusCode::OK, "ready\n"),
            (Some(_), Address::Admin) => text(StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
            (Some(why), Address::Status) => {
                let why = format!("not ready: {why}\n");
                reply(StatusCode::SERVICE_UNAVAILABLE, PLAIN, why.into())
            }
        }
    }

    fn render(&self) -> RenderedMetrics {
        self.cache.update_gauges();
        let Exposition { openmetrics, text } = self.metrics.exposition();
        RenderedMetrics {
            openmetrics: openmetrics.into(),
            text: text.into(),
        }
    }

    /// Returns metrics that are at most [`RENDER_INTERVAL`] old. A rendering visits each cache
    /// entry.
    async fn rendered(&self) -> RenderedMetrics {
        let mut rendered = self.rendered.lock().await;
        if let Some((at, latest)) = &*rendered
            && at.elapsed() < RENDER_INTERVAL
        {
            return latest.clone();
        }
        let latest = self.render();
        *rendered = Some((Instant::now(), latest.clone()));
        latest
    }

    fn unsupported_kernel(&self) -> Vec<String> {
        let uses_tcp = self.serves_pods || !self.listen.tcp.is_empty();
        let over_tcp = uses_tcp.then(|| self.attestor.missing_for_tcp()).flatten();
        let over_tcp = over_tcp.map(|missing| format!("callers over TCP are rejected: {missing}"));
        let on_unix = self
            .listen
            .unix
            .as_ref()
            .and_then(|_| self.attestor.missing_for_unix());
        over_tcp
            .into_iter()
            .chain(on_unix.map(str::to_owned))
            .collect()
    }

    fn status(&self) -> Response<Full<Bytes>> {
        let (source, sts) = self.metrics.health.reports();
        let status = StatusReport {
            version: env!("CARGO_PKG_VERSION"),
            ready: self.readiness.is_ready(),
            not_ready: self.readiness.why_not(),
            connections: self.metrics.connections.get(),
            unsupported_kernel: self.unsupported_kernel(),
            counts_executions: self
                .names_processes
                .load(Ordering::Acquire)
                .then(|| self.attestor.counts_executions()),
            source,
            sts,
            credentials: self.cache.entries(),
        };
        // Serializing strings and booleans into memory cannot fail.
        let body = serde_json::to_vec_pretty(&status).unwrap_or_default();
        reply(StatusCode::OK, "application/json", body.into())
    }
}

const PLAIN: &str = "text/plain; charset=utf-8";

fn text(status: StatusCode, body: &'static str) -> Response<Full<Bytes>> {
    reply(status, PLAIN, Bytes::from_static(body.as_bytes()))
}

fn reply(status: StatusCode, kind: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

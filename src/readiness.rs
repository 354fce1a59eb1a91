//! The probes of readiness: each listener, the identity source and STS have to answer once.
//!
//! On some kernels the callers of a listener cannot be attested. Such a listener is left out, with
//! a line in the log, because waiting does not change a kernel. If no other listener is left, the
//! daemon is not ready.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Empty;
use hyper::Request;
use hyper::body::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{sleep, timeout};
use zeroize::Zeroizing;

use crate::admin::Readiness;
use crate::attest::Attestor;
use crate::config::{self, Config};
use crate::file_threads::FileThreads;
use crate::http::OwnProbe;
use crate::http_client;
use crate::limits::LogQuota;
use crate::metrics::Metrics;
use crate::pod_listeners::TakeoverGate;
use crate::role::{RolesAnywhereTarget, StsTarget};
use crate::roles_anywhere::RolesAnywhere;
use crate::sts::Sts;
use crate::svid::IdentitySource;

/// The pause between two attempts.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// The longest time for the answer of a listener.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest body of an answer in bytes. Those of awsvid's errors are shorter.
const MAX_ANSWER_BYTES: usize = 4096;
/// The reason of a request that fails because the kernel lacks a feature.
const UNSUPPORTED: &str = "unsupported_kernel";
const NOTHING_SERVED: &str =
    "this kernel cannot attest the callers of any listener in [listen] (unsupported_kernel)";
const NO_PODS_SERVED: &str =
    "[pods] enabled: this kernel cannot attest the callers in pods (unsupported_kernel)";
const NO_KUBELET: &str = "[pods] enabled: the kubelet's cgroup is missing; in Kubernetes mount the host's /sys/fs/cgroup \
     by a hostPath volume, with its volumeMount at /host/cgroup, or set `cgroup_root`";
/// The reasons that have a line of the log without a pause.
const MAX_LOG_LINES: u32 = 5;
/// The time between log lines after the first ones.
const LOG_INTERVAL: Duration = Duration::from_secs(30);

/// The listeners and upstreams that have to answer.
#[derive(Debug)]
pub struct ReadinessProbes {
    unix: Option<PathBuf>,
    token_file: PathBuf,
    threads: FileThreads,
    source: Arc<dyn IdentitySource>,
    audience: String,
    sts: Arc<Sts>,
    targets: Vec<StsTarget>,
    roles_anywhere: Arc<RolesAnywhere>,
    roles_anywhere_targets: Vec<RolesAnywhereTarget>,
    metrics: Metrics,
    own_probe: OwnProbe,
}

impl ReadinessProbes {
    /// Returns the probes for this configuration.
    pub fn new(
        config: &Config,
        source: Arc<dyn IdentitySource>,
        sts: Arc<Sts>,
        roles_anywhere: Arc<RolesAnywhere>,
        metrics: Metrics,
        threads: FileThreads,
    ) -> Self {
        // The STS of `[requested_roles]` is one of them. It answers without a known role.
        let targets = config.roles.sts_targets().into_iter().cloned().collect();
        let roles_anywhere_targets = config.roles.roles_anywhere_targets();
        let audience = config
            .roles
            .defined
            .first()
            .map_or(&config.identity.audience, |role| &role.audience)
            .clone();
        let config::ListenConfig {
            unix, token_file, ..
        } = config.listen.clone();
        Self {
            unix,
            token_file,
            threads,
            source,
            audience,
            sts,
            targets,
            roles_anywhere,
            roles_anywhere_targets: roles_anywhere_targets.into_iter().cloned().collect(),
            metrics,
            own_probe: OwnProbe::new(),
        }
    }

    /// Marks the probes so that this endpoint does not count them.
    pub fn marked_by(self, own_probe: OwnProbe) -> Self {
        Self { own_probe, ..self }
    }

    /// Probes once a second until each one that can answer has done so.
    pub async fn until_ready(
        mut self,
        tcp: Vec<SocketAddr>,
        mut pods: Option<TakeoverGate>,
        attestor: Arc<Attestor>,
        readiness: Arc<Readiness>,
    ) {
        let mut logged = LoggedReason::default();
        let mut listeners = ProbedListeners {
            unanswered: self
                .unix
                .take()
                .map(ProbeTarget::Unix)
                .into_iter()
                .chain(tcp.into_iter().map(ProbeTarget::Tcp))
                .collect(),
            ..ProbedListeners::default()
        };
        loop {
            let mut missing = self.missing(&mut listeners, &attestor, pods.as_ref()).await;
            if missing.is_empty()
                && let Some(pods) = &mut pods
            {
                pods.pass().await;
                missing.extend(pods.without_served_pod());
            }
            if missing.is_empty() {
                listeners.warn_of_unsupported(&attestor);
                readiness.set_ready();
                tracing::info!("ready");
                return;
            }
            let missing = one_line(&missing.join("; "));
            readiness.missing(&missing);
            if logged.is_new(&missing) {
                tracing::warn!(%missing, "not ready");
            }
            sleep(PROBE_INTERVAL).await;
        }
    }

    /// Returns the token of TCP callers. It is right also where any value is.
    async fn token(&self) -> Zeroizing<String> {
        let path = self.token_file.clone();
        let read = move || std::fs::read_to_string(path).unwrap_or_default();
        let read = timeout(ANSWER_TIMEOUT, self.threads.run(&self.token_file, read));
        Zeroizing::new(read.await.ok().and_then(Result::ok).unwrap_or_default())
    }

    /// Runs all probes that have not succeeded yet, and returns the failures. A listener that has
    /// answered is not probed again.
    async fn missing(
        &self,
        listeners: &mut ProbedListeners,
        attestor: &Attestor,
        pods: Option<&TakeoverGate>,
    ) -> Vec<String> {
        let mut missing = Vec::new();
        let unanswered = if listeners.are_left() {
            let probe = self.own_probe.request(&self.token().await);
            listeners.probe_all(&probe).await
        } else {
            None
        };
        if let Some(listener) = unanswered {
            missing.push(format!(
                "the listener {listener} does not answer the daemon itself"
            ));
        } else {
            attestor.retry_tcp().await;
            let for_tcp = attestor.missing_for_tcp();
            if listeners.serve_no_caller(pods.is_some() && for_tcp.is_none()) {
                // The answer of the listener does not name the missing feature.
                missing.push(format!("{NOTHING_SERVED}: {}", for_tcp.unwrap_or_default()));
            }
        }
        if let Some(pods) = pods {
            missing.extend(missing_for_pods(pods, attestor).await);
        }
        let source = self.source.ready(&self.audience).await;
        let is_up = source.as_ref().err().is_none_or(|error| !error.is_outage());
        self.metrics.set_source_up(is_up);
        if let Err(error) = source {
            missing.push(format!("the identity source: {error}"));
        }
        for target in &self.targets {
            let sts = self.sts.probe(target).await;
            self.metrics.set_sts_up(target.to_string(), sts.is_ok());
            if let Err(error) = sts {
                missing.push(format!("STS: {error}"));
            }
        }
        for target in &self.roles_anywhere_targets {
            let answered = self.roles_anywhere.probe(target).await;
            self.metrics
                .set_sts_up(target.to_string(), answered.is_ok());
            if let Err(error) = answered {
                missing.push(error.to_string());
            }
        }
        missing
    }
}

/// Returns why a new pod would not be served.
async fn missing_for_pods(pods: &TakeoverGate, attestor: &Attestor) -> Option<String> {
    if let Some(missing) = attestor.missing_for_tcp() {
        return Some(format!("{NO_PODS_SERVED}: {missing}"));
    }
    if attestor.pod_roots().is_empty() {
        return Some(NO_KUBELET.to_owned());
    }
    pods.missing_for_new_pods(attestor.is_in_pod()).await
}

/// The reason that the log has. A new reason has a line; one that stays has no other.
///
/// Reasons that alternate, or contain a different number each time, would have a line each second,
/// so the lines are limited.
#[derive(Debug)]
struct LoggedReason {
    last: String,
    lines: LogQuota,
}

impl Default for LoggedReason {
    fn default() -> Self {
        Self {
            last: String::new(),
            lines: LogQuota::new(MAX_LOG_LINES, LOG_INTERVAL),
        }
    }
}

impl LoggedReason {
    /// Returns whether the log gets a line for this reason. A reason that the limit left out gets
    /// one later.
    fn is_new(&mut self, missing: &str) -> bool {
        let is_new = self.last != missing && self.lines.take().is_some();
        if is_new {
            missing.clone_into(&mut self.last);
        }
        is_new
    }
}

/// Joins the lines of a reason. Errors of the agent and of STS may contain line breaks.
fn one_line(text: &str) -> String {
    let words = text
        .split(|c: char| c.is_control() || c.is_whitespace())
        .filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

/// The daemon's own listeners, by the result of their probes.
#[derive(Debug, Default)]
struct ProbedListeners {
    unanswered: Vec<ProbeTarget>,
    /// Listeners that reject every caller. The kernel may gain support while it runs, so they are
    /// probed until the daemon is ready.
    unsupported: Vec<ProbeTarget>,
    serves: bool,
}

impl ProbedListeners {
    fn are_left(&self) -> bool {
        !self.unanswered.is_empty() || !self.unsupported.is_empty()
    }

    /// Probes the listeners that have not answered yet, and returns one that still does not.
    async fn probe_all(&mut self, probe: &Request<Empty<Bytes>>) -> Option<&ProbeTarget> {
        self.unanswered.append(&mut self.unsupported);
        while let Some(listener) = self.unanswered.pop() {
            match listener.probe(probe).await {
                Some(ProbeAnswer::Attested) => self.serves = true,
                Some(ProbeAnswer::Absent) => {}
                Some(ProbeAnswer::Unsupported) => self.unsupported.push(listener),
                None => {
                    self.unanswered.push(listener);
                    return self.unanswered.last();
                }
            }
        }
        None
    }

    /// Returns whether this kernel supports none of the listeners. `serves_pods` is set if there
    /// are listeners in pods, which it supports.
    fn serve_no_caller(&self, serves_pods: bool) -> bool {
        !self.unsupported.is_empty() && !self.serves && !serves_pods
    }

    fn warn_of_unsupported(&self, attestor: &Attestor) {
        if self.unsupported.is_empty() {
            return;
        }
        let listeners: Vec<_> = self.unsupported.iter().map(ToString::to_string).collect();
        let missing = attestor.missing_for_tcp();
        let missing = missing
            .as_deref()
            .or(attestor.missing_for_unix())
            .unwrap_or("see the lines before");
        tracing::warn!(
            listeners = listeners.join(", "),
            missing,
            "readiness leaves out listeners with callers that this kernel cannot attest (unsupported_kernel)"
        );
    }
}

/// The result of the probe of a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ProbeAnswer {
    /// The listener attests this process.
    Attested,
    /// The address cannot be reached: systemd also binds addresses of a disabled family.
    Absent,
    /// The listener rejects this process because the kernel lacks a feature.
    Unsupported,
}

/// One of the daemon's own listeners.
#[derive(Debug)]
enum ProbeTarget {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl fmt::Display for ProbeTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(address) => write!(f, "{address}"),
        }
    }
}

impl ProbeTarget {
    /// Probes the listener. Returns `None` if it does not answer, or rejects for another reason.
    async fn probe(&self, probe: &Request<Empty<Bytes>>) -> Option<ProbeAnswer> {
        let probe = probe.clone();
        let reply = timeout(ANSWER_TIMEOUT, async {
            match self {
                Self::Unix(path) => probe_listener(UnixStream::connect(path).await?, probe).await,
                Self::Tcp(address) => {
                    probe_listener(TcpStream::connect(address).await?, probe).await
                }
            }
        });
        match reply.await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => {
                let absent = matches!(
                    error.kind(),
                    ErrorKind::AddrNotAvailable | ErrorKind::NetworkUnreachable
                );
                if absent {
                    tracing::warn!(listener = %self, "this machine has no such address; clients use the others");
                }
                absent.then_some(ProbeAnswer::Absent)
            }
            Err(_) => None,
        }
    }
}

/// Sends the probe, and returns the result.
async fn probe_listener<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    probe: Request<Empty<Bytes>>,
) -> io::Result<Option<ProbeAnswer>> {
    let response = http_client::send(stream, probe, MAX_ANSWER_BYTES).await;
    // An answer that is not HTTP is not the daemon's.
    Ok(response
        .ok()
        .and_then(|response| classify_reply(response.status, &response.body)))
}

/// Returns the meaning of an answer. A 404 shows that the listener attests this process. A 403
/// shows that it does not.
fn classify_reply(status: u16, body: &[u8]) -> Option<ProbeAnswer> {
    if status == 404 {
        return Some(ProbeAnswer::Attested);
    }
    reports_unsupported_kernel(status, body).then_some(ProbeAnswer::Unsupported)
}

/// Returns whether an answer of the daemon states that the kernel lacks a feature.
pub fn reports_unsupported_kernel(status: u16, body: &[u8]) -> bool {
    let body: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    status == 403 && body["code"] == UNSUPPORTED
}

#[cfg(test)]
mod tests;

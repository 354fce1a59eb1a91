//! The daemon's own X.509-SVID, kept up to date by the stream of the SPIFFE Workload API.
//!
//! Standard: SPIFFE_Workload_API.md, sections 4 and 5.2.1. Each message is the full state, the first identity in it is the
//! default one, a refusal takes back what was given, and a stream that ends is opened again.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Status, Streaming};

use super::dial::{file_at, is_broken, open, unreachable};
use super::log_limit::{LogLimiter, LogPermit};
use super::proto::workload::X509svidRequest;
use super::proto::workload::X509svidResponse;
use super::proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use super::{CALL_TIMEOUT, SourceError, one_line};
use crate::endpoint::Endpoint;

mod certificates;

pub use certificates::{OwnSvid, id_of};

/// A stream that lasted so long was a good one: when it ends the next is opened at once.
const STABLE_AFTER: Duration = Duration::from_secs(5);
/// Before the second try to open one that does not last; twice as long before each one after that.
const PAUSE: Duration = Duration::from_millis(200);
/// No pause is longer. The agent is on this machine, and asking it costs little.
const MAX_PAUSE: Duration = Duration::from_secs(10);
/// Between two looks whether the agent was replaced at the same path, while the old one lives on and keeps its streams.
const SOCKET_POLL: Duration = Duration::from_secs(5);

/// Who the daemon is, by the SPIFFE agent. Kept up to date until it is dropped.
#[derive(Debug)]
pub struct OwnSvidSource {
    endpoint: Endpoint,
    now: watch::Receiver<OwnSvidState>,
    _task: AbortOnDropHandle<()>,
}

/// What is known of it.
#[derive(Debug, Clone, Default)]
struct OwnSvidState {
    /// The latest one that was given and not taken back.
    svid: Option<Arc<OwnSvid>>,
    /// Why no stream keeps it up to date at the moment.
    trouble: Option<SourceError>,
}

impl OwnSvidSource {
    /// Asks the Workload API at `endpoint`. To be called within a tokio runtime.
    pub fn at(endpoint: Endpoint) -> Self {
        let (sender, now) = watch::channel(OwnSvidState::default());
        let task = tokio::spawn(keep(endpoint.clone(), sender));
        Self {
            endpoint,
            now,
            _task: AbortOnDropHandle::new(task),
        }
    }

    /// The SVID to use now; else why there is none.
    pub fn latest(&self) -> Result<Arc<OwnSvid>, SourceError> {
        let now = self.now.borrow();
        now.svid
            .clone()
            .ok_or_else(|| now.trouble.clone().unwrap_or_else(|| self.not_yet()))
    }

    /// The same, but waits for the first one as long as `deadline`.
    pub async fn first(&self, deadline: Duration) -> Result<Arc<OwnSvid>, SourceError> {
        let mut now = self.now.clone();
        // Too late, or the task has panicked: there is none either way.
        let _ = timeout(deadline, now.wait_for(|now| now.svid.is_some())).await;
        self.latest()
    }

    /// Why what [`Self::latest`] gives may be outdated: the stream is down.
    pub fn trouble(&self) -> Option<SourceError> {
        self.now.borrow().trouble.clone()
    }

    fn not_yet(&self) -> SourceError {
        SourceError::Unavailable(format!(
            "the SPIFFE agent at {} has not given awsvid its own X.509-SVID yet",
            self.endpoint
        ))
    }
}

/// Opens one stream after another, for ever.
async fn keep(endpoint: Endpoint, now: watch::Sender<OwnSvidState>) {
    let mut state = StreamTask {
        endpoint,
        now,
        version: 0,
        log: LogLimiter::default(),
    };
    let mut tries = 0;
    loop {
        let (begun, before) = (Instant::now(), state.version);
        let Err(trouble) = state.read_stream().await;
        if state.version > before && begun.elapsed() >= STABLE_AFTER {
            tries = 0;
        }
        state.record_failure(trouble);
        sleep(pause(tries)).await;
        tries = tries.saturating_add(1);
    }
}

/// Before the next try after this many that came to nothing. Daemons whose agents were all restarted don't ask in step.
fn pause(tries: u32) -> Duration {
    let Some(doublings) = tries.checked_sub(1) else {
        return Duration::ZERO;
    };
    let longest = PAUSE
        .saturating_mul(1_u32.checked_shl(doublings).unwrap_or(u32::MAX))
        .min(MAX_PAUSE);
    longest.mul_f64(0.5 + 0.5 * fastrand::f64())
}

/// What the task has.
struct StreamTask {
    endpoint: Endpoint,
    now: watch::Sender<OwnSvidState>,
    version: u64,
    log: LogLimiter,
}

impl StreamTask {
    /// Takes each message of one stream, to its end.
    async fn read_stream(&mut self) -> Result<Infallible, SourceError> {
        let file = self.file();
        let opening = async {
            let mut stream = self.open().await?;
            let first = stream.message().await;
            Ok::<_, SourceError>((stream, first))
        };
        // The agent attests awsvid, which may take as long as for any workload, and then answers at once.
        let opened = timeout(CALL_TIMEOUT, opening).await;
        let (mut stream, mut message) = opened.map_err(|_| self.silent())??;
        let mut look = interval(SOCKET_POLL);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let full_state = message.map_err(|status| self.refused(&status))?;
            self.received(full_state.ok_or_else(|| self.ended("ended the stream"))?);
            message = loop {
                tokio::select! {
                    message = stream.message() => break message,
                    _ = look.tick() => {
                        let there = self.file();
                        if there.is_some() && there != file {
                            return Err(self.ended("was replaced by another"));
                        }
                    }
                }
            };
        }
    }

    async fn open(&self) -> Result<Streaming<X509svidResponse>, SourceError> {
        let channel = match &self.endpoint {
            Endpoint::Unix(path) => open(UnixStream::connect(path)).await,
            Endpoint::Tcp(address) => open(TcpStream::connect(address)).await,
        };
        let channel = channel.map_err(|error| {
            SourceError::Unavailable(unreachable(&self.endpoint, "workload_api_socket", &error))
        })?;
        let mut request = Request::new(X509svidRequest {});
        // The standard's guard against request forgery. SPIRE refuses a request that has it twice.
        request
            .metadata_mut()
            .insert("workload.spiffe.io", MetadataValue::from_static("true"));
        let answer = SpiffeWorkloadApiClient::new(channel)
            .fetch_x509svid(request)
            .await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| self.refused(&status))
    }

    fn file(&self) -> Option<(u64, u64)> {
        match &self.endpoint {
            Endpoint::Unix(path) => file_at(path),
            Endpoint::Tcp(_) => None,
        }
    }

    /// A message that cannot be used takes nothing back.
    fn received(&mut self, message: X509svidResponse) {
        match OwnSvid::read(message, self.version + 1) {
            Ok(svid) => {
                self.version = svid.version;
                let before = self.now.send_replace(OwnSvidState {
                    svid: Some(Arc::new(svid)),
                    trouble: None,
                });
                let now = self.now.borrow();
                let Some(svid) = &now.svid else { return };
                let is_known = before
                    .svid
                    .is_some_and(|before| before.spiffe_id == svid.spiffe_id);
                // An agent that ends each stream at once would fill the log.
                let is_news = !is_known || before.trouble.is_some();
                match is_news
                    .then(|| self.log.admit(svid.spiffe_id.as_str()))
                    .flatten()
                {
                    None => tracing::debug!(
                        version = svid.version,
                        "awsvid's own X.509-SVID is renewed"
                    ),
                    Some(_) => {
                        tracing::info!(spiffe_id = %svid.spiffe_id, "awsvid has its own X.509-SVID")
                    }
                }
            }
            Err(text) => self.record_failure(SourceError::Unavailable(format!(
                "the SPIFFE agent at {} gave awsvid an X.509-SVID that cannot be used: {text}",
                self.endpoint
            ))),
        }
    }

    /// Nothing keeps the SVID up to date, or there is none any more.
    fn record_failure(&self, trouble: SourceError) {
        let mut is_news = false;
        self.now.send_modify(|now| {
            is_news = now.trouble.as_ref() != Some(&trouble);
            if matches!(trouble, SourceError::Denied(_)) {
                now.svid = None;
            }
            now.trouble = Some(trouble.clone());
        });
        if is_news && let Some(LogPermit { missed }) = self.log.admit(&trouble.to_string()) {
            tracing::warn!(
                missed,
                "awsvid's own X.509-SVID is not kept up to date: {trouble}"
            );
        }
    }

    fn silent(&self) -> SourceError {
        SourceError::Unavailable(format!(
            "the SPIFFE agent at {} did not give awsvid its own X.509-SVID within {CALL_TIMEOUT:?}",
            self.endpoint
        ))
    }

    fn ended(&self, how: &str) -> SourceError {
        SourceError::Unavailable(format!("the SPIFFE agent at {} {how}", self.endpoint))
    }

    /// What the agent's refusal means: the table of SPIFFE_Workload_API.md, section 6.
    fn refused(&self, status: &Status) -> SourceError {
        let (said, endpoint) = (one_line(status.message()), &self.endpoint);
        match status.code() {
            _ if is_broken(status) => SourceError::Unavailable(format!(
                "the SPIFFE agent at {endpoint} broke off: {said}"
            )),
            Code::PermissionDenied | Code::NotFound => SourceError::Denied(format!(
                "the SPIFFE agent at {endpoint} has no identity for awsvid: register awsvid itself, by its user and \
                 executable ({said})"
            )),
            Code::InvalidArgument | Code::Unimplemented => SourceError::Misconfigured(format!(
                "the server at {endpoint} has no X.509-SVIDs to give: is it a SPIFFE Workload API? ({said})"
            )),
            _ => SourceError::Unavailable(format!(
                "the SPIFFE agent at {endpoint} did not give awsvid its own X.509-SVID: {said}"
            )),
        }
    }
}

#[cfg(test)]
pub(super) mod tests;

//! The daemon's own X.509-SVID, updated by the stream of the SPIFFE Workload API.
//!
//! Standard: SPIFFE_Workload_API.md, sections 4 and 5.2.1. Each message is the full state, and its
//! first identity is the default one. A denial withdraws the earlier state. A stream that ends is
//! opened again.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

use super::channel::{CallError, file_at, is_broken, open, unreachable};
use super::log_quota;
use super::proto::workload::X509svidRequest;
use super::proto::workload::X509svidResponse;
use super::proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use super::{CALL_TIMEOUT, SourceError, one_line};
use crate::backoff::{Backoff, Jitter};
use crate::limits::KeyedLogQuota;
use crate::socket_endpoint::Endpoint;

mod certificates;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;

pub use certificates::{CertificateIdError, OwnSvid, id_of};
pub(super) use certificates::{OwnSvidError, certified, split};

/// Maximum size of a message: 4 kB for each of 4000 identities.
const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;
/// A stream that lasted this long was stable. When it ends, the next one is opened at once.
const STABLE_AFTER: Duration = Duration::from_secs(5);
/// Delay before the second try to open a stream.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// Maximum delay. The agent is on this node, so a try costs little.
const MAX_PAUSE: Duration = Duration::from_secs(10);
/// Delays between tries. The jitter spreads daemons after a restart of all agents.
const BACKOFF: Backoff = Backoff::new(FIRST_PAUSE, MAX_PAUSE, Jitter::Down);
/// Interval between checks for an agent that was replaced at the same path, while the old one still
/// runs and keeps its streams.
const SOCKET_POLL: Duration = Duration::from_secs(5);

/// Source of the daemon's own X.509-SVID. It is kept up to date until it is dropped.
#[derive(Debug)]
pub struct OwnSvidSource {
    endpoint: Endpoint,
    now: watch::Receiver<OwnSvidState>,
    _task: AbortOnDropHandle<()>,
}

/// The current state of the daemon's SVID.
#[derive(Debug, Clone, Default)]
struct OwnSvidState {
    /// The latest SVID that was not withdrawn.
    svid: Option<Arc<OwnSvid>>,
    /// Reason why no stream keeps it up to date at the moment.
    failure: Option<SourceError>,
}

impl OwnSvidSource {
    /// Fetches from the Workload API at `endpoint`. Must be called within a tokio runtime.
    pub fn at(endpoint: Endpoint) -> Self {
        let (sender, now) = watch::channel(OwnSvidState::default());
        let task = tokio::spawn(run_streams(endpoint.clone(), sender));
        Self {
            endpoint,
            now,
            _task: AbortOnDropHandle::new(task),
        }
    }

    /// Returns the current SVID, or the reason why there is none.
    pub fn latest(&self) -> Result<Arc<OwnSvid>, SourceError> {
        let now = self.now.borrow();
        now.svid
            .clone()
            .ok_or_else(|| now.failure.clone().unwrap_or_else(|| self.no_svid_yet()))
    }

    /// Returns the current SVID, after a wait of at most `deadline` for the first one. Fails if
    /// none has come by then.
    pub async fn first(&self, deadline: Duration) -> Result<Arc<OwnSvid>, SourceError> {
        let mut now = self.now.clone();
        // After a timeout or a panic of the task, `latest` returns the reason.
        let _ = timeout(deadline, now.wait_for(|now| now.svid.is_some())).await;
        self.latest()
    }

    /// Returns the reason why the current SVID may be outdated: the stream is down.
    pub fn failure(&self) -> Option<SourceError> {
        self.now.borrow().failure.clone()
    }

    fn no_svid_yet(&self) -> SourceError {
        SourceError::Unavailable(format!(
            "the SPIFFE agent at {} has not given awsvid its own X.509-SVID yet",
            self.endpoint
        ))
    }
}

/// Opens one stream after another, for ever.
async fn run_streams(endpoint: Endpoint, now: watch::Sender<OwnSvidState>) {
    let mut state = StreamTask {
        endpoint,
        now,
        version: 0,
        log: log_quota(),
    };
    let mut tries = 0;
    loop {
        let (start, previous) = (Instant::now(), state.version);
        let Err(failure) = state.read_stream().await;
        if state.version > previous && start.elapsed() >= STABLE_AFTER {
            tries = 0;
        }
        state.record_failure(failure);
        sleep(BACKOFF.delay(tries)).await;
        tries = tries.saturating_add(1);
    }
}

/// State of the task that reads the streams.
struct StreamTask {
    endpoint: Endpoint,
    now: watch::Sender<OwnSvidState>,
    version: u64,
    log: KeyedLogQuota,
}

impl StreamTask {
    /// Processes each message of one stream, to its end.
    async fn read_stream(&mut self) -> Result<Infallible, SourceError> {
        let file = self.file();
        let opening = async {
            let mut stream = self.open().await?;
            let first = stream.message().await;
            Ok::<_, SourceError>((stream, first))
        };
        // The agent attests awsvid, which may take as long as for any workload, and then replies at
        // once.
        let opened = timeout(CALL_TIMEOUT, opening).await;
        let (mut stream, mut message) = opened.map_err(|_| self.timeout_error())??;
        let mut poll = interval(SOCKET_POLL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let full_state = message.map_err(|status| self.error_of(&status))?;
            self.received(full_state.ok_or_else(|| self.ended("ended the stream"))?);
            message = loop {
                tokio::select! {
                    message = stream.message() => break message,
                    _ = poll.tick() => {
                        let current = self.file();
                        if current.is_some() && current != file {
                            return Err(self.ended("was replaced by another"));
                        }
                    }
                }
            };
        }
    }

    async fn open(&self) -> Result<Streaming<X509svidResponse>, SourceError> {
        subscribe(&self.endpoint)
            .await
            .map_err(|failed| match failed {
                CallError::Unconnected(error) => error,
                CallError::Answered(status) => self.error_of(&status),
            })
    }

    fn file(&self) -> Option<(u64, u64)> {
        match &self.endpoint {
            Endpoint::Unix(path) => file_at(path),
            Endpoint::Tcp(_) => None,
        }
    }

    /// Stores the SVID of a message. An unusable message does not withdraw the current one.
    fn received(&mut self, message: X509svidResponse) {
        match OwnSvid::read(message, self.version + 1) {
            Ok(svid) => {
                self.version = svid.version;
                let previous = self.now.send_replace(OwnSvidState {
                    svid: Some(Arc::new(svid)),
                    failure: None,
                });
                let now = self.now.borrow();
                let Some(svid) = &now.svid else { return };
                let is_known = previous
                    .svid
                    .is_some_and(|previous| previous.spiffe_id == svid.spiffe_id);
                // An agent that ends each stream at once would fill the log.
                let is_change = !is_known || previous.failure.is_some();
                match is_change
                    .then(|| self.log.take(svid.spiffe_id.as_str()))
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
            Err(error) => self.record_failure(SourceError::Unavailable(format!(
                "the SPIFFE agent at {} gave awsvid an X.509-SVID that cannot be used: {error}",
                self.endpoint
            ))),
        }
    }

    /// Records that the SVID is not kept up to date, and removes it after a denial.
    fn record_failure(&self, failure: SourceError) {
        let mut is_change = false;
        self.now.send_modify(|now| {
            is_change = now.failure.as_ref() != Some(&failure);
            if matches!(failure, SourceError::Denied(_)) {
                now.svid = None;
            }
            now.failure = Some(failure.clone());
        });
        if is_change && let Some(missed) = self.log.take(&failure.to_string()) {
            tracing::warn!(
                missed,
                error = %failure,
                "awsvid's own X.509-SVID is not kept up to date"
            );
        }
    }

    fn timeout_error(&self) -> SourceError {
        SourceError::Unavailable(format!(
            "the SPIFFE agent at {} did not give awsvid its own X.509-SVID within {CALL_TIMEOUT:?}",
            self.endpoint
        ))
    }

    fn ended(&self, how: &str) -> SourceError {
        SourceError::Unavailable(format!("the SPIFFE agent at {} {how}", self.endpoint))
    }

    /// Converts the agent's rejection: the table of SPIFFE_Workload_API.md, section 6.
    fn error_of(&self, status: &Status) -> SourceError {
        let (reply, endpoint) = (one_line(status.message()), &self.endpoint);
        match status.code() {
            _ if is_broken(status) => SourceError::Unavailable(format!(
                "the SPIFFE agent at {endpoint} broke off: {reply}"
            )),
            Code::PermissionDenied | Code::NotFound => SourceError::Denied(format!(
                "the SPIFFE agent at {endpoint} has no identity for awsvid: register awsvid itself, by its user and \
                 executable ({reply})"
            )),
            Code::InvalidArgument | Code::Unimplemented => SourceError::Misconfigured(format!(
                "the server at {endpoint} does not offer X.509-SVIDs; check that it is a SPIFFE Workload API ({reply})"
            )),
            _ => SourceError::Unavailable(format!(
                "the SPIFFE agent at {endpoint} did not give awsvid its own X.509-SVID: {reply}"
            )),
        }
    }
}

/// Opens a stream of the daemon's own X.509-SVIDs, over a new connection.
pub(super) async fn subscribe(
    endpoint: &Endpoint,
) -> Result<Streaming<X509svidResponse>, CallError> {
    let channel = connect(endpoint).await.map_err(CallError::Unconnected)?;
    let mut request = Request::new(X509svidRequest {});
    // The standard's protection against request forgery. SPIRE rejects a request that has it
    // twice.
    request
        .metadata_mut()
        .insert("workload.spiffe.io", MetadataValue::from_static("true"));
    // One message has all identities of the daemon, each with its own copy of the bundle.
    let mut client =
        SpiffeWorkloadApiClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let reply = client.fetch_x509svid(request).await;
    reply
        .map(tonic::Response::into_inner)
        .map_err(CallError::Answered)
}

/// Opens a new connection to a Workload API.
pub(super) async fn connect(endpoint: &Endpoint) -> Result<Channel, SourceError> {
    let channel = match endpoint {
        Endpoint::Unix(path) => open(UnixStream::connect(path)).await,
        Endpoint::Tcp(address) => open(TcpStream::connect(address)).await,
    };
    channel.map_err(|error| {
        SourceError::Unavailable(unreachable(endpoint, "workload_api_socket", &error))
    })
}

#[cfg(test)]
pub(super) mod tests;

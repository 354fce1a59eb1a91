//! Identity source `spiffe-broker`: the SPIFFE Broker API. The agent attests the caller's pod or
//! process itself, as with the Delegated Identity API. But the daemon proves its identity by its
//! own X.509-SVID, and cannot request tokens for a workload that the agent does not see.
//!
//! Standards: SPIFFE_Broker_API.md and SPIFFE_Broker_Endpoint.md (incubating). SPIRE has it since
//! 1.15.2, as an experiment: <https://github.com/spiffe/spire/blob/main/doc/spire_agent.md>,
//! "SPIFFE Broker API".

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use prost::Message;
use prost_types::Any;
use tokio::time::timeout;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::agent::{AgentSvid, AttestingAgent, own_by_process};
use super::channel::{CallError, ReconnectingChannel, first_message};
use super::own_svid::OwnSvidSource;
use super::proto::broker::api_client::ApiClient;
use super::proto::broker::{
    FetchJwtsvidRequest, KubernetesObjectReference, KubernetesObjectType,
    SubscribeToX509svidRequest, WorkloadPidReference, WorkloadReference,
};
use super::spire_delegated::pid_namespace_error;
use super::{ReceivedX509Svid, SourceError};
use crate::caller::AttestError;
use crate::cgroup::PodUid;
use crate::identity::SpiffeIdPattern;
use crate::socket_endpoint::Endpoint;

mod connection;
mod server;
mod status_error;

use connection::BrokerConnector;

/// Maximum size of a reply, which has a token for each identity of one workload.
const MAX_REPLY_BYTES: usize = 1024 * 1024;
/// Type URL of a reference to a process.
const PID_REFERENCE: &str = "type.googleapis.com/spiffe.broker.WorkloadPIDReference";
/// Type URL of a reference to a pod.
const OBJECT_REFERENCE: &str = "type.googleapis.com/spiffe.broker.KubernetesObjectReference";
/// A UID that no pod has, for probes.
const NO_POD: &str = "00000000-0000-0000-0000-000000000000";
/// Maximum wait of [`AttestingAgent::connect`] for the daemon's first SVID. An agent that knows the
/// daemon sends it at once.
const FIRST_SVID_TIMEOUT: Duration = Duration::from_secs(5);

/// Client of a SPIFFE agent's broker socket.
pub struct BrokerApi {
    socket: PathBuf,
    endpoint: Endpoint,
    own: Arc<OwnSvidSource>,
    server: Option<SpiffeIdPattern>,
    refers_to_pods: bool,
    shares_pids: Arc<AtomicBool>,
    connection: ReconnectingChannel<BrokerConnector>,
    deadline: Duration,
}

/// The workload that a query is about.
#[derive(Debug, Clone, Copy)]
enum WorkloadRef<'a> {
    Process(i32),
    Pod(&'a PodUid),
}

impl fmt::Debug for BrokerApi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BrokerApi")
            .field("endpoint", &self.endpoint)
            .field("own", &self.own.latest().ok())
            .finish_non_exhaustive()
    }
}

impl BrokerApi {
    /// Creates a client of the agent at `socket`, which authenticates as `own`. The agent's SPIFFE
    /// ID must match `server`. The default is any SPIRE agent of the daemon's own trust domain.
    /// `deadline` bounds each call.
    pub fn new(
        socket: &Path,
        own: OwnSvidSource,
        server: Option<SpiffeIdPattern>,
        deadline: Duration,
    ) -> Self {
        Self::build(socket.to_owned(), Arc::new(own), server, false, deadline)
    }

    /// Refers to callers in pods by their pod. Then an agent in another pid namespace works too, as
    /// long as all callers are in pods.
    pub fn naming_pods(self) -> Self {
        Self::build(self.socket, self.own, self.server, true, self.deadline)
    }

    fn build(
        socket: PathBuf,
        own: Arc<OwnSvidSource>,
        server: Option<SpiffeIdPattern>,
        refers_to_pods: bool,
        deadline: Duration,
    ) -> Self {
        let shares_pids = Arc::new(AtomicBool::new(false));
        let broker = BrokerConnector {
            socket: socket.clone(),
            own: own.clone(),
            server: server.clone(),
            refers_to_pods,
            shares_pids: shares_pids.clone(),
        };
        let (endpoint, connection) = (
            Endpoint::Unix(socket.clone()),
            ReconnectingChannel::new(&socket, broker),
        );
        Self {
            socket,
            endpoint,
            own,
            server,
            refers_to_pods,
            shares_pids,
            connection,
            deadline,
        }
    }

    /// Fetches the JWT-SVIDs of a workload within the deadline.
    async fn fetch(
        &self,
        workload: WorkloadRef<'_>,
        audience: &str,
    ) -> Result<Vec<AgentSvid>, SourceError> {
        let reference = workload.reference();
        let send = |channel: Channel| {
            let mut client = ApiClient::new(channel).max_decoding_message_size(MAX_REPLY_BYTES);
            let request = self.request(FetchJwtsvidRequest {
                reference: Some(WorkloadReference {
                    reference: Some(reference.clone()),
                }),
                audience: vec![audience.to_owned()],
                spiffe_id: String::new(),
            });
            async move { client.fetch_jwtsvid(request).await }
        };
        let reply = self.call_in_time(workload, send).await?;
        Ok(reply
            .into_inner()
            .svids
            .into_iter()
            .map(|svid| AgentSvid::new(svid.spiffe_id, svid.svid, svid.hint))
            .collect())
    }

    /// Fetches the X.509-SVIDs of a workload within the deadline.
    async fn fetch_x509(
        &self,
        workload: WorkloadRef<'_>,
    ) -> Result<Vec<ReceivedX509Svid>, SourceError> {
        let reference = workload.reference();
        let send = |channel: Channel| {
            let mut client = ApiClient::new(channel).max_decoding_message_size(MAX_REPLY_BYTES);
            let request = self.request(SubscribeToX509svidRequest {
                reference: Some(WorkloadReference {
                    reference: Some(reference.clone()),
                }),
            });
            async move { first_message(client.subscribe_to_x509svid(request).await).await }
        };
        let reply = self.call_in_time(workload, send).await?;
        // Each is converted, so that each key is cleared.
        Ok(reply.svids.into_iter().map(Into::into).collect())
    }

    /// Returns a request with the headers of every call.
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        // The standard's protection against request forgery. SPIRE rejects a request that has it
        // twice.
        request
            .metadata_mut()
            .insert("broker.spiffe.io", MetadataValue::from_static("true"));
        // Lets the agent end the call when no request waits any more. tonic's own timeout would
        // be later, since its error is like that of a broken connection.
        request.set_timeout(self.deadline + Duration::from_secs(1));
        request
    }

    /// Sends a call about a workload within the deadline.
    async fn call_in_time<T, F>(
        &self,
        workload: WorkloadRef<'_>,
        send: impl Fn(Channel) -> F + Send + Sync,
    ) -> Result<T, SourceError>
    where
        F: Future<Output = Result<T, Status>> + Send,
    {
        let call = async {
            match self.connection.call(send).await {
                Ok(reply) => Ok(reply),
                Err(CallError::Unconnected(error)) => Err(error),
                Err(CallError::Answered(status)) => {
                    if is_client_unknown(&status) {
                        self.connection.invalidate_all().await;
                    }
                    Err(self.error_of(workload, &status))
                }
            }
        };
        timeout(self.deadline, call).await.unwrap_or_else(|_| {
            let (endpoint, deadline) = (&self.endpoint, self.deadline);
            Err(SourceError::Unavailable(format!(
                "the SPIFFE agent at {endpoint} did not answer within {deadline:?}"
            )))
        })
    }

    /// Returns the reference to a process. Fails if the agent would take another process for it.
    async fn process(&self, pid: u32) -> Result<WorkloadRef<'static>, SourceError> {
        let pid = i32::try_from(pid).map_err(|_| AttestError::CallerGone)?;
        if self.refers_to_pods && !self.shares_pids().await? {
            return Err(SourceError::Misconfigured(pid_namespace_error(
                &self.endpoint,
            )));
        }
        Ok(WorkloadRef::Process(pid))
    }

    /// Returns true if the agent shares the daemon's pid namespace. Connects to learn that.
    async fn shares_pids(&self) -> Result<bool, SourceError> {
        match self.connection.connect().await {
            Ok(()) => Ok(self.shares_pids.load(Ordering::Relaxed)),
            Err(CallError::Unconnected(error)) => Err(error),
            Err(CallError::Answered(status)) => {
                Err(self.error_of(WorkloadRef::Process(0), &status))
            }
        }
    }
}

impl WorkloadRef<'_> {
    fn reference(self) -> Any {
        match self {
            Self::Process(pid) => Any {
                type_url: PID_REFERENCE.to_owned(),
                value: WorkloadPidReference { pid }.encode_to_vec(),
            },
            Self::Pod(pod) => {
                let pods = KubernetesObjectType {
                    plural: "pods".to_owned(),
                    group: "core".to_owned(),
                };
                let object = KubernetesObjectReference {
                    r#type: Some(pods),
                    key: None,
                    uid: pod.to_string(),
                };
                Any {
                    type_url: OBJECT_REFERENCE.to_owned(),
                    value: object.encode_to_vec(),
                }
            }
        }
    }

    /// Returns the plural for messages, the type URL of a reference, and the agent's plugin.
    fn kind(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Process(_) => ("processes", PID_REFERENCE, "unix"),
            Self::Pod(_) => ("pods", OBJECT_REFERENCE, "k8s"),
        }
    }

    /// Returns the description of this workload for messages.
    fn name(self) -> String {
        match self {
            Self::Process(_) => "this process".to_owned(),
            Self::Pod(pod) if pod.is_static() => format!("the static pod {pod}"),
            Self::Pod(pod) => format!("the pod {pod}"),
        }
    }
}

/// Returns true if the server does not know the client of this connection any more. SPIRE uses the
/// same code if an attestor fails.
fn is_client_unknown(status: &Status) -> bool {
    status.code() == Code::Unauthenticated
        && !status.message().contains("workload attestation failed")
}

#[async_trait]
impl AttestingAgent for BrokerApi {
    async fn fetch_for_pid(&self, pid: u32, audience: &str) -> Result<Vec<AgentSvid>, SourceError> {
        self.fetch(self.process(pid).await?, audience).await
    }

    fn supports_pod_references(&self) -> bool {
        self.refers_to_pods
    }

    async fn fetch_for_pod(
        &self,
        pod: &PodUid,
        audience: &str,
    ) -> Result<Vec<AgentSvid>, SourceError> {
        self.fetch(WorkloadRef::Pod(pod), audience).await
    }

    async fn fetch_x509_for_pid(&self, pid: u32) -> Result<Vec<ReceivedX509Svid>, SourceError> {
        self.fetch_x509(self.process(pid).await?).await
    }

    async fn fetch_x509_for_pod(&self, pod: &PodUid) -> Result<Vec<ReceivedX509Svid>, SourceError> {
        self.fetch_x509(WorkloadRef::Pod(pod)).await
    }

    /// Returns the IDs of the daemon's X.509-SVIDs, for which the agent attests it as well. A
    /// process ID would refer to another process if the agent is in another pid namespace.
    async fn fetch_own(&self, audience: &str) -> Result<Vec<String>, SourceError> {
        if !self.refers_to_pods {
            return own_by_process(self.fetch_for_pid(std::process::id(), audience).await);
        }
        let own = match (self.own.latest(), self.own.failure()) {
            (Ok(own), None) => own,
            (Err(error), _) | (Ok(_), Some(error)) => {
                return Err(SourceError::Unavailable(error.to_string()));
            }
        };
        Ok(own.all.clone())
    }

    /// Queries a pod that does not exist, if processes cannot be referred to. The reply shows
    /// whether pods can be referred to.
    async fn ready(&self, audience: &str) -> Result<(), SourceError> {
        self.fetch_own(audience).await?;
        if !self.refers_to_pods {
            return Ok(());
        }
        let by_process = self.shares_pids().await?;
        let reply = if by_process {
            self.fetch_for_pid(std::process::id(), audience)
                .await
                .map(drop)
        } else {
            Ok(())
        };
        let reply = match (by_process, reply, PodUid::parse(NO_POD)) {
            (false, _, Some(pod)) | (true, Err(SourceError::Misconfigured(_)), Some(pod)) => {
                self.fetch_for_pod(&pod, audience).await.map(drop)
            }
            (_, reply, _) => reply,
        };
        match reply {
            Err(SourceError::Denied(_)) => Ok(()),
            reply => reply,
        }
    }

    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    async fn connect(&self) -> Result<(), SourceError> {
        let connected = self.connection.connect().await;
        // Without an SVID the connection fails. An agent in another pid namespace cannot attest the
        // daemon, so its SVID never arrives.
        let connected = match connected {
            Err(CallError::Unconnected(SourceError::Unavailable(_))) => {
                // The next connection reports the failure.
                let _ = self.own.first(FIRST_SVID_TIMEOUT).await;
                self.connection.connect().await
            }
            connected => connected,
        };
        connected.map_err(|failed| match failed {
            CallError::Unconnected(error) => error,
            CallError::Answered(status) => self.error_of(WorkloadRef::Process(0), &status),
        })
    }
}

#[cfg(test)]
mod tests;

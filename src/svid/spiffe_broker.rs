//! Source D: the SPIFFE Broker API. The agent attests the caller's pod or process itself, as with the Delegated Identity API,
//! but the daemon proves who it is by its own X.509-SVID, and has no way to ask for a workload that the agent does not see.
//!
//! Standards: SPIFFE_Broker_API.md and SPIFFE_Broker_Endpoint.md (incubating). SPIRE has it from 1.15.2 on, as an
//! experiment: <https://github.com/spiffe/spire/blob/main/doc/spire_agent.md>, "SPIFFE Broker API".

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
use super::channel::{CallError, ReconnectingChannel, is_broken};
use super::own_svid::OwnSvidSource;
use super::proto::broker::api_client::ApiClient;
use super::proto::broker::{
    FetchJwtsvidRequest, FetchJwtsvidResponse, KubernetesObjectReference, KubernetesObjectType,
    WorkloadPidReference, WorkloadReference,
};
use super::spire_delegated::other_pids;
use super::{SourceError, one_line};
use crate::caller::AttestError;
use crate::cgroup::PodUid;
use crate::identity::SpiffeIdPattern;
use crate::socket_endpoint::Endpoint;

mod connection;
mod server;

use connection::BrokerConnector;

/// An answer holds a token for each identity of one workload.
const ANSWER_MAX: usize = 1024 * 1024;
/// How a reference to a process is told from others.
const PID_REFERENCE: &str = "type.googleapis.com/spiffe.broker.WorkloadPIDReference";
/// ... and one to a pod.
const OBJECT_REFERENCE: &str = "type.googleapis.com/spiffe.broker.KubernetesObjectReference";
/// No pod has it.
const NO_POD: &str = "00000000-0000-0000-0000-000000000000";
/// How long [`AttestingAgent::connect`] waits for the daemon's first SVID: an agent that knows the daemon gives it at once.
const FIRST_SVID: Duration = Duration::from_secs(5);

/// A SPIFFE agent's broker socket.
pub struct BrokerApi {
    socket: PathBuf,
    endpoint: Endpoint,
    own: Arc<OwnSvidSource>,
    server: Option<SpiffeIdPattern>,
    names_pods: bool,
    names_processes: Arc<AtomicBool>,
    connection: ReconnectingChannel<BrokerConnector>,
    deadline: Duration,
}

/// Whom the agent is asked about.
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
    /// The agent that listens at `socket`, asked as `own`, if its SPIFFE ID is one that `server` covers: by default, that of
    /// any SPIRE agent of the daemon's own trust domain. No call lasts longer than `deadline`.
    pub fn new(
        socket: &Path,
        own: OwnSvidSource,
        server: Option<SpiffeIdPattern>,
        deadline: Duration,
    ) -> Self {
        Self::made(socket.to_owned(), Arc::new(own), server, false, deadline)
    }

    /// The same, and callers in pods are named by their pod. Then an agent will do that numbers processes otherwise than this
    /// one, as long as nobody else asks.
    pub fn naming_pods(self) -> Self {
        Self::made(self.socket, self.own, self.server, true, self.deadline)
    }

    fn made(
        socket: PathBuf,
        own: Arc<OwnSvidSource>,
        server: Option<SpiffeIdPattern>,
        names_pods: bool,
        deadline: Duration,
    ) -> Self {
        let names_processes = Arc::new(AtomicBool::new(false));
        let broker = BrokerConnector {
            socket: socket.clone(),
            own: own.clone(),
            server: server.clone(),
            names_pods,
            names_processes: names_processes.clone(),
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
            names_pods,
            names_processes,
            connection,
            deadline,
        }
    }

    /// What the agent says within the deadline.
    async fn svids_of(
        &self,
        whose: WorkloadRef<'_>,
        audience: &str,
    ) -> Result<Vec<AgentSvid>, SourceError> {
        let answer = timeout(self.deadline, self.ask(whose, audience))
            .await
            .map_err(|_| {
                let (endpoint, deadline) = (&self.endpoint, self.deadline);
                SourceError::Unavailable(format!(
                    "the SPIFFE agent at {endpoint} did not answer within {deadline:?}"
                ))
            })??;
        Ok(answer
            .svids
            .into_iter()
            .map(|svid| AgentSvid::new(svid.spiffe_id, svid.svid, svid.hint))
            .collect())
    }

    async fn ask(
        &self,
        whose: WorkloadRef<'_>,
        audience: &str,
    ) -> Result<FetchJwtsvidResponse, SourceError> {
        let reference = whose.reference();
        let ask = |channel: Channel| {
            let mut client = ApiClient::new(channel).max_decoding_message_size(ANSWER_MAX);
            let mut request = Request::new(FetchJwtsvidRequest {
                reference: Some(WorkloadReference {
                    reference: Some(reference.clone()),
                }),
                audience: vec![audience.to_owned()],
                spiffe_id: String::new(),
            });
            // The standard's guard against request forgery. SPIRE refuses a request that has it twice.
            request
                .metadata_mut()
                .insert("broker.spiffe.io", MetadataValue::from_static("true"));
            // Tells the agent when nobody waits any more. tonic would end the call at that time too, and it would look as
            // if the connection had broken.
            request.set_timeout(self.deadline + Duration::from_secs(1));
            async move { client.fetch_jwtsvid(request).await }
        };
        match self.connection.call(ask).await {
            Ok(answer) => Ok(answer.into_inner()),
            Err(CallError::Unconnected(error)) => Err(error),
            Err(CallError::Answered(status)) => {
                if is_unknown_to_it(&status) {
                    self.connection.forget().await;
                }
                Err(self.refused(whose, &status))
            }
        }
    }

    /// Whether the agent can be told of processes: a connection shows that.
    async fn names_processes(&self) -> Result<bool, SourceError> {
        match self.connection.connect().await {
            Ok(()) => Ok(self.names_processes.load(Ordering::Relaxed)),
            Err(CallError::Unconnected(error)) => Err(error),
            Err(CallError::Answered(status)) => Err(self.refused(WorkloadRef::Process(0), &status)),
        }
    }

    /// What the agent's refusal means. The texts are those of SPIRE 1.15.
    fn refused(&self, whose: WorkloadRef<'_>, status: &Status) -> SourceError {
        let (text, said, endpoint) = (status.message(), one_line(status.message()), &self.endpoint);
        let no_answer = || {
            SourceError::Unavailable(format!(
                "the SPIFFE agent at {endpoint} gave no answer: {said}"
            ))
        };
        if is_broken(status) {
            return no_answer();
        }
        // These stand in the text of whatever code the agent makes of the errors of all its attestors.
        if text.contains("broker configuration missing")
            || (text.contains("broker \"") && text.contains("not configured"))
        {
            return SourceError::Misconfigured(format!(
                "the SPIFFE agent at {endpoint} does not attest pods for awsvid: its plugin WorkloadAttestor \"k8s\" needs \
                 a block `experimental {{ broker {{ ... }} }}` of its own, with awsvid's SPIFFE ID in `brokers` ({said})"
            ));
        }
        match status.code() {
            Code::PermissionDenied if text.contains("reference type") => {
                let (plural, kind) = whose.kind();
                SourceError::Misconfigured(format!(
                    "the SPIFFE agent at {endpoint} does not let awsvid name {plural}: add {{ type_url = \"{kind}\" }} to \
                     awsvid's `allowed_reference_types` in the agent's `experimental {{ broker {{ ... }} }}` block ({said})"
                ))
            }
            Code::PermissionDenied if text.contains("impersonate-via-spire") => {
                SourceError::Denied(format!(
                    "Kubernetes does not let awsvid ask for {}: give the user that is named like awsvid's SPIFFE ID the verb \
                 impersonate-via-spire on pods ({said})",
                    whose.name()
                ))
            }
            Code::NotFound if matches!(whose, WorkloadRef::Pod(_)) => SourceError::Denied(format!(
                "the SPIFFE agent at {endpoint} does not find {} on this node: it asks the kubelet for it, as its plugin \
                 WorkloadAttestor \"k8s\" is set up ({said})",
                whose.name()
            )),
            Code::PermissionDenied | Code::NotFound => SourceError::Denied(format!(
                "no registration entry of the SPIFFE agent at {endpoint} matches {} ({said})",
                whose.name()
            )),
            Code::FailedPrecondition if text.contains("kubelet client") => {
                SourceError::Misconfigured(format!(
                    "the SPIFFE agent at {endpoint} cannot look for pods: let its plugin WorkloadAttestor \"k8s\" ask the kubelet, \
                 or give awsvid `pod_reference_scope = \"cluster\"` there ({said})"
                ))
            }
            Code::InvalidArgument => SourceError::Misconfigured(format!(
                "the SPIFFE agent at {endpoint} finds the request invalid: is its SPIRE newer than this awsvid? ({said})"
            )),
            Code::Unimplemented if text.contains("workload attestor") => {
                SourceError::Misconfigured(format!(
                    "the SPIFFE agent at {endpoint} has no plugin that attests {}, as WorkloadAttestor \"{}\" does ({said})",
                    whose.kind().0,
                    if matches!(whose, WorkloadRef::Pod(_)) {
                        "k8s"
                    } else {
                        "unix"
                    }
                ))
            }
            Code::Unimplemented => SourceError::Misconfigured(format!(
                "the server at {endpoint} has no SPIFFE Broker API: write the `socket_path` of the agent's `experimental \
                 {{ broker {{ ... }} }}` block as `broker_socket` in [identity] ({said})"
            )),
            Code::OutOfRange => SourceError::Misconfigured(format!(
                "the answer of the SPIFFE agent at {endpoint} is far longer than the tokens of one workload ({said})"
            )),
            _ => no_answer(),
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

    /// What many of them are called, and how a reference to them is told from others.
    fn kind(self) -> (&'static str, &'static str) {
        match self {
            Self::Process(_) => ("processes", PID_REFERENCE),
            Self::Pod(_) => ("pods", OBJECT_REFERENCE),
        }
    }

    /// What one is called.
    fn name(self) -> String {
        match self {
            Self::Process(_) => "this process".to_owned(),
            Self::Pod(pod) if pod.is_static() => format!("the static pod {pod}"),
            Self::Pod(pod) => format!("the pod {pod}"),
        }
    }
}

/// Whether the server has forgotten whose connection this is. SPIRE uses the same code where an attestor fails.
fn is_unknown_to_it(status: &Status) -> bool {
    status.code() == Code::Unauthenticated
        && !status.message().contains("workload attestation failed")
}

#[async_trait]
impl AttestingAgent for BrokerApi {
    async fn fetch_for_pid(&self, pid: u32, audience: &str) -> Result<Vec<AgentSvid>, SourceError> {
        let pid = i32::try_from(pid).map_err(|_| AttestError::CallerGone)?;
        if self.names_pods && !self.names_processes().await? {
            return Err(SourceError::Misconfigured(other_pids(&self.endpoint)));
        }
        self.svids_of(WorkloadRef::Process(pid), audience).await
    }

    fn supports_pod_references(&self) -> bool {
        self.names_pods
    }

    async fn fetch_for_pod(
        &self,
        pod: &PodUid,
        audience: &str,
    ) -> Result<Vec<AgentSvid>, SourceError> {
        self.svids_of(WorkloadRef::Pod(pod), audience).await
    }

    /// Those of its X.509-SVIDs, for which the agent attests it just the same. By its number another process would be meant
    /// where the agent's numbers are others.
    async fn fetch_own(&self, audience: &str) -> Result<Vec<String>, SourceError> {
        if !self.names_pods {
            return own_by_process(self.fetch_for_pid(std::process::id(), audience).await);
        }
        let own = match (self.own.latest(), self.own.trouble()) {
            (Ok(own), None) => own,
            (Err(error), _) | (Ok(_), Some(error)) => {
                return Err(SourceError::Unavailable(error.to_string()));
            }
        };
        Ok(own.all.clone())
    }

    /// By a pod that is none where processes can't be named, which shows whether pods can be.
    async fn ready(&self, audience: &str) -> Result<(), SourceError> {
        self.fetch_own(audience).await?;
        if !self.names_pods {
            return Ok(());
        }
        let by_process = self.names_processes().await?;
        let said = if by_process {
            self.fetch_for_pid(std::process::id(), audience)
                .await
                .map(drop)
        } else {
            Ok(())
        };
        let said = match (by_process, said, PodUid::parse(NO_POD)) {
            (false, _, Some(pod)) | (true, Err(SourceError::Misconfigured(_)), Some(pod)) => {
                self.fetch_for_pod(&pod, audience).await.map(drop)
            }
            (_, said, _) => said,
        };
        match said {
            Err(SourceError::Denied(_)) => Ok(()),
            said => said,
        }
    }

    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    async fn connect(&self) -> Result<(), SourceError> {
        let connected = self.connection.connect().await;
        // In another pid namespace the daemon is attested by nobody, and its SVID never comes.
        let connected = match connected {
            Err(CallError::Unconnected(SourceError::Unavailable(_))) => {
                // What becomes of it is seen when the connection is made.
                let _ = self.own.first(FIRST_SVID).await;
                self.connection.connect().await
            }
            connected => connected,
        };
        connected.map_err(|failed| match failed {
            CallError::Unconnected(error) => error,
            CallError::Answered(status) => self.refused(WorkloadRef::Process(0), &status),
        })
    }
}

#[cfg(test)]
mod tests;

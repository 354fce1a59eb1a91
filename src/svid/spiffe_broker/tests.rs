mod connecting;
mod fake;

use std::path::PathBuf;

use tempfile::{TempDir, tempdir};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::*;
use crate::svid::CALL_TIMEOUT;
use crate::svid::own_svid::tests::fake::{Authority, FakeAgent, Stream, TestCertificate};
use crate::svid::proto::broker::{FetchJwtsvidResponse, Jwtsvid};
use crate::svid::proto::workload::X509svidResponse;
use fake::{BrokerReply, BrokerRequest, FakeBroker};

const ID: &str = "spiffe://example.org/awsvid";
const AGENT: &str = "spiffe://example.org/spire/agent/join_token/7";
const AUDIENCE: &str = "sts.amazonaws.com";

const UID: &str = "72f7f152-440c-66ac-9084-e0fc1d8a910c";

fn pod() -> PodUid {
    PodUid::parse(UID).unwrap()
}

/// One node: its Workload API, which has sent awsvid an SVID, and the path of its broker socket.
struct Node {
    dir: TempDir,
    broker: PathBuf,
    authority: Authority,
    workload_api: FakeAgent,
    stream: Stream,
    own: Option<OwnSvidSource>,
}

impl Node {
    async fn new() -> Self {
        let authority = Authority::new();
        let message = authority.message(ID);
        Self::with(authority, message).await
    }

    async fn with(authority: Authority, message: X509svidResponse) -> Self {
        let dir = tempdir().unwrap();
        let agent = dir.path().join("agent.sock");
        let mut workload_api = FakeAgent::at(&agent);
        let own = OwnSvidSource::at(Endpoint::Unix(agent));
        let stream = workload_api.next_client().await.accept();
        stream.send(message);
        own.first(CALL_TIMEOUT).await.unwrap();
        Self {
            broker: dir.path().join("broker.sock"),
            dir,
            authority,
            workload_api,
            stream,
            own: Some(own),
        }
    }

    /// Takes the client, once.
    fn client(&mut self) -> BrokerApi {
        self.client_with(None, CALL_TIMEOUT)
    }

    fn client_with(&mut self, server: Option<&str>, deadline: Duration) -> BrokerApi {
        let server = server.map(|server| SpiffeIdPattern::parse(server).unwrap());
        BrokerApi::new(&self.broker, self.own.take().unwrap(), server, deadline)
    }

    /// Returns a valid certificate for the agent.
    fn certificate(&self) -> TestCertificate {
        self.authority.sign(&[AGENT], |_| {})
    }

    /// Serves a correct broker socket.
    fn serve<F>(&self, script: impl Fn(BrokerRequest) -> F + Send + Sync + 'static) -> FakeBroker
    where
        F: Future<Output = BrokerReply> + Send + 'static,
    {
        FakeBroker::at(
            &self.broker,
            &self.authority,
            self.certificate(),
            &[ID],
            script,
        )
    }

    /// Serves a broker socket that always sends this reply.
    fn serve_always(&self, reply: Result<FetchJwtsvidResponse, Status>) -> FakeBroker {
        self.serve(move |_| {
            let reply = reply.clone();
            async { Some(reply) }
        })
    }

    /// Sends awsvid another SVID, and returns when the client has it.
    async fn rotate(&self, client: &BrokerApi) {
        let previous = client.own.latest().unwrap().version;
        self.stream.send(self.authority.message(ID));
        while client.own.latest().unwrap().version == previous {
            tokio::task::yield_now().await;
        }
    }
}

fn good() -> Result<FetchJwtsvidResponse, Status> {
    let svid = |name: &str, hint: &str| Jwtsvid {
        spiffe_id: format!("spiffe://example.org/{name}"),
        svid: format!("token of {name}"),
        hint: hint.to_owned(),
    };
    Ok(FetchJwtsvidResponse {
        svids: vec![svid("billing", ""), svid("shop", "the shop")],
    })
}

#[tokio::test]
async fn query_refers_to_the_process_and_returns_every_svid() {
    let mut node = Node::new().await;
    let agent = node.serve_always(good());
    let client = node.client();
    let svids = client.fetch_for_pid(4711, AUDIENCE).await.unwrap();
    let found: Vec<_> = svids
        .iter()
        .map(|svid| (svid.spiffe_id.as_str(), svid.token.as_str(), &svid.hint))
        .collect();
    assert_eq!(
        found,
        [
            ("spiffe://example.org/billing", "token of billing", &None),
            (
                "spiffe://example.org/shop",
                "token of shop",
                &Some("the shop".to_owned())
            ),
        ]
    );
    let [received] = &agent.requests()[..] else {
        panic!("not exactly one request")
    };
    let header: Vec<_> = received
        .metadata
        .get_all("broker.spiffe.io")
        .iter()
        .collect();
    assert_eq!(header, ["true"]);
    assert!(
        received.metadata.contains_key("grpc-timeout"),
        "the agent may give up when no caller waits any more"
    );
    let reference = received
        .request
        .reference
        .clone()
        .unwrap()
        .reference
        .unwrap();
    assert_eq!(
        reference.type_url,
        "type.googleapis.com/spiffe.broker.WorkloadPIDReference"
    );
    assert_eq!(
        WorkloadPidReference::decode(&reference.value[..])
            .unwrap()
            .pid,
        4711
    );
    assert_eq!(received.request.audience, [AUDIENCE]);
    assert_eq!(received.request.spiffe_id, "");
    assert_eq!(
        received.presented,
        client.own.latest().unwrap().certified.cert[0]
    );

    // A number that a process cannot have is not sent.
    assert_eq!(
        client.fetch_for_pid(u32::MAX, AUDIENCE).await.unwrap_err(),
        SourceError::Caller(AttestError::CallerGone)
    );
    client.fetch_for_pid(1, AUDIENCE).await.unwrap();
    assert_eq!(
        agent
            .requests()
            .iter()
            .map(|received| received.connection)
            .collect::<Vec<_>>(),
        [0, 0]
    );
}

#[tokio::test]
async fn query_refers_to_the_pod() {
    let mut node = Node::new().await;
    let agent = node.serve_always(good());
    let client = node.client().naming_pods();
    assert_eq!(
        client.fetch_for_pod(&pod(), AUDIENCE).await.unwrap().len(),
        2
    );
    let received = agent.requests()[0].request.clone();
    let reference = received.reference.unwrap().reference.unwrap();
    assert_eq!(
        reference.type_url,
        "type.googleapis.com/spiffe.broker.KubernetesObjectReference"
    );
    let object = KubernetesObjectReference::decode(&reference.value[..]).unwrap();
    let pods = KubernetesObjectType {
        plural: "pods".to_owned(),
        group: "core".to_owned(),
    };
    assert_eq!(
        (object.r#type, object.key, object.uid.as_str()),
        (Some(pods), None, UID)
    );
    assert_eq!(received.audience, [AUDIENCE]);
    // The agent of this test is in the client's pid namespace.
    client.fetch_for_pid(4711, AUDIENCE).await.unwrap();
    assert_eq!(agent.requests().len(), 2);
}

#[tokio::test]
async fn own_identities_are_those_of_the_certificates() {
    let authority = Authority::new();
    let mut message = authority.message(ID);
    message
        .svids
        .extend(authority.message("spiffe://example.org/daemon-too").svids);
    let mut node = Node::with(authority, message).await;
    let agent = node.serve_always(good());
    let client = node.client().naming_pods();
    assert_eq!(
        client.fetch_own(AUDIENCE).await.unwrap(),
        [ID, "spiffe://example.org/daemon-too"]
    );
    assert_eq!(agent.requests().len(), 0);
    // While no stream updates them, it is not certain that the agent knows the daemon.
    drop(node.stream);
    drop(node.workload_api);
    while client.own.failure().is_none() {
        tokio::task::yield_now().await;
    }
    let error = client.fetch_own(AUDIENCE).await.unwrap_err();
    assert!(matches!(error, SourceError::Unavailable(_)), "{error:?}");
}

/// Readiness is checked by a process reference if possible, else by a pod that does not exist.
#[tokio::test]
async fn ready_succeeds_if_the_agent_allows_queries() {
    let not_allowed = |kind: &str| {
        let text = format!("broker \"{ID}\" is not allowed to use reference type \"{kind}\"");
        Some(Err::<FetchJwtsvidResponse, _>(Status::permission_denied(
            text,
        )))
    };
    let no_pod = Some(Err(Status::not_found(
        "pod with UID x not found on agent node",
    )));
    let no_entry = Some(Err(Status::permission_denied("no identity issued")));
    let table = [
        (Some(good()), not_allowed("pods"), Ok(())),
        (no_entry, not_allowed("pods"), Ok(())),
        (not_allowed("processes"), no_pod, Ok(())),
        (
            not_allowed("processes"),
            not_allowed("pods"),
            Err("source_misconfigured"),
        ),
        (
            Some(Err(Status::unavailable("away"))),
            None,
            Err("source_unavailable"),
        ),
    ];
    let mut node = Node::new().await;
    let client = node.client().naming_pods();
    for (row, (process, pods, ready)) in table.into_iter().enumerate() {
        let _agent = node.serve(move |received| {
            let reference = received.request.reference.unwrap().reference.unwrap();
            let reply = if reference.type_url == PID_REFERENCE {
                process.clone()
            } else {
                pods.clone()
            };
            async move { reply }
        });
        let reply = client.ready(AUDIENCE).await;
        assert_eq!(
            reply.as_ref().copied().map_err(SourceError::reason),
            ready,
            "{row}: {reply:?}"
        );
        std::fs::remove_file(&node.broker).unwrap();
    }
}

#[tokio::test]
async fn pod_rejection_names_the_fix() {
    let k8s = "workload attestor \"k8s\" failed: rpc error: code = Internal desc = broker configuration missing";
    let table = [
        (
            Code::NotFound,
            "pod with UID x not found on agent node",
            "source_denied",
            "does not find the pod 72f7f152-",
        ),
        (
            Code::PermissionDenied,
            "no identity issued",
            "source_denied",
            "no registration entry of the SPIFFE agent",
        ),
        (
            Code::PermissionDenied,
            "broker \"spiffe://example.org/awsvid\" is not allowed to use reference type \"type.googleapis.com/x\"",
            "source_misconfigured",
            "does not let awsvid name pods: add { type_url = \"type.googleapis.com/spiffe.broker.KubernetesObjectReference\" }",
        ),
        (
            Code::PermissionDenied,
            "Kubernetes authorizer does not allow the broker to use impersonate-via-spire for the referenced object",
            "source_denied",
            "does not let awsvid request SVIDs of the pod 72f7f152-440c-66ac-9084-e0fc1d8a910c: give the user that is named like \
             awsvid's SPIFFE ID the verb impersonate-via-spire on pods",
        ),
        (
            Code::Internal,
            k8s,
            "source_misconfigured",
            "WorkloadAttestor \"k8s\" needs a block",
        ),
        (
            Code::Unimplemented,
            "no workload attestor handled reference",
            "source_misconfigured",
            "no plugin that attests pods, as WorkloadAttestor \"k8s\"",
        ),
        (
            Code::FailedPrecondition,
            "kubelet client is disabled",
            "source_misconfigured",
            "query the kubelet",
        ),
        (
            Code::Unavailable,
            "unable to reach the kubelet",
            "source_unavailable",
            "gave no answer",
        ),
    ];
    let mut node = Node::new().await;
    let client = node.client().naming_pods();
    for (code, reply, reason, text) in table {
        let agent = node.serve_always(Err(Status::new(code, format!("{reply}\n"))));
        let error = client.fetch_for_pod(&pod(), AUDIENCE).await.unwrap_err();
        assert_eq!(error.reason(), reason, "{code:?} {reply}: {error}");
        assert!(
            error.to_string().contains(text) && error.to_string().contains(reply),
            "{code:?}: {error}"
        );
        assert!(!error.to_string().contains('\n'), "{error}");
        assert_eq!(
            agent.requests().len(),
            1,
            "{code:?} is for others to try again"
        );
        std::fs::remove_file(&node.broker).unwrap();
    }
}

#[tokio::test]
async fn rejection_names_the_fix() {
    let k8s = "workload attestor \"k8s\" failed: rpc error: code = Internal desc = broker configuration missing";
    let table = [
        (
            Code::PermissionDenied,
            "no identity issued",
            "source_denied",
            "no registration entry",
        ),
        (
            Code::NotFound,
            "no such workload",
            "source_denied",
            "no registration entry",
        ),
        (
            Code::PermissionDenied,
            "broker \"spiffe://example.org/awsvid\" is not allowed to use reference type \"type.googleapis.com/x\"",
            "source_misconfigured",
            "`allowed_reference_types`",
        ),
        (
            Code::PermissionDenied,
            "Kubernetes authorizer does not allow the broker to use impersonate-via-spire for the referenced object",
            "source_denied",
            "the verb impersonate-via-spire",
        ),
        (
            Code::Internal,
            k8s,
            "source_misconfigured",
            "WorkloadAttestor \"k8s\" needs a block",
        ),
        (
            Code::Unauthenticated,
            k8s,
            "source_misconfigured",
            "WorkloadAttestor \"k8s\" needs a block",
        ),
        (
            Code::PermissionDenied,
            "broker \"spiffe://example.org/awsvid\" is not configured",
            "source_misconfigured",
            "with awsvid's SPIFFE ID in `brokers`",
        ),
        (
            Code::InvalidArgument,
            "security header missing",
            "source_misconfigured",
            "finds the request invalid",
        ),
        (
            Code::Unimplemented,
            "no workload attestor handled reference",
            "source_misconfigured",
            "no plugin that attests processes",
        ),
        (
            Code::Unimplemented,
            "unknown service spiffe.broker.API",
            "source_misconfigured",
            "`broker_socket`",
        ),
        (
            Code::OutOfRange,
            "too long",
            "source_misconfigured",
            "sent more than the tokens of one workload",
        ),
        (
            Code::Unauthenticated,
            "unknown client",
            "source_unavailable",
            "gave no answer",
        ),
        (
            Code::Internal,
            "failed to get process",
            "source_unavailable",
            "gave no answer",
        ),
        (
            Code::Unavailable,
            "could not fetch JWT-SVID",
            "source_unavailable",
            "gave no answer",
        ),
        (
            Code::DeadlineExceeded,
            "no selectors found",
            "source_unavailable",
            "gave no answer",
        ),
        (
            Code::ResourceExhausted,
            "slow down",
            "source_unavailable",
            "gave no answer",
        ),
        (Code::Unknown, "hm", "source_unavailable", "gave no answer"),
        (
            Code::Cancelled,
            "hm",
            "source_unavailable",
            "gave no answer",
        ),
        (
            Code::FailedPrecondition,
            "hm",
            "source_unavailable",
            "gave no answer",
        ),
    ];
    let mut node = Node::new().await;
    let client = node.client();
    for (code, reply, reason, text) in table {
        let agent = node.serve_always(Err(Status::new(code, format!("{reply}\n"))));
        let error = client.fetch_for_pid(1, AUDIENCE).await.unwrap_err();
        assert_eq!(error.reason(), reason, "{code:?} {reply}: {error}");
        assert!(
            error.to_string().contains(text) && error.to_string().contains(reply),
            "{code:?}: {error}"
        );
        assert!(!error.to_string().contains('\n'), "{error}");
        assert_eq!(
            agent.requests().len(),
            1,
            "{code:?} is for others to try again"
        );
        std::fs::remove_file(&node.broker).unwrap();
    }
}

#[tokio::test]
async fn unauthenticated_connection_is_replaced() {
    let mut node = Node::new().await;
    let agent = node.serve_always(Err(Status::unauthenticated(
        "unable to determine caller identity",
    )));
    let client = node.client();
    for _ in 0..3 {
        client.fetch_for_pid(1, AUDIENCE).await.unwrap_err();
    }
    assert_eq!(
        agent
            .requests()
            .iter()
            .map(|received| received.connection)
            .collect::<Vec<_>>(),
        [0, 1, 2]
    );
    std::fs::remove_file(&node.broker).unwrap();
    // SPIRE's status for an attestor that failed, which does not concern the connection.
    let agent = node.serve_always(Err(Status::unauthenticated(
        "workload attestation failed: x",
    )));
    for _ in 0..3 {
        client.fetch_for_pid(1, AUDIENCE).await.unwrap_err();
    }
    assert_eq!(
        agent
            .requests()
            .iter()
            .map(|received| received.connection)
            .collect::<Vec<_>>(),
        [0, 0, 0]
    );
}

#[tokio::test]
async fn oversized_reply_is_rejected() {
    let mut node = Node::new().await;
    let long = Jwtsvid {
        svid: "x".repeat(MAX_REPLY_BYTES),
        ..Jwtsvid::default()
    };
    let _agent = node.serve_always(Ok(FetchJwtsvidResponse { svids: vec![long] }));
    let error = node.client().fetch_for_pid(1, AUDIENCE).await.unwrap_err();
    assert!(
        matches!(&error, SourceError::Misconfigured(text) if text.contains("sent more than the tokens of one workload")),
        "{error:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn unanswered_call_ends_at_the_deadline_without_a_retry() {
    let mut node = Node::new().await;
    let agent = node.serve(|received| async move {
        let WorkloadPidReference { pid } = WorkloadPidReference::decode(
            &received.request.reference.unwrap().reference.unwrap().value[..],
        )
        .unwrap();
        (pid == 1).then(good)
    });
    let client = node.client_with(None, Duration::from_secs(7));
    client.fetch_for_pid(1, AUDIENCE).await.unwrap();
    let start = Instant::now();
    let error = client.fetch_for_pid(2, AUDIENCE).await.unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("within 7s")),
        "{error:?}"
    );
    assert!(
        start.elapsed() < Duration::from_millis(7500),
        "{:?}",
        start.elapsed()
    );
    // A workload that delays the agent does not cost the others their connection.
    client.fetch_for_pid(1, AUDIENCE).await.unwrap();
    assert_eq!(
        agent
            .requests()
            .iter()
            .map(|received| received.connection)
            .collect::<Vec<_>>(),
        [0, 0, 0]
    );
}

#[tokio::test]
async fn broken_kept_connection_is_replaced_within_the_call() {
    let mut node = Node::new().await;
    let agent = node.serve_always(good());
    let client = node.client();
    for connection in 0..3 {
        client.fetch_for_pid(1, AUDIENCE).await.unwrap();
        assert_eq!(agent.requests().last().unwrap().connection, connection);
        agent.cut();
    }
}

#[tokio::test]
async fn connection_that_breaks_is_an_outage_after_one_retry() {
    let mut node = Node::new().await;
    let arrived = Arc::new(Notify::new());
    let arrives = arrived.clone();
    let agent = node.serve(move |received| {
        let reply = if received.connection == 0 {
            Some(good())
        } else {
            arrives.notify_one();
            None
        };
        async { reply }
    });
    let client = Arc::new(node.client());
    client.fetch_for_pid(1, AUDIENCE).await.unwrap();
    agent.cut();
    let second_client = client.clone();
    let pending_fetch = tokio::spawn(async move { second_client.fetch_for_pid(1, AUDIENCE).await });
    arrived.notified().await;
    agent.cut();
    let error = pending_fetch.await.unwrap().unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("gave no answer")),
        "{error:?}"
    );
    assert_eq!(
        agent
            .requests()
            .iter()
            .map(|received| received.connection)
            .collect::<Vec<_>>(),
        [0, 1]
    );
}

#[tokio::test]
async fn running_call_keeps_its_connection_at_a_renewal() {
    let mut node = Node::new().await;
    let (arrived, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (first, released) = (arrived.clone(), go_on.clone());
    let agent = node.serve(move |received| {
        let (first, released) = (first.clone(), released.clone());
        async move {
            if received.connection == 0 {
                first.notify_one();
                released.notified().await;
            }
            Some(good())
        }
    });
    let client = Arc::new(node.client());
    let old = client.own.latest().unwrap();
    let waits = client.clone();
    let under_way = tokio::spawn(async move { waits.fetch_for_pid(1, AUDIENCE).await });
    arrived.notified().await;
    node.rotate(&client).await;
    client.fetch_for_pid(2, AUDIENCE).await.unwrap();
    go_on.notify_one();
    under_way.await.unwrap().unwrap();
    let presented: Vec<_> = agent
        .requests()
        .into_iter()
        .map(|received| (received.connection, received.presented))
        .collect();
    let new = client.own.latest().unwrap();
    assert_eq!(
        presented,
        [
            (0, old.certified.cert[0].clone()),
            (1, new.certified.cert[0].clone())
        ]
    );
}

#[tokio::test]
async fn calls_succeed_during_renewals() {
    const ROTATIONS: usize = 200;
    const TASKS: usize = 8;
    let mut node = Node::new().await;
    let agent = node.serve(|_| async {
        tokio::time::sleep(Duration::from_micros(fastrand::u64(0..2000))).await;
        Some(good())
    });
    let client = Arc::new(node.client());
    let tasks: Vec<_> = (0..TASKS)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move {
                loop {
                    client.fetch_for_pid(1, AUDIENCE).await.unwrap();
                }
            })
        })
        .collect();
    for _ in 0..ROTATIONS {
        node.rotate(&client).await;
        // A call that begins now presents the new certificate.
        client.fetch_for_pid(2, AUDIENCE).await.unwrap();
        assert!(agent.was_presented(&client.own.latest().unwrap().certified.cert[0]));
    }
    for task in tasks {
        assert!(!task.is_finished(), "a call failed: {:?}", task.await);
        task.abort();
    }
    let connections = agent
        .requests()
        .iter()
        .map(|received| received.connection)
        .max()
        .unwrap();
    assert!(
        (ROTATIONS..2 * ROTATIONS).contains(&connections),
        "{connections}"
    );
}

#[tokio::test]
async fn replaced_agent_is_used_while_the_old_one_runs() {
    let mut node = Node::new().await;
    let old = node.serve_always(good());
    let client = node.client();
    client.fetch_for_pid(1, AUDIENCE).await.unwrap();
    std::fs::rename(&node.broker, node.dir.path().join("old.sock")).unwrap();
    let error = client.fetch_for_pid(1, AUDIENCE).await.unwrap_err();
    assert!(error.to_string().contains("no socket at"), "{error}");
    let new = node.serve_always(good());
    client.fetch_for_pid(1, AUDIENCE).await.unwrap();
    assert_eq!((old.requests().len(), new.requests().len()), (1, 1));
}

#[tokio::test]
async fn debug_shows_only_the_spiffe_id() {
    let mut node = Node::new().await;
    let text = format!("{:?}", node.client());
    assert!(
        text.contains("broker.sock") && text.contains(ID) && text.len() < 300,
        "{text}"
    );
}

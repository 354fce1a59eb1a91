//! Callers in pods, with an agent that supports pod references.

use std::collections::VecDeque;

use super::*;
use crate::caller::PodAge;
use crate::cgroup::{Pod, PodUid};

const UID: &str = "72f7f152-440c-66ac-9084-e0fc1d8a910c";
const OLD: Duration = Duration::from_secs(3600);

/// An agent that supports pod references, and sends these replies in order. The last one repeats.
#[derive(Debug)]
struct FakePodAgent {
    reply: Mutex<VecDeque<Answer>>,
    queried: Mutex<Vec<(String, Instant)>>,
    names_pods: bool,
    endpoint: Endpoint,
}

type Answer = Result<Vec<&'static str>, SourceError>;

impl FakePodAgent {
    fn reply(reply: impl IntoIterator<Item = Answer>) -> Arc<Self> {
        Self::with(true, reply)
    }

    fn with(names_pods: bool, reply: impl IntoIterator<Item = Answer>) -> Arc<Self> {
        let endpoint = Endpoint::Unix(PathBuf::from("/agent"));
        let reply = Mutex::new(reply.into_iter().collect());
        Arc::new(Self {
            reply,
            queried: Mutex::default(),
            names_pods,
            endpoint,
        })
    }

    /// Returns the workloads that it was queried about.
    fn queried(&self) -> Vec<String> {
        self.queried
            .lock()
            .unwrap()
            .iter()
            .map(|(subject, _)| subject.clone())
            .collect()
    }

    fn answer(&self, subject: String, audience: &str) -> Result<Vec<AgentSvid>, SourceError> {
        let ids = self.next_ids(subject)?;
        Ok(ids.iter().map(|id| svid_of(id, audience)).collect())
    }

    fn next_ids(&self, subject: String) -> Answer {
        self.queried.lock().unwrap().push((subject, Instant::now()));
        let mut reply = self.reply.lock().unwrap();
        match reply.len() {
            1 => reply[0].clone(),
            _ => reply.pop_front().unwrap(),
        }
    }
}

#[async_trait]
impl AttestingAgent for FakePodAgent {
    async fn fetch_for_pid(&self, pid: u32, audience: &str) -> Result<Vec<AgentSvid>, SourceError> {
        self.answer(format!("process {pid}"), audience)
    }

    fn supports_pod_references(&self) -> bool {
        self.names_pods
    }

    async fn fetch_for_pod(
        &self,
        pod: &PodUid,
        audience: &str,
    ) -> Result<Vec<AgentSvid>, SourceError> {
        self.answer(format!("pod {pod}"), audience)
    }

    async fn fetch_x509_for_pod(&self, pod: &PodUid) -> Result<Vec<ReceivedX509Svid>, SourceError> {
        let ids = self.next_ids(format!("certificate of pod {pod}"))?;
        let authority = Authority::new();
        Ok(ids.iter().map(|id| authority.svid(id).into()).collect())
    }

    async fn fetch_own(&self, _: &str) -> Result<Vec<String>, SourceError> {
        Ok(vec![AWSVID.to_owned()])
    }

    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    async fn connect(&self) -> Result<(), SourceError> {
        Ok(())
    }
}

/// A pod that exists for this many checks.
#[derive(Debug)]
struct PodProof {
    ages: PodAge,
    reads: AtomicU32,
    exists_for: u32,
    pid: u32,
}

#[async_trait::async_trait]
impl PeerProof for PodProof {
    async fn verify_unchanged(&self) -> Result<(), AttestError> {
        Ok(())
    }

    async fn for_agent(&self) -> Result<AgentProcessRef, AttestError> {
        Ok(AgentProcessRef {
            pid: self.pid,
            cgroups: "0::/\n".to_owned(),
        })
    }

    fn verify_pod(&self) -> Result<PodAge, AttestError> {
        let read = self.reads.fetch_add(1, Ordering::SeqCst);
        if read < self.exists_for {
            Ok(self.ages)
        } else {
            Err(AttestError::CallerGone)
        }
    }
}

fn caller_in_pod(uid: u32, ages: PodAge, exists_for: u32) -> Arc<Caller> {
    let pod = Pod {
        uid: PodUid::parse(UID).unwrap(),
        container: None,
    };
    let evidence = Box::new(PodProof {
        ages,
        reads: AtomicU32::new(0),
        exists_for,
        pid: 7,
    });
    Arc::new(Caller {
        listener: ListenerKind::Pod,
        peer: PeerFacts {
            pod: Some(pod),
            netns_inode: Some(1),
            ..PeerFacts::of_user(uid)
        },
        process: None,
        proof: evidence,
    })
}

fn since(pod: Duration, container: Duration) -> PodAge {
    PodAge { pod, container }
}

/// Returns a caller with known process facts.
fn with_process(ages: PodAge) -> Arc<Caller> {
    let process = Arc::into_inner(caller(7)).unwrap().process;
    Arc::new(Caller {
        process,
        ..Arc::into_inner(caller_in_pod(1001, ages, u32::MAX)).unwrap()
    })
}

fn source(agent: &Arc<FakePodAgent>) -> AgentSource {
    source_with(agent, false)
}

fn source_with(agent: &Arc<FakePodAgent>, uses_certificates: bool) -> AgentSource {
    AgentSource::new(
        agent.clone(),
        AUDIENCE.to_owned(),
        uses_certificates,
        MAX_PROCESSES,
        Clock::starting_at(now()),
        Metrics::default(),
    )
}

#[tokio::test(start_paused = true)]
async fn pod_is_one_subject_for_all_its_processes() {
    let agent = FakePodAgent::reply([Ok(vec![SHOP])]);
    let source = source(&agent);
    for uid in [0, 1001, OVERFLOW_ID] {
        let caller = caller_in_pod(uid, since(OLD, OLD), u32::MAX);
        assert_eq!(source.facts_needed(caller.facts()), None);
        assert_eq!(ids(source.identify(&caller).await), [SHOP]);
    }
    let token = source
        .token(
            &caller_in_pod(5, since(OLD, OLD), u32::MAX),
            &shop_id(),
            AUDIENCE,
        )
        .await
        .unwrap();
    assert_eq!(
        (token.spiffe_id(), agent.queried()),
        (&shop_id(), vec![format!("pod {UID}")])
    );
    // Callers outside pods are referred to by process. So are all callers if the agent does not
    // support pods.
    assert_eq!(
        source.facts_needed(Caller::synthetic().facts()),
        Some(FACTS_FOR_AGENT)
    );
    assert_eq!(ids(source.identify(&caller(7)).await), [SHOP]);
    assert_eq!(agent.queried()[1..], ["process 7"]);
    let agent = FakePodAgent::with(false, [Ok(vec![SHOP])]);
    let source = self::source(&agent);
    assert_eq!(
        source.facts_needed(caller_in_pod(1, since(OLD, OLD), u32::MAX).facts()),
        Some(FACTS_FOR_AGENT)
    );
    assert_eq!(
        ids(source.identify(&with_process(since(OLD, OLD))).await),
        [SHOP]
    );
    assert_eq!(agent.queried(), ["process 7"]);
}

#[tokio::test(start_paused = true)]
async fn pod_that_is_gone_gets_no_identity() {
    let agent = FakePodAgent::reply([Ok(vec![SHOP])]);
    let source = source(&agent);
    // The pod is gone before the call, or during it.
    for (reads, calls) in [(0, 0), (1, 1)] {
        let caller = caller_in_pod(1, since(OLD, OLD), reads);
        assert_eq!(
            source.identify(&caller).await,
            Err(AttestError::CallerGone.into())
        );
        assert_eq!(agent.queried().len(), calls);
    }
    let caller = caller_in_pod(1, since(OLD, OLD), 1);
    assert_eq!(
        source
            .token(&caller, &shop_id(), AUDIENCE)
            .await
            .unwrap_err(),
        AttestError::CallerGone.into()
    );
    // A cached pod is removed at its next revalidation.
    source
        .identify(&caller_in_pod(1, since(OLD, OLD), 3))
        .await
        .unwrap();
    assert_eq!(source.0.cache().len(), 1);
    let queried = agent.queried().len();
    sleep(Duration::from_secs(64)).await;
    assert_eq!(
        (source.0.cache().len(), agent.queried().len()),
        (0, queried + 1),
        "once more, while it was there"
    );
}

#[tokio::test(start_paused = true)]
async fn x509_svid_is_for_a_pod_that_is_there_before_and_after() {
    let agent = FakePodAgent::reply([Ok(vec![SHOP])]);
    let source = source(&agent);
    let query = format!("certificate of pod {UID}");
    for (reads, calls) in [(0, 0), (1, 1), (2, 2)] {
        let caller = caller_in_pod(1, since(OLD, OLD), reads);
        let svid = source.x509_svid(&caller, &shop_id()).await;
        match reads {
            2 => assert_eq!(svid.unwrap().spiffe_id(), &shop_id()),
            _ => assert_eq!(svid.unwrap_err(), AttestError::CallerGone.into()),
        }
        assert_eq!(agent.queried(), vec![query.clone(); calls]);
    }
    let caller = caller_in_pod(1, since(OLD, OLD), u32::MAX);
    let own = SpiffeId::parse(AWSVID).unwrap();
    *agent.reply.lock().unwrap() = VecDeque::from([Ok(vec![AWSVID])]);
    for id in [own, shop_id()] {
        let error = source.x509_svid(&caller, &id).await.unwrap_err();
        assert!(matches!(error, SourceError::Denied(_)), "{error:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn certificate_proves_the_identity_of_a_new_pod() {
    let no_tokens = || SourceError::Unavailable("could not fetch JWT-SVID".to_owned());
    // Each of the two queries checks the pod twice.
    for (reads, identities) in [(3, Err(AttestError::CallerGone.into())), (4, Ok(SHOP))] {
        let agent = FakePodAgent::reply([Err(no_tokens()), Ok(vec![SHOP])]);
        let source = source_with(&agent, true);
        let caller = caller_in_pod(1, since(OLD, OLD), reads);
        let result = source.identify(&caller).await;
        let result = result.map(|identities| identities[0].spiffe_id.to_string());
        assert_eq!(result, identities.map(str::to_owned));
        let queries = [format!("pod {UID}"), format!("certificate of pod {UID}")];
        assert_eq!(agent.queried(), queries);
    }
}

#[tokio::test(start_paused = true)]
async fn new_pod_is_queried_again_while_its_request_waits() {
    let new = Duration::from_secs(1);
    let table = [
        (caller_in_pod(1, since(new, new), u32::MAX), true),
        (caller_in_pod(1, since(NEW_POD_AGE, new), u32::MAX), false),
        (caller_in_pod(1, since(OLD, OLD), u32::MAX), false),
        // With a process reference the age of the container counts.
        (with_process(since(new, new)), true),
        (with_process(since(OLD, new)), true),
        (with_process(since(OLD, NEW_POD_AGE)), false),
        // For any other caller a denial is final.
        (caller(7), false),
    ];
    for (row, (caller, again)) in table.into_iter().enumerate() {
        let agent = FakePodAgent::with(
            caller.process.is_none(),
            [Err(denied()), Err(denied()), Ok(vec![SHOP])],
        );
        let source = source(&agent);
        let start = Instant::now();
        let result = ids(source.identify(&caller).await);
        match again {
            true => {
                assert_eq!(
                    (result, agent.queried().len(), start.elapsed()),
                    (vec![SHOP.to_owned()], 3, NEW_POD_RETRY * 3),
                    "{row}"
                )
            }
            false => assert_eq!(
                (result, agent.queried().len(), start.elapsed()),
                (vec![], 1, Duration::ZERO),
                "{row}"
            ),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn new_pod_without_entry_is_unavailable_in_time() {
    let agent = FakePodAgent::reply([Err(denied())]);
    let source = source(&agent);
    let start = Instant::now();
    let result = source
        .identify(&caller_in_pod(
            1,
            since(Duration::ZERO, Duration::ZERO),
            u32::MAX,
        ))
        .await
        .unwrap_err();
    assert!(
        matches!(&result, SourceError::Unavailable(text) if text.contains("does not know this new pod yet")),
        "{result:?}"
    );
    assert!(
        start.elapsed() > REQUEST_HOLD / 2
            && start.elapsed() < REQUEST_HOLD
            && agent.queried().len() < 8,
        "{:?}",
        agent.queried()
    );
    assert_eq!(source.0.cache().len(), 0);
    // An outage is not retried within the request.
    let agent = FakePodAgent::reply([Err(SourceError::Unavailable("away".to_owned()))]);
    let source = self::source(&agent);
    source
        .identify(&caller_in_pod(
            1,
            since(Duration::ZERO, Duration::ZERO),
            u32::MAX,
        ))
        .await
        .unwrap_err();
    assert_eq!(agent.queried().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn waiting_new_pods_hold_no_permit() {
    let agent = FakePodAgent::with(false, [Err(denied())]);
    let source = Arc::new(source(&agent));
    let young = since(Duration::ZERO, Duration::ZERO);
    for pid in 1..=32 {
        let process = Arc::into_inner(caller(pid)).unwrap().process;
        let caller = Caller {
            process,
            ..Arc::into_inner(caller_in_pod(1001, young, u32::MAX)).unwrap()
        };
        let source = source.clone();
        tokio::spawn(async move { source.identify(&Arc::new(caller)).await });
    }
    sleep(Duration::from_millis(50)).await;
    assert_eq!(agent.queried().len(), 32, "each had one query, and waits");
    *agent.reply.lock().unwrap() = VecDeque::from([Ok(vec![SHOP])]);
    let start = Instant::now();
    assert_eq!(ids(source.identify(&caller(99)).await), [SHOP]);
    assert_eq!(start.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn own_pod_gets_no_identity() {
    let agent = FakePodAgent::reply([Ok(vec![AWSVID])]);
    let source = source(&agent);
    let caller = caller_in_pod(0, since(OLD, OLD), u32::MAX);
    assert_eq!(ids(source.identify(&caller).await), [""; 0]);
    let own = SpiffeId::parse(AWSVID).unwrap();
    let error = source.token(&caller, &own, AUDIENCE).await.unwrap_err();
    assert!(matches!(error, SourceError::Denied(_)), "{error:?}");
}

//! Callers in pods.

use super::*;
use crate::caller::PodAge;
use crate::cgroup::Pod;

const UID: &str = "72f7f152-440c-66ac-9084-e0fc1d8a910c";
const OLD: Duration = Duration::from_secs(3600);

/// An agent that is told of pods, and answers in this order; the last answer stays.
#[derive(Debug)]
struct Pods {
    says: Mutex<VecDeque<Answer>>,
    asked: Mutex<Vec<(String, Instant)>>,
    names_pods: bool,
    endpoint: Endpoint,
}

type Answer = Result<Vec<&'static str>, SourceError>;

impl Pods {
    fn says(says: impl IntoIterator<Item = Answer>) -> Arc<Self> {
        Self::with(true, says)
    }

    fn with(names_pods: bool, says: impl IntoIterator<Item = Answer>) -> Arc<Self> {
        let endpoint = Endpoint::Unix(PathBuf::from("/agent"));
        let says = Mutex::new(says.into_iter().collect());
        Arc::new(Self {
            says,
            asked: Mutex::default(),
            names_pods,
            endpoint,
        })
    }

    /// Whom it was asked about.
    fn asked(&self) -> Vec<String> {
        self.asked
            .lock()
            .unwrap()
            .iter()
            .map(|(whose, _)| whose.clone())
            .collect()
    }

    fn answer(&self, whose: String, audience: &str) -> Result<Vec<AgentSvid>, SourceError> {
        self.asked.lock().unwrap().push((whose, Instant::now()));
        let mut says = self.says.lock().unwrap();
        let ids = if says.len() > 1 {
            says.pop_front().unwrap()
        } else {
            says[0].clone()
        }?;
        Ok(ids.iter().map(|id| svid_of(id, audience)).collect())
    }
}

#[async_trait]
impl AttestingAgent for Pods {
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

/// A pod that is there for so many looks.
#[derive(Debug)]
struct Housed {
    ages: PodAge,
    looks: AtomicU32,
    there_for: u32,
    pid: u32,
}

#[async_trait::async_trait]
impl PeerProof for Housed {
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
        let look = self.looks.fetch_add(1, Ordering::SeqCst);
        if look < self.there_for {
            Ok(self.ages)
        } else {
            Err(AttestError::CallerGone)
        }
    }
}

fn housed(uid: u32, ages: PodAge, there_for: u32) -> Arc<Caller> {
    let pod = Pod {
        uid: PodUid::parse(UID).unwrap(),
        container: None,
    };
    let evidence = Box::new(Housed {
        ages,
        looks: AtomicU32::new(0),
        there_for,
        pid: 7,
    });
    Arc::new(Caller {
        listener: ListenerKind::Pod,
        uid,
        cgroup: None,
        pod: Some(pod),
        namespace: Some(1),
        process: None,
        evidence,
    })
}

fn since(pod: Duration, container: Duration) -> PodAge {
    PodAge { pod, container }
}

/// One whose process was looked at as well.
fn with_process(ages: PodAge) -> Arc<Caller> {
    let process = Arc::into_inner(caller(7)).unwrap().process;
    Arc::new(Caller {
        process,
        ..Arc::into_inner(housed(1001, ages, u32::MAX)).unwrap()
    })
}

fn source(agent: &Arc<Pods>) -> AgentSource {
    AgentSource::new(
        agent.clone(),
        AUDIENCE.to_owned(),
        MOST,
        Clock::starting_at(now()),
        Metrics::default(),
    )
}

#[tokio::test(start_paused = true)]
async fn all_processes_of_a_pod_are_one_and_none_has_to_be_known() {
    let agent = Pods::says([Ok(vec![SHOP])]);
    let source = source(&agent);
    for uid in [0, 1001, OVERFLOW_ID] {
        let caller = housed(uid, since(OLD, OLD), u32::MAX);
        assert_eq!(source.facts_needed(&caller), None);
        assert_eq!(ids(source.identify(&caller).await), [SHOP]);
    }
    let token = source
        .token(&housed(5, since(OLD, OLD), u32::MAX), &shop_id(), AUDIENCE)
        .await
        .unwrap();
    assert_eq!(
        (token.spiffe_id(), agent.asked()),
        (&shop_id(), vec![format!("pod {UID}")])
    );
    // Others of the node are named by their process, and so are all where the agent is not told of pods.
    assert_eq!(
        source.facts_needed(&Caller::synthetic()),
        Some(FACTS_FOR_AGENT)
    );
    assert_eq!(ids(source.identify(&caller(7)).await), [SHOP]);
    assert_eq!(agent.asked()[1..], ["process 7"]);
    let agent = Pods::with(false, [Ok(vec![SHOP])]);
    let source = self::source(&agent);
    assert_eq!(
        source.facts_needed(&housed(1, since(OLD, OLD), u32::MAX)),
        Some(FACTS_FOR_AGENT)
    );
    assert_eq!(
        ids(source.identify(&with_process(since(OLD, OLD))).await),
        [SHOP]
    );
    assert_eq!(agent.asked(), ["process 7"]);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_had_for_a_pod_that_is_gone() {
    let agent = Pods::says([Ok(vec![SHOP])]);
    let source = source(&agent);
    // Before the call, and during it.
    for (looks, calls) in [(0, 0), (1, 1)] {
        let caller = housed(1, since(OLD, OLD), looks);
        assert_eq!(
            source.identify(&caller).await,
            Err(AttestError::CallerGone.into())
        );
        assert_eq!(agent.asked().len(), calls);
    }
    let caller = housed(1, since(OLD, OLD), 1);
    assert_eq!(
        source
            .token(&caller, &shop_id(), AUDIENCE)
            .await
            .unwrap_err(),
        AttestError::CallerGone.into()
    );
    // One that is known is forgotten when it is looked at again.
    source
        .identify(&housed(1, since(OLD, OLD), 3))
        .await
        .unwrap();
    assert_eq!(source.0.memory().len(), 1);
    let asked = agent.asked().len();
    sleep(Duration::from_secs(64)).await;
    assert_eq!(
        (source.0.memory().len(), agent.asked().len()),
        (0, asked + 1),
        "once more, while it was there"
    );
}

#[tokio::test(start_paused = true)]
async fn a_new_pod_that_the_agent_does_not_know_yet_is_asked_about_again_while_it_waits() {
    let new = Duration::from_secs(1);
    let table = [
        (housed(1, since(new, new), u32::MAX), true),
        (housed(1, since(NEW_POD_AGE, new), u32::MAX), false),
        (housed(1, since(OLD, OLD), u32::MAX), false),
        // By process it is the container that has to be new.
        (with_process(since(new, new)), true),
        (with_process(since(OLD, new)), true),
        (with_process(since(OLD, NEW_POD_AGE)), false),
        // Elsewhere a denial is a denial.
        (caller(7), false),
    ];
    for (row, (caller, again)) in table.into_iter().enumerate() {
        let agent = Pods::with(
            caller.process.is_none(),
            [Err(denied()), Err(denied()), Ok(vec![SHOP])],
        );
        let source = source(&agent);
        let start = Instant::now();
        let said = ids(source.identify(&caller).await);
        match again {
            true => {
                assert_eq!(
                    (said, agent.asked().len(), start.elapsed()),
                    (vec![SHOP.to_owned()], 3, NEW_POD_RETRY * 3),
                    "{row}"
                )
            }
            false => assert_eq!(
                (said, agent.asked().len(), start.elapsed()),
                (vec![], 1, Duration::ZERO),
                "{row}"
            ),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_pod_without_an_entry_is_told_to_come_back_in_time() {
    let agent = Pods::says([Err(denied())]);
    let source = source(&agent);
    let start = Instant::now();
    let said = source
        .identify(&housed(1, since(Duration::ZERO, Duration::ZERO), u32::MAX))
        .await
        .unwrap_err();
    assert!(
        matches!(&said, SourceError::Unavailable(text) if text.contains("does not know this new pod yet")),
        "{said:?}"
    );
    assert!(
        start.elapsed() > REQUEST_HOLD / 2
            && start.elapsed() < REQUEST_HOLD
            && agent.asked().len() < 8,
        "{:?}",
        agent.asked()
    );
    assert_eq!(source.0.memory().len(), 0);
    // Trouble is not made better by asking again at once.
    let agent = Pods::says([Err(SourceError::Unavailable("away".to_owned()))]);
    let source = self::source(&agent);
    source
        .identify(&housed(1, since(Duration::ZERO, Duration::ZERO), u32::MAX))
        .await
        .unwrap_err();
    assert_eq!(agent.asked().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn new_pods_that_wait_keep_no_turn_from_others() {
    let agent = Pods::with(false, [Err(denied())]);
    let source = Arc::new(source(&agent));
    let young = since(Duration::ZERO, Duration::ZERO);
    for pid in 1..=32 {
        let process = Arc::into_inner(caller(pid)).unwrap().process;
        let caller = Caller {
            process,
            ..Arc::into_inner(housed(1001, young, u32::MAX)).unwrap()
        };
        let source = source.clone();
        tokio::spawn(async move { source.identify(&Arc::new(caller)).await });
    }
    sleep(Duration::from_millis(50)).await;
    assert_eq!(
        agent.asked().len(),
        32,
        "each was asked about once, and waits"
    );
    *agent.says.lock().unwrap() = VecDeque::from([Ok(vec![SHOP])]);
    let start = Instant::now();
    assert_eq!(ids(source.identify(&caller(99)).await), [SHOP]);
    assert_eq!(start.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn the_daemons_own_pod_is_given_nothing() {
    let agent = Pods::says([Ok(vec![AWSVID])]);
    let source = source(&agent);
    let caller = housed(0, since(OLD, OLD), u32::MAX);
    assert_eq!(ids(source.identify(&caller).await), [""; 0]);
    let own = SpiffeId::parse(AWSVID).unwrap();
    let refused = source.token(&caller, &own, AUDIENCE).await.unwrap_err();
    assert!(matches!(refused, SourceError::Denied(_)), "{refused:?}");
}

//! More queries than the agent gets at once, most of them by hostile workloads (T29).

use super::*;
use crate::cgroup::CgroupPath;

/// The time in which requests that have failed are finished.
const AFTER_TIMEOUT: Duration = Duration::from_millis(1);
const HONEST: &str = "/system.slice/honest.service";

/// Returns a caller of this user in this cgroup.
fn caller_in(cgroup: &str, uid: u32, pid: u32) -> Arc<Caller> {
    let mut caller = Arc::into_inner(caller_with(uid, pid, None, None)).unwrap();
    caller.peer.cgroup = CgroupPath::parse(cgroup);
    Arc::new(caller)
}

/// A query, and the time that it took.
type PendingQuery = tokio::task::JoinHandle<(Result<Vec<Identity>, SourceError>, Duration)>;

struct AgentUnderLoad {
    agent: Arc<AgentScript>,
    source: Arc<AgentSource>,
    next_pid: u32,
}

impl AgentUnderLoad {
    fn new() -> Self {
        let agent = AgentScript::reply(shop);
        let source = Arc::new(source(&agent));
        Self {
            agent,
            source,
            next_pid: 1,
        }
    }

    /// Starts a query about a new process of this user. It has begun at the agent when this
    /// returns, if it could.
    async fn query(&mut self, cgroup: &str, uid: u32, hangs: bool) -> PendingQuery {
        let pid = self.next_pid;
        self.next_pid += 1;
        if hangs {
            self.agent.hangs.lock().unwrap().insert(pid);
        }
        let (source, caller) = (self.source.clone(), caller_in(cgroup, uid, pid));
        let query = tokio::spawn(async move {
            let start = Instant::now();
            (source.identify(&caller).await, start.elapsed())
        });
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
        query
    }

    /// Starts queries about new processes, for which the agent never replies.
    async fn hang(&mut self, cgroup: &str, uid: u32, count: usize) -> Vec<PendingQuery> {
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(self.query(cgroup, uid, true).await);
        }
        queries
    }

    /// Asserts that the next process of this user is answered at once.
    async fn is_answered(&mut self, cgroup: &str, uid: u32) {
        let (result, took) = self.query(cgroup, uid, false).await.await.unwrap();
        assert_eq!((ids(result), took), (vec![SHOP.to_owned()], Duration::ZERO));
    }

    fn evicted(&self) -> usize {
        let name = "awsvid_source_calls_total{result=\"source_busy\"} ";
        let metrics = self.source.0.metrics.encode();
        let line = metrics.lines().find_map(|line| line.strip_prefix(name));
        line.map_or(0, |count| count.parse().unwrap())
    }
}

/// Returns the results that are there by now.
async fn finished(queries: &mut Vec<PendingQuery>) -> Vec<Result<Vec<Identity>, SourceError>> {
    let mut results = Vec::new();
    for query in queries.extract_if(.., |query| query.is_finished()) {
        results.push(query.await.unwrap().0);
    }
    results
}

#[tokio::test(start_paused = true)]
async fn honest_workload_is_answered_while_four_others_hold_all_queries() {
    let mut load = AgentUnderLoad::new();
    let mut hostile = Vec::new();
    for unit in 0..4 {
        let cgroup = format!("/system.slice/hostile-{unit}.service");
        hostile.extend(load.hang(&cgroup, 1001, MAX_QUERIES_PER_WORKLOAD).await);
    }
    assert_eq!(load.agent.active(), MAX_QUERIES);
    for _ in 0..5 {
        load.is_answered(HONEST, 2000).await;
    }
    // The first of these needed a permit. The call of the evicted query ended at the agent, and its
    // request was answered.
    assert_eq!(load.agent.active(), MAX_QUERIES - 1);
    assert_eq!(finished(&mut hostile).await, [Err(SourceError::Busy)]);
    assert_eq!(load.evicted(), 1);
    assert_eq!(load.source.0.cache().len(), MAX_QUERIES - 1 + 5);
    // The others are not affected: their requests wait as long as any.
    for query in hostile {
        let (result, took) = query.await.unwrap();
        assert!(
            matches!(result, Err(SourceError::Unavailable(_))),
            "{result:?}"
        );
        assert_eq!(took, REQUEST_HOLD);
    }
}

#[tokio::test(start_paused = true)]
async fn permits_are_shared_evenly_under_load() {
    let mut load = AgentUnderLoad::new();
    for unit in 0..4 {
        let cgroup = format!("/system.slice/hostile-{unit}.service");
        load.hang(&cgroup, 1001, MAX_QUERIES_PER_WORKLOAD).await;
    }
    let mut slow = load.hang(HONEST, 2000, MAX_QUERIES_PER_WORKLOAD).await;
    // A fifth of all, without a wait.
    assert_eq!(load.evicted(), MAX_QUERIES / 5);
    sleep(QUERY_WAIT + AFTER_TIMEOUT).await;
    let busy = finished(&mut slow).await;
    assert_eq!(
        busy,
        vec![Err(SourceError::Busy); MAX_QUERIES_PER_WORKLOAD - MAX_QUERIES / 5]
    );
}

#[tokio::test(start_paused = true)]
async fn users_of_one_unit_give_way_together() {
    let mut load = AgentUnderLoad::new();
    let mut hostile = Vec::new();
    for uid in 0..MAX_QUERIES {
        let uid = u32::try_from(uid).unwrap();
        hostile.extend(load.hang("/system.slice/many.service", uid, 1).await);
    }
    assert_eq!(load.agent.active(), MAX_QUERIES);
    for _ in 0..MAX_QUERIES_PER_WORKLOAD {
        load.hang(HONEST, 2000, 1).await;
    }
    assert_eq!(load.evicted(), MAX_QUERIES_PER_WORKLOAD);
    // Within the unit, too, no user takes the only permit of another.
    load.hang("/system.slice/many.service", 9000, 1).await;
    assert_eq!(
        finished(&mut hostile).await,
        vec![Err(SourceError::Busy); MAX_QUERIES_PER_WORKLOAD]
    );
}

#[tokio::test(start_paused = true)]
async fn subordinate_ids_of_a_person_are_one_workload() {
    let mut load = AgentUnderLoad::new();
    for number in 0..2 * u32::try_from(MAX_QUERIES).unwrap() {
        let session = format!("/user.slice/user-1001.slice/session-{number}.scope");
        load.hang(&session, 165_536 + number, 1).await;
    }
    assert_eq!(load.agent.active(), MAX_QUERIES_PER_WORKLOAD);
    load.is_answered(HONEST, 2000).await;
    assert_eq!(load.evicted(), 0);
}

#[tokio::test(start_paused = true)]
async fn only_query_of_a_workload_is_not_evicted() {
    let mut load = AgentUnderLoad::new();
    // One permit for each hostile query that is first, and none for the honest one.
    load.agent.gate.forget_permits(Semaphore::MAX_PERMITS);
    let slow = load.query(HONEST, 2000, false).await;
    let mut others = Vec::new();
    for unit in 0..4 * MAX_QUERIES {
        let cgroup = format!("/system.slice/hostile-{unit}.service");
        others.extend(load.hang(&cgroup, 1001, 1).await);
    }
    assert_eq!(load.agent.active(), MAX_QUERIES);
    sleep(QUERY_WAIT + AFTER_TIMEOUT).await;
    assert_eq!(finished(&mut others).await.len(), 3 * MAX_QUERIES + 1);
    assert!(!slow.is_finished());
    load.agent.gate.add_permits(1);
    let (result, took) = slow.await.unwrap();
    assert_eq!(
        (ids(result), took),
        (vec![SHOP.to_owned()], QUERY_WAIT + AFTER_TIMEOUT)
    );
    assert_eq!(load.evicted(), 0);
}

#[tokio::test(start_paused = true)]
async fn workload_that_waits_is_next_when_many_hold_one_query_each() {
    const INTERVAL: Duration = Duration::from_millis(500);
    let mut load = AgentUnderLoad::new();
    for unit in 0..MAX_QUERIES {
        let cgroup = format!("/system.slice/hostile-{unit}.service");
        load.hang(&cgroup, 1001, 1).await;
        // They do not all end at once.
        sleep(INTERVAL).await;
    }
    let start = Instant::now();
    // Its SDK retries.
    while load.query(HONEST, 2000, false).await.await.unwrap().0 == Err(SourceError::Busy) {}
    // That is when the first of the calls ends.
    let first_ends = CALL_TIMEOUT - INTERVAL * u32::try_from(MAX_QUERIES).unwrap();
    assert_eq!(start.elapsed(), first_ends);
    assert_eq!(load.evicted(), 0);
}

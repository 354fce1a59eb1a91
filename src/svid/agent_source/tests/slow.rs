//! Processes that the agent attests slowly, such as an attacker's with a program of 200 GB (T28).

use super::*;

const MINUTE: Duration = Duration::from_secs(60);
const VICTIM: u32 = 9000;

fn of(uid: u32, pid: u32) -> Arc<Caller> {
    caller_with(uid, pid, None, None)
}

/// Makes these processes and the victim's process known. From then on the agent never answers for
/// them, and the victim's entry is deleted.
async fn hide_behind(slow: &[(u32, u32)]) -> (Arc<AgentScript>, AgentSource) {
    let agent = AgentScript::reply(shop);
    let source = AgentSource::new(
        agent.clone(),
        AUDIENCE.to_owned(),
        false,
        8192,
        Clock::starting_at(now()),
        Metrics::default(),
    );
    for (uid, pid) in slow {
        assert_eq!(ids(source.identify(&of(*uid, *pid)).await), [SHOP]);
    }
    assert_eq!(ids(source.identify(&of(VICTIM, VICTIM)).await), [SHOP]);
    agent
        .hangs
        .lock()
        .unwrap()
        .extend(slow.iter().map(|(_, pid)| *pid));
    agent.set_reply(|pid| {
        if pid == VICTIM {
            Err(denied())
        } else {
            shop(pid)
        }
    });
    (agent, source)
}

/// Returns the time until the victim's deleted entry takes effect.
async fn lasts(agent: &AgentScript, source: &AgentSource) -> Duration {
    let deleted = Instant::now();
    while !source
        .identify(&of(VICTIM, VICTIM))
        .await
        .unwrap()
        .is_empty()
    {
        assert!(deleted.elapsed() < MINUTE * 10, "it lasts for ever");
        assert!(
            agent.active() <= 8 + 4,
            "{} calls at one time",
            agent.active()
        );
        sleep(Duration::from_secs(1)).await;
    }
    deleted.elapsed()
}

#[tokio::test(start_paused = true)]
async fn slow_processes_of_one_workload_do_not_hide_a_deleted_entry() {
    let slow: Vec<_> = (1..=500).map(|pid| (1001, pid)).collect();
    let (agent, source) = hide_behind(&slow).await;
    let lasted = lasts(&agent, &source).await;
    assert!(lasted < MINUTE, "{lasted:?}");
    // The agent does not have to attest one after the other, either.
    let calls = agent.calls();
    sleep(MINUTE * 8).await;
    assert!(agent.calls() < calls + 10, "{} more", agent.calls() - calls);
}

#[tokio::test(start_paused = true)]
async fn slow_processes_of_many_workloads_do_not_hide_a_deleted_entry() {
    let slow: Vec<_> = (1..=40).map(|pid| (1000 + pid, pid)).collect();
    let (agent, source) = hide_behind(&slow).await;
    let lasted = lasts(&agent, &source).await;
    // Until each is known as slow, it occupies a slot of quick queries for five seconds.
    assert!(lasted < MINUTE + Duration::from_secs(30), "{lasted:?}");
    sleep(MINUTE).await;
    assert_eq!(
        ids(source.identify(&of(VICTIM + 1, VICTIM + 1)).await),
        [SHOP]
    );
}

#[tokio::test(start_paused = true)]
async fn known_slow_processes_do_not_delay_others() {
    let slow: Vec<_> = (1..=200).map(|pid| (1000 + pid, pid)).collect();
    let (agent, source) = hide_behind(&slow).await;
    lasts(&agent, &source).await;
    assert_eq!(
        ids(source.identify(&of(VICTIM + 1, VICTIM + 1)).await),
        [SHOP]
    );
    sleep(MINUTE * 5).await;
    agent.set_reply(|pid| {
        if pid == VICTIM + 1 {
            Err(denied())
        } else {
            shop(pid)
        }
    });
    let deleted = Instant::now();
    while !source
        .identify(&of(VICTIM + 1, VICTIM + 1))
        .await
        .unwrap()
        .is_empty()
    {
        assert!(deleted.elapsed() < MINUTE, "{:?}", deleted.elapsed());
        sleep(Duration::from_secs(1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn slow_process_loses_its_own_deleted_entry() {
    // Alone on the node, and with others.
    for others in [0, 5] {
        let agent = AgentScript::reply(shop);
        let source = source(&agent);
        for pid in 0..=others {
            source.identify(&of(1000 + pid, 1 + pid)).await.unwrap();
        }
        agent.hangs.lock().unwrap().insert(1);
        let deleted = Instant::now();
        while source.identify(&of(1000, 1)).await.is_ok() {
            assert!(
                deleted.elapsed() < MINUTE * 15,
                "with {others}: it lasts for ever"
            );
            sleep(Duration::from_secs(1)).await;
        }
        assert!(
            deleted.elapsed() > MINUTE * 9,
            "with {others}: {:?}",
            deleted.elapsed()
        );
        for pid in 1..=others {
            assert_eq!(ids(source.identify(&of(1000 + pid, 1 + pid)).await), [SHOP]);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn known_process_keeps_its_identity_while_the_agent_hangs() {
    let agent = AgentScript::reply(shop);
    let source = source(&agent);
    for pid in 1..=50 {
        source.identify(&of(1000 + pid, pid)).await.unwrap();
    }
    // The agent hangs completely, or answers with an error.
    for hangs in [true, false] {
        if hangs {
            agent
                .hangs
                .lock()
                .unwrap()
                .extend((1..=50).chain([std::process::id()]));
        }
        agent.set_reply(|_| Err(SourceError::Unavailable("away".to_owned())));
        for _ in 0..120 {
            sleep(MINUTE).await;
            assert_eq!(ids(source.identify(&of(1001, 1)).await), [SHOP]);
        }
        agent.hangs.lock().unwrap().clear();
        agent.set_reply(shop);
        for _ in 0..60 {
            sleep(MINUTE).await;
            for pid in 1..=50 {
                assert_eq!(ids(source.identify(&of(1000 + pid, pid)).await), [SHOP]);
            }
        }
    }
    let calls = agent.calls();
    source.identify(&of(1001, 1)).await.unwrap();
    assert_eq!(agent.calls(), calls, "they were known throughout");
}

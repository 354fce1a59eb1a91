//! Processes that the agent attests slowly, such as an attacker's with a program of 200 GB (attack 28).

use super::*;

const MINUTE: Duration = Duration::from_secs(60);
const VICTIM: u32 = 9000;

fn of(uid: u32, pid: u32) -> Arc<Caller> {
    caller_with(uid, pid, None, None)
}

/// Has these known, and the victim's process; from then on the agent does not answer about these, and the victim's entry is
/// deleted.
async fn hide_behind(slow: &[(u32, u32)]) -> (Arc<AgentScript>, AgentSource) {
    let agent = AgentScript::says(shop);
    let source = AgentSource::new(
        agent.clone(),
        AUDIENCE.to_owned(),
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
    agent.now_says(|pid| {
        if pid == VICTIM {
            Err(denied())
        } else {
            shop(pid)
        }
    });
    (agent, source)
}

/// How long the victim's deleted entry lasts.
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
async fn slow_processes_of_one_workload_hide_nobodys_deleted_entry() {
    let slow: Vec<_> = (1..=500).map(|pid| (1001, pid)).collect();
    let (agent, source) = hide_behind(&slow).await;
    let lasted = lasts(&agent, &source).await;
    assert!(lasted < MINUTE, "{lasted:?}");
    // Nor is the agent kept at work on one after the other.
    let calls = agent.calls();
    sleep(MINUTE * 8).await;
    assert!(agent.calls() < calls + 10, "{} more", agent.calls() - calls);
}

#[tokio::test(start_paused = true)]
async fn slow_processes_of_many_workloads_hide_nobodys_deleted_entry() {
    let slow: Vec<_> = (1..=40).map(|pid| (1000 + pid, pid)).collect();
    let (agent, source) = hide_behind(&slow).await;
    let lasted = lasts(&agent, &source).await;
    // Until each is known as slow, it takes a quick query's slot for five seconds.
    assert!(lasted < MINUTE + Duration::from_secs(30), "{lasted:?}");
    sleep(MINUTE).await;
    assert_eq!(
        ids(source.identify(&of(VICTIM + 1, VICTIM + 1)).await),
        [SHOP]
    );
}

#[tokio::test(start_paused = true)]
async fn slow_processes_that_are_known_as_such_delay_nobody() {
    let slow: Vec<_> = (1..=200).map(|pid| (1000 + pid, pid)).collect();
    let (agent, source) = hide_behind(&slow).await;
    lasts(&agent, &source).await;
    assert_eq!(
        ids(source.identify(&of(VICTIM + 1, VICTIM + 1)).await),
        [SHOP]
    );
    sleep(MINUTE * 5).await;
    agent.now_says(|pid| {
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
async fn slow_processes_do_not_keep_their_own_deleted_entry_for_ever() {
    // Alone on the node, and beside others.
    for others in [0, 5] {
        let agent = AgentScript::says(shop);
        let source = source(&agent);
        for pid in 0..=others {
            source.identify(&of(1000 + pid, 1 + pid)).await.unwrap();
        }
        agent.hangs.lock().unwrap().insert(1);
        let deleted = Instant::now();
        while source.identify(&of(1000, 1)).await.is_ok() {
            assert!(
                deleted.elapsed() < MINUTE * 15,
                "beside {others}: it lasts for ever"
            );
            sleep(Duration::from_secs(1)).await;
        }
        assert!(
            deleted.elapsed() > MINUTE * 9,
            "beside {others}: {:?}",
            deleted.elapsed()
        );
        for pid in 1..=others {
            assert_eq!(ids(source.identify(&of(1000 + pid, 1 + pid)).await), [SHOP]);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_hangs_for_hours_takes_nothing_from_those_that_are_known() {
    let agent = AgentScript::says(shop);
    let source = source(&agent);
    for pid in 1..=50 {
        source.identify(&of(1000 + pid, pid)).await.unwrap();
    }
    // All of it, or it answers that it can't.
    for hangs in [true, false] {
        if hangs {
            agent
                .hangs
                .lock()
                .unwrap()
                .extend((1..=50).chain([std::process::id()]));
        }
        agent.now_says(|_| Err(SourceError::Unavailable("away".to_owned())));
        for _ in 0..120 {
            sleep(MINUTE).await;
            assert_eq!(ids(source.identify(&of(1001, 1)).await), [SHOP]);
        }
        agent.hangs.lock().unwrap().clear();
        agent.now_says(shop);
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

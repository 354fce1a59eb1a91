use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Instant;

use tokio::sync::oneshot;

use super::pool_state::{MAX_PER_WORKLOAD, MAX_THREADS};
use super::*;
use crate::caller::PeerFacts;
use crate::cgroup::CgroupPath;
use crate::clock::REQUEST_HOLD;

fn spawn(threads: &LookupThreads, uid: u32, task: impl Future<Output = ()> + Send + 'static) {
    threads.spawn(WorkloadKey::user(uid), task, || {});
}

/// Runs a task that reports whether it runs on a lookup thread, and returns the report.
async fn runs_on_lookup_thread(threads: &LookupThreads, uid: u32) -> bool {
    let (report, reports) = oneshot::channel();
    spawn(threads, uid, async move {
        let _ = report.send(on_lookup_thread());
    });
    reports.await.unwrap()
}

fn count(threads: &LookupThreads) -> usize {
    let state = threads.0.state();
    state.busy.len() + state.idle
}

#[tokio::test]
async fn task_starts_on_a_lookup_thread_and_continues_on_its_runtime() {
    let threads = LookupThreads::new(1);
    assert!(runs_on_lookup_thread(&threads, 1).await && !on_lookup_thread());
    let (go, wait) = oneshot::channel::<()>();
    let (report, mut reports) = tokio::sync::mpsc::unbounded_channel();
    spawn(&threads, 1, async move {
        report.send(on_lookup_thread()).unwrap();
        let _ = wait.await;
        report.send(on_lookup_thread()).unwrap();
    });
    assert_eq!(reports.recv().await, Some(true));
    // The task waits on its own runtime, so the one thread is free.
    assert!(runs_on_lookup_thread(&threads, 1).await);
    go.send(()).unwrap();
    // The task was woken on its own runtime.
    let second = reports.recv().await;
    assert!(second == Some(false) || reports.recv().await == Some(false));
}

#[tokio::test]
async fn blocked_threads_are_replaced() {
    let threads = LookupThreads::new(2);
    let mut held = Vec::new();
    for uid in 0..20 {
        for _ in 0..MAX_PER_WORKLOAD + 3 {
            let (release, wait) = mpsc::channel::<()>();
            held.push(release);
            spawn(&threads, uid, async move {
                // A task that has waited too long for a thread is on its own runtime. It must not
                // block the test itself there.
                if on_lookup_thread() {
                    let _ = wait.recv();
                }
            });
        }
    }
    for uid in 100..150 {
        assert!(runs_on_lookup_thread(&threads, uid).await);
    }
    // There are two threads for each workload that blocks, and at least two more that do not block.
    let all = count(&threads);
    assert!(
        (20 * MAX_PER_WORKLOAD + 1..=20 * MAX_PER_WORKLOAD + 4).contains(&all),
        "{all}"
    );
    drop(held);
    for uid in 0..20 {
        assert!(runs_on_lookup_thread(&threads, uid).await);
    }
    // The threads that have returned are too many.
    while count(&threads) > 2 || !threads.0.state().workloads.is_empty() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn pool_schedules_workloads_round_robin() {
    let threads = LookupThreads::new(1);
    let (release, wait) = mpsc::channel::<()>();
    spawn(&threads, 9, async move {
        let _ = wait.recv();
    });
    let (order, count) = (
        Arc::new(Mutex::new(Vec::new())),
        Arc::new(AtomicUsize::new(0)),
    );
    for uid in [1, 1, 1, 1, 1, 2] {
        let (order, count) = (order.clone(), count.clone());
        spawn(&threads, uid, async move {
            order.lock().unwrap().push(uid);
            count.fetch_add(1, Ordering::SeqCst);
        });
    }
    release.send(()).unwrap();
    while count.load(Ordering::SeqCst) < 6 {
        tokio::task::yield_now().await;
    }
    let second = order
        .lock()
        .unwrap()
        .iter()
        .position(|uid| *uid == 2)
        .unwrap();
    assert!(second <= 2, "{order:?}");
}

#[tokio::test]
async fn panic_ends_only_its_own_task() {
    let threads = LookupThreads::new(1);
    spawn(&threads, 1, async { panic!("on purpose") });
    assert!(runs_on_lookup_thread(&threads, 1).await);
}

#[tokio::test]
async fn blocked_task_is_abandoned_once() {
    let threads = LookupThreads::new(1);
    let (release, wait) = mpsc::channel::<()>();
    let (on_abandon, mut abandoned) = tokio::sync::mpsc::unbounded_channel();
    let start = Instant::now();
    let task = async move {
        let _ = wait.recv();
    };
    threads.spawn(WorkloadKey::user(1), task, move || {
        on_abandon.send(start.elapsed()).unwrap()
    });
    // It holds with no other job to run, and while others run.
    assert!(abandoned.recv().await.unwrap() >= REQUEST_HOLD);
    assert_eq!(abandoned.recv().await, None, "the closure is gone");
    assert!(runs_on_lookup_thread(&threads, 2).await);
    drop(release);
    assert!(runs_on_lookup_thread(&threads, 1).await);
    while threads.0.state().watched {
        tokio::task::yield_now().await;
    }
}

/// Returns the workload of a person.
fn person(number: u32) -> WorkloadKey {
    PeerFacts {
        uid: number,
        cgroup: CgroupPath::parse(&format!("/user.slice/user-{number}.slice/session-1.scope")),
        pod: None,
        netns_inode: None,
    }
    .workload_key()
}

/// Covers T29: one party with many users, such as subordinate ids without systemd, blocks as many
/// threads as it can.
#[tokio::test]
async fn scope_that_blocks_leaves_threads_for_others() {
    let threads = LookupThreads::new(2);
    let (release, wait) = std::sync::mpsc::channel::<()>();
    let wait = Arc::new(Mutex::new(wait));
    let block = |uid| {
        let wait = wait.clone();
        spawn(&threads, uid, async move {
            if on_lookup_thread() {
                // All of them wait for the one that waits for the channel.
                let _ = wait.lock().map(|wait| wait.recv());
            }
        });
    };
    let busy = || threads.0.state().busy.len();
    let is_waiting = || {
        let state = threads.0.state();
        state
            .workloads
            .values()
            .any(|queue| !queue.waiting.is_empty())
    };
    while busy() < MAX_THREADS / 2 {
        // On a loaded machine jobs expire before they get a thread.
        if !is_waiting() {
            (0..400).for_each(|uid| (0..MAX_PER_WORKLOAD).for_each(|_| block(uid)));
        }
        sleep(STUCK_AFTER).await;
    }
    for number in 0..100 {
        let (report, reports) = oneshot::channel();
        let task = async move {
            let _ = report.send(on_lookup_thread());
        };
        threads.spawn(person(number), task, || {});
        assert!(reports.await.unwrap());
    }
    assert!(busy() <= MAX_THREADS / 2 + 4, "{}", busy());
    drop(release);
    while !threads.0.state().workloads.is_empty() {
        tokio::task::yield_now().await;
    }
}

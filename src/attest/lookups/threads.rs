//! Threads for connections whose callers' processes are looked at: as many as there are processors, and one more for each that
//! is kept waiting.
//!
//! A connection goes on there as far as it gets without waiting for anything, which mostly is to its end: credentials are
//! cached, and the request is there. What is left then goes on where it came from. So it changes threads once, and such a
//! thread is never one that the runtime needs to notice events.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::time::sleep;

use crate::caller::Owner;
use crate::clock::HOLD;
use crate::telemetry::Quota;

/// Of one workload at a time. One that is kept waiting leaves the workload another one.
const MAX_PER_WORKLOAD: usize = 2;
/// A connection that takes longer is taken to be kept waiting, and another thread started in its place. Most take 50 us.
const STUCK_AFTER: Duration = Duration::from_millis(10);
/// How often the log says that none can be started.
const TELL_AGAIN: Duration = Duration::from_secs(60);
/// All threads, those that are kept waiting included.
const MAX_THREADS: usize = 512;

thread_local! {
    /// Whether this thread may be kept waiting.
    static MAY_WAIT: Cell<bool> = const { Cell::new(false) };
}

/// Whether this is one of [`LookupThreads`].
pub(super) fn is_one_of_them() -> bool {
    MAY_WAIT.get()
}

/// Runs connections. Cheap to clone; the threads end with the process.
#[derive(Clone)]
pub struct LookupThreads(Arc<Shared>);

struct Shared {
    /// As many as are to run while nothing is kept waiting.
    wanted: usize,
    state: Mutex<State>,
    work: Condvar,
}

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

struct Job {
    task: Task,
    /// The runtime that it comes from.
    home: Handle,
    queued: Instant,
}

struct State {
    workloads: HashMap<Owner, Queue>,
    /// Workloads that have something to run and may, in the order of their turns.
    ready: VecDeque<Owner>,
    idle: usize,
    /// Since when each of the others runs something, by its number.
    busy: HashMap<u64, Instant>,
    next_number: u64,
    /// Whether somebody is going to look for threads that are kept waiting.
    watched: bool,
    /// What the log says of threads that cannot be started.
    unstarted: Quota,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Job>,
    running: usize,
    is_ready: bool,
}

impl fmt::Debug for LookupThreads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LookupThreads").field("wanted", &self.0.wanted).finish_non_exhaustive()
    }
}

impl Default for LookupThreads {
    /// One for each processor. They are started when there is something to run.
    fn default() -> Self {
        Self::new(thread::available_parallelism().map_or(1, usize::from))
    }
}

impl LookupThreads {
    fn new(wanted: usize) -> Self {
        Self(Arc::new(Shared { wanted, state: Mutex::default(), work: Condvar::new() }))
    }

    /// Runs `task` for this workload, after what it has there already; fairly between workloads. To be called within a
    /// runtime, on which the task goes on when it has to wait for something, or has waited too long for a thread.
    pub fn spawn(&self, owner: Owner, task: impl Future<Output = ()> + Send + 'static) {
        let job = Job { task: Box::pin(task), home: Handle::current(), queued: Instant::now() };
        let mut state = self.0.state();
        state.push(owner, job);
        if state.idle > 0 {
            drop(state);
            self.0.work.notify_one();
            return;
        }
        if !std::mem::replace(&mut state.watched, true) {
            tokio::spawn(self.clone().watch());
        }
        if state.busy.len() < self.0.wanted {
            let number = state.new_number();
            drop(state);
            self.start_thread(number);
        }
    }

    /// For as long as something waits to be run: starts threads in the place of those that are kept waiting.
    async fn watch(self) {
        loop {
            sleep(STUCK_AFTER).await;
            let missing = {
                let mut state = self.0.state();
                state.expire();
                if state.workloads.values().all(|queue| queue.waiting.is_empty()) {
                    state.watched = false;
                    return;
                }
                state.missing(self.0.wanted)
            };
            missing.into_iter().for_each(|number| self.start_thread(number));
        }
    }

    fn start_thread(&self, number: u64) {
        let shared = self.0.clone();
        let started = thread::Builder::new().name("awsvid-lookups".to_owned()).spawn(move || shared.run(number));
        if let Err(error) = started {
            let mut state = self.0.state();
            state.busy.remove(&number);
            if let Some(missed) = state.unstarted.take() {
                tracing::warn!(%error, missed, "no thread can be started to look at callers' processes");
            }
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, number: u64) {
        MAY_WAIT.set(true);
        let mut state = self.state();
        loop {
            if let Some((owner, job)) = state.next() {
                state.busy.insert(number, Instant::now());
                drop(state);
                job.run();
                state = self.state();
                state.done(owner);
                continue;
            }
            state.busy.remove(&number);
            if state.idle + state.moving() >= self.wanted {
                // It was started in the place of one that has come back.
                return;
            }
            state.idle += 1;
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
            state.busy.insert(number, Instant::now());
        }
    }
}

impl Job {
    /// As far as it gets, and the rest at home.
    fn run(mut self) {
        let home = self.home.clone();
        let entered = home.enter();
        let mut context = Context::from_waker(Waker::noop());
        let polled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.task.as_mut().poll(&mut context)));
        drop(entered);
        // A panic is in the log, and ends this connection alone.
        if polled.is_ok_and(|polled| polled.is_pending()) {
            self.go_home();
        }
    }

    fn go_home(self) {
        // There it is polled once more, and notes who is to be woken.
        self.home.spawn(self.task);
    }
}

impl Default for State {
    fn default() -> Self {
        Self {
            workloads: HashMap::new(),
            ready: VecDeque::new(),
            idle: 0,
            busy: HashMap::new(),
            next_number: 0,
            watched: false,
            unstarted: Quota::new(1, TELL_AGAIN),
        }
    }
}

impl State {
    /// Of a thread that is about to be started.
    fn new_number(&mut self) -> u64 {
        self.next_number += 1;
        self.busy.insert(self.next_number, Instant::now());
        self.next_number
    }

    /// Threads to start, so that `wanted` are not kept waiting.
    fn missing(&mut self, wanted: usize) -> Vec<u64> {
        let missing = wanted.saturating_sub(self.moving()).min(self.ready.len());
        let missing = missing.min(MAX_THREADS.saturating_sub(self.busy.len()));
        (0..missing).map(|_| self.new_number()).collect()
    }

    fn push(&mut self, owner: Owner, job: Job) {
        let queue = self.workloads.entry(owner.clone()).or_default();
        queue.waiting.push_back(job);
        if queue.running < MAX_PER_WORKLOAD && !std::mem::replace(&mut queue.is_ready, true) {
            self.ready.push_back(owner);
        }
    }

    fn next(&mut self) -> Option<(Owner, Job)> {
        loop {
            let owner = self.ready.pop_front()?;
            let Some(queue) = self.workloads.get_mut(&owner) else { continue };
            queue.is_ready = false;
            // It may have gone home.
            let Some(job) = queue.waiting.pop_front() else { continue };
            queue.running += 1;
            if queue.running < MAX_PER_WORKLOAD && !queue.waiting.is_empty() {
                queue.is_ready = true;
                self.ready.push_back(owner.clone());
            }
            return Some((owner, job));
        }
    }

    fn done(&mut self, owner: Owner) {
        let Some(queue) = self.workloads.get_mut(&owner) else { return };
        queue.running -= 1;
        if queue.waiting.is_empty() {
            if queue.running == 0 {
                self.workloads.remove(&owner);
            }
        } else if !std::mem::replace(&mut queue.is_ready, true) {
            self.ready.push_back(owner);
        }
    }

    /// Threads that run something and are not kept waiting.
    fn moving(&self) -> usize {
        self.busy.values().filter(|since| since.elapsed() < STUCK_AFTER).count()
    }

    /// What has waited as long as a request is held goes home: there it is refused, if it has to wait again.
    fn expire(&mut self) {
        for queue in self.workloads.values_mut() {
            while queue.waiting.front().is_some_and(|job| job.queued.elapsed() >= HOLD) {
                if let Some(job) = queue.waiting.pop_front() {
                    job.go_home();
                }
            }
        }
        self.workloads.retain(|_, queue| queue.running > 0 || !queue.waiting.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use tokio::sync::oneshot;

    use super::*;

    /// Runs a task that says on which kind of thread it was, and is answered.
    async fn where_it_runs(threads: &LookupThreads, uid: u32) -> bool {
        let (say, said) = oneshot::channel();
        threads.spawn(Owner::user(uid), async move {
            let _ = say.send(is_one_of_them());
        });
        said.await.unwrap()
    }

    fn count(threads: &LookupThreads) -> usize {
        let state = threads.0.state();
        state.busy.len() + state.idle
    }

    #[tokio::test]
    async fn task_runs_there_and_goes_on_at_home() {
        let threads = LookupThreads::new(1);
        assert!(where_it_runs(&threads, 1).await && !is_one_of_them());
        let (go, wait) = oneshot::channel::<()>();
        let (say, mut said) = tokio::sync::mpsc::unbounded_channel();
        threads.spawn(Owner::user(1), async move {
            say.send(is_one_of_them()).unwrap();
            let _ = wait.await;
            say.send(is_one_of_them()).unwrap();
        });
        assert_eq!(said.recv().await, Some(true));
        // It waits at home, so the one thread is free.
        assert!(where_it_runs(&threads, 1).await);
        go.send(()).unwrap();
        // What woke it was at home.
        let second = said.recv().await;
        assert!(second == Some(false) || said.recv().await == Some(false));
    }

    #[tokio::test]
    async fn threads_that_are_kept_waiting_are_replaced() {
        let threads = LookupThreads::new(2);
        let mut held = Vec::new();
        for uid in 0..20 {
            for _ in 0..MAX_PER_WORKLOAD + 3 {
                let (release, wait) = mpsc::channel::<()>();
                held.push(release);
                threads.spawn(Owner::user(uid), async move {
                    // One that waits too long for its turn is at home, where it must not keep the test itself waiting.
                    if is_one_of_them() {
                        let _ = wait.recv();
                    }
                });
            }
        }
        for uid in 100..150 {
            assert!(where_it_runs(&threads, uid).await);
        }
        // Two for each workload that is kept waiting, and at least those two that are not.
        let all = count(&threads);
        assert!((20 * MAX_PER_WORKLOAD + 1..=20 * MAX_PER_WORKLOAD + 4).contains(&all), "{all}");
        drop(held);
        for uid in 0..20 {
            assert!(where_it_runs(&threads, uid).await);
        }
        // Those that came back are too many.
        while count(&threads) > 2 {
            tokio::task::yield_now().await;
        }
        assert!(threads.0.state().workloads.is_empty());
    }

    #[tokio::test]
    async fn workload_with_many_tasks_leaves_others_their_turns() {
        let threads = LookupThreads::new(1);
        let (release, wait) = mpsc::channel::<()>();
        threads.spawn(Owner::user(9), async move {
            let _ = wait.recv();
        });
        let (order, count) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
        for uid in [1, 1, 1, 1, 1, 2] {
            let (order, count) = (order.clone(), count.clone());
            threads.spawn(Owner::user(uid), async move {
                order.lock().unwrap().push(uid);
                count.fetch_add(1, Ordering::SeqCst);
            });
        }
        release.send(()).unwrap();
        while count.load(Ordering::SeqCst) < 6 {
            tokio::task::yield_now().await;
        }
        let second = order.lock().unwrap().iter().position(|uid| *uid == 2).unwrap();
        assert!(second <= 2, "{order:?}");
    }

    #[tokio::test]
    async fn task_that_panics_ends_alone() {
        let threads = LookupThreads::new(1);
        threads.spawn(Owner::user(1), async { panic!("on purpose") });
        assert!(where_it_runs(&threads, 1).await);
    }
}

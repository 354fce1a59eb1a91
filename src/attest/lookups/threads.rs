//! Threads for connections that read their callers' processes: one per CPU, and one more for each
//! thread that is blocked.
//!
//! A connection runs there as far as it gets without waiting. Mostly that is to its end:
//! credentials are cached, and the request has arrived. If it has to wait, it continues on the
//! runtime that it came from. So it changes threads once, and a lookup thread is never one that the
//! runtime needs to notice events.

#![expect(clippy::disallowed_methods, reason = "these threads have no runtime")]

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

use crate::caller::WorkloadKey;
use crate::clock::REQUEST_HOLD;
use crate::limits::LogQuota;
use crate::telemetry::in_current_request;

/// The number of reads of one workload that may run at a time. If one of them blocks, another one
/// remains.
const MAX_PER_WORKLOAD: usize = 2;
/// The time after which a thread counts as blocked, and another one is started to replace it. Most
/// connections take 50 us.
const STUCK_AFTER: Duration = Duration::from_millis(10);
/// The shortest interval between two log lines about threads that cannot be started.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// The number of all threads, with those that are blocked. A scope (T29) gets another one only
/// while more are left than it has. So one scope blocks half of them, and ten leave an eleventh of
/// them. Only 256 scopes, each with two blocked reads, can block all. [`crate::limits`] has the
/// reason why these are no permits of a `FairSemaphore`.
const MAX_THREADS: usize = 512;

thread_local! {
    /// Whether this thread may block.
    static IS_LOOKUP_THREAD: Cell<bool> = const { Cell::new(false) };
}

/// Returns whether the current thread is a lookup thread.
pub(super) fn on_lookup_thread() -> bool {
    IS_LOOKUP_THREAD.get()
}

/// Makes reads run on the current thread, as on a lookup thread.
#[cfg(test)]
pub(crate) fn set_lookup_thread(is_one: bool) {
    IS_LOOKUP_THREAD.set(is_one);
}

/// The pool of lookup threads. Clones share one pool, and the threads end with the process.
#[derive(Clone)]
pub struct LookupThreads(Arc<ThreadPool>);

struct ThreadPool {
    /// The number of threads that should run and not be blocked.
    target: usize,
    state: Mutex<PoolState>,
    work: Condvar,
}

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;
type GiveUp = Box<dyn FnOnce() + Send>;

struct LookupJob {
    task: Task,
    give_up: GiveUp,
    /// The runtime that the job comes from. `None` if it must not continue there.
    runtime: Option<Handle>,
    queued: Instant,
}

struct PoolState {
    workloads: HashMap<WorkloadKey, WorkloadQueue>,
    /// The workloads that have a job to run and may run it, in round-robin order.
    ready: VecDeque<WorkloadKey>,
    idle: usize,
    /// The threads that run or are about to run a job, by number.
    busy: HashMap<u64, BusyThread>,
    next_number: u64,
    /// Whether a task watches for blocked threads.
    watched: bool,
    /// The log quota for threads that cannot be started.
    unstarted: LogQuota,
}

/// A thread that runs a job, or is about to.
struct BusyThread {
    since: Instant,
    /// The workload and the callback of its job, until the job has returned or was given up.
    give_up: Option<(WorkloadKey, GiveUp)>,
}

#[derive(Default)]
struct WorkloadQueue {
    waiting: VecDeque<LookupJob>,
    running: usize,
    is_ready: bool,
}

impl fmt::Debug for LookupThreads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LookupThreads")
            .field("target", &self.0.target)
            .finish_non_exhaustive()
    }
}

impl Default for LookupThreads {
    /// Creates a pool with one thread per CPU. Threads are started when there is a job.
    fn default() -> Self {
        Self::new(thread::available_parallelism().map_or(1, usize::from))
    }
}

impl LookupThreads {
    fn new(target: usize) -> Self {
        Self(Arc::new(ThreadPool {
            target,
            state: Mutex::default(),
            work: Condvar::new(),
        }))
    }

    /// Runs `task` for this workload, after the jobs that it already has. Workloads get threads in
    /// round-robin order. Call it within a runtime: the task continues there if it has to wait, or
    /// has waited too long for a thread.
    ///
    /// Calls `give_up` if the task blocks its thread for as long as a request is held. `give_up`
    /// must not block.
    pub fn spawn(
        &self,
        workload: WorkloadKey,
        task: impl Future<Output = ()> + Send + 'static,
        give_up: impl FnOnce() + Send + 'static,
    ) {
        self.push(
            workload,
            Box::pin(task),
            Box::new(give_up),
            Some(Handle::current()),
        );
    }

    /// Runs a task that never waits for events, for the current request. It is dropped if it has
    /// waited too long for a thread.
    pub(super) fn spawn_read(
        &self,
        workload: WorkloadKey,
        task: impl Future<Output = ()> + Send + 'static,
        give_up: impl FnOnce() + Send + 'static,
    ) {
        let task = in_current_request(task);
        self.push(workload, Box::pin(task), Box::new(give_up), None);
    }

    fn push(&self, workload: WorkloadKey, task: Task, give_up: GiveUp, runtime: Option<Handle>) {
        let job = LookupJob {
            task,
            give_up,
            runtime,
            queued: Instant::now(),
        };
        let mut state = self.0.state();
        state.push(workload, job);
        if !std::mem::replace(&mut state.watched, true) {
            tokio::spawn(self.clone().watch());
        }
        if state.idle > 0 {
            drop(state);
            self.0.work.notify_one();
        } else if state.busy.len() < self.0.target {
            let number = state.new_number();
            drop(state);
            self.start_thread(number);
        }
    }

    /// Watches the threads while a job runs or waits: starts threads to replace blocked ones, and
    /// gives up jobs that block too long.
    async fn watch(self) {
        loop {
            sleep(STUCK_AFTER).await;
            let (missing, overdue) = {
                let mut state = self.0.state();
                state.expire();
                if state.is_idle() {
                    state.watched = false;
                    return;
                }
                (state.missing(self.0.target), state.overdue())
            };
            missing
                .into_iter()
                .for_each(|number| self.start_thread(number));
            for (workload, give_up) in overdue {
                tracing::warn!(
                    ?workload,
                    "reading a caller's process blocks; giving up its connection"
                );
                give_up();
            }
        }
    }

    fn start_thread(&self, number: u64) {
        let shared = self.0.clone();
        let started = thread::Builder::new()
            .name("awsvid-lookups".to_owned())
            .spawn(move || shared.run(number));
        if let Err(error) = started {
            let mut state = self.0.state();
            state.busy.remove(&number);
            if let Some(missed) = state.unstarted.take() {
                tracing::warn!(%error, missed, "cannot start a lookup thread");
            }
        }
    }
}

impl ThreadPool {
    fn state(&self) -> MutexGuard<'_, PoolState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, number: u64) {
        IS_LOOKUP_THREAD.set(true);
        let mut state = self.state();
        loop {
            if let Some((workload, job)) = state.next() {
                let LookupJob {
                    task,
                    give_up,
                    runtime,
                    ..
                } = job;
                state.busy.insert(
                    number,
                    BusyThread {
                        since: Instant::now(),
                        give_up: Some((workload.clone(), give_up)),
                    },
                );
                drop(state);
                run(task, runtime.as_ref());
                state = self.state();
                if state
                    .busy
                    .insert(number, BusyThread::default())
                    .is_some_and(|busy| busy.give_up.is_none())
                {
                    tracing::info!(
                        ?workload,
                        "a blocked read of a caller's process has returned"
                    );
                }
                state.done(workload);
                continue;
            }
            state.busy.remove(&number);
            if state.idle + state.count_running() >= self.target {
                // This thread replaced one that has returned since.
                return;
            }
            state.idle += 1;
            state = self
                .work
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
            state.busy.insert(number, BusyThread::default());
        }
    }
}

impl Default for BusyThread {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            give_up: None,
        }
    }
}

/// Polls a task once, and continues it on its own runtime if it has to wait.
fn run(mut task: Task, runtime: Option<&Handle>) {
    let entered = runtime.map(Handle::enter);
    let mut context = Context::from_waker(Waker::noop());
    let polled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        task.as_mut().poll(&mut context)
    }));
    drop(entered);
    // A panic is logged, and ends only this connection.
    if let (Ok(true), Some(runtime)) = (polled.map(|polled| polled.is_pending()), runtime) {
        // The runtime polls the task again, which registers its waker.
        runtime.spawn(task);
    }
}

impl Default for PoolState {
    fn default() -> Self {
        Self {
            workloads: HashMap::new(),
            ready: VecDeque::new(),
            idle: 0,
            busy: HashMap::new(),
            next_number: 0,
            watched: false,
            unstarted: LogQuota::new(1, LOG_INTERVAL),
        }
    }
}

impl PoolState {
    /// Registers a thread that is about to be started, and returns its number.
    fn new_number(&mut self) -> u64 {
        self.next_number += 1;
        self.busy.insert(self.next_number, BusyThread::default());
        self.next_number
    }

    /// Registers the threads to start, so that `target` threads are not blocked.
    fn missing(&mut self, target: usize) -> Vec<u64> {
        let ready = self.ready.iter().filter(|workload| self.may_run(workload));
        let missing = target
            .saturating_sub(self.count_running())
            .min(ready.count());
        let missing = missing.min(MAX_THREADS.saturating_sub(self.busy.len()));
        (0..missing).map(|_| self.new_number()).collect()
    }

    fn push(&mut self, workload: WorkloadKey, job: LookupJob) {
        let queue = self.workloads.entry(workload.clone()).or_default();
        queue.waiting.push_back(job);
        if queue.running < MAX_PER_WORKLOAD && !std::mem::replace(&mut queue.is_ready, true) {
            self.ready.push_back(workload);
        }
    }

    /// Returns whether this workload's scope may have another thread.
    fn may_run(&self, workload: &WorkloadKey) -> bool {
        let left = MAX_THREADS.saturating_sub(self.busy.len());
        // The count takes a while, and is needed only while threads are blocked.
        if left > MAX_THREADS / 2 {
            return true;
        }
        let of_scope = self
            .workloads
            .iter()
            .filter(|(key, _)| key.scope() == workload.scope());
        of_scope.map(|(_, queue)| queue.running).sum::<usize>() < left
    }

    fn next(&mut self) -> Option<(WorkloadKey, LookupJob)> {
        loop {
            let first = self
                .ready
                .iter()
                .position(|workload| self.may_run(workload))?;
            let workload = self.ready.remove(first)?;
            let Some(queue) = self.workloads.get_mut(&workload) else {
                continue;
            };
            queue.is_ready = false;
            // The queue is empty if the job has expired.
            let Some(job) = queue.waiting.pop_front() else {
                continue;
            };
            queue.running += 1;
            if queue.running < MAX_PER_WORKLOAD && !queue.waiting.is_empty() {
                queue.is_ready = true;
                self.ready.push_back(workload.clone());
            }
            return Some((workload, job));
        }
    }

    fn done(&mut self, workload: WorkloadKey) {
        let Some(queue) = self.workloads.get_mut(&workload) else {
            return;
        };
        queue.running -= 1;
        if queue.waiting.is_empty() {
            if queue.running == 0 {
                self.workloads.remove(&workload);
            }
        } else if !std::mem::replace(&mut queue.is_ready, true) {
            self.ready.push_back(workload);
        }
    }

    /// Returns whether no job can be run or given up.
    fn is_idle(&self) -> bool {
        self.workloads
            .values()
            .all(|queue| queue.waiting.is_empty())
            && self.busy.values().all(|busy| busy.give_up.is_none())
    }

    /// Returns the jobs that have blocked their threads too long.
    fn overdue(&mut self) -> Vec<(WorkloadKey, GiveUp)> {
        let overdue = self
            .busy
            .values_mut()
            .filter(|busy| busy.since.elapsed() >= REQUEST_HOLD);
        overdue.filter_map(|busy| busy.give_up.take()).collect()
    }

    /// Returns the number of threads that run a job and are not blocked.
    fn count_running(&self) -> usize {
        self.busy
            .values()
            .filter(|busy| busy.since.elapsed() < STUCK_AFTER)
            .count()
    }

    /// Moves jobs that have waited as long as a request is held to their own runtime. There they
    /// are rejected if they have to wait again.
    fn expire(&mut self) {
        for queue in self.workloads.values_mut() {
            while queue
                .waiting
                .front()
                .is_some_and(|job| job.queued.elapsed() >= REQUEST_HOLD)
            {
                if let Some(LookupJob {
                    task,
                    runtime: Some(runtime),
                    ..
                }) = queue.waiting.pop_front()
                {
                    runtime.spawn(task);
                }
            }
        }
        self.workloads
            .retain(|_, queue| queue.running > 0 || !queue.waiting.is_empty());
    }
}

#[cfg(test)]
mod tests;

//! Threads for connections that read their callers' processes: one per CPU, and one more for each
//! thread that is blocked.
//!
//! A connection runs there as far as it gets without waiting. Mostly that is to its end:
//! credentials are cached, and the request has arrived. If it has to wait, it continues on the
//! runtime that it came from. So it changes threads once, and a lookup thread is never one that the
//! runtime needs to notice events.

use std::cell::Cell;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::thread;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::sleep;

use crate::caller::WorkloadKey;
use crate::telemetry::in_current_request;

mod pool_state;

use pool_state::{BusyThread, LookupJob, OnAbandon, PoolState, now};

/// The time after which a thread counts as blocked, and another one is started to replace it. Most
/// connections take 50 us.
const STUCK_AFTER: Duration = Duration::from_millis(10);

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
    /// Calls `on_abandon` if the task blocks its thread for as long as a request is held. That must
    /// not block.
    pub fn spawn(
        &self,
        workload: WorkloadKey,
        task: impl Future<Output = ()> + Send + 'static,
        on_abandon: impl FnOnce() + Send + 'static,
    ) {
        self.push(
            workload,
            Box::pin(task),
            Box::new(on_abandon),
            Some(Handle::current()),
        );
    }

    /// Runs a task that never waits for events, for the current request. It is dropped if it has
    /// waited too long for a thread.
    pub(super) fn spawn_read(
        &self,
        workload: WorkloadKey,
        task: impl Future<Output = ()> + Send + 'static,
        on_abandon: impl FnOnce() + Send + 'static,
    ) {
        let task = in_current_request(task);
        self.push(workload, Box::pin(task), Box::new(on_abandon), None);
    }

    fn push(
        &self,
        workload: WorkloadKey,
        task: Task,
        on_abandon: OnAbandon,
        runtime: Option<Handle>,
    ) {
        let job = LookupJob {
            task,
            on_abandon,
            runtime,
            queued: now(),
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
    /// abandons jobs that block too long.
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
            for (workload, on_abandon) in overdue {
                tracing::warn!(
                    ?workload,
                    "reading a caller's process blocks; giving up its connection"
                );
                on_abandon();
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
                    on_abandon,
                    runtime,
                    ..
                } = job;
                state.busy.insert(
                    number,
                    BusyThread {
                        since: now(),
                        on_abandon: Some((workload.clone(), on_abandon)),
                    },
                );
                drop(state);
                run(task, runtime.as_ref());
                state = self.state();
                if state
                    .busy
                    .insert(number, BusyThread::default())
                    .is_some_and(|busy| busy.on_abandon.is_none())
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

#[cfg(test)]
mod tests;

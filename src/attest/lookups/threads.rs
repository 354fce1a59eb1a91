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

/// Has looks run right on this thread, as on one of [`LookupThreads`].
#[cfg(test)]
pub(crate) fn let_wait(may: bool) {
    MAY_WAIT.set(may);
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
type GiveUp = Box<dyn FnOnce() + Send>;

struct Job {
    task: Task,
    give_up: GiveUp,
    /// The runtime that it comes from; `None` if it is not to go on there.
    home: Option<Handle>,
    queued: Instant,
}

struct State {
    workloads: HashMap<Owner, Queue>,
    /// Workloads that have something to run and may, in the order of their turns.
    ready: VecDeque<Owner>,
    idle: usize,
    /// The others, by their numbers.
    busy: HashMap<u64, Busy>,
    next_number: u64,
    /// Whether somebody is going to look for threads that are kept waiting.
    watched: bool,
    /// What the log says of threads that cannot be started.
    unstarted: Quota,
}

/// A thread that is about to run something, or does.
struct Busy {
    since: Instant,
    /// Of what it runs, until that has returned or was given up.
    give_up: Option<(Owner, GiveUp)>,
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
    ///
    /// `give_up` is called if the task keeps its thread waiting for as long as a request is held; it must not wait.
    pub fn spawn(
        &self,
        owner: Owner,
        task: impl Future<Output = ()> + Send + 'static,
        give_up: impl FnOnce() + Send + 'static,
    ) {
        self.push(owner, Box::pin(task), Box::new(give_up), Some(Handle::current()));
    }

    /// The same for a task that never waits for events, and is dropped if it has waited too long for a thread.
    pub(super) fn spawn_here(
        &self,
        owner: Owner,
        task: impl Future<Output = ()> + Send + 'static,
        give_up: impl FnOnce() + Send + 'static,
    ) {
        self.push(owner, Box::pin(task), Box::new(give_up), None);
    }

    fn push(&self, owner: Owner, task: Task, give_up: GiveUp, home: Option<Handle>) {
        let job = Job { task, give_up, home, queued: Instant::now() };
        let mut state = self.0.state();
        state.push(owner, job);
        if !std::mem::replace(&mut state.watched, true) {
            tokio::spawn(self.clone().watch());
        }
        if state.idle > 0 {
            drop(state);
            self.0.work.notify_one();
        } else if state.busy.len() < self.0.wanted {
            let number = state.new_number();
            drop(state);
            self.start_thread(number);
        }
    }

    /// For as long as something runs or waits to be run: starts threads in the place of those that are kept waiting, and gives
    /// up what keeps them waiting too long.
    async fn watch(self) {
        loop {
            sleep(STUCK_AFTER).await;
            let (missing, overdue) = {
                let mut state = self.0.state();
                state.expire();
                if state.is_quiet() {
                    state.watched = false;
                    return;
                }
                (state.missing(self.0.wanted), state.overdue())
            };
            missing.into_iter().for_each(|number| self.start_thread(number));
            for (owner, give_up) in overdue {
                tracing::warn!(
                    workload = ?owner,
                    "a look at a caller's process does not come back; that connection is given up"
                );
                give_up();
            }
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
                let Job { task, give_up, home, .. } = job;
                state.busy.insert(number, Busy { since: Instant::now(), give_up: Some((owner.clone(), give_up)) });
                drop(state);
                run(task, home.as_ref());
                state = self.state();
                if state.busy.insert(number, Busy::default()).is_some_and(|busy| busy.give_up.is_none()) {
                    tracing::info!(workload = ?owner, "the look at a caller's process has come back");
                }
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
            state.busy.insert(number, Busy::default());
        }
    }
}

impl Default for Busy {
    fn default() -> Self {
        Self { since: Instant::now(), give_up: None }
    }
}

/// Runs a task as far as it gets, and the rest at home.
fn run(mut task: Task, home: Option<&Handle>) {
    let entered = home.map(Handle::enter);
    let mut context = Context::from_waker(Waker::noop());
    let polled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| task.as_mut().poll(&mut context)));
    drop(entered);
    // A panic is in the log, and ends this connection alone.
    if let (Ok(true), Some(home)) = (polled.map(|polled| polled.is_pending()), home) {
        // There it is polled once more, and notes who is to be woken.
        home.spawn(task);
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
        self.busy.insert(self.next_number, Busy::default());
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

    /// Whether there is nothing to run, and nothing that could be given up.
    fn is_quiet(&self) -> bool {
        self.workloads.values().all(|queue| queue.waiting.is_empty())
            && self.busy.values().all(|busy| busy.give_up.is_none())
    }

    /// What has kept a thread waiting too long.
    fn overdue(&mut self) -> Vec<(Owner, GiveUp)> {
        let overdue = self.busy.values_mut().filter(|busy| busy.since.elapsed() >= HOLD);
        overdue.filter_map(|busy| busy.give_up.take()).collect()
    }

    /// Threads that run something and are not kept waiting.
    fn moving(&self) -> usize {
        self.busy.values().filter(|busy| busy.since.elapsed() < STUCK_AFTER).count()
    }

    /// What has waited as long as a request is held goes home: there it is refused, if it has to wait again.
    fn expire(&mut self) {
        for queue in self.workloads.values_mut() {
            while queue.waiting.front().is_some_and(|job| job.queued.elapsed() >= HOLD) {
                if let Some(Job { task, home: Some(home), .. }) = queue.waiting.pop_front() {
                    home.spawn(task);
                }
            }
        }
        self.workloads.retain(|_, queue| queue.running > 0 || !queue.waiting.is_empty());
    }
}

#[cfg(test)]
mod tests;

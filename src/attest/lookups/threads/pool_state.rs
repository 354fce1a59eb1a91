//! The jobs and the threads of the pool, and the decisions about them.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use crate::attest::lookups::threads::{STUCK_AFTER, Task};
use crate::caller::WorkloadKey;
use crate::clock::REQUEST_HOLD;
use crate::limits::LogQuota;

/// The number of reads of one workload that may run at a time. If one of them blocks, another one
/// remains.
pub(super) const MAX_PER_WORKLOAD: usize = 2;
/// The shortest interval between two log lines about threads that cannot be started.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// The number of all threads, with those that are blocked. A scope (T29) gets another one only
/// while more are left than it has. So one scope blocks half of them, and ten leave an eleventh of
/// them. Only 256 scopes, each with two blocked reads, can block all. [`crate::limits`] has the
/// reason why these are no permits of a `FairSemaphore`.
pub(super) const MAX_THREADS: usize = 512;

pub(super) type OnAbandon = Box<dyn FnOnce() + Send>;

pub(super) struct LookupJob {
    pub(super) task: Task,
    pub(super) on_abandon: OnAbandon,
    /// The runtime that the job comes from. `None` if it must not continue there.
    pub(super) runtime: Option<Handle>,
    pub(super) queued: Instant,
}

pub(super) struct PoolState {
    pub(super) workloads: HashMap<WorkloadKey, WorkloadQueue>,
    /// The workloads that have a job to run and may run it, in round-robin order.
    ready: VecDeque<WorkloadKey>,
    pub(super) idle: usize,
    /// The threads that run or are about to run a job, by number.
    pub(super) busy: HashMap<u64, BusyThread>,
    next_number: u64,
    /// Whether a task watches for blocked threads.
    pub(super) watched: bool,
    /// The log quota for threads that cannot be started.
    pub(super) unstarted: LogQuota,
}

/// A thread that runs a job, or is about to.
pub(super) struct BusyThread {
    pub(super) since: Instant,
    /// The workload and the callback of its job, until the job has returned or was abandoned.
    pub(super) on_abandon: Option<(WorkloadKey, OnAbandon)>,
}

#[derive(Default)]
pub(super) struct WorkloadQueue {
    pub(super) waiting: VecDeque<LookupJob>,
    pub(super) running: usize,
    is_ready: bool,
}

/// Returns the time of the lookup threads.
#[expect(
    clippy::disallowed_methods,
    reason = "these threads have no runtime, so that its time cannot be paused there"
)]
pub(super) fn now() -> Instant {
    Instant::now()
}

impl Default for BusyThread {
    fn default() -> Self {
        Self {
            since: now(),
            on_abandon: None,
        }
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
    pub(super) fn new_number(&mut self) -> u64 {
        self.next_number += 1;
        self.busy.insert(self.next_number, BusyThread::default());
        self.next_number
    }

    /// Registers the threads to start, so that `target` threads are not blocked.
    pub(super) fn missing(&mut self, target: usize) -> Vec<u64> {
        let ready = self.ready.iter().filter(|workload| self.may_run(workload));
        let missing = target
            .saturating_sub(self.count_running())
            .min(ready.count());
        let missing = missing.min(MAX_THREADS.saturating_sub(self.busy.len()));
        (0..missing).map(|_| self.new_number()).collect()
    }

    pub(super) fn push(&mut self, workload: WorkloadKey, job: LookupJob) {
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

    pub(super) fn next(&mut self) -> Option<(WorkloadKey, LookupJob)> {
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

    pub(super) fn done(&mut self, workload: WorkloadKey) {
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

    /// Returns whether no job can be run or abandoned.
    pub(super) fn is_idle(&self) -> bool {
        self.workloads
            .values()
            .all(|queue| queue.waiting.is_empty())
            && self.busy.values().all(|busy| busy.on_abandon.is_none())
    }

    /// Returns the jobs that have blocked their threads too long.
    pub(super) fn overdue(&mut self) -> Vec<(WorkloadKey, OnAbandon)> {
        let overdue = self
            .busy
            .values_mut()
            .filter(|busy| now().duration_since(busy.since) >= REQUEST_HOLD);
        overdue.filter_map(|busy| busy.on_abandon.take()).collect()
    }

    /// Returns the number of threads that run a job and are not blocked.
    pub(super) fn count_running(&self) -> usize {
        self.busy
            .values()
            .filter(|busy| now().duration_since(busy.since) < STUCK_AFTER)
            .count()
    }

    /// Moves jobs that have waited as long as a request is held to their own runtime. There they
    /// are rejected if they have to wait again.
    pub(super) fn expire(&mut self) {
        for queue in self.workloads.values_mut() {
            while queue
                .waiting
                .front()
                .is_some_and(|job| now().duration_since(job.queued) >= REQUEST_HOLD)
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

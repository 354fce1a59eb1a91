//! Looks at a caller's process, which may have to wait for what the caller controls (T25).
//!
//! A process that executes a program holds a lock of its own (`exec_update_lock`), and can be made to hold it without end: by
//! then it waits for the lock of its memory, which a helper that shares the memory holds in mmap(2) of a file whose server
//! does not answer. Kernels from 6.18 on take that lock wherever `ptrace_may_access` decides, so for most of `/proc/<pid>`.
//!
//! | call | may wait for | so it runs |
//! |---|---|---|
//! | `/proc/<pid>/fd/N`, `stat`, `exe` (readlink, read) | the lock of the process | here |
//! | statx(2) of `/proc/<pid>/exe` | the same, and the server of the file system that the program is on: NFS and 9p ask it, whatever the flags | here |
//! | the list of a process's descriptors | nothing, but is as long as the caller makes it | here, bounded in time ([`super::search`]) |
//! | statx(2) of a rule's `exe` | the server of its file system, and what is mounted on the way (autofs, FUSE) | on a thread, one for each file ([`crate::rule::ProgramFile`]) |
//! | `/proc/<pid>/status`, `cgroup`, `uid_map`, `PIDFD_GET_INFO` | spin locks and RCU; `cgroup` also for the kernel's one lock of all cgroups, and whoever holds that up stops systemd and the kubelet, too | at once |
//! | `sock_diag` without extensions, `SO_PEERCRED`, `SO_PEERPIDFD`, `SO_PEERGROUPS` | nothing: none takes the lock of the caller's socket, which it could hold in sendmsg(2) | at once |
//! | cgroup directories and `cgroup.procs` | kernfs, which waits for nobody's process | at once |
//! | what a process executes meanwhile | nothing: a number in memory ([`super::exec_monitor`]) | at once |
//!
//! Not used at all, since each takes the lock of the process: perf_event_open(2), kcmp(2), pidfd_getfd(2), the links in
//! `/proc/<pid>/ns`, `/proc/<pid>/{mem,maps,auxv,environ,cmdline,wchan}`.
//!
//! Connections themselves never wait for a client: sockets do not block, and a whole connection has a deadline.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::oneshot;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::caller::{Owner, Refusal};
use crate::clock::HOLD;
use crate::limits::FairSemaphore;

/// Looks on the threads of [`looking_threads`]. So many of these there are beside one for each processor: a look that does not
/// come back takes one of them away, and none that is needed.
const SPARE_THREADS: usize = 8;
/// Of those of one workload.
const INLINE_PER_WORKLOAD: usize = 2;
/// Looks on threads of their own ...
const MAX_LOOKS: usize = 32;
/// ... and those that have not come back in time, each of another workload. The runtime has 512 threads for all that blocks,
/// and names of hosts are looked up on them as well.
const MAX_STUCK: usize = 256;

/// The runtime for connections whose callers' processes are looked at: threads that may be kept waiting. It has no timers and
/// wakes nobody for sockets, since the thread that does that could be the one that waits; those are the daemon's other
/// runtime's ([`Looking`]).
pub fn looking_threads() -> io::Result<Runtime> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    Builder::new_multi_thread().worker_threads(processors + SPARE_THREADS).thread_name("awsvid-looking").build()
}

/// A future on such threads, with all that it starts and waits for on the runtime that it came from.
pub struct Looking<F> {
    home: Handle,
    future: Pin<Box<F>>,
}

impl<F: Future> Looking<F> {
    /// To be called on the runtime that it comes from.
    pub fn new(future: F) -> Self {
        Self { home: Handle::current(), future: Box::pin(future) }
    }
}

impl<F: Future> Future for Looking<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let home = self.home.clone();
        let _entered = home.enter();
        self.future.as_mut().poll(cx)
    }
}

/// Runs looks.
#[derive(Debug)]
pub(crate) struct Lookups {
    inline: FairSemaphore<Owner>,
    apart: FairSemaphore<Owner>,
    stuck: Arc<AtomicUsize>,
}

impl Default for Lookups {
    fn default() -> Self {
        Self {
            inline: FairSemaphore::new(SPARE_THREADS, INLINE_PER_WORKLOAD),
            apart: FairSemaphore::new(MAX_LOOKS, 1),
            stuck: Arc::default(),
        }
    }
}

impl Lookups {
    /// Runs `look` right here, on one of [`looking_threads`], if the workload and all together have one to spare for it; else
    /// apart.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        owner: &Owner,
        look: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        match self.inline.try_acquire(owner) {
            Ok(_permit) => look(),
            Err(_) => self.run_apart(owner, look).await,
        }
    }

    /// Runs `look` on a thread of its own, when this workload has no other there. One that does not come back keeps its
    /// workload waiting, and nobody else.
    pub(crate) async fn run_apart<T: Send + 'static>(
        &self,
        owner: &Owner,
        look: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        if self.stuck.load(Ordering::Relaxed) >= MAX_STUCK {
            return Err(Refusal::Unresponsive);
        }
        let permit = self.apart.acquire_within(HOLD, owner).await.ok_or(Refusal::Busy)?;
        let (owner, stuck) = (owner.clone(), self.stuck.clone());
        let (answer, answered) = oneshot::channel();
        // Whatever becomes of the connection, somebody has to notice that the look does not come back.
        tokio::spawn(async move {
            let mut looking = spawn_blocking(look);
            if let Ok(done) = timeout(HOLD, &mut looking).await {
                let _ = answer.send(done.unwrap_or(Err(Refusal::Kernel)));
                return;
            }
            let _ = answer.send(Err(Refusal::Unresponsive));
            permit.detach();
            stuck.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(
                workload = ?owner,
                "a look at a caller's process does not come back; its workload is not answered until it does"
            );
            let _ = looking.await;
            stuck.fetch_sub(1, Ordering::Relaxed);
            tracing::info!(workload = ?owner, "the look at a caller's process has come back");
            drop(permit);
        });
        answered.await.unwrap_or(Err(Refusal::Kernel))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use tokio::time::{Instant, advance};

    use super::*;

    /// Looks apart, and lets the time of a request pass meanwhile.
    async fn look_in_vain<T: Send + 'static>(
        lookups: &Arc<Lookups>,
        owner: Owner,
        look: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let lookups = lookups.clone();
        let looking = tokio::spawn(async move { lookups.run_apart(&owner, look).await });
        // Time does not pass by itself while something blocks.
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
        advance(HOLD).await;
        looking.await.unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn look_that_does_not_come_back_stops_its_own_workload_alone() {
        let lookups = Arc::new(Lookups::default());
        let mut held = Vec::new();
        // More than may be under way at a time.
        for uid in 0..u32::try_from(MAX_LOOKS).unwrap() + 3 {
            let (release, wait) = mpsc::channel::<()>();
            held.push(release);
            let look = move || {
                let _ = wait.recv();
                Ok(())
            };
            assert_eq!(look_in_vain(&lookups, Owner::user(uid), look).await, Err(Refusal::Unresponsive));
        }
        assert_eq!(lookups.stuck.load(Ordering::Relaxed), held.len());
        let start = Instant::now();
        assert_eq!(lookups.run_apart(&Owner::user(1000), || Ok(7)).await, Ok(7));
        assert_eq!(start.elapsed(), Duration::ZERO);
        assert_eq!(look_in_vain(&lookups, Owner::user(1), || Ok(7)).await, Err(Refusal::Busy));
        drop(held);
        while lookups.stuck.load(Ordering::Relaxed) > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(lookups.run_apart(&Owner::user(1), || Ok(7)).await, Ok(7));
    }

    #[tokio::test]
    async fn look_goes_apart_where_its_workload_has_enough_threads() {
        let lookups = Lookups::default();
        let owner = Owner::user(1);
        let here = std::thread::current().id();
        let is_here = move || Ok(std::thread::current().id() == here);
        assert_eq!(lookups.run(&owner, is_here).await, Ok(true));
        let held: Vec<_> = (0..INLINE_PER_WORKLOAD).map(|_| lookups.inline.try_acquire(&owner).unwrap()).collect();
        assert_eq!(lookups.run(&owner, is_here).await, Ok(false));
        assert_eq!(lookups.run(&Owner::user(2), is_here).await, Ok(true));
        drop(held);
        assert_eq!(lookups.run(&owner, is_here).await, Ok(true));
    }
}

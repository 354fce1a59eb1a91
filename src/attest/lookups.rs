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
//! | the list of a process's descriptors, its groups in `status` | nothing, but are as long as the caller makes them | here, the first bounded in time ([`super::search`]), the second in number |
//! | statx(2) of a rule's `exe` | the server of its file system, and what is mounted on the way (autofs, FUSE) | on a thread, one for each file ([`crate::rule::ProgramFile`]) |
//! | `/proc/<pid>/status` for ids, `cgroup`, `uid_map`, `PIDFD_GET_INFO`, a pidfd's own `fdinfo` | spin locks and RCU; `cgroup` also for the kernel's one lock of all cgroups, and whoever holds that up stops systemd and the kubelet, too | at once |
//! | `sock_diag` without extensions, `SO_PEERCRED`, `SO_PEERPIDFD`, `SO_PEERGROUPS` | nothing: none takes the lock of the caller's socket, which it could hold in sendmsg(2) | at once |
//! | cgroup directories and `cgroup.procs` | kernfs, which waits for nobody's process | at once |
//! | what a process executes meanwhile | nothing: a number in memory ([`super::exec_monitor`]) | at once |
//!
//! Not used at all, since each takes the lock of the process: perf_event_open(2), kcmp(2), pidfd_getfd(2), the links in
//! `/proc/<pid>/ns`, `/proc/<pid>/{mem,maps,auxv,environ,cmdline,wchan}`.
//!
//! *Here* is: where a connection goes on, on a thread of [`LookupThreads`]; everything else on a thread of the runtime's, one at
//! a time for each workload. Connections themselves never wait for a client: sockets do not block, and a whole connection has a
//! deadline.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::oneshot;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::caller::{Owner, Refusal};
use crate::clock::HOLD;
use crate::limits::FairSemaphore;

mod threads;

pub use threads::LookupThreads;

/// Looks on threads of their own ...
const MAX_LOOKS: usize = 32;
/// ... and those that have not come back in time, each of another workload. The runtime has 512 threads for all that blocks,
/// and names of hosts are looked up on them as well.
const MAX_STUCK: usize = 256;

/// Runs looks.
#[derive(Debug)]
pub(crate) struct Lookups {
    apart: FairSemaphore<Owner>,
    stuck: Arc<AtomicUsize>,
}

impl Default for Lookups {
    fn default() -> Self {
        Self { apart: FairSemaphore::new(MAX_LOOKS, 1), stuck: Arc::default() }
    }
}

impl Lookups {
    /// Runs `look` right here on one of [`LookupThreads`], else apart.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        owner: &Owner,
        look: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        if threads::is_one_of_them() { look() } else { self.run_apart(owner, look).await }
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
        let looking = tokio::spawn(async move { lookups.run(&owner, look).await });
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
        assert_eq!(lookups.run(&Owner::user(1000), || Ok(7)).await, Ok(7));
        assert_eq!(start.elapsed(), Duration::ZERO);
        assert_eq!(look_in_vain(&lookups, Owner::user(1), || Ok(7)).await, Err(Refusal::Busy));
        drop(held);
        while lookups.stuck.load(Ordering::Relaxed) > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(lookups.run(&Owner::user(1), || Ok(7)).await, Ok(7));
    }
}

//! Where looks at a caller's process run that may have to wait for what the caller controls: on threads of their own, one at a
//! time for each workload, and given up after a time (T25).
//!
//! Which look may wait for what:
//!
//! | call | may wait for | so it runs |
//! |---|---|---|
//! | statx(2) of `/proc/<pid>/exe` | the server of the file system that the program is on (NFS and 9p ask it, whatever the flags) | here, once for each execution where those are counted |
//! | statx(2) of a rule's `exe` | the same, and what is mounted on the way (autofs, FUSE) | here, at most ten times a second |
//! | lists of processes and descriptors | nothing, but are as long as the caller makes them | in a search of their own, bounded in time ([`super::search`]) |
//! | `/proc/<pid>/status`, `stat`, `cgroup`, `ns/*`, `fd/*`, `uid_map`, `PIDFD_GET_INFO` | spin locks and RCU; `cgroup` also for the kernel's one lock of all cgroups, and whoever holds up that stops systemd and the kubelet, too | at once |
//! | `sock_diag` without extensions, `SO_PEERCRED`, `SO_PEERPIDFD`, `SO_PEERGROUPS` | nothing: none takes the lock of the caller's socket, which it could hold in sendmsg(2) | at once |
//! | cgroup directories and `cgroup.procs` | kernfs, which waits for nobody's process | at once |
//! | what a process executes meanwhile | nothing: a number in memory ([`super::exec_monitor`]). perf_event_open(2), `/proc/<pid>/{mem,maps,auxv,environ}`, kcmp(2) and pidfd_getfd(2) wait for `exec_update_lock`, which a caller can hold without end | at once |
//!
//! Connections themselves never wait for a client: sockets do not block, and a whole connection has a deadline. The log and the
//! audit have a thread each ([`crate::audit`]), names of users are looked up by one ([`crate::config`]), and those of hosts by
//! the runtime's own.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::oneshot;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::caller::{Owner, Refusal};
use crate::clock::HOLD;
use crate::limits::FairSemaphore;

/// Looks under way.
const MAX_LOOKS: usize = 32;
/// Looks that have not come back in time, each of another workload. The runtime has 512 threads for all that blocks, and names of
/// hosts are looked up on them as well.
const MAX_STUCK: usize = 256;

/// Runs looks that may have to wait.
#[derive(Debug)]
pub(crate) struct Offload {
    permits: FairSemaphore<Owner>,
    stuck: Arc<AtomicUsize>,
}

impl Default for Offload {
    fn default() -> Self {
        Self { permits: FairSemaphore::new(MAX_LOOKS, 1), stuck: Arc::default() }
    }
}

impl Offload {
    /// Runs `look`, when this workload has no other under way. One that does not come back keeps its workload waiting, and
    /// nobody else.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        owner: &Owner,
        look: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        if self.stuck.load(Ordering::Relaxed) >= MAX_STUCK {
            return Err(Refusal::Unresponsive);
        }
        let permit = self.permits.acquire_within(HOLD, owner).await.ok_or(Refusal::Busy)?;
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
                "a look at a caller's process does not come back; the workload is not answered until it does. A file system \
                 that its program is on does not answer"
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

    use tokio::time::{Instant, advance};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn look_that_does_not_come_back_stops_its_own_workload_alone() {
        let offload = Arc::new(Offload::default());
        let mut held = Vec::new();
        // More than may be under way at a time.
        for uid in 0..u32::try_from(MAX_LOOKS).unwrap() + 3 {
            let (release, wait) = mpsc::channel::<()>();
            held.push(release);
            let look = move || {
                let _ = wait.recv();
                Ok(())
            };
            let looking = {
                let offload = offload.clone();
                tokio::spawn(async move { offload.run(&Owner::user(uid), look).await })
            };
            // Time does not pass by itself while something blocks.
            tokio::task::yield_now().await;
            tokio::task::yield_now().await;
            advance(HOLD).await;
            assert_eq!(looking.await.unwrap(), Err(Refusal::Unresponsive));
        }
        assert_eq!(offload.stuck.load(Ordering::Relaxed), held.len());
        let start = Instant::now();
        assert_eq!(offload.run(&Owner::user(1000), || Ok(7)).await, Ok(7));
        assert_eq!(start.elapsed(), std::time::Duration::ZERO);
        let again = {
            let offload = offload.clone();
            tokio::spawn(async move { offload.run(&Owner::user(1), || Ok(7)).await })
        };
        tokio::task::yield_now().await;
        advance(HOLD).await;
        assert_eq!(again.await.unwrap(), Err(Refusal::Busy));
        drop(held);
        while offload.stuck.load(Ordering::Relaxed) > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(offload.run(&Owner::user(1), || Ok(7)).await, Ok(7));
    }
}

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
//! *Here* is on a thread of [`LookupThreads`], two at a time for each workload: where a connection goes on, or a look alone where
//! the connection has waited for something meanwhile. Connections themselves never wait for a client: sockets do not block, and a
//! whole connection has a deadline.

use tokio::sync::oneshot;

use crate::caller::{Owner, Refusal};

mod threads;

pub use threads::LookupThreads;
#[cfg(test)]
pub(crate) use threads::let_wait;

impl LookupThreads {
    /// Runs `look` right here if this is one of these threads, else on one of them. [`Refusal::Busy`] if none is free for this
    /// workload as long as a request is held, [`Refusal::Unresponsive`] if the look takes as long as that.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        owner: &Owner,
        look: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        if threads::is_one_of_them() { look() } else { self.run_apart(owner, look).await }
    }

    /// The same, never right here: the caller can do something else meanwhile.
    pub(crate) async fn run_apart<T: Send + 'static>(
        &self,
        owner: &Owner,
        look: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let (answer, answered) = oneshot::channel();
        let (give_up, given_up) = oneshot::channel();
        let look = async {
            let _ = answer.send(look());
        };
        let give_up = || {
            let _ = give_up.send(());
        };
        self.spawn_here(owner.clone(), look, give_up);
        tokio::select! {
            biased;
            result = answered => result.unwrap_or(Err(Refusal::Busy)),
            Ok(()) = given_up => Err(Refusal::Unresponsive),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn look_that_does_not_come_back_stops_its_own_workload_alone() {
        let threads = LookupThreads::default();
        let (mut held, mut stuck) = (Vec::new(), Vec::new());
        for uid in 0..20 {
            // As many as there may be of one workload, and some more.
            for _ in 0..4 {
                let (release, wait) = mpsc::channel::<()>();
                held.push(release);
                let (threads, look) = (threads.clone(), move || {
                    let _ = wait.recv();
                    Ok(())
                });
                stuck.push(tokio::spawn(async move { threads.run(&Owner::user(uid), look).await }));
            }
        }
        assert_eq!(threads.run(&Owner::user(1000), || Ok(7)).await, Ok(7));
        let mut refused = [0, 0];
        for stuck in stuck {
            match stuck.await.unwrap() {
                Err(Refusal::Unresponsive) => refused[0] += 1,
                Err(Refusal::Busy) => refused[1] += 1,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(refused, [40, 40]);
        assert_eq!(threads.run(&Owner::user(1000), || Ok(7)).await, Ok(7));
        assert_eq!(threads.run(&Owner::user(1), || Ok(7)).await, Err(Refusal::Busy));
        drop(held);
        assert_eq!(threads.run(&Owner::user(1), || Ok(7)).await, Ok(7));
    }
}

//! Reads of a caller's process, which may block on something that the caller controls (T25).
//!
//! A process that executes a program holds a lock of its own (`exec_update_lock`), and can hold it
//! for as long as it likes. At that time it waits for the lock of its memory. A helper that shares
//! the memory holds that lock in mmap(2) of a file, if the server of the file does not reply.
//! Kernels from 6.18 on take `exec_update_lock` wherever `ptrace_may_access` decides, so for most
//! of `/proc/<pid>`.
//!
//! | call | may block on | so it runs |
//! |---|---|---|
//! | `/proc/<pid>/fd/N`, `stat`, `exe` (readlink, read) | the lock of the process | here; before Linux 6.5 that includes the start of each caller on the unix socket ([`super::unix`]) |
//! | statx(2) of `/proc/<pid>/exe` | the same, and the server of the program's file system: NFS and 9p query it, whatever the flags | here |
//! | the list of a process's descriptors, its groups in `status` | nothing, but the caller determines their length | here, the first bounded in time ([`super::socket_owner`]), the second in number |
//! | statx(2) of a rule's `exe` | the server of its file system, and mounts on the path (autofs, FUSE) | on a thread, one for each path, over all rules and reloads ([`crate::file_threads`]) |
//! | `/proc/<pid>/status` for ids, `cgroup`, `uid_map`, `PIDFD_GET_INFO`, a pidfd's own `fdinfo` | spin locks and RCU; `cgroup` also on the kernel's one lock of all cgroups, and a process that blocks that stops systemd and the kubelet, too | at once |
//! | `sock_diag` without extensions, `SO_PEERCRED`, `SO_PEERPIDFD`, `SO_PEERGROUPS` | nothing: none takes the lock of the caller's socket, which it could hold in sendmsg(2) | at once |
//! | a path below `/proc/<pid>` where `/proc` hides processes (`hidepid`) | nothing: the kernel checks it as ptrace(2), without the lock of the process. Without CAP_SYS_PTRACE a line at the start reports it ([`crate::hardening::HidingProc`]) | at once |
//! | the test of callers over TCP: `/proc/self/mountinfo`, the daemon's own cgroup in a new mount above it, a connection over loopback | users determine the number of cgroups; a packet filter drops the connection | another thread, one test at a time, every 2 s at most ([`super::tcp_support`]); its caller waits for 1 s. Up to 32,768 directories, 1 s for the connection |
//! | cgroup directories and `cgroup.procs` | kernfs, which waits for no other process | at once |
//! | executions in the meantime | nothing: a number in memory ([`super::exec_monitor`]) | at once |
//!
//! These are not used at all, since each takes the lock of the process: perf_event_open(2),
//! kcmp(2), pidfd_getfd(2), the links in `/proc/<pid>/ns`,
//! `/proc/<pid>/{mem,maps,auxv,environ,cmdline,wchan}`. That holds for each process: callers, and
//! the process at the agent's end of its socket ([`super::shares_pid_namespace_with_peer`] reads
//! its `status`), since another one may have its pid by now. The daemon reads the links of its own.
//!
//! Other calls wait for something that a caller does not control, or controls only in part:
//!
//! | call | may block on | where it runs, and its bound |
//! |---|---|---|
//! | the name service: users, groups, `/etc/passwd` | a directory server | up to 9 threads; a request waits for 2 s ([`crate::accounts`]) |
//! | the name service: hosts | a DNS server | threads of their own: all connections to a host share one, and up to 3 more once it is overdue, also over reloads; the timeout of the exchange ([`crate::sts::HostResolver`]) |
//! | writes of the log and the audit log: pipes, sockets, files | their reader, or a disk | one thread for each, with a bounded queue ([`crate::writer`]); a required record is awaited for 1 s |
//! | open(2) of the audit file | the server of its file system; never a pipe's reader (`O_NONBLOCK`) | one thread for the path; 1 s |
//! | connections to the agent and to STS | their servers | sockets that do not block; a timeout for each |
//! | connect(2) to a unix socket of awsvid's own | a process that is stopped, and whose backlog any local user can fill | the start does not wait: a full backlog means that the socket is in use; commands wait until their deadline ([`crate::listen`]). A listener is rebound on another thread |
//! | `sock_diag` while the kernel has no module for it | `modprobe(8)`, for which the kernel waits. Only root decides what that runs. A module that is there can be unloaded only by root | where the kernel is tested ([`super::tcp_support`]) |
//! | the directory of network namespaces: `inotify_add_watch(2)`, its list, stat(2) and open(2) of its files | the server of a file system that is mounted there, which only root can do, or a pod that may do anything (`mountPropagation: Bidirectional`) | one thread for the path ([`crate::file_threads`]); after 5 s the daemon goes on, and tries again once the thread is free. Until then new pods have no listener, and the kernel keeps an ended daemon's process ([`crate::pod_listeners`]) |
//! | open(2) of a namespace's file after a pod has killed its listener | the same | another thread, for that listener alone |
//! | setns(2), and making sockets in a pod's network namespace | nothing: a namespace has no lock that its processes could hold | a thread of its own |
//! | poll(2) of `/proc/self/mountinfo` | nothing | at once ([`crate::pod_listeners`]) |
//! | a pod's directories: kubelet's cgroups | kernfs, as above. No file of a pod is read, and no volume | at once |
//! | the configuration, with statvfs(2) and the links on its path, after the start | a file system that the operator chose | one thread for the path; not bounded: the old configuration stays in effect, and signals still end the daemon |
//! | with `serve --watch`: reads of the configuration and of `ca_file`, `inotify_add_watch(2)` of their directories | the same | the same threads of those two paths; until they reply, only SIGHUP reloads, which waits for the watch for 1 s (`daemon/config_watch.rs`) |
//! | the trust store and `ca_file`, likewise | the same | one thread for each path, over all clients and reloads; the timeout of the call ([`crate::sts`]) |
//! | the token's file, and that of the key of metadata tokens | the same | at the start on the main thread. Later one thread: for the daemon's own probes 5 s ([`crate::readiness`]), for writing not bounded |
//! | stat(2) of the agent's socket, and the lookup of its path in connect(2) | a file system mounted on its directory, which only root can do. Where root lets users mount FUSE for others (`user_allow_other`), the owner of that directory can, too: that is the agent's user, and the agent decides about every identity | at once |
//! | execve(2) of awsvid itself | the server of its file's file system | at the start, on the main thread ([`super::exec_monitor`]) |
//! | sd_notify(3) | pid 1, while it does not read and its queue is full | a thread of its own, in order; the daemon goes on after 1 s |
//!
//! The tests stop the calls that a caller, a user, a server or the operator's file system can
//! block. They do so by FUSE, by pipes without a reader, by a DNS server that does not reply and by
//! full queues (`blocked.rs`, `records.rs`, `stuck_calls.rs` and `full_queues.rs` in `tests/it`).
//! Where only root can block a call, no test does: the directory of the agent's socket, `modprobe`,
//! the program file of awsvid. FUSE stands for NFS and 9p, which the kernel of the test machines
//! lacks. The daemon waits in the VFS for all three: for the reply of a server.
//!
//! *Here* means on a thread of [`LookupThreads`], two at a time for each workload. Blocked reads of
//! one scope (T29) leave half of the threads for others. A connection
//! continues there, or only the read runs there if the connection has waited for something else.
//! Connections themselves never wait for a client: sockets do not block, and a whole connection has
//! a deadline.

use tokio::sync::oneshot;

use crate::caller::{AttestError, WorkloadKey};

mod threads;

pub use threads::LookupThreads;
#[cfg(test)]
pub(crate) use threads::set_lookup_thread;

impl LookupThreads {
    /// Runs `read` on the current thread if that is a lookup thread, or else on one of them.
    ///
    /// Fails with [`AttestError::SearchBusy`] if the workload gets no thread for as long as a
    /// request is held. Fails with [`AttestError::ProcessUnresponsive`] if the read itself takes
    /// that long.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        workload: &WorkloadKey,
        read: impl FnOnce() -> Result<T, AttestError> + Send + 'static,
    ) -> Result<T, AttestError> {
        if threads::on_lookup_thread() {
            read()
        } else {
            self.run_offloaded(workload, read).await
        }
    }

    /// Runs `read` on a lookup thread, never on the current one. The caller of this function can do
    /// something else in the meantime.
    pub(crate) async fn run_offloaded<T: Send + 'static>(
        &self,
        workload: &WorkloadKey,
        read: impl FnOnce() -> Result<T, AttestError> + Send + 'static,
    ) -> Result<T, AttestError> {
        let (answer, answered) = oneshot::channel();
        let (on_abandon, abandoned) = oneshot::channel();
        let read = async {
            let _ = answer.send(read());
        };
        let on_abandon = || {
            let _ = on_abandon.send(());
        };
        self.spawn_read(workload.clone(), read, on_abandon);
        tokio::select! {
            biased;
            result = answered => result.unwrap_or(Err(AttestError::SearchBusy)),
            Ok(()) = abandoned => Err(AttestError::ProcessUnresponsive),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn blocked_reads_stop_only_their_own_workload() {
        let threads = LookupThreads::default();
        let (mut held, mut stuck) = (Vec::new(), Vec::new());
        for uid in 0..20 {
            // More reads than one workload may run.
            for _ in 0..4 {
                let (release, wait) = mpsc::channel::<()>();
                held.push(release);
                let (threads, read) = (threads.clone(), move || {
                    let _ = wait.recv();
                    Ok(())
                });
                stuck.push(tokio::spawn(async move {
                    threads.run(&WorkloadKey::user(uid), read).await
                }));
            }
        }
        assert_eq!(threads.run(&WorkloadKey::user(1000), || Ok(7)).await, Ok(7));
        let mut rejected = [0, 0];
        for stuck in stuck {
            match stuck.await.unwrap() {
                Err(AttestError::ProcessUnresponsive) => rejected[0] += 1,
                Err(AttestError::SearchBusy) => rejected[1] += 1,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(rejected, [40, 40]);
        assert_eq!(threads.run(&WorkloadKey::user(1000), || Ok(7)).await, Ok(7));
        assert_eq!(
            threads.run(&WorkloadKey::user(1), || Ok(7)).await,
            Err(AttestError::SearchBusy)
        );
        drop(held);
        assert_eq!(threads.run(&WorkloadKey::user(1), || Ok(7)).await, Ok(7));
    }
}

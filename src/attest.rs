//! Attestation: finds out which process is at the other end of a connection, by facts that the
//! kernel fixed.
//!
//! On a unix socket that is the process that connected, on TCP the process that made the socket. It
//! is never the process that happens to write on the descriptor now. A doubt is an
//! [`AttestError`](crate::caller::AttestError), never a guess.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use thiserror::Error;
use tokio::net::UnixStream;

use crate::cgroup::{CgroupPath, PodRoots};
use crate::listen::{AcceptedStream, PendingPermit};
use crate::netns::NamespaceId;

mod cgroup_mounts;
mod cgroup_scan;
mod cgroup_tree;
mod exec_monitor;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod host;
mod kernel;
mod lookups;
mod peer;
mod pod_attestor;
mod pod_lookup;
mod pod_processes;
mod proc_files;
mod process_cache;
mod process_snapshot;
mod rejection;
mod sock_diag;
mod socket_owner;
mod status;
mod sys;
mod tcp;
mod tcp_support;
mod unix;

pub use exec_monitor::{ExecMonitor, ExecMonitorError};
pub use kernel::{TcpUnsupported, UnixSupport, try_tcp, unix_support};
pub use lookups::LookupThreads;
pub use peer::{Attestation, Peer};
pub use pod_attestor::PodAttestor;
pub use pod_processes::find_process_of_pod;
pub(crate) use proc_files::is_identity_map;
pub use rejection::Rejection;
pub use sock_diag::SockDiag;

use cgroup_mounts::CgroupMounts;
use host::Host;
use tcp_support::TcpSupport;
use unix::ConnectedPeer;

/// An attestor for the peers of all listeners in the daemon's own network namespace.
#[derive(Debug)]
pub struct Attestor {
    host: Arc<Host>,
    tcp: TcpSupport,
    unix: UnixSupport,
}

/// The reason why the daemon cannot attest any caller on this machine.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug, Error)]
pub enum StartError {
    /// The daemon's user namespace translates user ids, so that they would be wrong (T14).
    #[error(
        "the daemon runs in a user namespace that does not map every user id to itself; run it in the host's (for systemd: no PrivateUsers=)"
    )]
    UserNamespace,
    /// A file in `/proc` cannot be read.
    #[error("cannot read {path}: {source}; give the daemon the host's /proc")]
    Proc { path: PathBuf, source: io::Error },
}

impl Attestor {
    /// Checks which interfaces the kernel has. If it lacks those for TCP, callers over TCP are
    /// rejected, and the reason is logged once.
    ///
    /// Pods are searched for below `roots`. Without an `exec_monitor` no process is passed to an
    /// agent.
    pub fn new(roots: PodRoots, exec_monitor: Option<ExecMonitor>) -> Result<Self, StartError> {
        let proc_root = PathBuf::from("/proc");
        let read = |name: &str| {
            let path = proc_root.join(name);
            std::fs::read_to_string(&path).map_err(|source| StartError::Proc { path, source })
        };
        if !proc_files::is_identity_map(&read("self/uid_map")?) {
            return Err(StartError::UserNamespace);
        }
        let hierarchies = CgroupMounts::find(&read("self/mountinfo")?);
        let host = Arc::new(Host::new(
            proc_root,
            hierarchies,
            roots,
            exec_monitor.map(Arc::new),
        ));
        let unix = kernel::unix_support();
        if let Some(missing) = unix.missing() {
            tracing::warn!(%missing, "callers on the unix socket are rejected (unsupported_kernel)");
        }
        Ok(Self {
            tcp: TcpSupport::new(host.clone()),
            host,
            unix,
        })
    }

    /// Returns the cgroups below which a kubelet creates its pods, as far as they are visible here.
    /// Without any, no pod is known.
    pub fn pod_roots(&self) -> Vec<CgroupPath> {
        self.host.cgroups().pod_roots()
    }

    /// Returns whether this process is in a pod of a kubelet whose cgroup is visible.
    pub fn is_in_pod(&self) -> bool {
        self.host.is_in_pod()
    }

    /// Returns the threads to which connections move before their callers' processes are read.
    pub fn lookup_threads(&self) -> &LookupThreads {
        &self.host.lookups
    }

    /// Reads the facts of a peer from its socket. `pod` is the attestor of a pod's listener, and
    /// `None` for one of the host.
    ///
    /// Releases `pending` before it waits for a cgroup scan, which has limits of its own. Fails
    /// with the facts that were read until then.
    pub async fn read_peer(
        &self,
        stream: &AcceptedStream,
        pod: Option<&Arc<PodAttestor>>,
        pending: PendingPermit,
    ) -> Result<Peer, Rejection> {
        match (stream, pod) {
            (AcceptedStream::Unix(stream), _) => {
                if self.host.cgroup_tree().is_none() {
                    // A rule by cgroup or unit matches no caller until there is one.
                    self.tcp.retry().await;
                }
                let stream = stream.descriptor();
                let connected = ConnectedPeer::of(stream.as_fd())?;
                let (facts, connector) =
                    unix::find_connector(&self.host, connected, stream.as_fd())?;
                Ok(Peer::unix(facts, connector, stream.clone()))
            }
            (AcceptedStream::Tcp { client, server, .. }, None) => {
                let (facts, socket) = self.tcp.find_socket((*client, *server), pending).await?;
                Ok(Peer::tcp(facts, socket, None))
            }
            (AcceptedStream::Tcp { client, server, .. }, Some(pod)) => {
                let (facts, socket) = pod.find_socket((*client, *server), pending).await?;
                Ok(Peer::tcp(facts, socket, Some(pod.clone())))
            }
        }
    }

    /// Returns the interfaces that TCP callers lack here, and the fix. `None` if TCP callers are
    /// attested. It changes with the kernel's modules and mounts: a call after a failed test starts
    /// another one. Call it within a runtime.
    pub fn missing_for_tcp(&self) -> Option<String> {
        self.tcp.missing()
    }

    /// Repeats a failed test for TCP callers, and waits for it, but not for long. The result is
    /// that of [`Attestor::missing_for_tcp`].
    pub async fn retry_tcp(&self) {
        self.tcp.retry_failed().await;
    }

    /// Returns the interfaces that callers on the unix socket lack here. `None` if all of them are
    /// attested.
    pub fn missing_for_unix(&self) -> Option<&'static str> {
        self.unix.missing()
    }

    /// Returns whether executions of programs are counted. Without that no process is passed to an
    /// agent (`unseen_program`).
    pub fn counts_executions(&self) -> bool {
        self.host.exec_monitor.is_some()
    }

    /// Returns an attestor for listeners in a pod's network namespace `netns`, in which `diag` was
    /// opened. `None` if the kernel lacks an interface for TCP.
    pub fn in_pod(&self, diag: SockDiag, netns: NamespaceId) -> Option<PodAttestor> {
        Some(PodAttestor::new(self.tcp.attestor()?.in_pod(diag), netns))
    }
}

/// Returns whether the process that listens at the other end of `stream` is in this process's pid
/// namespace. In another one the same pid means another process.
///
/// The kernel translates the listener's pid for this process: 0 if it is not visible from here
/// (unix(7), `SO_PEERCRED`). A pid in a nested namespace is visible, so its namespace is checked.
pub fn shares_pid_namespace_with_peer(stream: &UnixStream) -> bool {
    let Ok(peer) = getsockopt(stream, PeerCredentials) else {
        return false;
    };
    peer.pid() > 0 && proc_files::shares_pid_namespace(Path::new("/proc"), peer.pid())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::{TcpListener, TcpStream};
    use std::sync::mpsc;

    use tokio::task::yield_now;
    use tokio::time::{Instant, sleep};

    use super::*;
    use crate::caller::{AttestError, ProcessFacts, WorkloadKey};
    use crate::clock::REQUEST_HOLD;
    use crate::limits::AcquireError;

    /// A caller with more descriptors than the short search may read.
    struct ManyDescriptors {
        listener: TcpListener,
        client: TcpStream,
        _descriptors: Vec<File>,
    }

    impl ManyDescriptors {
        fn connect() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            Self {
                client: TcpStream::connect(listener.local_addr().unwrap()).unwrap(),
                listener,
                _descriptors: (0..300).map(|_| File::open("/dev/null").unwrap()).collect(),
            }
        }

        async fn begin_attestation(&self, tcp: &tcp::TcpAttestor) -> Attestation {
            let addresses = (
                self.client.local_addr().unwrap(),
                self.listener.local_addr().unwrap(),
            );
            let found = tcp.find_socket(addresses, PendingPermit::none()).await;
            let (facts, socket) = found.unwrap();
            Peer::tcp(facts, socket, None)
                .begin_attestation(Some(ProcessFacts::default()))
                .unwrap()
        }
    }

    /// Shows that long searches wait without a thread, whatever the number of workloads that cause
    /// them.
    #[tokio::test(start_paused = true)]
    async fn long_searches_are_limited_in_total() {
        let attestor = Attestor::new(PodRoots::defaults(), None).unwrap();
        let Some(tcp) = attestor.tcp.attestor() else {
            return crate::skip::skip("this kernel cannot attest callers over TCP");
        };
        let all: Vec<_> = (0..)
            .map_while(|uid| tcp.searches().try_acquire(&WorkloadKey::user(uid)).ok())
            .collect();
        assert!(!all.is_empty());
        let caller = ManyDescriptors::connect();
        let attestation = caller.begin_attestation(&tcp).await;
        let start = Instant::now();
        // The short search runs on this thread, as in the daemon. While it ran on another one, the
        // paused clock would advance.
        lookups::set_lookup_thread(true);
        let attested = attestation.finish().await;
        lookups::set_lookup_thread(false);
        assert_eq!(
            (attested.unwrap_err().error, start.elapsed()),
            (AttestError::SearchBusy, REQUEST_HOLD)
        );
    }

    /// Covers T29: a search that blocks takes no CPU time, so another one may run.
    #[tokio::test(start_paused = true)]
    async fn blocked_search_releases_its_permit() {
        let attestor = Attestor::new(PodRoots::defaults(), None).unwrap();
        let Some(tcp) = attestor.tcp.attestor() else {
            return;
        };
        let caller = ManyDescriptors::connect();
        let attestation = caller.begin_attestation(&tcp).await;
        let workload = attestation.peer_facts().workload_key();
        // One permit is left. The search gets it, and no thread.
        let mut all: Vec<_> = (0..)
            .map_while(|uid| tcp.searches().try_acquire(&WorkloadKey::user(uid)).ok())
            .collect();
        all.pop();
        let mut blocked = Vec::new();
        for _ in 0..2 {
            let (release, wait) = mpsc::channel::<()>();
            let (threads, workload) = (attestor.lookup_threads().clone(), workload.clone());
            let read = move || {
                let _ = wait.recv();
                Ok(())
            };
            let read = async move { threads.run_offloaded(&workload, read).await };
            blocked.push((release, tokio::spawn(read)));
        }
        yield_now().await;
        lookups::set_lookup_thread(true);
        let search = tokio::spawn(attestation.finish());
        yield_now().await;
        lookups::set_lookup_thread(false);
        let next = || tcp.searches().try_acquire(&WorkloadKey::user(u32::MAX));
        assert_eq!(next().unwrap_err(), AcquireError::Total);
        sleep(REQUEST_HOLD / 2).await;
        next().unwrap();
        drop((blocked, search));
    }
}

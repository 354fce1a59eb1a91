//! Who is at the other end of a connection, by what the kernel fixed.
//!
//! On a unix socket that is the process that connected, on TCP the process that made the socket: never whoever happens to
//! write on the descriptor now. A doubt is a [`Refusal`], never a guess.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use thiserror::Error;
use tokio::net::UnixStream;

use crate::caller::{Caller, Owner, Refusal, Stranger};
use crate::cgroup::{CgroupPath, PodRoots};
use crate::listen::Socket;

mod cgroups;
mod exec_monitor;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod hierarchies;
mod host;
mod in_pod;
mod inet_diag;
mod kernel;
mod known;
mod lookups;
mod pods;
mod process;
mod search;
mod status;
mod sys;
mod tcp;
mod tcp_support;
mod unix;
mod walks;

pub use exec_monitor::{ExecMonitor, ExecMonitorError};
pub use in_pod::PodAttestor;
pub use inet_diag::SockDiag;
pub use kernel::{TcpUnsupported, UnixSupport, try_tcp, unix_support};
pub use lookups::LookupThreads;

use hierarchies::Hierarchies;
use host::Host;
use tcp_support::TcpSupport;

/// Attests the peers of all listeners in the daemon's own network namespace.
#[derive(Debug)]
pub struct Attestor {
    host: Arc<Host>,
    tcp: TcpSupport,
    unix: UnixSupport,
}

/// Why a peer was not attested, and what its socket had told by then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unattested {
    /// Why.
    pub refusal: Refusal,
    /// As far as it was told.
    pub peer: Option<Stranger>,
}

impl Unattested {
    fn of(refusal: Refusal, peer: &Stranger) -> Self {
        Self { refusal, peer: Some(peer.clone()) }
    }

    /// The key of the peer's limits.
    pub fn owner(&self) -> Owner {
        self.peer.as_ref().map_or_else(Owner::unknown, Stranger::owner)
    }
}

impl From<Refusal> for Unattested {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, peer: None }
    }
}

/// Why the daemon cannot attest anybody here.
#[derive(Debug, Error)]
pub enum StartError {
    /// User ids would not mean what they say (attack 14).
    #[error(
        "the daemon runs in a user namespace that does not map every user id to itself; run it in the host's (for systemd: no PrivateUsers=)"
    )]
    UserNamespace,
    /// `/proc` cannot be read.
    #[error("{path} cannot be read: {source}; the daemon needs the host's /proc")]
    Proc {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Attestor {
    /// Looks at the machine. TCP callers are refused, and the reason is logged once, where the kernel lacks what they need.
    /// Pods are those below `roots`. Without an `exec_monitor` no process can be named to an agent.
    pub fn new(roots: PodRoots, exec_monitor: Option<ExecMonitor>) -> Result<Self, StartError> {
        let proc_root = PathBuf::from("/proc");
        let read = |name: &str| {
            let path = proc_root.join(name);
            std::fs::read_to_string(&path).map_err(|source| StartError::Proc { path, source })
        };
        if !process::is_identity_map(&read("self/uid_map")?) {
            return Err(StartError::UserNamespace);
        }
        let hierarchies = Hierarchies::find(&read("self/mountinfo")?);
        let host = Arc::new(Host::new(proc_root, hierarchies, roots, exec_monitor.map(Arc::new)));
        let unix = kernel::unix_support();
        if let Some(missing) = unix.missing() {
            tracing::warn!("{missing} (unsupported_kernel)");
        }
        Ok(Self { tcp: TcpSupport::new(host.clone()), host, unix })
    }

    /// The cgroups below which a kubelet puts its pods, as far as they can be seen from here. Without one no pod is known.
    pub fn pod_roots(&self) -> Vec<&CgroupPath> {
        self.host.pods.as_ref().map(|pods| pods.roots_found()).unwrap_or_default()
    }

    /// Where connections go on whose callers' processes are looked at.
    pub fn lookup_threads(&self) -> &LookupThreads {
        &self.host.lookups
    }

    /// The peer of a unix stream, by what the kernel recorded of it when it connected.
    pub fn unix(&self, stream: &Socket) -> Result<Caller, Unattested> {
        let stream = stream.descriptor();
        unix::attest(&self.host, unix::Peer::of(stream.as_fd())?, stream)
    }

    /// The peer `client` of a TCP connection that was accepted on `server`, as far as its socket tells who it is. `on_wait` is
    /// called before that takes time.
    pub async fn tcp(
        &self,
        client: SocketAddr,
        server: SocketAddr,
        on_wait: impl FnOnce(),
    ) -> Result<Caller, Unattested> {
        Ok(self.tcp.look((client, server), on_wait).await?.into_caller())
    }

    /// What callers over TCP lack here, and the fix. `None` if they are attested. It changes with the kernel's modules and mounts.
    pub fn missing_for_tcp(&self) -> Option<String> {
        self.tcp.missing()
    }

    /// What callers on the unix socket lack here. `None` if all of them are attested.
    pub fn missing_for_unix(&self) -> Option<&'static str> {
        self.unix.missing()
    }

    /// Whether executions of programs are counted. Without that no process is named to an agent (`unseen_program`).
    pub fn counts_executions(&self) -> bool {
        self.host.exec_monitor.is_some()
    }

    /// Attests the peers of listeners in a pod's network namespace, in which `diag` was made; `None` where the kernel lacks what
    /// that needs.
    pub fn in_pod(&self, diag: SockDiag) -> Option<PodAttestor> {
        Some(PodAttestor::new(self.tcp.attestor()?.in_pod(diag)))
    }
}

/// Whether the process that listens at the other end of `stream` numbers processes as this one does. In another pid
/// namespace the same number is another process's.
///
/// The kernel tells the listener's number as this process would call it: 0 if it can't be seen from here (unix(7),
/// `SO_PEERCRED`). One in a namespace below is seen, and so looked at.
pub fn names_the_same_processes(stream: &UnixStream) -> bool {
    let Ok(peer) = getsockopt(stream, PeerCredentials) else { return false };
    peer.pid() > 0 && process::shares_pid_namespace(Path::new("/proc"), peer.pid())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::{TcpListener, TcpStream};

    use tokio::time::Instant;

    use super::*;
    use crate::caller::Looks;
    use crate::clock::HOLD;

    /// However many workloads an attacker is: what is long waits, and takes no thread meanwhile.
    #[tokio::test(start_paused = true)]
    async fn long_searches_are_few_in_all() {
        let attestor = Attestor::new(PodRoots::usual(), None).unwrap();
        let Some(tcp) = attestor.tcp.attestor() else { return };
        let all: Vec<_> = (0..).map_while(|uid| tcp.searches().try_acquire(&Owner::user(uid)).ok()).collect();
        assert!(!all.is_empty());
        // More than is looked at on the way.
        let _descriptors: Vec<_> = (0..300).map(|_| File::open("/dev/null").unwrap()).collect();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        let client = TcpStream::connect(server).unwrap();
        let peer = attestor.tcp(client.local_addr().unwrap(), server, || ()).await.unwrap();
        let start = Instant::now();
        // As where connections go on. While the short search is on another thread, time would pass by itself.
        lookups::let_wait(true);
        let attested = peer.with_process(Looks::default()).await;
        lookups::let_wait(false);
        assert_eq!((attested.unwrap_err(), start.elapsed()), (Refusal::Busy, HOLD));
    }
}

//! Who is at the other end of a connection, by what the kernel fixed.
//!
//! On a unix socket that is the process that connected, on TCP the process that made the socket: never whoever happens to
//! write on the descriptor now. A doubt is a [`Refusal`], never a guess.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use thiserror::Error;
use tokio::net::UnixStream;

use crate::caller::{Caller, Groups, Looks, Owner, Refusal};
use crate::cgroup::{CgroupPath, PodRoots};
use crate::turns::Turns;

mod cgroups;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod hierarchies;
mod host;
mod in_pod;
mod inet_diag;
mod known;
mod pods;
mod process;
mod search;
mod status;
mod sys;
mod tcp;
mod unix;
mod walks;

pub use in_pod::PodAttestor;
pub use inet_diag::SockDiag;

use hierarchies::Hierarchies;
use host::Host;

/// Says what a decision about this caller needs to know of its process, which on TCP has to be searched for; `None` if
/// nothing more.
pub type Needs = Arc<dyn Fn(&Caller) -> Option<Looks> + Send + Sync>;

/// Attests the peers of all listeners in the daemon's own network namespace.
pub struct Attestor {
    host: Arc<Host>,
    needs: Needs,
    searches: Turns<Owner>,
    tcp: Option<tcp::TcpAttestor>,
}

impl fmt::Debug for Attestor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attestor").field("tcp", &self.tcp).finish_non_exhaustive()
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
    /// Pods are those below `roots`.
    pub fn new(needs: Needs, roots: PodRoots) -> Result<Self, StartError> {
        let proc_root = PathBuf::from("/proc");
        let read = |name: &str| {
            let path = proc_root.join(name);
            std::fs::read_to_string(&path).map_err(|source| StartError::Proc { path, source })
        };
        if !process::is_identity_map(&read("self/uid_map")?) {
            return Err(StartError::UserNamespace);
        }
        let hierarchies = Hierarchies::find(&read("self/mountinfo")?);
        let release = read("sys/kernel/osrelease")?;
        let host = Arc::new(Host::new(proc_root, hierarchies, roots));
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        // However many ask for them, half of the processors are for what is quickly done.
        let searches = Turns::new(processors.div_ceil(2), 1);
        let tcp = match (host.cgroups.clone(), SockDiag::open_for_all_processors()) {
            _ if !tells_cgroups(&release) => {
                tracing::warn!(
                    "before Linux 5.15 the kernel does not reliably tell a socket's cgroup: callers over TCP are refused; use the unix socket"
                );
                None
            }
            (Some(cgroups), Ok(diag)) => Some(tcp::TcpAttestor::new(host.clone(), diag, cgroups, searches.clone())),
            (None, _) => {
                tracing::warn!(
                    "no cgroup v2 tree is mounted: callers over TCP are refused; mount cgroup2, or use the unix socket"
                );
                None
            }
            (_, Err(error)) => {
                tracing::warn!(%error, "sock_diag is not available (CONFIG_INET_DIAG): callers over TCP are refused");
                None
            }
        };
        Ok(Self { host, needs, searches, tcp })
    }

    /// The cgroups below which a kubelet puts its pods, as far as they can be seen from here. Without one no pod is known.
    pub fn pod_roots(&self) -> Vec<&CgroupPath> {
        self.host.pods.as_ref().map(|pods| pods.roots_found()).unwrap_or_default()
    }

    /// Attests the peer of a unix stream.
    pub fn unix(&self, stream: BorrowedFd<'_>) -> Result<Caller, Refusal> {
        let groups = || {
            sys::peer_groups(stream, Groups::MAX).map_err(|error| match error {
                Errno::ERANGE => Refusal::TooManyGroups,
                _ => Refusal::Kernel,
            })
        };
        unix::attest(&self.host, unix::Peer::of(stream)?, groups, |caller| (self.needs)(caller))
    }

    /// Attests the peer `client` of a TCP connection that was accepted on `server`. `admit` is shown what the socket alone
    /// tells, before any process is searched for; if it says no, that is [`Refusal::TooManyConnections`].
    pub async fn tcp(
        &self,
        client: SocketAddr,
        server: SocketAddr,
        admit: impl FnOnce(&Caller) -> bool,
    ) -> Result<Caller, Refusal> {
        let tcp = self.tcp.as_ref().ok_or(Refusal::Unsupported("TCP callers need a cgroup v2 tree and sock_diag"))?;
        tcp.attest((client, server), admit, |_, _| Ok(()), |caller| (self.needs)(caller)).await
    }

    /// Attests the peers of listeners in a pod's network namespace, in which `diag` was made; `None` where the kernel lacks what
    /// that needs.
    pub fn in_pod(&self, diag: SockDiag) -> Option<PodAttestor> {
        self.tcp.as_ref()?;
        let cgroups = self.host.cgroups.clone()?;
        let tcp = tcp::TcpAttestor::in_pod(self.host.clone(), diag, cgroups, self.searches.clone());
        Some(PodAttestor::new(tcp, self.needs.clone()))
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

/// Whether `INET_DIAG_CGROUP_ID` is to be trusted: before Linux 5.15, `net_cls` and `net_prio` made every id the root's.
fn tells_cgroups(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) => (major, minor) >= (5, 15),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::{TcpListener, TcpStream};

    use tokio::time::Instant;

    use super::*;
    use crate::clock::HOLD;

    /// However many workloads an attacker is: what is long waits, and takes no thread meanwhile.
    #[tokio::test(start_paused = true)]
    async fn long_searches_are_few_in_all() {
        let attestor = Attestor::new(Arc::new(|_| Some(Looks::default())), PodRoots::usual()).unwrap();
        if attestor.tcp.is_none() {
            return;
        }
        let all: Vec<_> = (0..).map_while(|uid| attestor.searches.try_take(&Owner::user(uid))).collect();
        assert!(!all.is_empty());
        // More than is looked at on the way.
        let _descriptors: Vec<_> = (0..300).map(|_| File::open("/dev/null").unwrap()).collect();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        let client = TcpStream::connect(server).unwrap();
        let start = Instant::now();
        let attested = attestor.tcp(client.local_addr().unwrap(), server, |_| true).await;
        assert_eq!((attested.unwrap_err(), start.elapsed()), (Refusal::Busy, HOLD));
    }

    #[test]
    fn kernels_that_tell_cgroups() {
        for (release, tells) in
            [("5.14.21-el9", false), ("5.15.0", true), ("6.1.0-9-amd64", true), ("4.19", false), ("nonsense", false)]
        {
            assert_eq!(tells_cgroups(release), tells, "{release}");
        }
    }
}

//! Detects by trial which facts about peers this kernel reports.
//!
//! Versions prove little, since distributions change their kernels. RHEL 9's 5.14 reports a
//! socket's cgroup, and so does 5.10 since 2024.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use thiserror::Error;

use crate::attest::cgroup_mounts::CgroupMounts;
use crate::attest::cgroup_tree::CgroupTree;
use crate::attest::host::Host;
use crate::attest::sock_diag::{SockDiag, SocketInfo};
use crate::attest::sys;
use crate::caller::AttestError;
use crate::cgroup;

/// The longest wait for the test's own connection, which a packet filter may drop.
const LOOPBACK_TIMEOUT: Duration = Duration::from_secs(1);

/// The reason why callers over TCP cannot be distinguished here.
#[derive(Debug, Error)]
pub enum TcpUnsupported {
    /// No cgroup v2 tree is mounted here.
    #[error("no cgroup v2 tree is mounted")]
    NoCgroups,
    /// The kernel does not reply to queries about TCP sockets.
    #[error("sock_diag(7) does not work for TCP: {0}")]
    NoSockDiag(String),
    /// The reply does not contain a cgroup.
    #[error("the kernel does not report the cgroup of a socket")]
    NoCgroupId,
    /// The reply contains another cgroup than this process's own, or may do so.
    #[error("the kernel reports a wrong cgroup of a socket")]
    WrongCgroupId,
    /// The test has no connection of its own: the machine lacks a loopback device, or other
    /// processes hold all ports.
    #[error("cannot connect over loopback: {0}")]
    NoLoopback(io::Error),
}

impl TcpUnsupported {
    /// Returns the fix, as an imperative. It proposes the unix socket only if `unix` serves
    /// callers.
    pub fn fix(&self, unix: UnixSupport) -> String {
        let fix = match self {
            Self::NoCgroups => {
                "boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 none /sys/fs/cgroup/unified; \
                 in Kubernetes mount the host's /sys/fs/cgroup by a hostPath volume, with its volumeMount at /host/cgroup"
            }
            Self::NoSockDiag(_) => {
                "load the kernel modules inet_diag and tcp_diag (CONFIG_INET_DIAG, CONFIG_INET_TCP_DIAG)"
            }
            Self::NoCgroupId => "use a kernel from Linux 5.8 on with CONFIG_SOCK_CGROUP_DATA",
            Self::WrongCgroupId => {
                "unmount the cgroup v1 controllers net_cls and net_prio, or use Linux 5.15"
            }
            Self::NoLoopback(_) => {
                "bring the device lo up (ip link set lo up), and keep ports of net.ipv4.ip_local_port_range free"
            }
        };
        match unix {
            UnixSupport::NoPidfd => fix.to_owned(),
            UnixSupport::Process | UnixSupport::Pid => {
                format!(
                    "{fix}; or use the unix socket only ([listen] tcp = [], and no TCP address in awsvid.socket)"
                )
            }
        }
    }
}

impl TcpUnsupported {
    /// Returns whether the test shows that the kernel lacks something. Any user can hold all ports,
    /// so the lack of a connection to test with shows nothing about callers.
    pub(super) fn is_conclusive(&self) -> bool {
        !matches!(self, Self::NoLoopback(_))
    }

    /// Returns the rejection of a caller, which names what is missing.
    pub(super) fn rejection(&self) -> AttestError {
        AttestError::Unsupported(match self {
            Self::NoCgroups => "no cgroup v2 tree is mounted, which callers over TCP need",
            Self::NoSockDiag(_) => {
                "it does not find a TCP socket (sock_diag(7), in the modules inet_diag and tcp_diag)"
            }
            Self::NoCgroupId => "it does not report the cgroup of a TCP socket",
            Self::WrongCgroupId => "it reports a wrong cgroup of a TCP socket",
            Self::NoLoopback(_) => {
                "TCP cannot be tested: the device lo is missing or down, or no port is free"
            }
        })
    }
}

/// The facts that the kernel reports about peers of a unix socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnixSupport {
    /// The process, by a descriptor that the kernel holds since it connected (`SO_PEERPIDFD`, Linux
    /// 6.5).
    Process,
    /// Only the pid. Callers in containers can cause pids to be reused, so they are rejected.
    Pid,
    /// No process can be held by a descriptor (pidfd_open(2), Linux 5.3). All callers are rejected.
    NoPidfd,
}

impl UnixSupport {
    /// Returns the callers that are rejected because of it, and the interface that they need.
    /// `None` if none are rejected.
    pub fn missing(self) -> Option<&'static str> {
        match self {
            Self::Process => None,
            Self::Pid => Some(
                "callers in containers are rejected on the unix socket: the kernel lacks SO_PEERPIDFD (Linux 6.5)",
            ),
            Self::NoPidfd => Some(
                "all callers are rejected on the unix socket: the kernel lacks pidfd_open(2) (Linux 5.3)",
            ),
        }
    }
}

/// Detects the support for unix sockets, with a socket pair of this process.
pub fn unix_support() -> UnixSupport {
    let peer = UnixStream::pair().and_then(|(one, _other)| sys::peer_pidfd(one.as_fd()));
    match peer {
        Ok(Some(_)) => UnixSupport::Process,
        _ if sys::pidfd_open(std::process::id()).is_ok() => UnixSupport::Pid,
        _ => UnixSupport::NoPidfd,
    }
}

/// Tests whether callers over TCP can be distinguished, in the way that the daemon does it.
/// `proc_root` is the mount of `/proc`.
pub fn try_tcp(proc_root: &Path) -> Result<(), TcpUnsupported> {
    let text = |name: &str| fs::read_to_string(proc_root.join(name)).unwrap_or_default();
    let hierarchies = CgroupMounts::find(&text("self/mountinfo"));
    let cgroups = CgroupTree::find(&hierarchies, crate::cgroup::PodRoots::defaults())
        .ok_or(TcpUnsupported::NoCgroups)?;
    let diag = SockDiag::open().map_err(no_sock_diag)?;
    test_tcp(&hierarchies, &cgroups, &diag, proc_root)
}

/// Runs the same test with the daemon's own sources.
pub(super) fn try_tcp_of(host: &Host, diag: &SockDiag) -> Result<(), TcpUnsupported> {
    let cgroups = host.cgroups();
    let tree = cgroups.tree.as_ref().ok_or(TcpUnsupported::NoCgroups)?;
    test_tcp(&cgroups.hierarchies, tree, diag, &host.proc_root)
}

pub(super) fn no_sock_diag(error: io::Error) -> TcpUnsupported {
    TcpUnsupported::NoSockDiag(error.to_string())
}

fn test_tcp(
    hierarchies: &CgroupMounts,
    cgroups: &CgroupTree,
    diag: &SockDiag,
    proc_root: &Path,
) -> Result<(), TcpUnsupported> {
    let socket = own_socket(diag)?;
    let text = |name: &str| fs::read_to_string(proc_root.join(name)).unwrap_or_default();
    let membership = text("self/cgroup");
    let own = cgroup::unified(&membership)
        .and_then(|shown| hierarchies.path("", shown))
        .and_then(|path| cgroups.id(&path).ok());
    classify(
        socket.cgroup_id,
        own,
        &KernelFacts::read(hierarchies, cgroups, &text("sys/kernel/osrelease")),
    )
}

/// The facts that decide if this process's own cgroup proves nothing.
#[derive(Debug, Clone, Copy)]
struct KernelFacts {
    /// The id of the root cgroup. Older kernels report it for a socket of unknown cgroup.
    root: Option<u64>,
    /// Whether a controller is mounted that hides a socket's cgroup from older kernels.
    hides_cgroups: bool,
    /// Whether the kernel is Linux 5.15 or newer. These report the cgroup in any case.
    is_new: bool,
}

impl KernelFacts {
    fn read(hierarchies: &CgroupMounts, cgroups: &CgroupTree, release: &str) -> Self {
        let root = crate::cgroup::CgroupPath::parse("/").and_then(|root| cgroups.id(&root).ok());
        let hides_cgroups = ["net_cls", "net_prio"]
            .iter()
            .any(|name| hierarchies.has(name));
        let mut numbers = release
            .split(|c: char| !c.is_ascii_digit())
            .map_while(|number| number.parse::<u32>().ok());
        let version = (
            numbers.next().unwrap_or_default(),
            numbers.next().unwrap_or_default(),
        );
        Self {
            root,
            hides_cgroups,
            is_new: version >= (5, 15),
        }
    }
}

/// Judges the cgroup that the kernel has `reported` for a socket of this process, by the process's
/// own cgroup `own`.
fn classify(
    reported: Option<u64>,
    own: Option<u64>,
    about: &KernelFacts,
) -> Result<(), TcpUnsupported> {
    let reported = reported.ok_or(TcpUnsupported::NoCgroupId)?;
    match own {
        Some(own) if own != reported => Err(TcpUnsupported::WrongCgroupId),
        Some(own) if Some(own) != about.root => Ok(()),
        // In the root cgroup, or in one that is not visible from here, old and new kernels report
        // the same.
        _ if about.is_new || !about.hides_cgroups => Ok(()),
        _ => Err(TcpUnsupported::WrongCgroupId),
    }
}

/// Finds the client's end of a connection of this process to itself.
fn own_socket(diag: &SockDiag) -> Result<SocketInfo, TcpUnsupported> {
    let connection = connect_to_self(Ipv4Addr::LOCALHOST.into())
        .or_else(|error| connect_to_self(Ipv6Addr::LOCALHOST.into()).map_err(|_| error));
    let (client, server, _listener) = connection.map_err(TcpUnsupported::NoLoopback)?;
    let address = client.local_addr().map_err(TcpUnsupported::NoLoopback)?;
    // ENOENT has two meanings: the kernel has no such socket, or no handler for TCP sockets. This
    // socket exists.
    diag.client_socket(address, server).map_err(|rejection| {
        TcpUnsupported::NoSockDiag(match rejection {
            AttestError::CallerGone => "it does not find a socket that exists".to_owned(),
            rejection => rejection.to_string(),
        })
    })
}

/// Connects this process to itself. Returns the client's end, the server's address, and the
/// listener.
fn connect_to_self(address: IpAddr) -> io::Result<(TcpStream, SocketAddr, TcpListener)> {
    let listener = TcpListener::bind((address, 0))?;
    let server = listener.local_addr()?;
    let client = TcpStream::connect_timeout(&server, LOOPBACK_TIMEOUT)?;
    Ok((client, server, listener))
}

#[cfg(test)]
mod tests;

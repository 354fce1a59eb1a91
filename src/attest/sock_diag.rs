//! Finds the socket of a loopback TCP client, or the listener at an address, by one exact
//! `sock_diag(7)` lookup in the kernel.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType};
use nix::sys::stat::stat;
use nix::sys::time::TimeVal;
use nix::unistd::geteuid;

use crate::caller::AttestError;
use crate::listen::is_metadata_address;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_HEADER: usize = 16;
/// The size of the request: the header and `struct inet_diag_req_v2`.
const REQUEST_BYTES: u32 = 16 + 56;
/// The size of `struct inet_diag_msg`, before its attributes.
const INET_DIAG_MSG_BYTES: usize = 72;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
const INET_DIAG_CGROUP_ID: u16 = 21;
/// `INET_DIAG_NOCOOKIE` twice, which matches any cookie.
const NO_COOKIE: u64 = u64::MAX;
/// The states in which the client's end still belongs to a process: `TCP_ESTABLISHED`,
/// `TCP_FIN_WAIT1`, `TCP_FIN_WAIT2`.
const LIVE_STATES: [u8; 3] = [1, 4, 5];
/// The state of a listener: `TCP_LISTEN`.
const LISTEN_STATE: u8 = 10;
/// The name of the loopback device in every network namespace.
const LOOPBACK: &str = "lo";
/// The query, as errors name it.
const QUERY: &str = "sock_diag";
/// The network namespace of the calling thread.
const OWN_NAMESPACE: &str = "/proc/thread-self/ns/net";

/// The client's socket of one connection, as the kernel describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SocketInfo {
    /// The owner: the user that made the socket.
    pub(crate) uid: u32,
    /// The inode in sockfs. `/proc/<pid>/fd` shows it as `socket:[inode]`.
    pub(crate) inode: u32,
    /// An id of this socket that is unique until the next boot.
    pub(crate) cookie: u64,
    /// The inode number of the cgroup v2 directory in which the socket was made. `None` if the
    /// kernel does not report it.
    pub(crate) cgroup_id: Option<u64>,
}

/// A `sock_diag` socket. It stays in the network namespace in which it was opened.
#[derive(Debug)]
pub struct SockDiag {
    /// Each is `None` once it is closed.
    netlinks: Vec<Mutex<Option<OwnedFd>>>,
    loopback: u32,
    namespace: u64,
    sequence: AtomicU32,
}

impl SockDiag {
    /// Opens a socket in the current network namespace. It keeps the namespace alive until it is
    /// closed.
    pub fn open() -> io::Result<Self> {
        Self::of(1)
    }

    /// Opens one netlink socket per CPU, so that concurrent lookups rarely wait for each other.
    pub(crate) fn open_per_cpu() -> io::Result<Self> {
        Self::of(std::thread::available_parallelism().map_or(1, usize::from))
    }

    fn of(netlinks: usize) -> io::Result<Self> {
        let netlinks = (0..netlinks)
            .map(|_| Ok(Mutex::new(Some(netlink()?))))
            .collect::<io::Result<_>>()?;
        let loopback = nix::net::if_::if_nametoindex(LOOPBACK)?;
        let namespace = stat(OWN_NAMESPACE)?.st_ino;
        Ok(Self {
            netlinks,
            loopback,
            namespace,
            sequence: AtomicU32::new(1),
        })
    }

    /// Makes a lookup that gets its replies from the other end of this socket.
    #[cfg(test)]
    pub(crate) fn over(netlink: OwnedFd) -> Self {
        Self {
            netlinks: vec![Mutex::new(Some(netlink))],
            loopback: 1,
            namespace: 0,
            sequence: AtomicU32::new(1),
        }
    }

    /// Returns the inode of the network namespace.
    pub fn namespace(&self) -> u64 {
        self.namespace
    }

    /// Releases the network namespace, whatever still refers to this value. All later lookups fail.
    pub(crate) fn close(&self) {
        for netlink in &self.netlinks {
            drop(
                netlink
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .take(),
            );
        }
    }

    /// Finds the socket at `client`'s end of its connection to `server`.
    ///
    /// The request has loopback as its interface. Without it the kernel skips a socket that is
    /// bound to a device. It then returns a *listener* on the same port, which may belong to
    /// another process (T1).
    pub(crate) fn client_socket(
        &self,
        client: SocketAddr,
        server: SocketAddr,
    ) -> Result<SocketInfo, AttestError> {
        if !is_local(client, server) {
            return Err(AttestError::NotLoopback);
        }
        let mut buffer = [0_u8; 1024];
        parse(self.lookup(client, server, &mut buffer)?, client, server)
    }

    /// Returns whether connections to this address over loopback reach a listener of the calling
    /// process's user that is bound to the loopback device, as awsvid's at the metadata address is.
    pub(crate) fn is_served_on_loopback(&self, address: SocketAddr) -> Result<bool, AttestError> {
        let any_ip: IpAddr = match address {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let mut buffer = [0_u8; 1024];
        let reply = self.lookup(address, SocketAddr::new(any_ip, 0), &mut buffer);
        match reply.and_then(message) {
            Ok(message) => {
                let device = read_u32(message, 40);
                let uid = read_u32(message, 64);
                Ok(message[1] == LISTEN_STATE
                    && device == Some(self.loopback)
                    && uid == Some(geteuid().as_raw()))
            }
            Err(AttestError::CallerGone) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Returns the reply about the socket at `own`'s end of its connection to `peer`.
    fn lookup<'a>(
        &self,
        own: SocketAddr,
        peer: SocketAddr,
        buffer: &'a mut [u8],
    ) -> Result<&'a [u8], AttestError> {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let request = request(own, peer, self.loopback, sequence);
        let length = self
            .round_trip(&request, sequence, buffer)
            .map_err(|errno| AttestError::kernel(QUERY, errno))?;
        Ok(&buffer[..length.ok_or(AttestError::CallerGone)?])
    }

    /// Returns a netlink socket that is free, or else waits for the next one in order.
    fn netlink(&self, sequence: u32) -> MutexGuard<'_, Option<OwnedFd>> {
        let free = self
            .netlinks
            .iter()
            .find_map(|netlink| netlink.try_lock().ok());
        free.unwrap_or_else(|| {
            self.netlinks[sequence as usize % self.netlinks.len()]
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        })
    }

    /// Returns the length of the reply, or `None` if the socket is closed.
    fn round_trip(
        &self,
        request: &[u8],
        sequence: u32,
        buffer: &mut [u8],
    ) -> nix::Result<Option<usize>> {
        let netlink = self.netlink(sequence);
        let Some(netlink) = &*netlink else {
            return Ok(None);
        };
        retry(|| socket::send(netlink.as_raw_fd(), request, MsgFlags::empty()))?;
        loop {
            let length = retry(|| socket::recv(netlink.as_raw_fd(), buffer, MsgFlags::empty()))?;
            // A late reply to a request that has timed out is skipped.
            if read_u32(buffer, 8) == Some(sequence) {
                return Ok(Some(length));
            }
        }
    }
}

/// Returns whether both ends are addresses of the loopback device, by which no other host connects.
/// The kernel selects the metadata address itself as the source of a connection to it.
fn is_local(client: SocketAddr, server: SocketAddr) -> bool {
    let [client_ip, server_ip] = [client, server].map(|end| end.ip().to_canonical());
    let is_server = server_ip.is_loopback() || is_metadata_address(server);
    is_server && (client_ip.is_loopback() || (client_ip == server_ip))
}

fn netlink() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let netlink = socket::socket(
        AddressFamily::Netlink,
        SockType::Raw,
        flags,
        SockProtocol::NetlinkSockDiag,
    )?;
    // The kernel replies within `send`. The timeout only bounds the wait if that should fail.
    socket::setsockopt(
        &netlink,
        socket::sockopt::ReceiveTimeout,
        &TimeVal::new(1, 0),
    )?;
    Ok(netlink)
}

fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Builds a request: `struct nlmsghdr`, then `struct inet_diag_req_v2` with family, protocol, ext,
/// pad, states, and `struct inet_diag_sockid`.
fn request(client: SocketAddr, server: SocketAddr, interface: u32, sequence: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(REQUEST_BYTES as usize);
    out.extend(REQUEST_BYTES.to_ne_bytes());
    out.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    out.extend(NLM_F_REQUEST.to_ne_bytes());
    out.extend(sequence.to_ne_bytes());
    out.extend(0_u32.to_ne_bytes());
    let family = if client.is_ipv4() { AF_INET } else { AF_INET6 };
    out.extend([family, IPPROTO_TCP, 0, 0]);
    out.extend(u32::MAX.to_ne_bytes());
    out.extend(client.port().to_be_bytes());
    out.extend(server.port().to_be_bytes());
    for address in [client.ip(), server.ip()] {
        match address {
            IpAddr::V4(v4) => {
                out.extend(v4.octets());
                out.extend([0; 12]);
            }
            IpAddr::V6(v6) => out.extend(v6.octets()),
        }
    }
    out.extend(interface.to_ne_bytes());
    out.extend(NO_COOKIE.to_ne_bytes());
    out
}

/// Parses a reply. Accepts it only if it describes the client's end of exactly this connection, and
/// that end is alive.
pub(crate) fn parse(
    reply: &[u8],
    client: SocketAddr,
    server: SocketAddr,
) -> Result<SocketInfo, AttestError> {
    let message = message(reply)?;
    let (family, state) = (message[0], message[1]);
    let source = endpoint(family, &message[8..24], [message[4], message[5]]);
    let target = endpoint(family, &message[24..40], [message[6], message[7]]);
    let (source, target) = source.zip(target).ok_or_else(unreadable)?;
    let inode = read_u32(message, 68).unwrap_or(0);
    // A socket that its process has closed has uid 0 and inode 0.
    if source != canonical(client)
        || target != canonical(server)
        || !LIVE_STATES.contains(&state)
        || inode == 0
    {
        return Err(AttestError::CallerGone);
    }
    let (uid, cookie) = read_u32(message, 64)
        .zip(read_u64(message, 44))
        .ok_or_else(unreadable)?;
    Ok(SocketInfo {
        uid,
        inode,
        cookie,
        cgroup_id: attribute(&message[INET_DIAG_MSG_BYTES..], INET_DIAG_CGROUP_ID),
    })
}

/// Returns `struct inet_diag_msg` and its attributes. Fails with `CallerGone` if the kernel found
/// no socket.
fn message(reply: &[u8]) -> Result<&[u8], AttestError> {
    let kind = read_u16(reply, 4).ok_or_else(unreadable)?;
    if kind == NLMSG_ERROR {
        let errno = read_u32(reply, NLMSG_HEADER)
            .map(|code| Errno::from_raw(code.cast_signed().wrapping_neg()));
        return Err(if errno == Some(Errno::ENOENT) {
            AttestError::CallerGone
        } else {
            AttestError::kernel(QUERY, errno)
        });
    }
    let length = read_u32(reply, 0).map_or(0, |length| length as usize);
    let message = reply
        .get(NLMSG_HEADER..length)
        .filter(|message| message.len() >= INET_DIAG_MSG_BYTES)
        .ok_or_else(unreadable)?;
    if kind != SOCK_DIAG_BY_FAMILY {
        return Err(unreadable());
    }
    Ok(message)
}

fn unreadable() -> AttestError {
    AttestError::kernel(QUERY, None)
}

fn endpoint(family: u8, address: &[u8], port: [u8; 2]) -> Option<SocketAddr> {
    let ip = if family == AF_INET {
        IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(&address[..4]).ok()?))
    } else if family == AF_INET6 {
        IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(address).ok()?))
    } else {
        return None;
    };
    Some(SocketAddr::new(ip.to_canonical(), u16::from_be_bytes(port)))
}

/// Removes scope and flow, and converts a v4-mapped address to the IPv4 address.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Finds a `u64` among netlink attributes: length (2 bytes, with this header of 4), type (2),
/// value, padded to 4.
fn attribute(mut rest: &[u8], kind: u16) -> Option<u64> {
    loop {
        let length = usize::from(read_u16(rest, 0)?);
        if length < 4 {
            return None;
        }
        if read_u16(rest, 2)? == kind {
            return read_u64(rest.get(..length)?, 4);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
pub(crate) mod tests;

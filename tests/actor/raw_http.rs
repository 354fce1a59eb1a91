//! Connections to the daemon, and the requests on them.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrIn,
    SockaddrIn6, SockaddrStorage, UnixAddr, bind, connect, getsockname, recvmsg, sendmsg,
    setsockopt, socket, sockopt,
};

use crate::daemon;

pub(crate) enum Address {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

pub(crate) const REQUEST: &[u8] =
    b"GET /v1/credentials HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: any\r\n\r\n";
/// The bytes that are sent where a scene goes on in the middle of a request.
const PART: usize = 20;

impl Address {
    pub(crate) fn parse(listener: &str, address: &str) -> Self {
        if listener == "unix" {
            Self::Unix(address.into())
        } else {
            Self::Tcp(address.parse().unwrap())
        }
    }

    pub(crate) fn connect(&self) -> OwnedFd {
        self.try_connect().unwrap()
    }

    pub(crate) fn try_connect(&self) -> io::Result<OwnedFd> {
        Ok(match self {
            Self::Unix(path) => UnixStream::connect(path)?.into(),
            Self::Tcp(address) => TcpStream::connect(address)?.into(),
        })
    }

    /// Returns a loopback address of the listener's family from which no process connects by
    /// default.
    pub(crate) fn another(&self, port: u16) -> SocketAddr {
        match self.family() {
            AddressFamily::Inet6 => SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0).into(),
            _ => SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 2), port).into(),
        }
    }

    /// Makes a socket that is not yet connected: from this port of such an address, bound to the
    /// loopback device (T1).
    pub(crate) fn bound_socket(&self, port: u16) -> nix::Result<OwnedFd> {
        let fd = self.socket();
        setsockopt(&fd, sockopt::ReuseAddr, &true).unwrap();
        setsockopt(&fd, sockopt::BindToDevice, &"lo".into()).unwrap();
        bind(fd.as_raw_fd(), &SockaddrStorage::from(self.another(port)))?;
        Ok(fd)
    }

    /// Returns the address of a TCP socket.
    pub(crate) fn local(fd: &OwnedFd) -> SocketAddr {
        let name: SockaddrStorage = getsockname(fd.as_raw_fd()).unwrap();
        let v4 = name
            .as_sockaddr_in()
            .map(|v4| SocketAddrV4::from(*v4).into());
        v4.or_else(|| {
            name.as_sockaddr_in6()
                .map(|v6| SocketAddrV6::from(*v6).into())
        })
        .unwrap()
    }

    fn family(&self) -> AddressFamily {
        match self {
            Self::Unix(_) => AddressFamily::Unix,
            Self::Tcp(SocketAddr::V4(_)) => AddressFamily::Inet,
            Self::Tcp(SocketAddr::V6(_)) => AddressFamily::Inet6,
        }
    }

    /// Returns the first two arguments of socket(2).
    pub(crate) fn numbers(&self) -> (i32, i32) {
        (self.family() as i32, SockType::Stream as i32)
    }

    /// Makes a socket that is not yet connected.
    pub(crate) fn socket(&self) -> OwnedFd {
        socket(
            self.family(),
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .unwrap()
    }

    /// Connects such a socket.
    pub(crate) fn connect_from(&self, fd: &OwnedFd) {
        let fd = fd.as_raw_fd();
        match self {
            Self::Unix(path) => connect(fd, &UnixAddr::new(path).unwrap()),
            Self::Tcp(SocketAddr::V4(to)) => connect(fd, &SockaddrIn::from(*to)),
            Self::Tcp(SocketAddr::V6(to)) => connect(fd, &SockaddrIn6::from(*to)),
        }
        .unwrap();
    }
}

/// Sends the whole request, and returns the whole response, empty if the daemon sends none.
pub(crate) fn fetch(fd: &OwnedFd) -> String {
    send(fd);
    answer(fd)
}

/// Sends a request for a metadata token, and returns the whole response.
pub(crate) fn put_token(fd: &OwnedFd) -> String {
    write(
        fd,
        b"PUT /latest/api/token HTTP/1.1\r\nHost: 127.0.0.1\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n",
    );
    answer(fd)
}

pub(crate) fn send(fd: &OwnedFd) {
    write(fd, REQUEST);
}

/// Sends the beginning of a request, and waits until the daemon has read it, so that it has
/// attested the connection.
pub(crate) fn begin(to: &Address, fd: &OwnedFd) {
    send_part(fd);
    daemon::await_read(to, fd);
}

/// Sends the beginning of a request, and does not wait.
pub(crate) fn send_part(fd: &OwnedFd) {
    write(fd, &REQUEST[..PART]);
}

/// Sends the rest of it, and returns the response.
pub(crate) fn conclude(fd: &OwnedFd) -> String {
    write(fd, &REQUEST[PART..]);
    answer(fd)
}

pub(crate) fn answer(fd: &OwnedFd) -> String {
    let mut bytes = Vec::new();
    let _ = file(fd).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

pub(crate) fn fetch_on(descriptor: RawFd) -> String {
    fetch(&inherited(descriptor))
}

pub(crate) fn conclude_on(descriptor: RawFd) -> String {
    conclude(&inherited(descriptor))
}

fn inherited(descriptor: RawFd) -> OwnedFd {
    // SAFETY: the program before this one has left the descriptor open for it.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// Writes on this very descriptor: a second one that is closed again may be the one that the daemon
/// has found. The daemon may have closed already, which the response then shows. These bytes fit
/// into any buffer.
fn write(fd: &OwnedFd, bytes: &[u8]) {
    let written = nix::unistd::write(fd, bytes);
    assert!(written.is_err() || written == Ok(bytes.len()));
}

fn file(fd: &OwnedFd) -> std::fs::File {
    fd.try_clone().unwrap().into()
}

/// Puts a copy of `fd` into the queue of a socket, for the process that receives from it.
pub(crate) fn pass(over: &UnixStream, fd: &OwnedFd) {
    let fds = [fd.as_raw_fd()];
    let message = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(
        over.as_raw_fd(),
        &[IoSlice::new(b"x")],
        &message,
        MsgFlags::empty(),
        None,
    )
    .unwrap();
}

pub(crate) fn receive(over: &UnixStream) -> OwnedFd {
    let mut space = cmsg_space!(RawFd);
    let mut byte = [0];
    let mut into = [IoSliceMut::new(&mut byte)];
    let message = recvmsg::<()>(
        over.as_raw_fd(),
        &mut into,
        Some(&mut space),
        MsgFlags::empty(),
    )
    .unwrap();
    let mut received = message
        .cmsgs()
        .unwrap()
        .filter_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => fds.into_iter().next(),
            _ => None,
        });
    // SAFETY: the kernel has just made this descriptor for this process.
    unsafe { OwnedFd::from_raw_fd(received.next().expect("a descriptor")) }
}

/// Makes the descriptor one that programs executed from here on inherit.
pub(crate) fn inheritable(fd: OwnedFd) -> RawFd {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    fd.into_raw_fd()
}

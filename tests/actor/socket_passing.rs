//! Scenes about sockets that a process of one user has made, and a process of another user sends
//! requests on (T24).

use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::unistd::{Pid, getpid};

use crate::cgroup_moves::{Cgroup, own_cgroup};
use crate::process::{become_user, child};
use crate::raw_http::{self, Address};
use crate::{ALICE, BOB};

/// The socket of root's that Bob gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RootSocket {
    /// A listener that root does not have any more, like a service manager's that it has passed to
    /// a service.
    Listener,
    /// A listener that root's process has, too, as a web server's master has those of its workers.
    SharedListener,
    /// A connection that root's process has accepted, as inetd does.
    Accepted,
}

/// Plays a socket that root makes and passes to Bob. Bob disconnects it, connects it to the daemon,
/// and sends a request.
pub(crate) fn used_again(to: &Address, socket_kind: RootSocket) -> String {
    let listener = TcpListener::bind(to.another(0)).unwrap();
    let address = listener.local_addr().unwrap();
    let (socket, held_by_root): (OwnedFd, Option<OwnedFd>) = match socket_kind {
        RootSocket::Listener => (listener.into(), None),
        RootSocket::SharedListener => (listener.try_clone().unwrap().into(), Some(listener.into())),
        RootSocket::Accepted => {
            let client = TcpStream::connect(address).unwrap();
            (listener.accept().unwrap().0.into(), Some(client.into()))
        }
    };
    let (over, from) = UnixStream::pair().unwrap();
    raw_http::pass(&over, &socket);
    drop(socket);
    let mut bob = child(|_| {
        become_user(BOB);
        let socket = raw_http::receive(&from);
        disconnect(&socket);
        to.connect_from(&socket);
        raw_http::fetch(&socket)
    });
    let response = bob.output();
    bob.reap();
    drop(held_by_root);
    response
}

/// Does the same as a service that systemd has started with a listener, as its only one.
pub(crate) fn used_again_by_service(to: &Address) -> String {
    let pid: i32 = std::env::var("LISTEN_PID").unwrap().parse().unwrap();
    assert_eq!(
        (Pid::from_raw(pid), std::env::var("LISTEN_FDS").as_deref()),
        (getpid(), Ok("1"))
    );
    // SAFETY: the descriptor is this process's, as systemd documents it, and nothing else uses it.
    let socket = unsafe { OwnedFd::from_raw_fd(3) };
    disconnect(&socket);
    to.connect_from(&socket);
    raw_http::fetch(&socket)
}

/// Plays a request of Alice on a socket from a cgroup that has the name of one of systemd's socket
/// units.
pub(crate) fn from_socket_unit(to: &Address) -> String {
    let unit = Cgroup::new(&own_cgroup(), "attack-", ".socket");
    let mut alice = child(|_| {
        unit.write("cgroup.procs", "0");
        become_user(ALICE);
        raw_http::fetch(&to.connect())
    });
    let response = alice.output();
    alice.reap();
    response
}

/// Makes a listener, or a connected socket, connectable again (connect(2), `AF_UNSPEC`).
fn disconnect(socket: &OwnedFd) {
    let nowhere = libc::sockaddr {
        sa_family: libc::AF_UNSPEC.try_into().unwrap(),
        sa_data: [0; 14],
    };
    let length = libc::socklen_t::try_from(size_of_val(&nowhere)).unwrap();
    // SAFETY: `nowhere` is an address of `length` bytes, which the kernel only reads.
    let status = unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, length) };
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
}

use super::*;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

const CLIENT: &str = "127.0.0.1:40000";
const SERVER: &str = "127.0.0.1:974";

/// A reply as the kernel sends it.
struct DiagReply {
    family: u8,
    state: u8,
    client: SocketAddr,
    server: SocketAddr,
    uid: u32,
    inode: u32,
    attributes: Vec<u8>,
}

impl DiagReply {
    fn good() -> Self {
        let mut attributes = Vec::new();
        // An attribute of 5 bytes comes first, so that padding matters.
        attributes.extend(5_u16.to_ne_bytes());
        attributes.extend(8_u16.to_ne_bytes());
        attributes.extend([3, 0, 0, 0]);
        attributes.extend(12_u16.to_ne_bytes());
        attributes.extend(INET_DIAG_CGROUP_ID.to_ne_bytes());
        attributes.extend(4711_u64.to_ne_bytes());
        Self {
            family: AF_INET,
            state: 1,
            client: CLIENT.parse().unwrap(),
            server: SERVER.parse().unwrap(),
            uid: 1001,
            inode: 99,
            attributes,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut message = vec![self.family, self.state, 0, 0];
        message.extend(self.client.port().to_be_bytes());
        message.extend(self.server.port().to_be_bytes());
        for ip in [self.client.ip(), self.server.ip()] {
            match ip {
                IpAddr::V4(v4) => {
                    message.extend(v4.octets());
                    message.extend([0; 12]);
                }
                IpAddr::V6(v6) => message.extend(v6.octets()),
            }
        }
        message.extend(1_u32.to_ne_bytes());
        message.extend(7_u64.to_ne_bytes());
        message.extend([0; 12]);
        message.extend(self.uid.to_ne_bytes());
        message.extend(self.inode.to_ne_bytes());
        assert_eq!(message.len(), INET_DIAG_MSG_BYTES);
        message.extend(&self.attributes);
        let mut out = Vec::new();
        out.extend(
            u32::try_from(NLMSG_HEADER + message.len())
                .unwrap()
                .to_ne_bytes(),
        );
        out.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        out.extend([0; 10]);
        out.extend(message);
        out
    }

    fn parse(&self) -> Result<SocketInfo, AttestError> {
        parse(
            &self.bytes(),
            CLIENT.parse().unwrap(),
            SERVER.parse().unwrap(),
        )
    }
}

#[test]
fn parse_reads_a_reply() {
    let expected = SocketInfo {
        uid: 1001,
        inode: 99,
        cookie: 7,
        cgroup_id: Some(4711),
    };
    assert_eq!(DiagReply::good().parse(), Ok(expected));
    let without = DiagReply {
        attributes: Vec::new(),
        ..DiagReply::good()
    };
    assert_eq!(
        without.parse(),
        Ok(SocketInfo {
            cgroup_id: None,
            ..expected
        })
    );
    for state in [4, 5] {
        assert_eq!(
            DiagReply {
                state,
                ..DiagReply::good()
            }
            .parse(),
            Ok(expected)
        );
    }
    let mapped = DiagReply {
        family: AF_INET6,
        client: "[::ffff:127.0.0.1]:40000".parse().unwrap(),
        server: "[::ffff:127.0.0.1]:974".parse().unwrap(),
        ..DiagReply::good()
    };
    assert_eq!(mapped.parse(), Ok(expected));
}

#[test]
fn parse_rejects_replies_for_other_sockets() {
    // Every other state, among them LISTEN (10), TIME_WAIT (6), CLOSE_WAIT (8) and CLOSE (7).
    for state in [0, 2, 3, 6, 7, 8, 9, 10, 11, 12] {
        assert_eq!(
            DiagReply {
                state,
                ..DiagReply::good()
            }
            .parse(),
            Err(AttestError::CallerGone),
            "state {state}"
        );
    }
    let other = |client: &str, server: &str| DiagReply {
        client: client.parse().unwrap(),
        server: server.parse().unwrap(),
        ..DiagReply::good()
    };
    for (client, server) in [
        ("127.0.0.2:40000", SERVER),
        ("127.0.0.1:40001", SERVER),
        (CLIENT, "127.0.0.1:975"),
        ("0.0.0.0:40000", "0.0.0.0:0"),
    ] {
        assert_eq!(
            other(client, server).parse(),
            Err(AttestError::CallerGone),
            "{client} {server}"
        );
    }
    // A client that has already closed has uid 0.
    assert_eq!(
        DiagReply {
            uid: 0,
            inode: 0,
            ..DiagReply::good()
        }
        .parse(),
        Err(AttestError::CallerGone)
    );
}

/// Returns a reply with this error, as `struct nlmsghdr` and `struct nlmsgerr`.
pub(crate) fn error_reply(errno: i32, sequence: [u8; 4]) -> Vec<u8> {
    let mut reply = 36_u32.to_ne_bytes().to_vec();
    reply.extend(NLMSG_ERROR.to_ne_bytes());
    reply.extend([0; 2]);
    reply.extend(sequence);
    reply.extend([0; 4]);
    reply.extend((-errno).to_ne_bytes());
    reply.extend([0; 16]);
    reply
}

/// ENOENT is a missing socket, or a missing handler: the kernel's test distinguishes them.
#[test]
fn parse_distinguishes_a_missing_socket_from_failures() {
    let (client, server) = (CLIENT.parse().unwrap(), SERVER.parse().unwrap());
    for (errno, rejection) in [
        (libc::ENOENT, AttestError::CallerGone),
        (libc::EPERM, AttestError::kernel(QUERY, Errno::EPERM)),
        (libc::EINVAL, AttestError::kernel(QUERY, Errno::EINVAL)),
        (
            libc::EOPNOTSUPP,
            AttestError::kernel(QUERY, Errno::EOPNOTSUPP),
        ),
        // An acknowledgement describes no socket.
        (0, AttestError::kernel(QUERY, Errno::from_raw(0))),
    ] {
        let reply = error_reply(errno, [1, 0, 0, 0]);
        assert_eq!(parse(&reply, client, server), Err(rejection), "{errno}");
        // A reply that ends before its number is a failure.
        let cut = parse(&reply[..NLMSG_HEADER + 3], client, server);
        assert_eq!(cut, Err(AttestError::kernel(QUERY, None)), "{errno}");
    }
    let mut other = DiagReply::good().bytes();
    other[4..6].copy_from_slice(&3_u16.to_ne_bytes());
    assert_eq!(
        parse(&other, client, server),
        Err(AttestError::kernel(QUERY, None))
    );
}

#[test]
fn parse_fails_for_replies_of_every_shorter_length() {
    let bytes = DiagReply::good().bytes();
    for length in 0..NLMSG_HEADER + INET_DIAG_MSG_BYTES {
        assert!(
            parse(
                &bytes[..length],
                CLIENT.parse().unwrap(),
                SERVER.parse().unwrap()
            )
            .is_err(),
            "{length} bytes"
        );
    }
}

#[test]
fn lookup_rejects_addresses_outside_loopback() {
    let diag = SockDiag::open().unwrap();
    let neighbour = "192.0.2.7:22".parse().unwrap();
    assert_eq!(
        diag.client_socket(neighbour, SERVER.parse().unwrap()),
        Err(AttestError::NotLoopback)
    );
    assert_eq!(
        diag.client_socket(CLIENT.parse().unwrap(), neighbour),
        Err(AttestError::NotLoopback)
    );
}

#[test]
fn only_loopback_and_the_metadata_address_itself_are_local() {
    const METADATA: &str = "169.254.169.254:80";
    const METADATA_V6: &str = "[fd00:ec2::254]:80";
    for (client, server, expected) in [
        ("127.0.0.1:5000", "127.0.0.1:974", true),
        ("[::1]:5000", "[::1]:974", true),
        ("[::ffff:127.0.0.1]:5000", "127.0.0.1:974", true),
        ("169.254.169.254:5000", METADATA, true),
        ("127.0.0.1:5000", METADATA, true),
        ("[fd00:ec2::254]:5000", METADATA_V6, true),
        ("10.9.0.1:5000", METADATA, false),
        ("[2001:db8::1]:5000", METADATA_V6, false),
        // Only at the port of the metadata service.
        ("169.254.169.254:5000", "169.254.169.254:974", false),
        ("169.254.169.254:5000", "127.0.0.1:974", false),
        ("10.9.0.1:5000", "10.9.0.1:974", false),
    ] {
        let ends = (client.parse().unwrap(), server.parse().unwrap());
        assert_eq!(is_local(ends.0, ends.1), expected, "{client} {server}");
    }
}

#[test]
fn lookup_finds_real_connections_until_they_are_closed() {
    let diag = SockDiag::open().unwrap();
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let listener = TcpListener::bind(address).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, peer) = listener.accept().unwrap();
        let local = server.local_addr().unwrap();
        let found = diag.client_socket(peer, local).unwrap();
        assert_eq!(found.uid, nix::unistd::geteuid().as_raw());
        assert!(found.cgroup_id.is_some());
        assert_eq!(diag.client_socket(peer, local), Ok(found));
        // A half-closed socket still belongs to the client.
        client.write_all(b"x").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut one = [0];
        server.read_exact(&mut one).unwrap();
        assert_eq!(server.read(&mut one).unwrap(), 0);
        assert_eq!(diag.client_socket(peer, local), Ok(found));
        drop(client);
        // Another test's fork may hold a copy until it executes its program.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while diag.client_socket(peer, local) == Ok(found) && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(
            diag.client_socket(peer, local),
            Err(AttestError::CallerGone)
        );
    }
}

#[test]
fn listener_counts_only_if_it_is_bound_to_the_loopback_device() {
    let diag = SockDiag::open().unwrap();
    let is_served = |address: SocketAddr| diag.is_served_on_loopback(address).unwrap();
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        assert!(!is_served(address), "it is bound to no device");
        let lo = std::ffi::OsString::from(LOOPBACK);
        socket::setsockopt(&listener, socket::sockopt::BindToDevice, &lo).unwrap();
        assert!(is_served(address), "{address}");
        // A connection to it is not a listener.
        let stream = TcpStream::connect(address).unwrap();
        assert!(!is_served(stream.local_addr().unwrap()));
    }
}

#[test]
fn lookup_fails_after_close() {
    let diag = SockDiag::open().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (client, server) = (stream.local_addr().unwrap(), stream.peer_addr().unwrap());
    assert!(diag.client_socket(client, server).is_ok());
    diag.close();
    assert_eq!(
        diag.client_socket(client, server),
        Err(AttestError::CallerGone)
    );
    assert!(
        diag.netlinks
            .iter()
            .all(|netlink| netlink.lock().unwrap().is_none())
    );
}

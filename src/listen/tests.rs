use std::io::IoSlice;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use nix::sys::socket::{
    self, AddressFamily, SockFlag, SockType, SockaddrStorage, getsockopt, setsockopt, sockopt,
};
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

use super::*;
use crate::netns::NetNs;

/// Binds a listener to a free port, and returns its address too.
fn bound() -> (Listener, SocketAddr) {
    let bound = Listener::tcp(
        (Ipv4Addr::LOCALHOST, 0).into(),
        &mut ActivatedSockets::default(),
    )
    .unwrap();
    let Listener::Tcp { address, .. } = bound else {
        unreachable!()
    };
    (bound, address)
}

#[tokio::test]
async fn unattested_connections_do_not_block_other_listeners() {
    let (connections, stop) = (
        ConnectionTracker::new(&Metrics::default()),
        watch::channel(false),
    );
    let (arrived, mut arrivals) = mpsc::unbounded_channel();
    let serving = || {
        let ((bound, address), arrived) = (bound(), arrived.clone());
        let connection = move |stream, arrival| {
            let arrived = arrived.clone();
            // The workload is never attested.
            async move { drop(arrived.send((address, stream, arrival))) }
        };
        (
            address,
            tokio::spawn(serve(
                bound,
                connections.clone(),
                stop.1.clone(),
                connection,
            )),
        )
    };
    let (hostile, honest) = (serving(), serving());
    let _clients: Vec<_> = (0..=MAX_UNATTESTED)
        .map(|_| TcpStream::connect(hostile.0).unwrap())
        .collect();
    let mut held = Vec::new();
    for _ in 0..MAX_UNATTESTED {
        held.push(arrivals.recv().await.unwrap());
    }
    let _client = TcpStream::connect(honest.0).unwrap();
    let next = timeout(CONNECTION_TIMEOUT, arrivals.recv())
        .await
        .expect("the other listener accepts")
        .unwrap();
    assert_eq!(next.0, honest.0, "and the first has as many as it may");
    // Each attested connection makes room for another one.
    held.pop();
    let next = timeout(CONNECTION_TIMEOUT, arrivals.recv())
        .await
        .expect("the first one accepts again")
        .unwrap();
    assert_eq!(next.0, hostile.0);
    hostile.1.abort();
    honest.1.abort();
}

/// systemd would restart the daemon for a connection that is left in the backlog.
#[tokio::test]
async fn close_drains_the_backlog_that_systemd_holds() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sock");
    let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let unix = UnixListener::bind(&path).unwrap();
    tcp.set_nonblocking(true).unwrap();
    unix.set_nonblocking(true).unwrap();
    let address = tcp.local_addr().unwrap();
    let watched = |listener: OwnedFd| sys::register_listener(Arc::new(listener)).unwrap();
    let listener = watched(tcp.try_clone().unwrap().into());
    let bound = Listener::Tcp {
        listener,
        address,
        origin: ListenerSource::Activated,
    };
    let _before = TcpStream::connect(address).unwrap();
    assert_eq!(bound.close_and_drain_backlog().unwrap().len(), 1);
    assert_eq!(tcp.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    let bound = Listener::Unix {
        listener: watched(unix.try_clone().unwrap().into()),
        path: path.clone(),
        mode: 0o666,
        file: None,
    };
    let _before = UnixStream::connect(&path).unwrap();
    assert_eq!(bound.close_and_drain_backlog().unwrap().len(), 1);
    assert_eq!(unix.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    // Later connections wait for the next start.
    let _after = (
        TcpStream::connect(address).unwrap(),
        UnixStream::connect(&path).unwrap(),
    );
    tcp.accept().unwrap();
    unix.accept().unwrap();
}

/// Returns the buffers of an accepted connection as the kernel counts them: twice the value that
/// was set.
fn buffers(accepted: &AcceptedStream) -> (usize, usize) {
    let (AcceptedStream::Unix(socket) | AcceptedStream::Tcp { stream: socket, .. }) = accepted;
    let [receive, send] = [
        getsockopt(socket, sockopt::RcvBuf).unwrap(),
        getsockopt(socket, sockopt::SndBuf).unwrap(),
    ];
    (receive, send)
}

/// Covers T32 with each origin of a listener.
#[tokio::test]
async fn tcp_listeners_have_small_buffers() {
    let elsewhere = || {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    };
    let netns = || {
        Arc::new(NetnsRef::new(
            NetNs::own().unwrap().id(),
            "/proc/self/ns/net".into(),
        ))
    };
    let inherited = elsewhere();
    let address = inherited.local_addr().unwrap();
    let by_systemd = Listener::tcp(address, &mut ActivatedSockets::of(inherited)).unwrap();
    let passed = elsewhere();
    let address = passed.local_addr().unwrap();
    let passed = PodListener::with(netns(), address, passed.into()).unwrap();
    let handed_over = Listener::pod(Arc::new(passed)).unwrap();
    let inside = PodListener::bind(netns(), (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let port = sys::local_address(inside.listener()).unwrap();
    let in_a_pod = Listener::pod(Arc::new(inside)).unwrap();
    let mut again = None;
    for (name, bound) in [
        ("own", bound().0),
        ("systemd", by_systemd),
        ("handed over", handed_over),
        ("pod", in_a_pod),
    ] {
        let Listener::Tcp { address, .. } = bound else {
            unreachable!()
        };
        let address = if name == "pod" { port } else { address };
        let _client = TcpStream::connect(address).unwrap();
        let mut ready = bound.readable().await.unwrap();
        let accepted = bound.accept(&mut ready).unwrap().unwrap();
        assert_eq!(buffers(&accepted), (2 * 8 * 1024, 2 * 16 * 1024), "{name}");
        drop(ready);
        again.get_or_insert(bound);
    }
    // The same holds for a listener that replaces a killed one.
    let Some(Listener::Tcp {
        address,
        listener,
        origin,
    }) = again
    else {
        unreachable!()
    };
    drop(listener);
    let killed = Listener::Tcp {
        listener: sys::register_listener(Arc::new(elsewhere().into())).unwrap(),
        address,
        origin,
    };
    let bound = killed.rebind().await.unwrap();
    let _client = TcpStream::connect(address).unwrap();
    let mut ready = bound.readable().await.unwrap();
    assert_eq!(
        buffers(&bound.accept(&mut ready).unwrap().unwrap()),
        (2 * 8 * 1024, 2 * 16 * 1024)
    );
}

/// Shows that the largest response is one write, and is whole for a client that reads it slowly
/// into a small buffer.
#[tokio::test]
async fn response_is_a_single_write() {
    let (bound, address) = bound();
    let mut client = socket::socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::empty(),
        None,
    )
    .map(|client| {
        setsockopt(&client, sockopt::RcvBuf, &1024).unwrap();
        socket::connect(client.as_raw_fd(), &SockaddrStorage::from(address)).unwrap();
        TcpStream::from(client)
    })
    .unwrap();
    let mut ready = bound.readable().await.unwrap();
    let AcceptedStream::Tcp { mut stream, .. } = bound.accept(&mut ready).unwrap().unwrap() else {
        unreachable!()
    };
    let (head, body) = (vec![b'h'; 200], vec![b'b'; 10_000]);
    let written = stream
        .write_vectored(&[IoSlice::new(&head), IoSlice::new(&body)])
        .await
        .unwrap();
    assert_eq!(written, head.len() + body.len());
    stream.shutdown().await.unwrap();
    drop(stream);
    let (mut all, mut some) = (0, [0; 100]);
    loop {
        match io::Read::read(&mut client, &mut some).unwrap() {
            0 => break,
            length => all += length,
        }
    }
    assert_eq!(all, written);
}

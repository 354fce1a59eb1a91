use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use tokio::sync::mpsc;

use super::*;

/// A listener on a port that is free, and where it is.
fn bound() -> (Bound, SocketAddr) {
    let bound = Bound::tcp((Ipv4Addr::LOCALHOST, 0).into(), &mut Inherited::default()).unwrap();
    let Bound::Tcp { address, .. } = bound else { unreachable!() };
    (bound, address)
}

#[tokio::test]
async fn whose_callers_are_hard_to_find_keeps_no_other_listener_from_accepting() {
    let (limits, stop) = (Limits::new(Metrics::default()), watch::channel(false));
    let (arrived, mut arrivals) = mpsc::unbounded_channel();
    let serving = || {
        let ((bound, address), arrived) = (bound(), arrived.clone());
        let connection = move |stream, arrival| {
            let arrived = arrived.clone();
            // Whose it is, is never known.
            async move { drop(arrived.send((address, stream, arrival))) }
        };
        (address, tokio::spawn(serve(bound, limits.clone(), stop.1.clone(), connection)))
    };
    let (hostile, honest) = (serving(), serving());
    let _connections: Vec<_> = (0..=ARRIVING).map(|_| TcpStream::connect(hostile.0).unwrap()).collect();
    let mut held = Vec::new();
    for _ in 0..ARRIVING {
        held.push(arrivals.recv().await.unwrap());
    }
    let _connection = TcpStream::connect(honest.0).unwrap();
    let next = timeout(CONNECTION_LIFE, arrivals.recv()).await.expect("the other listener accepts").unwrap();
    assert_eq!(next.0, honest.0, "and the first has as many as it may");
    // Each that is known makes room for another one.
    held.pop();
    let next = timeout(CONNECTION_LIFE, arrivals.recv()).await.expect("the first one accepts again").unwrap();
    assert_eq!(next.0, hostile.0);
    hostile.1.abort();
    honest.1.abort();
}

/// systemd would start the daemon again for one who is left there.
#[tokio::test]
async fn nobody_who_came_before_the_end_is_left_in_a_queue_that_systemd_has() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sock");
    let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let unix = UnixListener::bind(&path).unwrap();
    tcp.set_nonblocking(true).unwrap();
    unix.set_nonblocking(true).unwrap();
    let address = tcp.local_addr().unwrap();
    let watched = |listener: OwnedFd| sys::watch_listener(Arc::new(listener)).unwrap();
    let listener = watched(tcp.try_clone().unwrap().into());
    let bound = Bound::Tcp { listener, address, origin: Origin::Inherited };
    let _before = TcpStream::connect(address).unwrap();
    assert_eq!(bound.close().unwrap().len(), 1);
    assert_eq!(tcp.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    let bound = Bound::Unix {
        listener: watched(unix.try_clone().unwrap().into()),
        path: path.clone(),
        mode: 0o666,
        file: None,
    };
    let _before = UnixStream::connect(&path).unwrap();
    assert_eq!(bound.close().unwrap().len(), 1);
    assert_eq!(unix.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    // Who comes later waits for the next start.
    let _after = (TcpStream::connect(address).unwrap(), UnixStream::connect(&path).unwrap());
    tcp.accept().unwrap();
    unix.accept().unwrap();
}

use std::net::{Ipv4Addr, TcpStream};

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
    let (limits, stop) = (Limits::new(4096, Metrics::default()), watch::channel(false));
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

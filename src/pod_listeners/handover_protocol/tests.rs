use std::fs::Permissions;
use std::io::Read;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::listen::{METADATA_ADDRESSES, POD_ADDRESSES};
use crate::netns::NamespaceId;

const BOTH_PARTS: MetadataParts = MetadataParts {
    key: true,
    listeners: true,
};

fn id(number: u8) -> NamespaceId {
    NamespaceId::from_bytes([number; NamespaceId::LENGTH])
}

fn listener() -> (Arc<OwnedFd>, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (Arc::new(listener.into()), address)
}

#[tokio::test]
async fn listeners_arrive_with_namespace_and_address() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let sent: Vec<_> = (0..250)
        .flat_map(|number| POD_ADDRESSES.map(|address| ((id(number), address), listener().0)))
        .collect();
    let (mut before, kept) = std::os::unix::net::UnixStream::pair().unwrap();
    let kept = Arc::new(OwnedFd::from(kept));
    let listeners = sent.iter().cloned();
    let messages = listeners
        .map(|(key, listener)| HandoverMessage::Listener(key, listener))
        .chain([HandoverMessage::Earlier(kept), HandoverMessage::End]);
    let sending = async {
        for message in messages {
            send(&ours, &message).await.unwrap();
        }
    };
    let ((), received) = tokio::join!(sending, receive_all(&theirs));
    let ReceivedListeners {
        listeners: received,
        earlier: kept_there,
        ..
    } = received.unwrap();
    assert_eq!((received.len(), kept_there.len()), (500, 1));
    // The connection ends when its last owner closes it.
    before.set_nonblocking(true).unwrap();
    assert_eq!(
        before.read(&mut [0]).unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
    drop(kept_there);
    assert_eq!(before.read(&mut [0]).unwrap(), 0);
    for (key, listener) in &sent {
        let here: SockaddrStorage = getsockname(listener.as_raw_fd()).unwrap();
        assert_eq!(
            getsockname::<SockaddrStorage>(received[key].as_raw_fd()).unwrap(),
            here,
            "{key:?}"
        );
    }
}

#[tokio::test]
async fn each_message_is_received_as_sent() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let descriptor = listener().0;
    let messages = [
        HandoverMessage::Request(BOTH_PARTS),
        HandoverMessage::Listener((id(7), POD_ADDRESSES[1]), descriptor.clone()),
        HandoverMessage::Listener((id(7), METADATA_ADDRESSES[1]), descriptor.clone()),
        HandoverMessage::TokenKey(descriptor.clone()),
        HandoverMessage::Earlier(descriptor),
        HandoverMessage::End,
        HandoverMessage::Serving,
        HandoverMessage::Done,
    ];
    for message in &messages {
        send(&ours, message).await.unwrap();
        let received = receive(&theirs).await.unwrap().unwrap();
        assert_eq!(
            received.encode().unwrap().0,
            message.encode().unwrap().0,
            "{message:?}"
        );
        assert_eq!(
            std::mem::discriminant(&received),
            std::mem::discriminant(message)
        );
    }
    drop(ours);
    assert!(receive(&theirs).await.unwrap().is_none());
}

/// The bytes of instances from before the metadata service.
#[test]
fn request_of_older_instance_takes_no_metadata() {
    let mut bytes = [0; LENGTH];
    bytes[0] = b'G';
    let decoded = HandoverMessage::decode(bytes, None).unwrap();
    assert!(
        matches!(decoded, HandoverMessage::Request(parts) if parts == MetadataParts::default())
    );
    assert_eq!(decoded.encode().unwrap().0, bytes);
    for (key, listeners) in [(true, false), (false, true), (true, true)] {
        let parts = MetadataParts { key, listeners };
        let (bytes, _) = HandoverMessage::Request(parts).encode().unwrap();
        let decoded = HandoverMessage::decode(bytes, None).unwrap();
        assert!(matches!(decoded, HandoverMessage::Request(found) if found == parts));
    }
}

#[test]
fn listener_of_unknown_address_is_not_sent() {
    let (descriptor, address) = listener();
    assert!(
        HandoverMessage::Listener((id(1), address), descriptor)
            .encode()
            .is_err()
    );
}

#[tokio::test]
async fn receiving_ends_at_an_invalid_message() {
    let (descriptor, _) = listener();
    let bytes = |message: HandoverMessage| message.encode().unwrap().0;
    let end = bytes(HandoverMessage::End);
    let with_one = bytes(HandoverMessage::Listener(
        (id(1), POD_ADDRESSES[0]),
        descriptor.clone(),
    ));
    let earlier = bytes(HandoverMessage::Earlier(descriptor.clone()));
    let (mut fifth_address, mut unknown) = (with_one, with_one);
    fifth_address[LENGTH - 1] = 4;
    unknown[0] = b'X';
    let cases: [(&[u8], bool, io::ErrorKind); 8] = [
        (&[], false, io::ErrorKind::UnexpectedEof),
        (&with_one, false, io::ErrorKind::InvalidData),
        (&end, true, io::ErrorKind::InvalidData),
        (&earlier, false, io::ErrorKind::InvalidData),
        (&with_one[..9], true, io::ErrorKind::InvalidData),
        (&fifth_address, true, io::ErrorKind::InvalidData),
        (&unknown, false, io::ErrorKind::InvalidData),
        // No listeners follow this one.
        (
            &bytes(HandoverMessage::Request(BOTH_PARTS)),
            false,
            io::ErrorKind::InvalidData,
        ),
    ];
    for (bytes, has_descriptor, kind) in cases {
        let (ours, theirs) = UnixStream::pair().unwrap();
        if !bytes.is_empty() {
            sys::send(
                ours.as_fd(),
                bytes,
                has_descriptor.then(|| descriptor.as_fd()),
            )
            .unwrap();
        }
        drop(ours);
        assert_eq!(
            receive_all(&theirs).await.unwrap_err().kind(),
            kind,
            "{bytes:?}"
        );
    }
}

#[test]
fn listener_is_verified_by_address_and_namespace() {
    let (good, address) = listener();
    let is = |descriptor: OwnedFd, address| is_listener(&descriptor, address).unwrap_or(false);
    let another = |descriptor: &Arc<OwnedFd>| descriptor.try_clone().unwrap();
    assert!(is(another(&good), address));
    assert!(!is(another(&good), POD_ADDRESSES[0]), "another address");
    let connected = TcpStream::connect(address).unwrap();
    let local = connected.local_addr().unwrap();
    assert!(!is(connected.into(), local), "it does not accept");
    let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
    let local = datagrams.local_addr().unwrap();
    assert!(!is(datagrams.into(), local), "no stream");
    assert!(
        !is(std::fs::File::open("/dev/null").unwrap().into(), address),
        "no socket"
    );
    if crate::skip::root() {
        let elsewhere = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            TcpListener::bind(address).unwrap()
        });
        assert!(
            !is(elsewhere.join().unwrap().into(), address),
            "in another network namespace"
        );
    }
}

#[test]
fn cgroups_of_two_pods_of_one_kind_are_equal() {
    let table = [
        (
            "/kubepods/besteffort/poda/x",
            "/kubepods/besteffort/podb/y",
            true,
        ),
        (
            "/kubepods/besteffort/poda/x",
            "/kubepods/burstable/podb/y",
            false,
        ),
        (
            "/kubepods/besteffort/poda/x",
            "/user.slice/user-1000.slice/x",
            false,
        ),
        (
            "/kubepods.slice/kubepods-poda.slice/cri-x.scope",
            "/kubepods.slice/kubepods-podb.slice/cri-y.scope",
            true,
        ),
        (
            "/system.slice/awsvid.service",
            "/system.slice/awsvid-next.service",
            true,
        ),
        // The paths as read from within the first one's cgroup namespace.
        ("/", "/../../podb/y", true),
        ("/", "/../../../burstable/podb/y", false),
        ("/", "/../../../../system.slice/x.service", false),
    ];
    for (own, other, same) in table {
        assert_eq!(
            grandparent_cgroup(own) == grandparent_cgroup(other),
            same,
            "{own} {other}"
        );
    }
}

#[tokio::test]
async fn socket_admits_only_its_owner() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), Permissions::from_mode(0o700)).unwrap();
    let path = folder.path().join("handover.sock");
    let handover = HandoverSocket::bind(&path).unwrap();
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let (next, before) = tokio::join!(handover.accept(), connect(&path));
    send(&before.unwrap(), &HandoverMessage::Request(BOTH_PARTS))
        .await
        .unwrap();
    let next = next.unwrap();
    assert!(matches!(
        receive(&next).await,
        Ok(Some(HandoverMessage::Request(BOTH_PARTS)))
    ));
    assert!(matches!(receive(&next).await, Ok(None)));
    std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    drop(handover);
    assert!(matches!(
        HandoverSocket::bind(&path),
        Err(ListenError::UnsafeDirectory { .. })
    ));
}

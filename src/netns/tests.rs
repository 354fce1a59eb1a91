use std::collections::HashSet;
use std::os::unix::fs::symlink;

use nix::sched::unshare;

use super::*;
use crate::skip::root;

/// Creates a namespace that lives as long as the returned sender, with a thread in it. `None`
/// without root.
fn create_namespace() -> Option<(NetNs, std::sync::mpsc::Sender<()>)> {
    if !root() {
        return None;
    }
    let (sender, receiver) = std::sync::mpsc::channel();
    let (end, ended) = std::sync::mpsc::channel();
    thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        sender.send(NetNs::own().unwrap()).unwrap();
        let _ = ended.recv();
    });
    Some((receiver.recv().unwrap(), end))
}

#[test]
fn run_in_creates_sockets_in_the_namespace_only() {
    let Some((namespace, _end)) = create_namespace() else {
        return;
    };
    let own = NamespaceId::own().unwrap();
    assert_ne!(namespace.id(), own);
    let ids = (0..8)
        .map(|_| namespace.run_in(|| NamespaceId::own().unwrap()).unwrap())
        .collect::<HashSet<_>>();
    assert_eq!(ids, HashSet::from([namespace.id()]));
    assert_eq!(NamespaceId::own().unwrap(), own);
    let port = namespace
        .run_in(|| std::net::TcpListener::bind("127.0.0.1:0").unwrap())
        .unwrap();
    let address = port.local_addr().unwrap();
    assert!(
        std::net::TcpStream::connect(address).is_err(),
        "it is not in this namespace"
    );
}

#[test]
fn run_in_propagates_panics() {
    let Some((namespace, _end)) = create_namespace() else {
        return;
    };
    let caught = std::panic::catch_unwind(|| namespace.run_in(|| panic!("inside")));
    assert_eq!(caught.unwrap_err().downcast_ref(), Some(&"inside"));
    assert_eq!(namespace.run_in(|| ()).unwrap(), ());
}

#[test]
fn open_rejects_files_without_a_namespace() {
    let folder = tempfile::tempdir().unwrap();
    let own = NamespaceId::own().unwrap();
    let file = folder.path().join("file");
    File::create(&file).unwrap();
    let link = folder.path().join("link");
    symlink("/proc/self/ns/net", &link).unwrap();
    for path in [&file, &link] {
        assert_eq!(
            NamespaceId::at(path, own).unwrap(),
            None,
            "{}",
            path.display()
        );
        assert!(
            matches!(NetNs::open(path), Err(NamespaceError::NotMounted)),
            "{}",
            path.display()
        );
    }
    assert!(NamespaceId::at(&folder.path().join("none"), own).is_err());
    if root() {
        let mounts = NetNs::of(File::open("/proc/self/ns/mnt").unwrap()).unwrap();
        assert!(
            matches!(mounts.run_in(|| ()), Err(NamespaceError::NotMounted)),
            "one of another kind"
        );
    }
}

#[test]
fn namespace_id_survives_serialization() {
    let id = NamespaceId {
        device: 4,
        inode: u64::MAX - 1,
    };
    assert_eq!(NamespaceId::from_bytes(id.to_bytes()), id);
}

#[test]
fn initial_namespace_is_recognized_by_inode_or_cookie() {
    let id = |inode| NamespaceId { device: 4, inode };
    let table = [
        ("5.15 to 6.17", 0xF000_0008, 1, true),
        ("6.18", 0xEFFF_FFF9, 3, true),
        ("6.19", 0xEFFF_FFF9, 7, true),
        ("a pod", 0xF000_00A2, 2, false),
        ("a pod", 0xF000_00A2, 4102, false),
    ];
    for (kernel, inode, cookie, is) in table {
        assert_eq!(id(inode).is_initial(Some(cookie)), is, "{kernel}");
    }
}

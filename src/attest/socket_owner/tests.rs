use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;

use super::*;
use crate::attest::cgroup_mounts::CgroupMounts;
use crate::attest::sock_diag::SockDiag;
use crate::caller::GroupDetail;
use crate::cgroup::PodRoots;

/// Returns the facts to read and a large budget.
const ALL: ProcessFacts = ProcessFacts {
    groups: GroupDetail::List,
    program: true,
    started: false,
};
const PLENTY: SearchBudget = SearchBudget {
    list: 64 * 1024,
    descriptors: 65_536,
    time: Duration::from_secs(60),
};

/// Returns a connection of this process, and the kernel's description of its client's socket.
fn connection() -> (TcpListener, TcpStream, SocketInfo) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = listener.local_addr().unwrap();
    let client = TcpStream::connect(server).unwrap();
    let socket = SockDiag::open()
        .unwrap()
        .client_socket(client.local_addr().unwrap(), server)
        .unwrap();
    (listener, client, socket)
}

/// Returns the machine, with its real cgroup v2 tree.
fn machine() -> (Arc<Host>, Arc<CgroupTree>) {
    let hierarchies = CgroupMounts::find(&fs::read_to_string("/proc/self/mountinfo").unwrap());
    let host = Arc::new(Host::new(
        PathBuf::from("/proc"),
        hierarchies,
        PodRoots::defaults(),
        None,
    ));
    let tree = host.cgroup_tree().expect("cgroup v2");
    (host, tree)
}

/// Returns a tree in which the root's list has these processes.
fn listing(processes: &str) -> (tempfile::TempDir, CgroupTree) {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("unit")).unwrap();
    fs::write(root.path().join("unit/cgroup.procs"), processes).unwrap();
    let tree = CgroupTree::at(root.path().to_owned(), PodRoots::defaults());
    (root, tree)
}

fn unit() -> CgroupPath {
    CgroupPath::parse("/unit").unwrap()
}

#[test]
fn search_finds_the_owner_and_its_descriptor() {
    let (_listener, client, socket) = connection();
    let (host, tree) = machine();
    let cgroup = tree.path_of_blocking(socket.cgroup_id.unwrap()).unwrap();
    let found = find_socket_owner(&host, &tree, &socket, &cgroup, ALL, PLENTY).unwrap();
    assert_eq!(found.process.to_process().pid, std::process::id());
    assert_eq!(found.descriptor, client.as_raw_fd().cast_unsigned());
}

/// Covers a process that is moved between the read of the list and its own read.
#[test]
fn search_rejects_an_owner_in_another_cgroup() {
    let (_listener, _client, socket) = connection();
    let (host, _) = machine();
    let (_root, elsewhere) = listing(&format!("{}\n", std::process::id()));
    assert_eq!(
        find_socket_owner(&host, &elsewhere, &socket, &unit(), ALL, PLENTY).unwrap_err(),
        AttestError::Ambiguous
    );
}

#[test]
fn search_fails_for_an_invisible_pid_namespace() {
    let (_listener, _client, socket) = connection();
    let (host, _) = machine();
    let (_root, tree) = listing(&format!("0\n{}\n", std::process::id()));
    assert_eq!(
        find_socket_owner(&host, &tree, &socket, &unit(), ALL, PLENTY).unwrap_err(),
        AttestError::InvisibleProcess
    );
}

#[test]
fn search_fails_over_its_budget() {
    let (_listener, _client, socket) = connection();
    let (host, _) = machine();
    let (_root, tree) = listing(&format!("{}\n", std::process::id()));
    // These are opened after the connection, so their numbers are higher and they are read first.
    let _others: Vec<_> = (0..300)
        .map(|_| fs::File::open("/dev/null").unwrap())
        .collect();
    for budget in [
        SearchBudget { list: 1, ..PLENTY },
        // The standard streams and the two sockets exceed the budget.
        SearchBudget {
            descriptors: 3,
            ..PLENTY
        },
        SearchBudget {
            time: Duration::ZERO,
            ..PLENTY
        },
    ] {
        let found = find_socket_owner(&host, &tree, &socket, &unit(), ALL, budget);
        assert_eq!(
            found.unwrap_err(),
            AttestError::TooManyDescriptors,
            "{budget:?}"
        );
    }
}

#[test]
fn search_skips_a_process_without_the_socket() {
    let (_listener, client, socket) = connection();
    let (host, _) = machine();
    let (_root, tree) = listing(&format!("{}\n", std::process::id()));
    drop(client);
    assert_eq!(
        find_socket_owner(&host, &tree, &socket, &unit(), ALL, PLENTY).unwrap_err(),
        AttestError::NoSocketOwner
    );
}

/// Covers a pid that belonged to another process when its handle was cached.
#[test]
fn search_finds_a_process_with_a_reused_pid() {
    let (_listener, _client, socket) = connection();
    let (host, tree) = machine();
    let mut gone = std::process::Command::new("true").spawn().unwrap();
    let pidfd = sys::pidfd_open(gone.id()).unwrap();
    gone.wait().unwrap();
    let handle = host.process(std::process::id(), pidfd).unwrap();
    // The other process had its connections at this number too.
    (0..8).for_each(|number| handle.record_held(number));
    handle.replace_socket_hints([(socket.inode, 0)].into_iter());
    let cgroup = tree.path_of_blocking(socket.cgroup_id.unwrap()).unwrap();
    let found = find_socket_owner(&host, &tree, &socket, &cgroup, ALL, PLENTY).unwrap();
    assert_eq!(found.process.verify_unchanged_blocking(), Ok(()));
    assert!(!Arc::ptr_eq(
        &handle,
        &host.processes.get(std::process::id()).unwrap()
    ));
}

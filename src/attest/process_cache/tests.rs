use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};

use super::*;
use crate::attest::cgroup_mounts::CgroupMounts;
use crate::attest::host::Host;
use crate::cgroup::PodRoots;

fn host() -> Host {
    Host::new(
        PathBuf::from("/proc"),
        CgroupMounts::default(),
        PodRoots::defaults(),
        None,
    )
}

/// Starts a child process that waits until its standard input is closed.
fn sleeper() -> Child {
    Command::new("cat").stdin(Stdio::piped()).spawn().unwrap()
}

fn end(mut child: Child) -> u32 {
    child.kill().unwrap();
    child.wait().unwrap();
    child.id()
}

fn pidfd(pid: u32) -> OwnedFd {
    sys::pidfd_open(pid).unwrap()
}

#[test]
fn host_reuses_the_handle_of_a_process() {
    let (host, child) = (host(), sleeper());
    let first = host.process(child.id(), pidfd(child.id())).unwrap();
    let again = host.process(child.id(), pidfd(child.id())).unwrap();
    // Before Linux 6.9 nothing shows that it is the same process.
    assert_eq!(Arc::ptr_eq(&first, &again), first.inode().is_some());
    end(child);
}

#[test]
fn host_does_not_reuse_a_handle_for_a_reused_pid() {
    let (host, old, new) = (host(), sleeper(), sleeper());
    // This is as if the new process had the pid of the old one.
    let first = host.process(new.id(), pidfd(old.id())).unwrap();
    end(old);
    assert_eq!(first.verify_alive(), Err(AttestError::CallerGone));
    let second = host.process(new.id(), pidfd(new.id())).unwrap();
    assert!(!Arc::ptr_eq(&first, &second));
    assert!(Arc::ptr_eq(&second, &host.processes.get(new.id()).unwrap()));
    assert_eq!(second.verify_alive(), Ok(()));
    end(new);
}

#[test]
fn open_directories_fail_after_exit() {
    let child = sleeper();
    let handle = ProcessHandle::new(child.id(), pidfd(child.id()), None);
    let proc_root = Path::new("/proc");
    handle.descriptors(proc_root).unwrap();
    end(child);
    let directory = handle.directory(proc_root).unwrap();
    assert!(fcntl::openat(directory, "stat", OFlag::O_RDONLY, Mode::empty()).is_err());
    assert!(fcntl::readlinkat(handle.descriptors(proc_root).unwrap(), "0").is_err());
}

/// Returns connections of this process, with descriptor number and inode of each.
fn connections(count: usize) -> (TcpListener, Vec<(TcpStream, u32, u32)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connect = || {
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let number = client.as_raw_fd().cast_unsigned();
        let inode = nix::sys::stat::fstat(&client)
            .unwrap()
            .st_ino
            .try_into()
            .unwrap();
        (client, number, inode)
    };
    let connections = (0..count).map(|_| connect()).collect();
    (listener, connections)
}

fn own() -> ProcessHandle {
    ProcessHandle::new(std::process::id(), pidfd(std::process::id()), None)
}

#[test]
fn socket_returns_the_inode_of_a_descriptor() {
    let (_listener, connections) = connections(1);
    let file = std::fs::File::open("/dev/null").unwrap();
    let (handle, proc_root) = (own(), Path::new("/proc"));
    let (_, number, inode) = connections[0];
    assert_eq!(handle.socket(proc_root, number), Some(inode));
    assert_eq!(
        handle.socket(proc_root, file.as_raw_fd().cast_unsigned()),
        None
    );
    assert_eq!(handle.socket(proc_root, u32::MAX), None);
}

/// Returns the number that is found for `inode`, and how many were read.
fn hint_for(handle: &ProcessHandle, inode: u32) -> (Option<u32>, usize) {
    let mut reads = 0;
    let found = handle.find_by_hint(Path::new("/proc"), inode, || {
        reads += 1;
        Ok(())
    });
    (found.unwrap(), reads)
}

#[test]
fn hints_are_tried_in_order_and_scanned_sockets_first() {
    let (_listener, connections) = connections(10);
    let handle = own();
    assert_eq!(hint_for(&handle, connections[0].2), (None, 0));
    connections
        .iter()
        .for_each(|(_, number, _)| handle.record_held(*number));
    // The first two hints are evicted by now. A search for a missing inode reads all others.
    assert_eq!(hint_for(&handle, connections[0].2), (None, MAX_HINTS));
    for (_, number, inode) in &connections[2..] {
        assert_eq!(hint_for(&handle, *inode), (Some(*number), 1));
    }
    // The oldest hint is tried first.
    let handle = own();
    connections[..3]
        .iter()
        .for_each(|(_, number, _)| handle.record_held(*number));
    handle.record_held(connections[0].1);
    assert_eq!(
        hint_for(&handle, connections[2].2),
        (Some(connections[2].1), 2)
    );
}

#[test]
fn scanned_socket_is_found_without_a_scan() {
    let (_listener, connections) = connections(100);
    let handle = own();
    handle.replace_socket_hints(
        connections
            .iter()
            .map(|(_, number, inode)| (*inode, *number)),
    );
    for (_, number, inode) in &connections[1..] {
        assert_eq!(hint_for(&handle, *inode), (Some(*number), 1));
        assert_eq!(hint_for(&handle, *inode), (None, 0), "once");
    }
    // The descriptor is read, whatever the hint was before.
    let (first, number, inode) = connections.into_iter().next().unwrap();
    drop(first);
    let _other = std::fs::File::open("/dev/null").unwrap();
    assert_eq!(hint_for(&handle, inode), (None, 1), "{number}");
    // The number of hints is bounded.
    handle.replace_socket_hints((0..10_000).map(|number| (number, number)));
    assert_eq!(handle.hints.lock().unwrap().sockets.len(), MAX_SOCKETS);
}

#[test]
fn failed_charge_ends_the_search() {
    let (_listener, connections) = connections(2);
    let handle = own();
    connections
        .iter()
        .for_each(|(_, number, _)| handle.record_held(*number));
    let found = handle.find_by_hint(Path::new("/proc"), connections[1].2, || {
        Err(AttestError::TooManyDescriptors)
    });
    assert_eq!(found, Err(AttestError::TooManyDescriptors));
}

#[test]
fn exe_path_is_read_once_per_file() {
    let handle = own();
    let path = |file, path: &str| handle.exe_path(file, || PathBuf::from(path));
    assert_eq!(&*path((1, 2), "/a"), Path::new("/a"));
    assert_eq!(&*path((1, 2), "/b"), Path::new("/a"));
    assert_eq!(&*path((1, 3), "/b"), Path::new("/b"));
}

#[test]
fn full_process_cache_evicts_the_least_recently_used() {
    let processes = ProcessCache::with_capacity(3);
    let own = |pid| Arc::new(ProcessHandle::new(pid, pidfd(std::process::id()), None));
    let used = own(1);
    processes.insert(used.clone());
    for pid in 2..100 {
        processes.insert(own(pid));
        assert!(Arc::ptr_eq(&processes.get(1).unwrap(), &used));
        let is_cached = |pid| lock(&processes.0).by_pid.contains(&pid);
        assert!(is_cached(pid) && is_cached(pid - 1), "{pid}");
        assert!(pid < 4 || !is_cached(pid - 2), "{pid}");
    }
}

#[tokio::test(start_paused = true)]
async fn handles_of_ended_processes_are_evicted() {
    let processes = ProcessCache::with_capacity(1000);
    let (ended, running) = (sleeper(), sleeper());
    for child in [&ended, &running] {
        let handle = ProcessHandle::new(child.id(), pidfd(child.id()), None);
        processes.insert(Arc::new(handle));
    }
    let ended = end(ended);
    assert!(processes.get(ended).is_some());
    sleep(2 * SWEEP_INTERVAL).await;
    assert!(processes.get(ended).is_none());
    assert!(processes.get(running.id()).is_some());
    end(running);
    sleep(2 * SWEEP_INTERVAL).await;
    let cached = lock(&processes.0);
    assert!(cached.by_pid.is_empty() && !cached.swept);
}

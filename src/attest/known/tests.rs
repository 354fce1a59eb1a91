use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};

use super::*;
use crate::attest::host::Host;

fn host() -> Host {
    Host::new(PathBuf::from("/proc"), None)
}

/// A process of the test's own that waits until it is told to end.
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
fn a_process_is_opened_once() {
    let (host, child) = (host(), sleeper());
    let first = host.process(child.id(), pidfd(child.id())).unwrap();
    let again = host.process(child.id(), pidfd(child.id())).unwrap();
    // Before Linux 6.9 nothing tells that it is the same.
    assert_eq!(Arc::ptr_eq(&first, &again), first.inode().is_some());
    end(child);
}

#[test]
fn another_one_with_the_same_number_is_another() {
    let (host, old, new) = (host(), sleeper(), sleeper());
    // As if the number of the new one had been that of the old one.
    let first = host.process(new.id(), pidfd(old.id())).unwrap();
    end(old);
    assert_eq!(first.alive(), Err(Refusal::Gone));
    let second = host.process(new.id(), pidfd(new.id())).unwrap();
    assert!(!Arc::ptr_eq(&first, &second));
    assert!(Arc::ptr_eq(&second, &host.processes.of(new.id()).unwrap()));
    assert_eq!(second.alive(), Ok(()));
    end(new);
}

#[test]
fn what_was_opened_of_one_that_is_gone_shows_nothing_any_more() {
    let child = sleeper();
    let known = Known::new(child.id(), pidfd(child.id()), None);
    let proc_root = Path::new("/proc");
    known.descriptors(proc_root).unwrap();
    end(child);
    let directory = known.directory(proc_root).unwrap();
    assert!(fcntl::openat(directory, "stat", OFlag::O_RDONLY, Mode::empty()).is_err());
    assert!(fcntl::readlinkat(known.descriptors(proc_root).unwrap(), "0").is_err());
}

#[test]
fn a_descriptor_is_a_socket_only_by_its_whole_inode() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let known = Known::new(std::process::id(), pidfd(std::process::id()), None);
    let inode = |socket: &TcpStream| {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd())).unwrap();
        let link = link.to_str().unwrap().strip_prefix("socket:[").unwrap().strip_suffix(']').unwrap().to_owned();
        link.parse::<u32>().unwrap()
    };
    let (inode, number) = (inode(&client), client.as_raw_fd().cast_unsigned());
    assert!(known.holds(Path::new("/proc"), number, inode));
    for other in [inode / 10, inode + 1, 0, u32::MAX] {
        assert!(!known.holds(Path::new("/proc"), number, other), "{other}");
    }
    assert!(!known.holds(Path::new("/proc"), u32::MAX, inode));
}

#[test]
fn the_numbers_that_were_seen_last_are_tried() {
    let known = Known::new(std::process::id(), pidfd(std::process::id()), None);
    assert_eq!(known.numbers().count(), 0);
    [3, 4, 5, 3].into_iter().for_each(|number| known.held(number));
    assert_eq!(known.numbers().collect::<Vec<_>>(), [4, 5, 3]);
    (10..16).for_each(|number| known.held(number));
    assert_eq!(known.numbers().collect::<Vec<_>>(), [5, 3, 10, 11, 12, 13, 14, 15]);
}

#[test]
fn a_path_is_read_once_for_each_file() {
    let known = Known::new(std::process::id(), pidfd(std::process::id()), None);
    let path = |file, path: &str| known.executable(file, || PathBuf::from(path)).path;
    assert_eq!(&*path((1, 2), "/a"), Path::new("/a"));
    assert_eq!(&*path((1, 2), "/b"), Path::new("/a"));
    assert_eq!(&*path((1, 3), "/b"), Path::new("/b"));
}

#[test]
fn so_many_are_kept_and_no_more() {
    let processes = KnownProcesses::default();
    for pid in 1..1000 {
        processes.keep(Arc::new(Known::new(pid, pidfd(std::process::id()), None)));
        assert!(processes.of(pid).is_some());
        assert!(processes.0.lock().unwrap().len() <= KEPT);
    }
}

//! The opt-in of a pod to the metadata address: a sysctl of its network namespace.
//!
//! The pod's `securityContext.sysctls` sets `net.ipv4.ip_local_reserved_ports`, by which the kernel
//! reserves port 974 for a service. The runtime sets it before the first container, whose processes
//! cannot change it without `CAP_NET_ADMIN`. It outlives each restart of the daemon.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::listen::POD_PORT;

/// The sysctl of the network namespace of the thread that opens it.
const SYSCTL_PATH: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
/// The length of the part of the list that is read, in bytes. The kernel sorts the list, so that
/// only ports below 974 stand before it.
const LIST_BYTES: usize = 4096;

/// The open sysctl of one network namespace. It does not keep the namespace alive.
#[derive(Debug)]
pub(super) struct OptInFile(File);

impl OptInFile {
    /// Opens the sysctl of the calling thread's network namespace.
    pub(super) fn open() -> io::Result<Self> {
        File::open(SYSCTL_PATH).map(Self)
    }

    /// Returns whether the pod has opted in by now. The kernel answers from memory. Fails after the
    /// end of the namespace.
    pub(super) fn is_set(&self) -> io::Result<bool> {
        let mut list = [0; LIST_BYTES];
        let length = self.0.read_at(&mut list, 0)?;
        Ok(reserves(&String::from_utf8_lossy(&list[..length])))
    }
}

/// Returns whether the list has the endpoint's port as an element of its own. A range around it may
/// have another purpose.
fn reserves(list: &str) -> bool {
    let port = POD_PORT.to_string();
    list.trim().split(',').any(|element| element == port)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use nix::sched::{CloneFlags, unshare};

    use super::*;
    use crate::skip::root;

    #[test]
    fn port_opts_in_as_an_element_of_its_own() {
        for (list, expected) in [
            ("974\n", true),
            ("80,974,8080\n", true),
            ("974-974\n", false),
            ("970-980\n", false),
            ("974-975\n", false),
            ("9740\n", false),
            ("97,4\n", false),
            ("\n", false),
            ("", false),
        ] {
            assert_eq!(reserves(list), expected, "{list:?}");
        }
    }

    #[test]
    fn open_file_follows_the_namespace_from_outside() {
        if !root() {
            return;
        }
        let (opened, file) = mpsc::channel();
        let (end, ended) = mpsc::channel::<&str>();
        let (set, is_set) = mpsc::channel();
        let pod = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            opened.send(OptInFile::open().unwrap()).unwrap();
            for list in ended {
                std::fs::write(SYSCTL_PATH, list).unwrap();
                set.send(()).unwrap();
            }
        });
        let file = file.recv().unwrap();
        assert!(!file.is_set().unwrap());
        for (list, expected) in [("974", true), ("900-980", false), ("8080,974", true)] {
            end.send(list).unwrap();
            is_set.recv().unwrap();
            assert_eq!(file.is_set().unwrap(), expected, "{list}");
        }
        assert!(!OptInFile::open().unwrap().is_set().unwrap(), "here");
        drop(end);
        pod.join().unwrap();
        // The kernel frees the namespace a moment after its last process.
        let give_up = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while file.is_set().is_ok() {
            assert!(
                std::time::Instant::now() < give_up,
                "it keeps the namespace"
            );
            thread::yield_now();
        }
    }
}

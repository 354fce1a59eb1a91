use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::*;
use crate::attest::cgroup_mounts::CgroupMounts;
use crate::cgroup::PodRoots;

fn host() -> Arc<Host> {
    Arc::new(Host::new(
        PathBuf::from("/proc"),
        CgroupMounts::default(),
        PodRoots::defaults(),
        None,
    ))
}

/// Starts a child process that waits until its standard input is closed.
fn sleeper() -> std::process::Child {
    std::process::Command::new("cat")
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn process_is_unchanged_until_it_exits_even_as_a_zombie() {
    let mut child = sleeper();
    let pidfd = crate::attest::sys::pidfd_open(child.id()).unwrap();
    let host = host();
    let held = ProcessSnapshot::read(&host, host.process(child.id(), pidfd).unwrap()).unwrap();
    assert_eq!(held.verify_unchanged_blocking(), Ok(()));
    assert_eq!(held.to_process().pid, child.id());
    child.kill().unwrap();
    // The process is dead and not reaped before `wait` below, so /proc/<pid> still exists.
    let mut fds = [PollFd::new(held.handle.pidfd().as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::from(5000_u16)).unwrap(), 1);
    assert!(
        Path::new("/proc")
            .join(child.id().to_string())
            .join("stat")
            .exists()
    );
    assert_eq!(
        held.verify_unchanged_blocking(),
        Err(AttestError::CallerGone)
    );
    child.wait().unwrap();
    assert_eq!(
        held.verify_unchanged_blocking(),
        Err(AttestError::CallerGone)
    );
}

#[test]
fn reused_pid_is_detected() {
    let mut dead = sleeper();
    let pidfd = crate::attest::sys::pidfd_open(dead.id()).unwrap();
    dead.kill().unwrap();
    dead.wait().unwrap();
    let mut living = sleeper();
    // This is as if the pid had been reused in the meantime.
    let host = host();
    let handle = host.process(living.id(), pidfd).unwrap();
    assert_eq!(
        ProcessSnapshot::read(&host, handle).unwrap_err(),
        AttestError::CallerGone
    );
    living.kill().unwrap();
    living.wait().unwrap();
}

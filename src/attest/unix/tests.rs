use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::unistd::{Gid, Uid, getegid, geteuid, getgroups};

use super::*;

fn host() -> Host {
    Host::new(PathBuf::from("/proc"), None)
}

/// What a kernel before 6.5 would have recorded of this process or a child of it.
fn peer(pid: u32, accepted: u64) -> Peer {
    let mut groups: Vec<u32> = getgroups().unwrap().into_iter().map(Gid::as_raw).collect();
    groups.sort_unstable();
    groups.dedup();
    Peer { pid, uid: geteuid().as_raw(), gid: getegid().as_raw(), groups, pinned: Pinned::SinceAccept(accepted) }
}

/// A process that waits until it is killed.
fn waiting(program: &str, arguments: &[&str]) -> Child {
    Command::new(program).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

fn end(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

fn start_time(child: &Child) -> u64 {
    let pidfd = sys::pidfd_open(child.id()).unwrap();
    HeldProcess::look(&host(), child.id(), pidfd).unwrap().start_time().unwrap()
}

#[test]
fn without_a_pidfd_of_the_kernels_the_process_of_that_number_is_taken() {
    let child = waiting("cat", &[]);
    let accepted = start_time(&child);
    let caller = attest(&host(), peer(child.id(), accepted), |_| false).unwrap();
    assert_eq!(caller.process.as_ref().unwrap().pid, child.id());
    assert_eq!(caller.still_same(), Ok(()));
    end(child);
    assert_eq!(caller.still_same(), Err(Refusal::Gone));
}

#[test]
fn without_one_a_process_that_started_after_the_connection_is_another() {
    let child = waiting("cat", &[]);
    let accepted = start_time(&child) - 1;
    assert_eq!(attest(&host(), peer(child.id(), accepted), |_| false).unwrap_err(), Refusal::Gone);
    end(child);
}

#[test]
fn without_one_nobody_in_a_container_is_served() {
    if !Uid::effective().is_root() {
        // A user namespace may not be allowed here; with root it always is.
        return;
    }
    // In a user namespace of its own, with this user mapped to itself: all that tells is the namespace.
    let mut child = waiting("unshare", &["--user", "--map-current-user", "sh", "-c", "echo; exec cat"]);
    std::io::Read::read_exact(&mut child.stdout.take().unwrap(), &mut [0]).unwrap();
    let refusal = attest(&host(), peer(child.id(), u64::MAX), |_| false).unwrap_err();
    assert!(matches!(refusal, Refusal::Unsupported(_)), "{refusal:?}");
    end(child);
}

#[test]
fn other_ids_than_the_connectors_are_a_refusal() {
    let child = waiting("cat", &[]);
    let other = Peer { uid: geteuid().as_raw() + 1, ..peer(child.id(), u64::MAX) };
    assert_eq!(attest(&host(), other, |_| false).unwrap_err(), Refusal::Changed);
    let other = Peer { gid: getegid().as_raw() + 1, ..peer(child.id(), u64::MAX) };
    assert_eq!(attest(&host(), other, |_| false).unwrap_err(), Refusal::Changed);
    end(child);
}

#[test]
fn what_it_runs_is_looked_at_only_where_that_decides() {
    let child = waiting("cat", &[]);
    let without = attest(&host(), peer(child.id(), u64::MAX), |_| false).unwrap();
    assert!(without.process.unwrap().program.is_none());
    let with = attest(&host(), peer(child.id(), u64::MAX), |caller| caller.process.is_some()).unwrap();
    let program = with.process.unwrap().program.unwrap();
    assert_eq!(program.start_time, start_time(&child));
    assert!(program.exe.unwrap().path.is_absolute());
    end(child);
}

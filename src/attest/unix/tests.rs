use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::stat::Mode;
use nix::unistd::{Gid, getegid, geteuid, getgroups, mkfifo};
use tokio::time::timeout;

use super::*;
use crate::attest::cgroup_mounts::CgroupMounts;
use crate::attest::{Attestation, Peer};
use crate::cgroup::PodRoots;

fn host() -> Arc<Host> {
    Arc::new(Host::new(
        PathBuf::from("/proc"),
        CgroupMounts::default(),
        PodRoots::defaults(),
        None,
    ))
}

/// Returns what a kernel before 6.5 records of this process or a child of it.
fn peer(pid: u32, accepted: u64) -> ConnectedPeer {
    ConnectedPeer {
        pid,
        uid: geteuid().as_raw(),
        gid: getegid().as_raw(),
        pin: PeerPin::SinceAccept(accepted),
    }
}

/// Returns this process's supplementary groups, which its children have too.
fn groups() -> Vec<u32> {
    getgroups().unwrap().into_iter().map(Gid::as_raw).collect()
}

/// Returns one end of a connection to this process.
fn stream() -> Arc<OwnedFd> {
    Arc::new(UnixStream::pair().unwrap().0.into())
}

fn connector_of(peer: ConnectedPeer) -> Result<Box<ConnectorProof>, AttestError> {
    match find_connector(&host(), peer, stream().as_fd()) {
        Ok((_, connector)) => Ok(Box::new(connector)),
        Err(rejection) => Err(rejection.error),
    }
}

/// Begins the attestation of the peer, for a decision that needs these facts.
fn begin_attestation(
    (host, stream): (&Arc<Host>, &Arc<OwnedFd>),
    peer: ConnectedPeer,
    facts: Option<ProcessFacts>,
) -> Attestation {
    let (socket, connector) = find_connector(host, peer, stream.as_fd()).unwrap();
    let peer = Peer::unix(socket, connector, stream.clone());
    peer.begin_attestation(facts).unwrap()
}

/// Starts a process that waits until it is killed.
fn spawn_waiting(program: &str, arguments: &[&str]) -> Child {
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

fn end(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

fn start_time(child: &Child) -> u64 {
    let pidfd = sys::pidfd_open(child.id()).unwrap();
    let host = host();
    ProcessSnapshot::read(&host, host.process(child.id(), pidfd).unwrap())
        .unwrap()
        .start_time()
        .unwrap()
}

#[tokio::test]
async fn attest_uses_the_pid_without_a_kernel_pidfd() {
    let child = spawn_waiting("cat", &[]);
    let accepted = start_time(&child);
    let connector = connector_of(peer(child.id(), accepted)).unwrap();
    assert_eq!(connector.to_process().pid, child.id());
    assert_eq!(connector.verify_unchanged().await, Ok(()));
    assert!(connector.needs_process());
    let stream = stream();
    let read = connector.read_facts(stream.as_fd(), ProcessFacts::default());
    let (_, connector) = read.await.unwrap();
    assert!(!connector.needs_process());
    assert_eq!(connector.verify_unchanged().await, Ok(()));
    end(child);
    assert_eq!(
        connector.verify_unchanged().await,
        Err(AttestError::CallerGone)
    );
}

#[tokio::test]
async fn attest_rejects_a_later_process_without_a_kernel_pidfd() {
    let child = spawn_waiting("cat", &[]);
    let accepted = start_time(&child) - 1;
    let later = || peer(child.id(), accepted);
    // Before the request is decided, its process is read although no rule needs a fact of it.
    let attestation = begin_attestation((&host(), &stream()), later(), None);
    assert!(attestation.may_wait());
    assert_eq!(
        attestation.finish().await.unwrap_err().error,
        AttestError::CallerGone
    );
    // No proof of it ever succeeds.
    let gone = Err(AttestError::CallerGone);
    let connector = connector_of(later()).unwrap();
    assert_eq!(connector.verify_unchanged().await, gone);
    assert_eq!(connector.for_agent().await.map(drop), gone);
    end(child);
}

/// Returns a host with a `/proc` in which reading the start of this process blocks. Also returns a
/// function that ends the block.
fn host_with_blocked_start(pid: u32) -> (tempfile::TempDir, Arc<Host>, impl FnOnce() + Send) {
    let proc = tempfile::tempdir().unwrap();
    let (own, real) = (
        proc.path().join(pid.to_string()),
        PathBuf::from(format!("/proc/{}", pid)),
    );
    std::fs::create_dir(&own).unwrap();
    for name in ["status", "cgroup", "uid_map"] {
        std::fs::write(own.join(name), std::fs::read(real.join(name)).unwrap()).unwrap();
    }
    std::os::unix::fs::symlink("/proc/self", proc.path().join("self")).unwrap();
    let stat = own.join("stat");
    mkfifo(&stat, Mode::S_IRWXU).unwrap();
    let release = move || std::fs::write(stat, "").unwrap();
    let host = Arc::new(Host::new(
        proc.path().to_owned(),
        CgroupMounts::default(),
        PodRoots::defaults(),
        None,
    ));
    (proc, host, release)
}

/// Before Linux 6.5 the start of the caller's process has to be read, for which the kernel takes a
/// lock that the caller may hold (T25).
#[tokio::test]
async fn blocked_start_stops_only_a_lookup_thread() {
    let child = spawn_waiting("cat", &[]);
    let (_proc, host, release) = host_with_blocked_start(child.id());
    let (attested, wait) = mpsc::channel();
    let releasing = std::thread::spawn(move || {
        let outcome = wait.recv_timeout(Duration::from_secs(20));
        release();
        outcome
    });
    let attestation = begin_attestation((&host, &stream()), peer(child.id(), u64::MAX), None);
    assert!(
        attestation.may_wait(),
        "its connection moves to a lookup thread"
    );
    let mut reading = tokio::spawn(attestation.finish());
    let waited = timeout(Duration::from_millis(100), &mut reading).await;
    assert!(waited.is_err(), "this thread goes on");
    attested.send(()).unwrap();
    let outcome = releasing.join().unwrap();
    outcome.expect("the caller is attested while its start cannot be read");
    // A pipe cannot be read at an offset, as files of `/proc` are.
    let rejection = reading.await.unwrap().unwrap_err();
    let failed = AttestError::kernel("stat", Errno::ESPIPE);
    assert_eq!(rejection.error, failed);
    end(child);
}

#[test]
fn attest_rejects_containers_without_a_kernel_pidfd() {
    // A user namespace may not be allowed here; root may always create one.
    if !crate::skip::root() {
        return;
    }
    // In a user namespace of its own, with this user mapped to itself, only the namespace differs.
    let mut child = spawn_waiting(
        "unshare",
        &["--user", "--map-current-user", "sh", "-c", "echo; exec cat"],
    );
    std::io::Read::read_exact(&mut child.stdout.take().unwrap(), &mut [0]).unwrap();
    let rejection = connector_of(peer(child.id(), u64::MAX)).unwrap_err();
    assert!(
        matches!(rejection, AttestError::Unsupported(_)),
        "{rejection:?}"
    );
    end(child);
}

#[test]
fn attest_rejects_changed_ids() {
    let child = spawn_waiting("cat", &[]);
    let other = ConnectedPeer {
        uid: geteuid().as_raw() + 1,
        ..peer(child.id(), u64::MAX)
    };
    assert_eq!(
        connector_of(other).unwrap_err(),
        AttestError::IdentityChanged
    );
    let other = ConnectedPeer {
        gid: getegid().as_raw() + 1,
        ..peer(child.id(), u64::MAX)
    };
    assert_eq!(
        connector_of(other).unwrap_err(),
        AttestError::IdentityChanged
    );
    end(child);
}

#[tokio::test]
async fn groups_and_program_are_read_only_if_needed() {
    let (child, stream) = (spawn_waiting("cat", &[]), stream());
    let connector = connector_of(peer(child.id(), u64::MAX)).unwrap();
    let process = connector.to_process();
    assert_eq!((&process.groups, &process.program), (&None, &None));
    let facts = ProcessFacts {
        groups: GroupDetail::List,
        program: true,
        started: false,
    };
    let attestation =
        begin_attestation((&host(), &stream), peer(child.id(), u64::MAX), Some(facts));
    let all = attestation.finish().await.unwrap();
    let process = all.process.as_ref().unwrap();
    assert_eq!(
        process.groups,
        Some(Groups::new(groups(), GroupDetail::Digest).unwrap())
    );
    assert!(
        process
            .program
            .as_ref()
            .unwrap()
            .exe
            .as_ref()
            .unwrap()
            .path
            .is_absolute()
    );
    assert_eq!(all.verify_unchanged().await, Ok(()));
    end(child);
}

#[tokio::test]
async fn attest_rejects_changed_groups() {
    if !crate::skip::root() {
        return;
    }
    let (child, stream) = (
        spawn_waiting(
            "setpriv",
            &["--groups", "4000000000", "sh", "-c", "echo; exec cat"],
        ),
        stream(),
    );
    let mut child = child;
    std::io::Read::read_exact(&mut child.stdout.take().unwrap(), &mut [0]).unwrap();
    let facts = ProcessFacts {
        groups: GroupDetail::Digest,
        program: false,
        started: false,
    };
    let attestation =
        begin_attestation((&host(), &stream), peer(child.id(), u64::MAX), Some(facts));
    assert_eq!(
        attestation.finish().await.unwrap_err().error,
        AttestError::IdentityChanged
    );
    end(child);
}

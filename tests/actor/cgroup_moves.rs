//! Scenes about cgroups below this process's own, and about sockets that io_uring makes (T7 and
//! T15).

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use io_uring::types::Fixed;
use io_uring::{IoUring, opcode, squeue};

use crate::daemon;
use crate::process::{become_user, child};
use crate::raw_http::{self, Address};
use crate::{ALICE, BOB};

/// A cgroup below this process's own, removed at the end.
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    /// Creates one with a name that begins with `prefix` and ends with `suffix`. An actor that was
    /// killed leaves its cgroups behind, and another may get its process id.
    pub(crate) fn new(parent: &Path, prefix: &str, suffix: &str) -> Self {
        let directory = tempfile::Builder::new()
            .prefix(prefix)
            .suffix(suffix)
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir_in(parent)
            .unwrap();
        Self(directory.keep())
    }

    pub(crate) fn write(&self, file: &str, text: &str) {
        fs::write(self.0.join(file), text).unwrap();
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // One that a scene has removed is gone already.
        let _ = fs::remove_dir(&self.0);
    }
}

pub(crate) fn own_cgroup() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mount = mounts
        .lines()
        .find(|line| line.contains(" - cgroup2 "))
        .and_then(|line| line.split(' ').nth(4));
    let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap();
    let path = cgroups
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .unwrap()
        .to_owned();
    Path::new(mount.unwrap()).join(path)
}

/// Plays a socket that Alice makes in one cgroup. Alice's process is moved to another, then
/// connects and sends a request. With `late` the request has begun before the move. With `remove`
/// the first cgroup is gone by then.
pub(crate) fn moved(to: &Address, late: bool, remove: bool) -> String {
    let (here, there) = UnixStream::pair().unwrap();
    let own = own_cgroup();
    let [first, second] = ["first-", "second-"].map(|name| Cgroup::new(&own, name, ""));
    let mut alice = child(|_| {
        let mut steps = &there;
        steps.read_exact(&mut [0]).unwrap();
        become_user(ALICE);
        let fd = to.socket();
        if late {
            to.connect_from(&fd);
            raw_http::begin(to, &fd);
        }
        steps.write_all(b"x").unwrap();
        steps.read_exact(&mut [0]).unwrap();
        if late {
            return raw_http::conclude(&fd);
        }
        to.connect_from(&fd);
        raw_http::fetch(&fd)
    });
    let pid = alice.pid.to_string();
    let mut steps = &here;
    first.write("cgroup.procs", &pid);
    steps.write_all(b"x").unwrap();
    steps.read_exact(&mut [0]).unwrap();
    second.write("cgroup.procs", &pid);
    if remove {
        fs::remove_dir(&first.0).unwrap();
    }
    steps.write_all(b"x").unwrap();
    let response = alice.output();
    alice.reap();
    response
}

/// Plays a request of Alice from a cgroup of the threaded kind, in which processes can't be listed.
pub(crate) fn threaded(to: &Address) -> String {
    let (here, there) = UnixStream::pair().unwrap();
    let domain = Cgroup::new(&own_cgroup(), "domain-", "");
    // Dropped before its parent.
    let threaded = Cgroup::new(&domain.0, "threaded-", "");
    threaded.write("cgroup.type", "threaded");
    let mut alice = child(|_| {
        (&there).read_exact(&mut [0]).unwrap();
        become_user(ALICE);
        raw_http::fetch(&to.connect())
    });
    domain.write("cgroup.procs", &alice.pid.to_string());
    threaded.write("cgroup.threads", &alice.pid.to_string());
    (&here).write_all(b"x").unwrap();
    let response = alice.output();
    alice.reap();
    drop(threaded);
    response
}

/// Plays a root that keeps Alice's credentials in an io_uring and becomes Bob. Bob's socket is then
/// made as Alice.
pub(crate) fn personality(to: &Address) -> String {
    let mut bob = child(|_| {
        let mut ring = IoUring::new(2).unwrap();
        // The kernel takes a new socket's owner from the filesystem uid.
        let as_alice = {
            nix::unistd::setfsuid(ALICE.into());
            let credential_id = ring.submitter().register_personality().unwrap();
            nix::unistd::setfsuid(0.into());
            credential_id
        };
        become_user(BOB);
        let (family, kind) = to.numbers();
        let make = opcode::Socket::new(family, kind, 0)
            .build()
            .personality(as_alice);
        let socket_fd = complete(&mut ring, &make);
        assert!(
            socket_fd >= 0,
            "{}",
            std::io::Error::from_raw_os_error(-socket_fd)
        );
        // SAFETY: the kernel has just made this descriptor.
        let fd = unsafe { OwnedFd::from_raw_fd(socket_fd) };
        to.connect_from(&fd);
        raw_http::fetch(&fd)
    });
    let response = bob.output();
    bob.reap();
    response
}

/// Plays a request of Alice on a connection that is among the fixed files of an io_uring, and in no
/// process's descriptors.
pub(crate) fn fixed_file(to: &Address) -> String {
    let (ready, signalled) = UnixStream::pair().unwrap();
    let stopped = daemon::hold();
    let mut alice = child(|cue| {
        let mut ring = IoUring::new(2).unwrap();
        become_user(ALICE);
        let fd = to.connect();
        ring.submitter().register_files(&[fd.as_raw_fd()]).unwrap();
        drop(fd);
        (&ready).write_all(b"x").unwrap();
        cue.wait();
        let length = u32::try_from(raw_http::REQUEST.len()).unwrap();
        let sent = complete(
            &mut ring,
            &opcode::Send::new(Fixed(0), raw_http::REQUEST.as_ptr(), length).build(),
        );
        assert_eq!(u32::try_from(sent), Ok(length));
        let mut answer = Vec::new();
        let mut part = [0_u8; 4096];
        loop {
            let receive = opcode::Recv::new(Fixed(0), part.as_mut_ptr(), 4096).build();
            let Ok(length @ 1..) = usize::try_from(complete(&mut ring, &receive)) else {
                break;
            };
            answer.extend_from_slice(&part[..length]);
        }
        String::from_utf8(answer).unwrap()
    });
    (&signalled).read_exact(&mut [0]).unwrap();
    drop(stopped);
    alice.cue();
    let response = alice.output();
    alice.reap();
    response
}

/// Submits one entry, and waits until it is done.
fn complete(ring: &mut IoUring, entry: &squeue::Entry) -> i32 {
    // SAFETY: the memory that the entry refers to is the caller's, which waits here.
    unsafe { ring.submission().push(entry) }.unwrap();
    ring.submit_and_wait(1).unwrap();
    ring.completion().next().unwrap().result()
}

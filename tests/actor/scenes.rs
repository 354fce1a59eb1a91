//! What is played out. Each scene gives what the daemon answered on the connection that it is about.

use std::ffi::CString;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, fchown};
use std::os::unix::net::UnixStream;

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{Shutdown, shutdown};
use nix::sys::wait::waitpid;
use nix::unistd::execv;

use crate::process::{Child, become_of, become_user, child, reuse};
use crate::wire::{self, Address};
use crate::{ALICE, BOB, moves};

pub(crate) fn play(scene: &str, to: &Address) -> String {
    match scene {
        "alice" => honest(to, ALICE),
        "bob" => honest(to, BOB),
        "passed" => passed(to),
        "exited" => exited(to, true),
        "zombie" => exited(to, false),
        "reused" => reused(to),
        "forked" => alone(|| child_asks(to.connect())),
        "executed" => alone(|| executed(to.connect())),
        "setuid" => setuid(to, false),
        "setuid-late" => setuid(to, true),
        "shared" => shared(to),
        "other-group" => other_group(to),
        "closed" => closed(to),
        "half-closed" => alone(|| half_closed(to.connect())),
        "queued" => alone(|| queued(to.connect())),
        "decoy" => decoy(to),
        "user-namespace" => user_namespace(to),
        "dropped" => dropped(to),
        "chowned" => chowned(to),
        "moved" => moves::moved(to, false),
        "removed-cgroup" => moves::moved(to, true),
        "threaded" => moves::threaded(to),
        "personality" => moves::personality(to),
        other => panic!("no scene {other}"),
    }
}

fn honest(to: &Address, uid: u32) -> String {
    finish(child(|_| {
        become_user(uid);
        wire::ask(&to.connect())
    }))
}

/// A scene that is Alice's alone.
fn alone(act: impl FnOnce() -> String) -> String {
    finish(child(|_| {
        become_user(ALICE);
        act()
    }))
}

fn finish(mut child: Child) -> String {
    let said = child.said();
    child.reap();
    said
}

/// Alice connects and gives the descriptor to Bob, who asks on it while she lives.
fn passed(to: &Address) -> String {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut alice = child(|cue| {
        become_user(ALICE);
        wire::pass(&ours, &to.connect());
        cue.wait();
        String::new()
    });
    let bob = child(|_| {
        become_user(BOB);
        wire::ask(&wire::receive(&theirs))
    });
    let said = finish(bob);
    alice.cue();
    alice.reap();
    said
}

/// A connector that has ended, and the child that still has its connection and waits to be told to ask.
fn orphan(to: &Address) -> (Child, Child) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut alice = child(|_| {
        become_user(ALICE);
        wire::pass(&ours, &to.connect());
        String::new()
    });
    alice.said();
    let heir = child(|cue| {
        become_user(ALICE);
        let fd = wire::receive(&theirs);
        cue.wait();
        wire::ask(&fd)
    });
    (alice, heir)
}

fn exited(to: &Address, reap: bool) -> String {
    let (alice, mut heir) = orphan(to);
    if reap {
        alice.reap();
        heir.cue();
        return finish(heir);
    }
    heir.cue();
    let said = finish(heir);
    alice.reap();
    said
}

/// As above, and Bob's process then has the connector's number.
fn reused(to: &Address) -> String {
    let (alice, mut heir) = orphan(to);
    let pid = alice.pid;
    alice.reap();
    let bob = reuse(pid, BOB);
    heir.cue();
    let said = finish(heir);
    if let Some(bob) = bob {
        kill(bob, Signal::SIGKILL).unwrap();
        waitpid(bob, None).unwrap();
    }
    said
}

fn child_asks(fd: OwnedFd) -> String {
    finish(child(|_| wire::ask(&fd)))
}

fn executed(fd: OwnedFd) -> String {
    let number = wire::inheritable(fd).to_string();
    let program = std::env::current_exe().unwrap();
    let output = std::process::Command::new(program).args(["speak", &number]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Attack 3: Alice connects, leaves a child with the connection, and executes a program that is setuid root. With `late`
/// the request has begun before, so that the daemon has attested her before.
fn setuid(to: &Address, late: bool) -> String {
    let folder = std::env::temp_dir().join(format!("awsvid-setuid-{}", std::process::id()));
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
    let program = folder.join("root");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).unwrap();
    let path = CString::new(program.to_str().unwrap()).unwrap();

    let (ours, theirs) = UnixStream::pair().unwrap();
    let (begun, seen) = UnixStream::pair().unwrap();
    let mut alice = child(|cue| {
        become_user(ALICE);
        let fd = to.connect();
        wire::pass(&ours, &fd);
        drop(fd);
        cue.wait();
        execv(&path, &[path.clone(), c"stay".to_owned()]).unwrap();
        String::new()
    });
    let mut heir = child(|cue| {
        become_user(ALICE);
        let fd = wire::receive(&theirs);
        if !late {
            cue.wait();
            return wire::ask(&fd);
        }
        wire::begin(&fd);
        // Accepted, attested and answered after this connection was accepted.
        wire::ask(&to.connect());
        (&begun).write_all(b"x").unwrap();
        cue.wait();
        wire::finish(&fd)
    });
    if late {
        (&seen).read_exact(&mut [0]).unwrap();
    }
    alice.cue();
    await_root(&alice);
    heir.cue();
    let said = finish(heir);
    kill(alice.pid, Signal::SIGKILL).unwrap();
    alice.reap();
    fs::remove_dir_all(&folder).unwrap();
    said
}

/// Until the process has executed the setuid program.
fn await_root(process: &Child) {
    let status = format!("/proc/{}/status", process.pid);
    // Real and effective: before it became Alice both were root's.
    let is_root = |line: &str| line.split_whitespace().take(3).eq(["Uid:", &ALICE.to_string(), "0"]);
    while !fs::read_to_string(&status).unwrap().lines().any(is_root) {
        std::thread::yield_now();
    }
}

/// Alice and Bob both hold the socket before it is connected; Alice asks.
fn shared(to: &Address) -> String {
    held_by_two(to, (BOB, BOB), (ALICE, ALICE))
}

/// A process of Alice's user but of Bob's group makes the connection and asks. One of Alice's own group, which has been
/// there for longer, holds it too.
fn other_group(to: &Address) -> String {
    held_by_two(to, (ALICE, ALICE), (ALICE, BOB))
}

/// Two processes, each with a user and a group: the younger makes the socket, gives it to the elder, connects and asks.
fn held_by_two(to: &Address, elder: (u32, u32), younger: (u32, u32)) -> String {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (told, tell) = UnixStream::pair().unwrap();
    let mut elder = child(|cue| {
        become_of(elder.0, elder.1);
        let fd = wire::receive(&theirs);
        wire::pass(&tell, &fd);
        cue.wait();
        String::new()
    });
    // Processes that start within one tick of the clock (10 ms) are of one age.
    std::thread::sleep(std::time::Duration::from_millis(20));
    let younger = child(|_| {
        become_of(younger.0, younger.1);
        let fd = to.socket();
        wire::pass(&ours, &fd);
        wire::receive(&told);
        to.connect_from(&fd);
        wire::ask(&fd)
    });
    let said = finish(younger);
    elder.cue();
    elder.reap();
    said
}

/// Asks and is gone before an answer can come.
fn closed(to: &Address) -> String {
    finish(child(|_| {
        become_user(ALICE);
        wire::send(&to.connect());
        String::new()
    }));
    String::new()
}

fn half_closed(fd: OwnedFd) -> String {
    wire::send(&fd);
    shutdown(fd.as_raw_fd(), Shutdown::Write).unwrap();
    wire::answer(&fd)
}

/// Attack 7: while the daemon looks, the connection is only in a queue, and among no process's descriptors.
fn queued(fd: OwnedFd) -> String {
    let (ours, theirs) = UnixStream::pair().unwrap();
    wire::send(&fd);
    wire::pass(&ours, &fd);
    drop(fd);
    wire::answer(&wire::receive(&theirs))
}

/// Attack 1: Bob listens on the port that Alice connects from, on every address.
fn decoy(to: &Address) -> String {
    let free = TcpListener::bind("127.0.0.2:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let (bound, is_bound) = UnixStream::pair().unwrap();
    let (listening, listens) = UnixStream::pair().unwrap();
    let mut alice = child(|cue| {
        become_user(ALICE);
        let fd = Address::bound_socket(port);
        (&bound).write_all(b"x").unwrap();
        cue.wait();
        to.connect_from(&fd);
        wire::ask(&fd)
    });
    (&is_bound).read_exact(&mut [0]).unwrap();
    let mut bob = child(|cue| {
        become_user(BOB);
        let _listener = TcpListener::bind(("0.0.0.0", port)).unwrap();
        (&listening).write_all(b"x").unwrap();
        cue.wait();
        String::new()
    });
    (&listens).read_exact(&mut [0]).unwrap();
    alice.cue();
    let said = finish(alice);
    bob.cue();
    bob.reap();
    said
}

/// From a user namespace of Alice's own, in which she has no id at all.
fn user_namespace(to: &Address) -> String {
    alone(|| {
        unshare(CloneFlags::CLONE_NEWUSER).unwrap();
        wire::ask(&to.connect())
    })
}

/// Root connects, and then becomes Alice.
fn dropped(to: &Address) -> String {
    finish(child(|_| {
        let fd = to.connect();
        become_user(ALICE);
        wire::ask(&fd)
    }))
}

/// Root makes the socket and gives its file to Alice: the kernel then says that it is hers.
fn chowned(to: &Address) -> String {
    finish(child(|_| {
        let fd = to.connect();
        fchown(&fd, Some(ALICE), Some(ALICE)).unwrap();
        wire::ask(&fd)
    }))
}

//! The scenes. Each returns the daemon's response on the connection that it is about.
//!
//! In some scenes it matters whether the daemon attests before or after an event. There the daemon
//! is stopped until the event has happened. In a scene with a name in `-late` it has attested the
//! caller before.

use std::ffi::CString;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, fchown};
use std::os::unix::net::UnixStream;

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{Shutdown, shutdown};
use nix::sys::wait::waitpid;
use nix::unistd::{execv, setgroups, setresgid, setresuid};

use crate::daemon::{self, StoppedDaemon};
use crate::process::{Child, become_of, become_user, child, reuse, stay};
use crate::raw_http::{self, Address};
use crate::socket_passing::{self, RootSocket as Socket};
use crate::{ALICE, BOB, blocked, cgroup_moves};

pub(crate) fn play(scene: &str, to: &Address) -> String {
    let late = scene.ends_with("-late");
    match scene.trim_end_matches("-late") {
        "alice" => honest(to, ALICE),
        "bob" => honest(to, BOB),
        "passed" => passed(to, late),
        "connected-by-another" => connected_by_another(to),
        "exited" => exited(to, late, true),
        "zombie" => exited(to, late, false),
        "reused" => reused(to, late),
        "forked" => alone(|| child_fetches(to.connect())),
        "executed" => alone(|| executed(to.connect())),
        "setuid" => setuid(to, late),
        "shared" => shared(to),
        "other-group" => other_group(to),
        "mixed-group" => mixed_group(to),
        "closed" => closed(to, false),
        "shut-and-closed" => closed(to, true),
        "half-closed" => alone(|| half_closed(to.connect())),
        "queued" => queued(to),
        "decoy" => decoy(to),
        "user-namespace" => apart(to, CloneFlags::CLONE_NEWUSER),
        "pid-namespace" => apart(to, CloneFlags::CLONE_NEWPID),
        "dropped" => changed_by_root(to, late, |_| become_user(ALICE)),
        "chowned" => changed_by_root(to, late, |fd| fchown(fd, Some(ALICE), Some(ALICE)).unwrap()),
        "regrouped" => regrouped(to, late),
        "moved" => cgroup_moves::moved(to, late, false),
        "removed-cgroup" => cgroup_moves::moved(to, late, true),
        "threaded" => cgroup_moves::threaded(to),
        "listener-used-again" => socket_passing::used_again(to, Socket::Listener),
        "shared-listener-used-again" => socket_passing::used_again(to, Socket::SharedListener),
        "accepted-used-again" => socket_passing::used_again(to, Socket::Accepted),
        "from-socket-unit" => socket_passing::from_socket_unit(to),
        "stuck" => blocked::stuck(to),
        "personality" => cgroup_moves::personality(to),
        "fixed-file" => cgroup_moves::fixed_file(to),
        other => panic!("no scene {other}"),
    }
}

fn honest(to: &Address, uid: u32) -> String {
    finish(child(|_| {
        become_user(uid);
        raw_http::fetch(&to.connect())
    }))
}

/// Plays a scene that is Alice's alone.
fn alone(act: impl FnOnce() -> String) -> String {
    finish(child(|_| {
        become_user(ALICE);
        act()
    }))
}

fn finish(mut child: Child) -> String {
    let response = child.output();
    child.reap();
    response
}

/// Alice's connection, which another process is to use. Alice's own descriptor is closed.
struct PassedConnection {
    alice: Child,
    heir: Child,
    stopped: Option<StoppedDaemon>,
}

impl PassedConnection {
    /// Passes it to a user with a group. With `late` the request has begun before. Alice's process
    /// does `then` at its cue.
    fn start(to: &Address, late: bool, heir: (u32, u32), then: impl FnOnce()) -> Self {
        let (over, from) = UnixStream::pair().unwrap();
        let (steps, continued) = UnixStream::pair().unwrap();
        let stopped = (!late).then(daemon::hold);
        let alice = child(|cue| {
            become_user(ALICE);
            let fd = to.connect();
            if late {
                raw_http::begin(to, &fd);
            }
            raw_http::pass(&over, &fd);
            drop(fd);
            (&steps).write_all(b"x").unwrap();
            cue.wait();
            then();
            String::new()
        });
        let heir = child(|cue| {
            become_of(heir.0, heir.1);
            let fd = raw_http::receive(&from);
            (&steps).write_all(b"x").unwrap();
            cue.wait();
            if late {
                raw_http::conclude(&fd)
            } else {
                raw_http::fetch(&fd)
            }
        });
        (&continued).read_exact(&mut [0; 2]).unwrap();
        Self {
            alice,
            heir,
            stopped,
        }
    }
}

fn goes_on(stopped: Option<StoppedDaemon>, mut fetcher: Child) -> String {
    drop(stopped);
    fetcher.cue();
    finish(fetcher)
}

/// Plays a request of Bob, in Alice's group, on the connection of Alice's living process.
fn passed(to: &Address, late: bool) -> String {
    let PassedConnection {
        mut alice,
        heir,
        stopped,
    } = PassedConnection::start(to, late, (BOB, ALICE), || {});
    let response = goes_on(stopped, heir);
    alice.cue();
    alice.reap();
    response
}

/// Plays a socket that Alice makes and only Bob has then. Bob connects it and sends a request.
fn connected_by_another(to: &Address) -> String {
    let (over, from) = UnixStream::pair().unwrap();
    let alice = child(|_| {
        become_user(ALICE);
        raw_http::pass(&over, &to.socket());
        String::new()
    });
    finish(alice);
    finish(child(|_| {
        become_user(BOB);
        let fd = raw_http::receive(&from);
        to.connect_from(&fd);
        raw_http::fetch(&fd)
    }))
}

/// Plays a request of Alice's child after Alice's process has ended.
fn exited(to: &Address, late: bool, reap: bool) -> String {
    let PassedConnection {
        mut alice,
        heir,
        stopped,
    } = PassedConnection::start(to, late, (ALICE, ALICE), || {});
    alice.cue();
    alice.output();
    if reap {
        alice.reap();
        return goes_on(stopped, heir);
    }
    let response = goes_on(stopped, heir);
    alice.reap();
    response
}

/// Plays `exited` with a process of Bob that has the connector's number.
fn reused(to: &Address, late: bool) -> String {
    let PassedConnection {
        mut alice,
        heir,
        stopped,
    } = PassedConnection::start(to, late, (ALICE, ALICE), || {});
    let pid = alice.pid;
    alice.cue();
    alice.output();
    alice.reap();
    let bob = reuse(pid, BOB, || stay());
    let response = goes_on(stopped, heir);
    if let Some(bob) = bob {
        kill(bob, Signal::SIGKILL).unwrap();
        waitpid(bob, None).unwrap();
    }
    response
}

fn child_fetches(fd: OwnedFd) -> String {
    finish(child(|_| raw_http::fetch(&fd)))
}

fn executed(fd: OwnedFd) -> String {
    let number = raw_http::inheritable(fd).to_string();
    let program = std::env::current_exe().unwrap();
    let output = std::process::Command::new(program)
        .args(["speak", &number])
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Plays T3: Alice connects, leaves a child with the connection, and executes a program that is
/// setuid root.
fn setuid(to: &Address, late: bool) -> String {
    let folder = tempfile::Builder::new()
        .prefix("awsvid-setuid-")
        .permissions(fs::Permissions::from_mode(0o755))
        .tempdir()
        .unwrap();
    let program = folder.path().join("root");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).unwrap();
    let path = CString::new(program.to_str().unwrap()).unwrap();
    let execute = || {
        execv(&path, &[path.clone(), c"stay".to_owned()]).unwrap();
    };
    let PassedConnection {
        mut alice,
        heir,
        stopped,
    } = PassedConnection::start(to, late, (ALICE, ALICE), execute);
    alice.cue();
    await_root(&alice);
    let response = goes_on(stopped, heir);
    kill(alice.pid, Signal::SIGKILL).unwrap();
    alice.reap();
    response
}

/// Waits until the process has executed the setuid program.
fn await_root(process: &Child) {
    let status = format!("/proc/{}/status", process.pid);
    // Real and effective: before it became Alice both were root's.
    let is_root = |line: &str| {
        line.split_whitespace()
            .take(3)
            .eq(["Uid:", &ALICE.to_string(), "0"])
    };
    while !fs::read_to_string(&status).unwrap().lines().any(is_root) {
        std::thread::yield_now();
    }
}

/// Plays a socket that Alice and Bob both hold before it is connected. Alice sends the request.
fn shared(to: &Address) -> String {
    held_by_two(to, (BOB, BOB), (ALICE, ALICE))
}

/// Plays a connection and request of a process of Alice's user but of Bob's group. An older process
/// of Alice's own group holds the socket too.
fn other_group(to: &Address) -> String {
    held_by_two(to, (ALICE, ALICE), (ALICE, BOB))
}

/// Plays two processes, each with a user and a group: the younger makes the socket, passes it to
/// the elder, connects and sends the request.
fn held_by_two(to: &Address, elder: (u32, u32), younger: (u32, u32)) -> String {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (continued, steps) = UnixStream::pair().unwrap();
    let mut elder = child(|cue| {
        become_of(elder.0, elder.1);
        let fd = raw_http::receive(&theirs);
        raw_http::pass(&steps, &fd);
        cue.wait();
        String::new()
    });
    // Processes that start within one tick of the clock (10 ms) have the same age.
    std::thread::sleep(std::time::Duration::from_millis(20));
    let younger = child(|_| {
        become_of(younger.0, younger.1);
        let fd = to.socket();
        raw_http::pass(&ours, &fd);
        raw_http::receive(&continued);
        to.connect_from(&fd);
        raw_http::fetch(&fd)
    });
    let response = finish(younger);
    elder.cue();
    elder.reap();
    response
}

/// Plays a process of Alice that is in another group by its real id than by the others.
fn mixed_group(to: &Address) -> String {
    finish(child(|_| {
        setgroups(&[]).unwrap();
        setresgid(BOB.into(), ALICE.into(), ALICE.into()).unwrap();
        setresuid(ALICE.into(), ALICE.into(), ALICE.into()).unwrap();
        raw_http::fetch(&to.connect())
    }))
}

/// Plays a request of a process that is gone before the daemon attests it. Only the daemon's audit
/// has the outcome.
fn closed(to: &Address, shut: bool) -> String {
    let stopped = daemon::hold();
    finish(child(|_| {
        become_user(ALICE);
        let fd = to.connect();
        raw_http::send(&fd);
        if shut {
            shutdown(fd.as_raw_fd(), Shutdown::Write).unwrap();
        }
        String::new()
    }));
    drop(stopped);
    String::new()
}

fn half_closed(fd: OwnedFd) -> String {
    raw_http::send(&fd);
    shutdown(fd.as_raw_fd(), Shutdown::Write).unwrap();
    raw_http::answer(&fd)
}

/// Plays T7: while the daemon searches, the connection is only in a queue, and among no process's
/// descriptors.
fn queued(to: &Address) -> String {
    let (over, from) = UnixStream::pair().unwrap();
    let (steps, continued) = UnixStream::pair().unwrap();
    let stopped = daemon::hold();
    let mut alice = child(|cue| {
        become_user(ALICE);
        let fd = to.connect();
        raw_http::send(&fd);
        raw_http::pass(&over, &fd);
        let client = matches!(to, Address::Tcp(_)).then(|| Address::local(&fd));
        drop(fd);
        (&steps).write_all(b"x").unwrap();
        cue.wait();
        // On the unix socket the daemon does not search for it.
        if let (Some(client), Address::Tcp(server)) = (client, to) {
            daemon::await_answer(client, *server);
        }
        raw_http::answer(&raw_http::receive(&from))
    });
    (&continued).read_exact(&mut [0]).unwrap();
    drop(stopped);
    alice.cue();
    finish(alice)
}

/// Plays T1: Bob listens on the port that Alice connects from, on every address.
fn decoy(to: &Address) -> String {
    loop {
        let free = TcpListener::bind(to.another(0)).unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        // Another process may have taken it meanwhile.
        if let Some(response) = decoy_on(to, port) {
            return response;
        }
    }
}

fn decoy_on(to: &Address, port: u16) -> Option<String> {
    let (steps, continued) = UnixStream::pair().unwrap();
    let are_ready = || {
        let mut ready = [0];
        (&continued).read_exact(&mut ready).unwrap();
        ready == [1]
    };
    let mut alice = child(|cue| {
        become_user(ALICE);
        let bound = to.bound_socket(port);
        (&steps).write_all(&[bound.is_ok().into()]).unwrap();
        cue.wait();
        let Ok(fd) = bound else { return String::new() };
        to.connect_from(&fd);
        raw_http::fetch(&fd)
    });
    let is_bound = are_ready();
    let every: IpAddr = if to.another(0).is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let mut bob = child(|cue| {
        become_user(BOB);
        let listener = TcpListener::bind((every, port));
        (&steps).write_all(&[listener.is_ok().into()]).unwrap();
        cue.wait();
        String::new()
    });
    let is_played = are_ready() && is_bound;
    alice.cue();
    let response = finish(alice);
    bob.cue();
    bob.reap();
    is_played.then_some(response)
}

/// Plays a request of Alice from a new namespace: one of users, without any id in it, or one of
/// processes.
fn apart(to: &Address, namespace: CloneFlags) -> String {
    finish(child(|_| {
        if namespace == CloneFlags::CLONE_NEWUSER {
            become_user(ALICE);
            unshare(namespace).unwrap();
            return raw_http::fetch(&to.connect());
        }
        unshare(namespace).unwrap();
        // The first process in it.
        honest(to, ALICE)
    }))
}

/// Plays a root that is in Bob's group when it connects, and in Alice's later.
fn regrouped(to: &Address, late: bool) -> String {
    setgroups(&[BOB.into()]).unwrap();
    changed_by_root(to, late, |_| setgroups(&[ALICE.into()]).unwrap())
}

/// Plays a root that connects, and then changes something of itself or of the connection.
fn changed_by_root(to: &Address, late: bool, change: impl FnOnce(&OwnedFd)) -> String {
    let (steps, continued) = UnixStream::pair().unwrap();
    let stopped = (!late).then(daemon::hold);
    let fetcher = child(|cue| {
        let fd = to.connect();
        if late {
            raw_http::begin(to, &fd);
        }
        change(&fd);
        (&steps).write_all(b"x").unwrap();
        cue.wait();
        if late {
            raw_http::conclude(&fd)
        } else {
            raw_http::fetch(&fd)
        }
    });
    (&continued).read_exact(&mut [0]).unwrap();
    goes_on(stopped, fetcher)
}

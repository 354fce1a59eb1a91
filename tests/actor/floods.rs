//! One user's processes in numbers: honest requests one after another, connections that are only
//! held, and loops of several threads in a process with very many open descriptors. Responses are
//! counted by their code.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{MsgFlags, recv};

use crate::cgroup_moves::{Cgroup, own_cgroup};
use crate::process::{become_user, become_with_groups, child};
use crate::raw_http::{self, Address};

/// Responses by their code (`Success`, or an error's), and `nothing` for connections that ended
/// without one.
type Counts = BTreeMap<String, usize>;

pub(crate) fn act(what: &str, numbers: &[usize], to: &Address) -> String {
    if let ("grouped", [uid, groups, processes]) = (what, numbers) {
        return show(&grouped(
            to,
            u32::try_from(*uid).unwrap(),
            *groups,
            *processes,
        ));
    }
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    if let ("orphaned", [uid, count]) = (what, numbers) {
        return orphaned(to, u32::try_from(*uid).unwrap(), *count);
    }
    become_user(u32::try_from(numbers[0]).unwrap());
    match (what, numbers) {
        ("fetch", [_, count]) => show(&send_requests(to, *count)),
        ("hold", [_, count]) => hold(to, *count, |_| ()),
        ("mute", [_, count]) => hold(to, *count, raw_http::send),
        ("storm", [_, threads, descriptors]) => storm(to, *threads, *descriptors, send_request),
        ("puts", [_, threads]) => storm(to, *threads, 0, send_put),
        _ => panic!("no such act: {what} {numbers:?}"),
    }
}

/// Opens a connection at each byte on standard input, a socket, and passes the connection over
/// that.
pub(crate) fn connect(uid: u32, to: &Address) {
    become_user(uid);
    let mut input = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    let (mut word, mut kept) = ([0], Vec::new());
    while input.read(&mut word).is_ok_and(|length| length == 1) {
        let fd = to.connect();
        raw_http::pass(&input, &fd);
        if word == *b"k" {
            kept.push(fd);
        }
    }
}

fn show(counts: &Counts) -> String {
    counts
        .iter()
        .map(|(code, count)| format!("{code} {count}\n"))
        .collect()
}

fn send_requests(to: &Address, count: usize) -> Counts {
    let mut counts = Counts::new();
    for _ in 0..count {
        *counts.entry(send_request(to)).or_default() += 1;
    }
    counts
}

/// Sends requests from this number of processes of a user, each with this number of supplementary
/// groups (T27).
fn grouped(to: &Address, uid: u32, groups: usize, processes: usize) -> Counts {
    let mut counts = Counts::new();
    for _ in 0..processes {
        let mut caller = child(|_| {
            become_with_groups(uid, groups);
            raw_http::fetch(&to.connect())
        });
        *counts.entry(code(&caller.output())).or_default() += 1;
        caller.reap();
    }
    counts
}

fn code(answer: &str) -> String {
    let code = answer
        .split("\"Code\":\"")
        .nth(1)
        .and_then(|rest| rest.split('"').next());
    code.unwrap_or("nothing").to_owned()
}

/// Prints that this has begun, and waits until the test closes standard input.
fn report_start() {
    println!("begun");
}

fn wait_for_stop() {
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

/// Opens connections, does `first` on each, and keeps all of them. Returns how many the daemon had
/// ended by the end.
fn hold(to: &Address, count: usize, first: impl Fn(&OwnedFd)) -> String {
    let connections: Vec<OwnedFd> = (0..count)
        .map(|_| {
            let fd = to.connect();
            first(&fd);
            fd
        })
        .collect();
    report_start();
    wait_for_stop();
    let mut counts = Counts::new();
    for fd in &connections {
        *counts.entry(state(fd).to_owned()).or_default() += 1;
    }
    show(&counts)
}

/// Returns the state of a connection, without reading from it.
fn state(fd: &OwnedFd) -> &'static str {
    match recv(
        fd.as_raw_fd(),
        &mut [0],
        MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT,
    ) {
        Ok(0) => "closed",
        Ok(_) => "answered",
        Err(Errno::EAGAIN) => "open",
        Err(_) => "reset",
    }
}

/// Sends a request for credentials, and returns the code of the answer.
fn send_request(to: &Address) -> String {
    code(&raw_http::fetch(&to.connect()))
}

/// Sends a request for a metadata token, and returns the status of the answer.
fn send_put(to: &Address) -> String {
    let answer = raw_http::put_token(&to.connect());
    let status = answer.split(' ').nth(1);
    status.unwrap_or("nothing").to_owned()
}

/// Sends requests by `send` in a loop from each of this number of threads, in a process with this
/// number of open descriptors.
fn storm(to: &Address, threads: usize, descriptors: usize, send: fn(&Address) -> String) -> String {
    let open: Vec<File> = (0..descriptors)
        .map(|_| File::open("/dev/null").unwrap())
        .collect();
    let ended = AtomicBool::new(false);
    let mut counts = Counts::new();
    std::thread::scope(|scope| {
        let (first, is_first) = std::sync::mpsc::channel();
        let fetch_in_loop = |first: std::sync::mpsc::Sender<()>| {
            let mut counts = Counts::new();
            while !ended.load(Ordering::Relaxed) {
                *counts.entry(send(to)).or_default() += 1;
                let _ = first.send(());
            }
            counts
        };
        let running: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn({
                    let first = first.clone();
                    move || fetch_in_loop(first)
                })
            })
            .collect();
        // The first response shows that the loop runs.
        is_first.recv().unwrap();
        report_start();
        wait_for_stop();
        ended.store(true, Ordering::Relaxed);
        for thread in running {
            for (code, count) in thread.join().unwrap() {
                *counts.entry(code).or_default() += count;
            }
        }
    });
    assert!(open.iter().all(|file| file.as_raw_fd() > 2));
    show(&counts)
}

/// Sends requests of a user until the test closes standard input, this number at a time. Each has a
/// socket from a cgroup that was removed before (T33).
fn orphaned(to: &Address, uid: u32, count: usize) -> String {
    let stopped = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            wait_for_stop();
            stopped.store(true, Ordering::Relaxed);
        });
        orphaned_burst(to, uid, count);
        report_start();
        while !stopped.load(Ordering::Relaxed) {
            orphaned_burst(to, uid, count);
        }
    });
    String::new()
}

fn orphaned_burst(to: &Address, uid: u32, count: usize) {
    let (mut here, there) = UnixStream::pair().unwrap();
    let removed = Cgroup::new(&own_cgroup(), "removed-", "");
    let mut user = child(|_| {
        let mut steps = &there;
        steps.read_exact(&mut [0]).unwrap();
        become_user(uid);
        let sockets: Vec<OwnedFd> = (0..count).map(|_| to.socket()).collect();
        steps.write_all(b"x").unwrap();
        steps.read_exact(&mut [0]).unwrap();
        for socket in &sockets {
            to.connect_from(socket);
            raw_http::send(socket);
        }
        for socket in sockets {
            // Until it is answered or reset.
            let _ = File::from(socket).read_to_end(&mut Vec::new());
        }
        String::new()
    });
    removed.write("cgroup.procs", &user.pid.to_string());
    here.write_all(b"x").unwrap();
    here.read_exact(&mut [0]).unwrap();
    std::fs::write(own_cgroup().join("cgroup.procs"), user.pid.to_string()).unwrap();
    drop(removed);
    here.write_all(b"x").unwrap();
    user.output();
    user.reap();
}

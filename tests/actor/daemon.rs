//! The daemon's progress with a connection: a scene can stop the daemon meanwhile, or wait until it
//! has read from the connection.

use std::fs;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::raw_http::Address;

/// The variable with the daemon's pid.
const DAEMON: &str = "DAEMON";

nix::ioctl_read_bad!(outq, libc::TIOCOUTQ, libc::c_int);

/// The daemon is stopped until this is dropped: all that happens meanwhile has happened when it
/// goes on.
pub(crate) struct StoppedDaemon(Pid);

/// Stops the daemon. Takes root.
pub(crate) fn hold() -> StoppedDaemon {
    let pid = pid();
    let held = StoppedDaemon(Pid::from_raw(pid));
    kill(held.0, Signal::SIGSTOP).unwrap();
    // A thread that runs on another processor stops a little later. One that is blocked in the
    // kernel stops before it leaves it.
    while !states(pid).all(|state| matches!(state, 'T' | 'D')) {
        thread::yield_now();
    }
    held
}

fn pid() -> i32 {
    std::env::var(DAEMON)
        .expect("the daemon's pid")
        .parse()
        .unwrap()
}

/// Returns the states of a process's threads (proc_pid_stat(5)), without those that have ended
/// meanwhile.
fn states(pid: i32) -> impl Iterator<Item = char> {
    fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .filter_map(|task| {
            let stat = fs::read_to_string(task.unwrap().path().join("stat")).ok()?;
            stat.rsplit_once(')')?.1.trim_start().chars().next()
        })
}

impl Drop for StoppedDaemon {
    fn drop(&mut self) {
        kill(self.0, Signal::SIGCONT).unwrap();
    }
}

/// Waits until the daemon has read all that was sent on `fd`. It attests a caller before it reads a
/// byte.
pub(crate) fn await_read(to: &Address, fd: &OwnedFd) {
    let connection = Connection::of(to, fd);
    while !is_read(&connection) {
        thread::yield_now();
    }
}

/// A connection of which the kernel shows whether the daemon has read from it.
pub(crate) enum Connection {
    /// A descriptor of it.
    Unix(OwnedFd),
    /// The client's address and the daemon's: a process with a descriptor could be taken for the
    /// caller.
    Tcp(SocketAddr, SocketAddr),
}

impl Connection {
    /// Returns the connection with the client's end `fd`.
    pub(crate) fn of(to: &Address, fd: &OwnedFd) -> Self {
        match to {
            Address::Unix(_) => Self::Unix(fd.try_clone().unwrap()),
            Address::Tcp(server) => Self::Tcp(Address::local(fd), *server),
        }
    }
}

/// Returns whether the daemon has read all that was sent.
pub(crate) fn is_read(connection: &Connection) -> bool {
    match connection {
        Connection::Unix(fd) => !unread(fd),
        // Both ends are checked: unacknowledged data may not have arrived.
        Connection::Tcp(client, server) => {
            queues(*client, *server).is_some_and(|(unsent, _)| unsent == 0)
                && queues(*server, *client).is_some_and(|(_, unread)| unread == 0)
        }
    }
}

/// Returns whether one of the daemon's threads is blocked, as by a lock.
pub(crate) fn has_stuck_thread() -> bool {
    states(pid()).any(|state| state == 'D')
}

fn unread(fd: &OwnedFd) -> bool {
    let mut bytes = 0;
    // SAFETY: the request writes one integer to where the reference points.
    unsafe { outq(fd.as_raw_fd(), &raw mut bytes) }.unwrap();
    bytes > 0
}

/// Waits until the daemon has sent something to the TCP socket with the address `client`, of which
/// no process may have a descriptor.
pub(crate) fn await_answer(client: SocketAddr, server: SocketAddr) {
    while queues(client, server).is_none_or(|(_, unread)| unread == 0) {
        thread::yield_now();
    }
}

/// Returns the bytes that are not yet acknowledged and not yet read at the end of a TCP connection
/// that has the address `local`.
fn queues(local: SocketAddr, remote: SocketAddr) -> Option<(u64, u64)> {
    // The tables in /proc have all connections of the machine, which takes long to print and to
    // read.
    let filter = format!("src = {local} and dst = {remote}");
    let output = Command::new("ss")
        .args(["-Htn", "state", "connected", &filter])
        .output()
        .unwrap();
    let line = String::from_utf8(output.stdout).unwrap();
    let mut fields = line.split_ascii_whitespace();
    match fields.next()? {
        "ESTAB" | "CLOSE-WAIT" => {
            let unread = fields.next()?.parse().ok()?;
            Some((fields.next()?.parse().ok()?, unread))
        }
        _ => None,
    }
}

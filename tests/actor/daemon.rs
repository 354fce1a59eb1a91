//! How far the daemon is with a connection: held back while a scene goes on, or seen to have read of it.

use std::fs;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wire::Address;

/// The variable with the daemon's pid.
const DAEMON: &str = "DAEMON";

nix::ioctl_read_bad!(outq, libc::TIOCOUTQ, libc::c_int);

/// The daemon stands still until this is dropped: what happens meanwhile has happened when it looks.
pub(crate) struct Held(Pid);

/// Holds the daemon. Takes root.
pub(crate) fn hold() -> Held {
    let pid: i32 = std::env::var(DAEMON).expect("the daemon's pid").parse().unwrap();
    let held = Held(Pid::from_raw(pid));
    kill(held.0, Signal::SIGSTOP).unwrap();
    // A thread that runs elsewhere stops a little later.
    while !threads_are_stopped(pid) {
        thread::yield_now();
    }
    held
}

fn threads_are_stopped(pid: i32) -> bool {
    fs::read_dir(format!("/proc/{pid}/task")).unwrap().all(|task| {
        // One that has ended meanwhile does nothing any more.
        let stat = fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
        stat.rsplit_once(')').is_none_or(|(_, fields)| fields.starts_with(" T"))
    })
}

impl Drop for Held {
    fn drop(&mut self) {
        kill(self.0, Signal::SIGCONT).unwrap();
    }
}

/// Until the daemon has read all that was sent on `fd`. It attests whom it accepts before it reads a byte.
pub(crate) fn await_read(to: &Address, fd: &OwnedFd) {
    match to {
        Address::Unix(_) => while unread(fd) {},
        Address::Tcp(server) => {
            let client = Address::local(fd);
            // Both ends have to be seen: what is not acknowledged yet may not have arrived.
            while queues(client, *server).is_none_or(|(unsent, _)| unsent > 0)
                || queues(*server, client).is_none_or(|(_, unread)| unread > 0)
            {
                thread::yield_now();
            }
        }
    }
}

fn unread(fd: &OwnedFd) -> bool {
    let mut bytes = 0;
    // SAFETY: the request writes one integer to where the reference points.
    unsafe { outq(fd.as_raw_fd(), &raw mut bytes) }.unwrap();
    thread::yield_now();
    bytes > 0
}

/// Until the daemon has sent something to the TCP socket with the address `client`, which may be nobody's descriptor.
pub(crate) fn await_answer(client: SocketAddr, server: SocketAddr) {
    while queues(client, server).is_none_or(|(_, unread)| unread == 0) {
        thread::yield_now();
    }
}

/// The bytes that are not yet acknowledged and not yet read at the end of a TCP connection that has the address `local`.
fn queues(local: SocketAddr, remote: SocketAddr) -> Option<(u64, u64)> {
    // The tables in /proc/net have everybody's connections, which takes long to print and to read.
    let filter = format!("src = {local} and dst = {remote}");
    let output = Command::new("ss").args(["-Htn", "state", "connected", &filter]).output().unwrap();
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

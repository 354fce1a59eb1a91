//! Sockets with a full queue: the unix sockets of a daemon that is stopped, and that of pid 1 while
//! it does not read (T25).

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use crate::harness::client::fetch;
use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::run;
use crate::harness::daemon::{Daemon, PROGRAM};
use crate::harness::upstream::{Upstream, my_rule};

const TIMEOUT: Duration = Duration::from_secs(60);

fn configuration(upstream: &Upstream) -> String {
    upstream.configuration() + &my_rule()
}

fn assert_answers(daemon: &Daemon) {
    let (status, body) = fetch(UnixStream::connect(daemon.unix()).unwrap());
    assert_eq!(status, 200, "{body}");
}

/// pid 1 does not read its notifications, and their queue is full.
#[test]
fn full_notification_queue_stops_neither_reloads_nor_the_end() {
    let (folder, upstream) = (folder(), Upstream::start_for_me());
    let path = folder.path().join("notify.sock");
    let manager = UnixDatagram::bind(&path).unwrap();
    let filler = UnixDatagram::unbound().unwrap();
    filler.set_nonblocking(true).unwrap();
    let full = loop {
        if let Err(error) = filler.send_to(b"filler", &path) {
            break error;
        }
    };
    assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
    let variable = format!("NOTIFY_SOCKET={}", path.display());
    let text = configuration(&upstream);
    let words = ["env", &variable];
    let mut daemon = Daemon::start_behind(&words, folder.path(), "", &text).ready();
    assert_answers(&daemon);
    assert!(daemon.reload("", &text));
    // What it missed arrives in order once it reads again.
    manager.set_read_timeout(Some(TIMEOUT)).unwrap();
    let received = || {
        let mut message = [0; 4096];
        let length = manager.recv(&mut message).unwrap();
        String::from_utf8(message[..length].to_vec()).unwrap()
    };
    let mut first = received();
    while first == "filler" {
        first = received();
    }
    assert_eq!(first, "READY=1\n");
    assert!(received().starts_with("RELOADING=1\n"));
    assert!(received().starts_with("READY=1\nSTATUS=Reloaded"));
    while filler.send_to(b"filler", &path).is_ok() {}
    daemon.process().signal(Signal::SIGTERM);
    let status = daemon.process().owned().wait(TIMEOUT);
    assert!(status.expect("it ends").success());
}

/// Connects until the backlog of a daemon that is stopped is full. The connections stay there,
/// although the client closes them.
fn fill_backlog(path: &Path) {
    let address = UnixAddr::new(path).unwrap();
    let connected = || {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        connect(socket.as_raw_fd(), &address)
    };
    let full = loop {
        if let Err(error) = connected() {
            break error;
        }
    };
    assert_eq!(full, Errno::EAGAIN);
}

/// The daemon is stopped, and local users have filled the backlogs of its sockets.
#[test]
fn full_backlog_of_stopped_daemon_does_not_block_commands() {
    let (folder, upstream) = (folder(), Upstream::start_for_me());
    let daemon = Daemon::start(folder.path(), "", &configuration(&upstream)).ready();
    kill(daemon.pid(), Signal::SIGSTOP).unwrap();
    let (unix, status) = (daemon.unix(), folder.path().join("status.sock"));
    fill_backlog(&unix);
    fill_backlog(&status);
    let commands: [(&[&str], &Path); 3] = [
        (&["credential-process", "--same-user"], &unix),
        (&["status"], &status),
        (&["probe", "live"], &status),
    ];
    for (arguments, socket) in commands {
        let mut command = Command::new(PROGRAM);
        command
            .env_clear()
            .args(arguments)
            .arg("--socket")
            .arg(socket);
        let output = run(command, b"", TIMEOUT);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
        let text = format!("{}{}", output.stdout, output.stderr);
        assert!(
            text.contains("timed out; find the cause in the log"),
            "{text}"
        );
    }
    kill(daemon.pid(), Signal::SIGCONT).unwrap();
    assert_answers(&daemon);
}

//! A listener is nobody else's, and comes back when it is killed (attack 9).

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen, setsockopt, socket,
    sockopt,
};

use crate::harness::counterparts::process::{Process, await_some, run};
use crate::harness::counterparts::{folder, http_get, root};
use crate::harness::daemon::{Daemon, PROGRAM};

const CONFIGURATION: &str = r#"
[identity]
workload_api_socket = "unix:///nonexistent/agent.sock"
[sts]
region = "eu-central-1"
[[workload]]
spiffe_id = "spiffe://example.org/billing"
uid = 54321
[[role]]
name = "billing"
spiffe_id = "spiffe://example.org/billing"
role_arn = "arn:aws:iam::123456789012:role/billing"
"#;

/// The status of a request; `None` if nobody answers.
fn status(address: SocketAddr) -> Option<u16> {
    http_get(address, "/v1/credentials").map(|(status, _)| status)
}

#[test]
fn a_killed_listener_is_bound_again() {
    if !root() {
        return;
    }
    let folder = folder();
    let daemon = Daemon::start(folder.path(), "", CONFIGURATION);
    for address in [daemon.tcp(), daemon.tcp6()] {
        assert_eq!(status(address), Some(403));
        let mut kill = Command::new("ss");
        kill.args(["-K", "-lnt", &format!("sport = :{}", address.port())]);
        let killed = run(kill, b"", Duration::from_secs(20)).success("ss -K");
        assert!(killed.contains(&address.port().to_string()), "{killed}");
        await_some("the listener is back", Duration::from_secs(30), || {
            status(address)
        });
        assert_eq!(status(address), Some(403));
    }
    let log = daemon.log();
    assert_eq!(log.matches("the listener was killed").count(), 2, "{log}");
}

#[test]
fn nobody_shares_the_port() {
    let folder = folder();
    let daemon = Daemon::start(folder.path(), "", CONFIGURATION);
    let SocketAddr::V4(address) = daemon.tcp() else {
        panic!("an IPv4 address")
    };
    // The same user as the daemon, which is all that SO_REUSEPORT asks for.
    let fd = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    setsockopt(&fd, sockopt::ReusePort, &true).unwrap();
    setsockopt(&fd, sockopt::ReuseAddr, &true).unwrap();
    let shared = bind(fd.as_raw_fd(), &SockaddrIn::from(address))
        .and_then(|()| listen(&fd, Backlog::new(1).unwrap()));
    let error = std::io::Error::from(shared.expect_err("the port is the daemon's alone"));
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
}

/// Whether any user can take a port follows the kernel's value in the daemon's network namespace.
#[test]
fn a_port_that_any_user_can_take_is_warned_of() {
    if !root() {
        return;
    }
    for (first, is_warned) in [(1024, false), (975, false), (974, true), (0, true)] {
        let folder = folder();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let [unix, status, token] = ["awsvid.sock", "status.sock", "token"].map(path);
        let listen =
            format!("[listen]\nunix = {unix:?}\nstatus = {status:?}\ntoken_file = {token:?}\n");
        std::fs::write(path("awsvid.toml"), format!("{CONFIGURATION}{listen}")).unwrap();
        let script = format!(
            "ip link set lo up && echo {first} >/proc/sys/net/ipv4/ip_unprivileged_port_start && exec \"$0\" serve --config \"$1\""
        );
        let mut command = Command::new("unshare");
        command
            .args(["--net", "sh", "-c", &script, PROGRAM])
            .arg(path("awsvid.toml"));
        let daemon = Process::start("awsvid", command, &folder.path().join("log"));
        daemon.await_some("it listens", Duration::from_secs(30), || {
            daemon.log().contains("serving operators").then_some(())
        });
        let log = daemon.log();
        assert_eq!(
            log.contains("ip_unprivileged_port_start is"),
            is_warned,
            "{log}"
        );
        assert_eq!(log.contains("[974]"), is_warned, "{log}");
    }
}

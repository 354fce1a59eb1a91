//! The daemon shares a listener with no other process, and binds it again when it is killed (T9).

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

const TIMEOUT: Duration = Duration::from_secs(60);
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

/// Returns the status of a request, or `None` without a response.
fn status(address: SocketAddr) -> Option<u16> {
    http_get(address, "/v1/credentials").map(|(status, _)| status)
}

#[test]
fn killed_listener_is_rebound() {
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
    assert_eq!(
        log.matches("listener was killed; rebinding").count(),
        2,
        "{log}"
    );
}

#[test]
fn port_is_not_shared_with_other_process() {
    let folder = folder();
    let daemon = Daemon::start(folder.path(), "", CONFIGURATION);
    let SocketAddr::V4(address) = daemon.tcp() else {
        panic!("an IPv4 address")
    };
    // The same user as the daemon, which is all that SO_REUSEPORT requires.
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

/// The kernel's setting in the daemon's network namespace decides whether any user can bind a port.
#[test]
fn unprivileged_port_is_warned_of() {
    if !root() {
        return;
    }
    for (first, port, is_warned) in [
        (1024, 974, false),
        (975, 974, false),
        (974, 974, true),
        (0, 974, true),
        (1024, 8974, true),
        (8974, 8974, true),
        (8975, 8974, false),
        (32_768, 8974, false),
    ] {
        let folder = folder();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let [unix, status, token] = ["awsvid.sock", "status.sock", "token"].map(path);
        let mut listen =
            format!("[listen]\nunix = {unix:?}\nstatus = {status:?}\ntoken_file = {token:?}\n");
        if port != 974 {
            listen += &format!("tcp = [\"127.0.0.1:{port}\"]\n");
        }
        std::fs::write(path("awsvid.toml"), format!("{CONFIGURATION}{listen}")).unwrap();
        let script = format!(
            "ip link set lo up && echo {first} >/proc/sys/net/ipv4/ip_unprivileged_port_start && exec \"$0\" \"$@\""
        );
        let inside = |words: &[&str]| {
            let mut command = Command::new("unshare");
            command
                .args(["--net", "sh", "-c", &script, PROGRAM])
                .args(words);
            command
        };
        let file = path("awsvid.toml");
        let taken = format!("any user can take port {port} ");
        let validated = run(inside(&["config", "validate", &file]), b"", TIMEOUT);
        assert_eq!(
            validated.stderr.contains(&taken),
            is_warned,
            "{first}: {validated:?}"
        );
        // In CI the kernel's default decides.
        let offline = ["config", "validate", "--offline", &file];
        let validated = run(inside(&offline), b"", TIMEOUT);
        assert_eq!(
            validated.stderr.contains(&taken),
            port >= 1024,
            "{first}: {validated:?}"
        );
        let command = inside(&["serve", "--config", &file]);
        let daemon = Process::start("awsvid", command, &folder.path().join("log"));
        daemon.await_some("it listens", TIMEOUT, || {
            daemon.log().contains("serving operators").then_some(())
        });
        let log = daemon.log();
        assert_eq!(
            log.contains("any user can bind awsvid's port"),
            is_warned,
            "{log}"
        );
        assert_eq!(log.contains(&format!("[{port}]")), is_warned, "{log}");
    }
}

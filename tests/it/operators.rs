//! Operators are answered under any load at their address (T26).

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};

use crate::harness::client::EndLater;
use crate::harness::counterparts::process::{Output, run};
use crate::harness::counterparts::{folder, http_get};
use crate::harness::daemon::{Daemon, PROGRAM};
use crate::harness::upstream::{Upstream, my_rule};

const TIMEOUT: Duration = Duration::from_secs(60);
/// The address of the flood. Probes come from 127.0.0.1.
const SOURCE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const PROBES: usize = 120;

fn connect_from_source(to: SocketAddr) -> nix::Result<TcpStream> {
    let stream = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    bind(
        stream.as_raw_fd(),
        &SockaddrStorage::from(SocketAddr::from((SOURCE, 0))),
    )?;
    connect(stream.as_raw_fd(), &SockaddrStorage::from(to))?;
    Ok(TcpStream::from(stream))
}

fn stage(folder: &Path) -> (Daemon, Upstream) {
    let upstream = Upstream::start_for_me();
    (
        Daemon::start(folder, "", &(upstream.configuration() + &my_rule())).ready(),
        upstream,
    )
}

/// Sends a probe as the kubelet does: three failures in a row are one. A busy machine may not let
/// this process send its request within the second that the daemon waits for it.
fn answered_probe(admin: SocketAddr, path: &str) -> Option<(u16, String)> {
    (0..3).find_map(|_| http_get(admin, path))
}

/// Sends a flood in which each connection sends this. It keeps its last connections open, and reads
/// no response.
#[test]
fn probes_are_answered_during_flood_from_other_address() {
    let folder = folder();
    let (daemon, _upstream) = stage(folder.path());
    let admin = daemon.admin();
    for sent in [
        "",
        "GET /metrics HTT",
        "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    ] {
        let (ended, connected) = (AtomicBool::new(false), AtomicUsize::new(0));
        let flood = || {
            let mut open = std::collections::VecDeque::new();
            while !ended.load(Ordering::Relaxed) {
                // There may be no port left for a moment.
                let Ok(mut stream) = connect_from_source(admin) else {
                    continue;
                };
                let _ = stream.write_all(sent.as_bytes());
                open.push_back(stream);
                // Only as fast as the daemon ends them: an overflow of the kernel's queue is not
                // the subject.
                if open.len() > 300
                    && let Some(mut oldest) = open.pop_front()
                {
                    let _ = oldest
                        .set_read_timeout(Some(TIMEOUT))
                        .and_then(|()| oldest.read_to_end(&mut Vec::new()));
                }
                connected.fetch_add(1, Ordering::Relaxed);
            }
        };
        std::thread::scope(|scope| {
            let _end = EndLater(&ended);
            scope.spawn(flood);
            scope.spawn(flood);
            // More than the daemon accepts from one address.
            while connected.load(Ordering::Relaxed) < 1000 {
                std::thread::yield_now();
            }
            for _ in 0..PROBES {
                for (path, text) in [("/healthz", "ok\n"), ("/readyz", "ready\n")] {
                    assert_eq!(
                        answered_probe(admin, path),
                        Some((200, text.to_owned())),
                        "with {sent:?}"
                    );
                }
                assert_eq!(
                    daemon.query_status_socket("/readyz"),
                    (200, "ready\n".to_owned())
                );
            }
            assert_eq!(
                answered_probe(admin, "/metrics").map(|(status, _)| status),
                Some(200)
            );
            assert_eq!(daemon.query_status_socket("/status").0, 200);
            assert!(
                probe(folder.path(), "live").status.success()
                    && probe(folder.path(), "ready").status.success()
            );
        });
        eprintln!(
            "with {sent:?}: {} connections of the flood",
            connected.into_inner()
        );
    }
    assert!(daemon.metric("awsvid_connections_dropped_total{reason=\"too_many_operators\"}") > 0);
}

/// They are rendered at most once a second, however often they are requested. In between something
/// happens that they show.
#[test]
fn metrics_are_rendered_at_most_once_a_second() {
    let folder = folder();
    let (daemon, _upstream) = stage(folder.path());
    let started = Instant::now();
    let mut texts = BTreeSet::new();
    let mut before = (daemon.metrics(), String::new());
    for _ in 0..500 {
        http_get(daemon.tcp(), "/v1/credentials").unwrap();
        let (status, text) = http_get(daemon.admin(), "/metrics").unwrap();
        assert_eq!(status, 200);
        texts.insert(text);
        // The status socket shows each request at once.
        let after = daemon.metrics();
        assert_ne!(before.0, after);
        before.0 = after;
    }
    let seconds = usize::try_from(started.elapsed().as_secs()).unwrap();
    assert!(
        texts.len() <= seconds + 2,
        "{} texts in {seconds} s",
        texts.len()
    );
}

/// The daemon closes it long before one at a listener of workloads.
#[test]
fn slow_admin_head_is_closed_early() {
    let folder = folder();
    let (daemon, _upstream) = stage(folder.path());
    let waits = |to: SocketAddr| {
        let mut stream = TcpStream::connect(to).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream
            .write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
            .unwrap();
        stream
    };
    let (mut workload, mut operator) = (waits(daemon.tcp()), waits(daemon.admin()));
    assert_eq!(operator.read(&mut [0]).unwrap_or(0), 0);
    workload.set_nonblocking(true).unwrap();
    assert_eq!(
        workload.read(&mut [0]).unwrap_err().kind(),
        std::io::ErrorKind::WouldBlock
    );
}

fn probe(folder: &Path, what: &str) -> Output {
    let mut command = Command::new(PROGRAM);
    command
        .env_clear()
        .args(["probe", what, "--config"])
        .arg(folder.join("awsvid.toml"));
    run(command, b"", TIMEOUT)
}

#[test]
fn failed_probe_explains_the_reason() {
    let folder = folder();
    let upstream = Upstream::start_for_me();
    let agent = folder.path().join("agent.sock");
    let daemon = Daemon::start(
        folder.path(),
        "",
        &(upstream.configuration_at(&agent) + &my_rule()),
    );
    let line = daemon.await_line(&["not ready", "the identity source"]);
    let line = line.replace("not ready missing=", "not ready: ");
    let output = probe(folder.path(), "ready");
    assert!(
        !output.status.success() && output.stdout.trim_end() == line,
        "{output:?}, not {line}"
    );
    let output = probe(folder.path(), "live");
    assert!(
        output.status.success() && output.stdout == "ok\n",
        "{output:?}"
    );
    // Not over the network.
    assert_eq!(
        http_get(daemon.admin(), "/readyz"),
        Some((503, "not ready\n".to_owned()))
    );
    std::os::unix::fs::symlink(upstream.socket(), &agent).unwrap();
    let daemon = daemon.ready();
    let output = probe(folder.path(), "ready");
    assert!(
        output.status.success() && output.stdout == "ready\n",
        "{output:?}"
    );
    drop(daemon);
    let output = probe(folder.path(), "live");
    assert!(
        !output.status.success() && output.stdout.contains("systemctl"),
        "{output:?}"
    );
    assert_eq!(output.stdout.lines().count(), 1, "{output:?}");
}

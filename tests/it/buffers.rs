//! The kernel's buffers for connections, which count as the daemon's memory (T32).

use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::harness::client::connect;
use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::run;
use crate::harness::daemon::Daemon;
use crate::harness::pausable_proxy::PausableProxy;
use crate::harness::upstream::{Upstream, my_rule};

const CONNECTIONS: usize = 500;
/// Each has an incomplete head, or at most one head: well above what SDKs send.
const MAX_BUFFERED_BYTES: usize = CONNECTIONS * 20 * 1024;

/// Returns the bytes that the kernel holds for the daemon's sockets of this listener's connections,
/// and their number.
fn buffered(listener: SocketAddr) -> (usize, usize) {
    let mut ss = Command::new("ss");
    ss.args([
        "-tmnH",
        "state",
        "established",
        &format!("sport = :{}", listener.port()),
    ]);
    let text = run(ss, b"", Duration::from_secs(60)).success("ss");
    let queues = text
        .split("skmem:(r")
        .skip(1)
        .filter_map(|rest| rest.split(',').next()?.parse::<usize>().ok());
    queues
        .filter(|queue| *queue > 0)
        .fold((0, 0), |(sum, count), queue| (sum + queue, count + 1))
}

/// Sends requests that wait for their exchange, and sends more data while they wait.
#[test]
fn kernel_buffers_of_waiting_callers_stay_small() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let folder = folder();
    let upstream = Upstream::start_for_me();
    // The SPIFFE provider accepts every query, and replies to none.
    let agent = folder.path().join("agent.sock");
    let _gate = PausableProxy::start(&agent, &upstream.socket());
    let daemon = Daemon::start(
        folder.path(),
        "",
        &(upstream.configuration_at(&agent) + &my_rule()),
    );
    for listener in [daemon.tcp(), daemon.tcp6()] {
        let ended = AtomicBool::new(false);
        let (most, of) = std::thread::scope(|scope| {
            let watching = scope.spawn(|| {
                let mut most = (0, 0);
                while !ended.load(Ordering::Relaxed) {
                    most = most.max(buffered(listener));
                }
                most
            });
            let mut clients: Vec<TcpStream> = (0..CONNECTIONS)
                .map(|_| {
                    let mut client = connect(listener);
                    client
                        .write_all(b"GET /v1/credentials HTTP/1.1\r\nHost: localhost\r\nAuthorization: x\r\n\r\n")
                        .unwrap();
                    client.set_nonblocking(true).unwrap();
                    client
                })
                .collect();
            let more = [0; 64 * 1024];
            // Until the daemon has answered each.
            while !clients.is_empty() {
                clients.retain_mut(|client| match client.write(&more) {
                    Ok(_) => true,
                    Err(error) => error.kind() == ErrorKind::WouldBlock,
                });
            }
            ended.store(true, Ordering::Relaxed);
            watching.join().unwrap()
        });
        eprintln!("over {listener}: {most} bytes for {of} connections");
        assert!(
            of > CONNECTIONS / 2,
            "{of} connections had something in their queue"
        );
        assert!(
            most <= MAX_BUFFERED_BYTES,
            "{most} bytes for {of} connections"
        );
    }
}

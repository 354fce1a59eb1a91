//! The daemon's end: SIGTERM cuts no connection, a second signal does.

use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::Value;

use crate::harness::client::{answer, connect, fetch, send};
use crate::harness::counterparts::process::await_some;
use crate::harness::counterparts::{folder, http_get};
use crate::harness::daemon::Daemon;
use crate::harness::pausable_proxy::PausableProxy;
use crate::harness::upstream::{Upstream, my_rule};

/// Bounds steps that take milliseconds, or the daemon's own 16 s, on a machine that is busy with
/// other tests.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A daemon that serves the user of this test, and a pausable proxy in front of its source.
struct DrainStage {
    daemon: Daemon,
    gate: PausableProxy,
    _upstream: Upstream,
    _folder: tempfile::TempDir,
}

impl DrainStage {
    /// Starts it, waits until it is ready, and closes the proxy. The cache is empty.
    fn set() -> Self {
        let folder = folder();
        let upstream = Upstream::start_for_me();
        let path = folder.path().join("gate.sock");
        let gate = PausableProxy::start(&path, &upstream.socket());
        gate.set_open(true);
        let daemon = Daemon::start(
            folder.path(),
            "",
            &(upstream.configuration_at(&path) + &my_rule()),
        )
        .ready();
        gate.set_open(false);
        Self {
            daemon,
            gate,
            _upstream: upstream,
            _folder: folder,
        }
    }

    /// Sends a request for credentials that are not cached, and waits until the daemon has queried
    /// the source for them.
    fn held_request(&self) -> UnixStream {
        let arrivals = self.gate.arrivals();
        let stream = send(UnixStream::connect(self.daemon.unix()).unwrap());
        self.gate.await_arrivals(arrivals + 1);
        stream
    }

    /// Sends the signal, and returns once the daemon accepts no more connections.
    fn end(&mut self, signal: Signal) {
        self.daemon.process().signal(signal);
        await_some("no listener is left", TIMEOUT, || {
            let rejected = |error: std::io::Error| {
                matches!(
                    error.kind(),
                    ErrorKind::ConnectionRefused | ErrorKind::NotFound
                )
            };
            let unix = UnixStream::connect(self.daemon.unix()).is_err_and(rejected);
            let tcp = [self.daemon.tcp(), self.daemon.tcp6()]
                .map(|address| TcpStream::connect(address).is_err_and(rejected));
            (unix && tcp == [true; 2]).then_some(())
        });
    }

    fn exit_status(&mut self) -> Option<i32> {
        self.daemon
            .process()
            .owned()
            .wait(TIMEOUT)
            .expect("the daemon ends")
            .code()
    }
}

#[test]
fn cold_request_gets_credentials_during_drain() {
    let mut stage = DrainStage::set();
    let mut waiting = stage.held_request();
    stage.end(Signal::SIGTERM);
    assert_eq!(
        http_get(stage.daemon.admin(), "/readyz").unwrap().0,
        503,
        "operators see that it ends"
    );
    stage.gate.set_open(true);
    let (status, body) = answer(&mut waiting);
    assert_eq!(status, 200, "{body}");
    assert_eq!(stage.exit_status(), Some(0));
    let records = stage.daemon.audit();
    let issued = records
        .iter()
        .find(|record| record["access_key_id"] == body["AccessKeyId"]);
    assert_eq!(issued.expect("an audit record")["outcome"], "issued");
}

#[test]
fn cold_request_gets_503_at_end_of_drain() {
    let mut stage = DrainStage::set();
    let mut waiting = stage.held_request();
    stage.end(Signal::SIGINT);
    let (status, body) = answer(&mut waiting);
    assert_eq!(
        (status, &body["code"]),
        (503, &Value::from("pending")),
        "{body}"
    );
    assert_eq!(stage.exit_status(), Some(0));
}

#[test]
fn pending_connection_is_answered_during_drain() {
    const CONNECTIONS_PER_LISTENER: usize = 150;
    let mut stage = DrainStage::set();
    stage.gate.set_open(true);
    let warm = fetch(UnixStream::connect(stage.daemon.unix()).unwrap()).1["AccessKeyId"].clone();
    let (unix, tcp, tcp6) = (stage.daemon.unix(), stage.daemon.tcp(), stage.daemon.tcp6());
    // While it is stopped the kernel accepts for it. On continuation it finds the signal and the
    // connections at the same time.
    stage.daemon.process().signal(Signal::SIGSTOP);
    let queued: Vec<_> = (0..CONNECTIONS_PER_LISTENER)
        .map(|_| {
            let unix = send(UnixStream::connect(&unix).unwrap());
            (unix, [tcp, tcp6].map(|address| send(connect(address))))
        })
        .collect();
    stage.daemon.process().signal(Signal::SIGTERM);
    stage.daemon.process().signal(Signal::SIGCONT);
    for (mut unix, mut tcp) in queued {
        let answers = [answer(&mut unix), answer(&mut tcp[0]), answer(&mut tcp[1])];
        assert!(
            answers
                .iter()
                .all(|(status, body)| *status == 200 && body["AccessKeyId"] == warm),
            "{answers:?}"
        );
    }
    assert_eq!(stage.exit_status(), Some(0));
}

#[test]
fn slow_reader_gets_whole_response_during_drain() {
    let mut stage = DrainStage::set();
    let waiting = stage.held_request();
    let slow = [stage.daemon.tcp(), stage.daemon.tcp6()].map(|address| {
        let stream = connect(address);
        // The least that the kernel allows: the response doesn't fit.
        setsockopt(&stream.as_fd(), sockopt::RcvBuf, &1).unwrap();
        send(stream)
    });
    stage.end(Signal::SIGTERM);
    stage.gate.set_open(true);
    // A client that reads only after the daemon has ended.
    assert_eq!(stage.exit_status(), Some(0));
    for stream in slow {
        assert_eq!(answer(&mut &stream).0, 200);
    }
    assert_eq!(answer(&mut &waiting).0, 200);
}

#[test]
fn second_signal_ends_daemon_at_once() {
    for (second, status) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
        let mut stage = DrainStage::set();
        let mut waiting = stage.held_request();
        stage.end(Signal::SIGTERM);
        stage.daemon.process().signal(second);
        assert_eq!(stage.exit_status(), Some(status));
        let mut cut = String::new();
        let _ = waiting.read_to_string(&mut cut);
        assert_eq!(cut, "", "the request was open, and got no response");
        let left: Vec<PathBuf> = [stage.daemon.unix()]
            .into_iter()
            .filter(|path| path.exists())
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

//! The daemon's own interface to clients and operators, byte for byte where it matters. These tests
//! need neither SPIRE nor STS.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::harness::counterparts::process::{Output, run};
use crate::harness::counterparts::{folder, http_get, root};
use crate::harness::daemon::Daemon;

mod alerts;
mod commands;
mod lists;
mod variables;

/// A source at which no agent listens, and a rule for a user that does not run these tests.
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

const GOOD: &str = "GET /v1/credentials HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: x\r\n\r\n";

/// A whole response: status, headers in lower case, body.
struct Answer {
    status: u16,
    head: String,
    body: Value,
}

fn exchange(mut stream: impl Read + Write, request: &str) -> Answer {
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no answer to {request:?}: {answer:?}"));
    Answer {
        status: head[9..12].parse().unwrap(),
        head: head.to_lowercase(),
        body: serde_json::from_str(body).unwrap_or_default(),
    }
}

fn fetch(address: SocketAddr, request: &str) -> Answer {
    let stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    exchange(stream, request)
}

#[test]
fn rejections_are_counted_audited_and_readable() {
    let folder = folder();
    let daemon = Daemon::start(folder.path(), "", CONFIGURATION);
    let with = |line: &str| GOOD.replace("\r\n\r\n", &format!("\r\n{line}\r\n\r\n"));
    let cases = [
        (GOOD.to_owned(), 403, "no_identity"),
        (
            GOOD.replace("Host: 127.0.0.1\r\n", "Host: rebound.example\r\n"),
            400,
            "host",
        ),
        (GOOD.replace("Host: 127.0.0.1\r\n", ""), 400, "host"),
        (with("Host: 127.0.0.1"), 400, "host"),
        (with("Origin: http://evil.example"), 403, "browser"),
        (with("Sec-Fetch-Site: cross-site"), 403, "browser"),
        (with("X-Forwarded-For: 10.0.0.1"), 403, "proxied"),
        (with("Via: 1.1 proxy"), 403, "proxied"),
        (GOOD.replace("GET", "POST"), 405, "method"),
        (GOOD.replace("GET", "PUT"), 405, "method"),
        (
            GOOD.replace("Authorization: x\r\n", ""),
            403,
            "no_authorization",
        ),
        (
            GOOD.replace("/v1/credentials", "/latest/meta-data"),
            404,
            "path",
        ),
        (
            GOOD.replace("/v1/credentials", "/v1/credentials/arn:x"),
            400,
            "bad_arn",
        ),
    ];
    for address in [daemon.tcp(), daemon.tcp6()] {
        for (request, status, code) in &cases {
            let before = daemon.audit().len();
            let answer = fetch(address, request);
            assert_eq!(
                (answer.status, &answer.body["code"]),
                (*status, &Value::from(*code)),
                "{request:?}"
            );
            for header in [
                "content-type: application/json",
                "cache-control: no-store",
                "connection: close",
                "content-length: ",
            ] {
                assert!(answer.head.contains(header), "{header} in {}", answer.head);
            }
            let record = &daemon.audit_after(before)[..];
            // The daemon's own readiness probes may arrive in between.
            assert!(
                record
                    .iter()
                    .any(|record| record["reason"] == *code && record["outcome"] == "refused"),
                "{record:?}"
            );
        }
    }
    // The unix socket requires no Authorization.
    let answer = exchange(
        UnixStream::connect(daemon.unix()).unwrap(),
        &GOOD.replace("Authorization: x\r\n", ""),
    );
    assert_eq!(
        (answer.status, &answer.body["code"]),
        (403, &Value::from("no_identity"))
    );
    let metrics = daemon.metrics();
    for (_, _, code) in &cases {
        let is_counted = metrics
            .lines()
            .any(|line| line.contains(&format!("reason=\"{code}\"")) && !line.ends_with(" 0"));
        assert!(is_counted, "{code} in {metrics}");
    }
}

#[test]
fn admin_address_shows_health_but_no_workload() {
    let folder = folder();
    let daemon = Daemon::start(folder.path(), "", CONFIGURATION);
    assert_eq!(http_get(daemon.admin(), "/healthz").unwrap().0, 200);
    // The test has neither a source nor an STS.
    assert_eq!(http_get(daemon.admin(), "/readyz").unwrap().0, 503);
    assert_eq!(http_get(daemon.admin(), "/status").unwrap().0, 404);
    let (_, metrics) = http_get(daemon.admin(), "/metrics").unwrap();
    assert!(
        !metrics.contains("spiffe") && !metrics.contains("arn:"),
        "{metrics}"
    );
    let socket = folder.path().join("status.sock");
    let found = std::fs::metadata(&socket).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.mode() & 0o777, 0o600);
    let answer = exchange(
        UnixStream::connect(&socket).unwrap(),
        "GET /status HTTP/1.1\r\nHost: x\r\n\r\n",
    );
    assert_eq!(
        (answer.status, &answer.body["ready"]),
        (200, &Value::from(false))
    );
}

#[test]
fn unix_socket_is_public_and_removed_at_exit() {
    let folder = folder();
    let mut daemon = Daemon::start(folder.path(), "", CONFIGURATION);
    let path = daemon.unix();
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o666);
    let token = std::fs::read(folder.path().join("token")).unwrap();
    assert_eq!(token.len(), 43);
    assert!(!token.contains(&b'\n'));
    assert_eq!(
        std::fs::metadata(folder.path().join("token"))
            .unwrap()
            .mode()
            & 0o777,
        0o644
    );
    // A second daemon does not remove the first one's socket.
    let output = serve(folder.path().join("awsvid.toml").to_str().unwrap());
    assert!(
        !output.status.success() && output.stderr.contains("another process serves this socket"),
        "{output:?}"
    );
    assert_eq!(
        exchange(UnixStream::connect(&path).unwrap(), GOOD).status,
        403
    );
    daemon.process().signal(Signal::SIGTERM);
    let status = daemon
        .process()
        .owned()
        .wait(Duration::from_secs(20))
        .expect("it ends on SIGTERM");
    assert!(status.success(), "{status}");
    assert!(!path.exists());
}

#[test]
fn sigterm_lets_open_request_end() {
    let folder = folder();
    let mut daemon = Daemon::start(folder.path(), "", CONFIGURATION);
    let mut stream = TcpStream::connect(daemon.tcp()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream.write_all(&GOOD.as_bytes()[..20]).unwrap();
    // Answered after the first one was accepted, since both connected to the same listener.
    assert_eq!(fetch(daemon.tcp(), GOOD).status, 403);
    daemon.process().signal(Signal::SIGTERM);
    let mut rest = stream.try_clone().unwrap();
    rest.write_all(&GOOD.as_bytes()[20..]).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    assert!(
        daemon
            .process()
            .owned()
            .wait(Duration::from_secs(20))
            .expect("it ends")
            .success()
    );
}

fn serve(config: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_awsvid"));
    command.env_clear().args(["serve", "--config", config]);
    run(command, b"", Duration::from_secs(20))
}

#[test]
fn configuration_errors_are_reported_together() {
    let folder = folder();
    let path = folder.path().join("wrong.toml");
    let text = "[listen]\ntpc = []\nadmin = 7\n[[workload]]\nuid = 1001\nspiffe_id = \"spiffe:/x\"\n[[role]]\nname = \"a\"\nspiffe_id = \"spiffe://example.org/a\"\nrole_arn = \"arn:aws:iam::12:role/x\"\nduration = \"1\"\n";
    std::fs::write(&path, text).unwrap();
    let output = serve(path.to_str().unwrap());
    assert_eq!(output.status.code(), Some(78));
    for line in [2, 3, 6, 10, 11] {
        assert!(
            output.stderr.contains(&format!("wrong.toml:{line}: ")),
            "line {line} in:\n{}",
            output.stderr
        );
    }
    let output = serve("/nonexistent.toml");
    assert_eq!(output.status.code(), Some(78));
    assert!(output.stderr.contains("/nonexistent.toml"), "{output:?}");
}

/// T14: in such a namespace all users that it does not map have the same uid.
#[test]
fn daemon_does_not_start_in_own_user_namespace() {
    if !root() {
        return;
    }
    let folder = folder();
    let path = folder.path().join("awsvid.toml");
    let socket = folder.path().join("awsvid.sock");
    let listen = format!("[listen]\nunix = {socket:?}\ntcp = []\nadmin = \"\"\nstatus = \"\"\n");
    std::fs::write(&path, format!("{CONFIGURATION}{listen}")).unwrap();
    let mut command = Command::new("unshare");
    command
        .args([
            "--user",
            "--map-root-user",
            env!("CARGO_BIN_EXE_awsvid"),
            "serve",
            "--config",
        ])
        .arg(&path);
    let output = run(command, b"", Duration::from_secs(20));
    assert_eq!(output.status.code(), Some(78), "{output:?}");
    assert!(
        output
            .stderr
            .contains("in a user namespace that does not map every user id to itself"),
        "{output:?}"
    );
    assert!(!socket.exists());
}

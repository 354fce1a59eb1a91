//! The exit statuses of `awsvid serve`, and the faults that do not end it, since they may pass by
//! themselves.
//!
//! - 78: another start would not change the fault, and systemd does not try one.
//! - 1: another start may succeed, and systemd tries one.
//! - 2: the command line is invalid.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::harness::client::fetch;
use crate::harness::counterparts::process::{Output, await_some, run};
use crate::harness::counterparts::{folder, http_get, root};
use crate::harness::daemon::{Daemon, PROGRAM, text};
use crate::harness::upstream::{Upstream, my_rule};

const TIMEOUT: Duration = Duration::from_secs(60);
const REST: &str = r#"
[identity]
workload_api_socket = "unix:///nonexistent/agent.sock"
[sts]
region = "eu-central-1"
[[workload]]
spiffe_id = "spiffe://example.org/a"
uid = 54321
[[role]]
name = "a"
spiffe_id = "spiffe://example.org/a"
role_arn = "arn:aws:iam::123456789012:role/a"
"#;

/// Runs `awsvid serve` with this file, behind these words, with these variables, to its end.
fn serve(words: &[&str], variables: &[(&str, &str)], path: &Path) -> Output {
    let all = [words, &[PROGRAM, "serve", "--config"]].concat();
    let mut command = Command::new(all[0]);
    command
        .args(&all[1..])
        .arg(path)
        .env_clear()
        .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin");
    command.envs(variables.iter().copied());
    run(command, b"", TIMEOUT)
}

/// Returns a configuration with these listeners and this text after it.
fn configuration(folder: &Path, listen: &str, more: &str) -> String {
    let path = |name: &str| folder.join(name);
    format!(
        "{REST}{more}\n[listen]\nunix = {:?}\nadmin = \"\"\nstatus = {:?}\ntoken_file = {:?}\n{listen}\n",
        path("awsvid.sock"),
        path("status.sock"),
        path("token")
    )
}

#[test]
fn permanent_error_exits_with_78() {
    let folder = folder();
    let path = folder.path().join("awsvid.toml");
    let good = configuration(folder.path(), "tcp = []", "");
    let cases: [(&str, &[u8], &str); 4] = [
        ("a syntax error", b"[listen", "this is not TOML"),
        ("several mistakes", b"[lisen]\n", "did you mean `listen`?"),
        ("another encoding", b"\xff", "this is not UTF-8"),
        (
            "a newer version's key",
            b"[listen]\nfuture = 1\n",
            "has no such key",
        ),
    ];
    for (case, text, words) in cases {
        fs::write(&path, text).unwrap();
        let output = serve(&[], &[], &path);
        assert!(
            output.status.code() == Some(78) && output.stderr.contains(words),
            "{case}: {output:?}"
        );
    }
    let missing = serve(&[], &[], &folder.path().join("missing.toml"));
    assert!(
        missing.status.code() == Some(78) && missing.stderr.contains("cannot be read"),
        "{missing:?}"
    );
    fs::write(&path, &good).unwrap();
    for (variable, value) in [
        ("AWSVID_LOG", "loud"),
        ("SPIFFE_ENDPOINT_SOCKET", "/agent.sock"),
        ("HTTPS_PROXY", "socks5://proxy:1080"),
    ] {
        // The file would give the socket.
        let text = if variable.starts_with("SPIFFE") {
            good.replace("workload_api_socket = \"unix", "# \"unix")
        } else {
            good.clone()
        };
        fs::write(&path, text).unwrap();
        let output = serve(&[], &[(variable, value)], &path);
        assert!(
            output.status.code() == Some(78) && output.stderr.contains(variable),
            "{variable}: {output:?}"
        );
    }
    if !root() {
        return;
    }
    fs::write(&path, &good).unwrap();
    let namespace = serve(&["unshare", "--user", "--map-root-user"], &[], &path);
    let words = "in a user namespace that does not map every user id to itself";
    assert!(
        namespace.status.code() == Some(78) && namespace.stderr.contains(words),
        "{namespace:?}"
    );
    let pods = format!(
        "tcp = []\n[pods]\nenabled = true\nnetns_dir = {:?}\nhandover_socket = \"\"",
        folder.path()
    );
    fs::write(&path, configuration(folder.path(), &pods, "")).unwrap();
    let pods = serve(&["setpriv", "--bounding-set", "-sys_admin"], &[], &path);
    assert!(
        pods.status.code() == Some(78) && pods.stderr.contains("CAP_SYS_ADMIN"),
        "{pods:?}"
    );
    // tests/it/exposure.rs has the file that other users can change.
}

#[test]
fn temporary_error_exits_with_1() {
    let folder = folder();
    let path = folder.path().join("awsvid.toml");
    // Every address is in use, as by another awsvid.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let _unix = UnixListener::bind(folder.path().join("awsvid.sock")).unwrap();
    let listen = format!("tcp = [\"{}\"]", taken.local_addr().unwrap());
    fs::write(&path, configuration(folder.path(), &listen, "")).unwrap();
    let output = serve(&[], &[], &path);
    assert!(output.status.code() == Some(1), "{output:?}");
    assert!(
        output.stderr.contains("another process serves this socket"),
        "{output:?}"
    );
}

#[test]
fn unknown_argument_exits_with_2() {
    let mut command = Command::new(PROGRAM);
    command
        .env_clear()
        .args(["serve", "--confg", "/etc/awsvid/awsvid.toml"]);
    assert_eq!(run(command, b"", TIMEOUT).status.code(), Some(2));
}

#[test]
fn signal_exits_with_0() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let folder = folder();
        let mut daemon = Daemon::start(folder.path(), "", REST);
        daemon.process().signal(signal);
        assert_eq!(
            daemon
                .process()
                .owned()
                .wait(TIMEOUT)
                .expect("it ends")
                .code(),
            Some(0)
        );
    }
    // tests/it/drain.rs has the second signal: 128 and its number.
}

fn unix(daemon: &Daemon) -> (u16, serde_json::Value) {
    fetch(UnixStream::connect(daemon.unix()).unwrap())
}

#[test]
fn audit_file_is_opened_once_possible() {
    let folder = folder();
    let late = folder.path().join("late");
    let audit = format!("file = {:?}", late.join("audit.log"));
    let text = text(folder.path(), "", REST);
    let line = text
        .lines()
        .find(|line| line.starts_with("file = "))
        .unwrap()
        .to_owned();
    let daemon = Daemon::start_text(folder.path(), &text.replace(&line, &audit));
    // A caller without an identity is rejected as ever; the record waits.
    assert_eq!(unix(&daemon).1["code"], "no_identity");
    assert!(
        daemon.log().contains("the audit file cannot be opened yet"),
        "{}",
        daemon.log()
    );
    fs::create_dir(&late).unwrap();
    daemon.await_line(&["audit file opened"]);
    assert_eq!(unix(&daemon).1["code"], "no_identity");
    await_some("both records", TIMEOUT, || {
        let text = fs::read_to_string(late.join("audit.log")).ok()?;
        (text
            .lines()
            .filter(|line| line.contains("no_identity"))
            .count()
            == 2)
            .then_some(())
    });
    assert_eq!(daemon.metric("awsvid_audit_records_dropped_total"), 0);
}

#[test]
fn required_audit_blocks_credentials_until_file_opens() {
    let folder = folder();
    let late = folder.path().join("late");
    let upstream = Upstream::start_for_me();
    let text = text(folder.path(), "", &(upstream.configuration() + &my_rule()));
    let text = text.replace("audit.log\"", "late/audit.log\"\nrequired = true");
    let daemon = Daemon::start_text(folder.path(), &text).ready();
    assert_eq!(unix(&daemon).1["code"], "not_audited");
    fs::create_dir(&late).unwrap();
    daemon.await_line(&["audit file opened"]);
    let (status, body) = unix(&daemon);
    assert_eq!(status, 200, "{body}");
    let audit = fs::read_to_string(late.join("audit.log")).unwrap();
    assert!(
        audit.contains(body["AccessKeyId"].as_str().unwrap()),
        "{audit}"
    );
}

#[test]
fn token_file_is_written_once_possible() {
    let folder = folder();
    let late = folder.path().join("late");
    // A file has the path of the directory.
    fs::write(&late, "").unwrap();
    let token = folder.path().join("token");
    let text = text(folder.path(), "", REST).replace(
        &format!("{token:?}"),
        &format!("{:?}\nauthorization = \"token\"", late.join("token")),
    );
    let daemon = Daemon::start_text(folder.path(), &text);
    assert!(
        daemon.log().contains("token_file cannot be written yet"),
        "{}",
        daemon.log()
    );
    assert_eq!(unix(&daemon).1["code"], "no_identity");
    let over_tcp = |token: &str| {
        let mut stream = std::net::TcpStream::connect(daemon.tcp()).unwrap();
        let request = format!(
            "GET /v1/credentials HTTP/1.1\r\nHost: localhost\r\nAuthorization: {token}\r\n\r\n"
        );
        std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
        crate::harness::client::answer(&mut stream).1["code"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!(over_tcp("any"), "wrong_token");
    fs::remove_file(&late).unwrap();
    daemon.await_line(&["token file written"]);
    let written = fs::read_to_string(late.join("token")).unwrap();
    assert_eq!(over_tcp(&written), "no_identity");
}

#[test]
fn occupied_address_does_not_stop_other_listeners() {
    let folder = folder();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, closed) = (taken.local_addr().unwrap(), folder.path().join("closed"));
    // Another process has the port, and any user may put a socket at the path of the status socket.
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o777)).unwrap();
    let text =
        text(folder.path(), "", REST).replace("\"127.0.0.1:0\", ", &format!("\"{address}\", "));
    let text = text.replace("status.sock", "closed/status.sock");
    let daemon = Daemon::start_text(folder.path(), &text);
    assert_eq!(unix(&daemon).1["code"], "no_identity");
    let logged = || daemon.log().matches("cannot be bound yet").count();
    assert_eq!(logged(), 2, "{}", daemon.log());
    assert_eq!(http_get(daemon.admin(), "/readyz").unwrap().0, 503);
    drop(taken);
    await_some("the port is served", TIMEOUT, || {
        (http_get(address, "/probe")?.0 == 403).then_some(())
    });
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o755)).unwrap();
    await_some("the status is served", TIMEOUT, || {
        UnixStream::connect(closed.join("status.sock")).ok()
    });
    // The retries failed for the same reasons, which are logged once.
    assert_eq!(logged(), 2, "{}", daemon.log());
}

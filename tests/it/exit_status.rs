//! How `awsvid serve` ends, and with which status; and what does not end it, since it may pass by itself.
//!
//! 78 is for what another start would not change, and what systemd does not start again; 1 is tried again; 2 is a command line
//! that nobody can have meant.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::getuid;

use crate::harness::cgroup::own_rule;
use crate::harness::client::ask;
use crate::harness::counterparts::process::{Output, await_some, run};
use crate::harness::counterparts::{folder, http_get, root};
use crate::harness::daemon::{Daemon, PROGRAM, text};
use crate::harness::upstream::Upstream;

const PATIENCE: Duration = Duration::from_secs(60);
const REST: &str = r#"
[identity]
socket = "unix:///nonexistent/agent.sock"
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

/// `awsvid serve` with this file, by these words, with these variables, to its end.
fn serve(words: &[&str], variables: &[(&str, &str)], path: &Path) -> Output {
    let all = [words, &[PROGRAM, "serve", "--config"]].concat();
    let mut command = Command::new(all[0]);
    command
        .args(&all[1..])
        .arg(path)
        .env_clear()
        .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin");
    command.envs(variables.iter().copied());
    run(command, b"", PATIENCE)
}

/// A configuration with these listeners and this after it.
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
fn what_another_start_would_not_change_is_78() {
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
        missing.status.code() == Some(78) && missing.stderr.contains("can't be read"),
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
            good.replace("socket = \"unix", "# \"unix")
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
        "tcp = []\npods = true\npods_dir = {:?}\nhandover = \"\"",
        folder.path()
    );
    fs::write(&path, configuration(folder.path(), &pods, "")).unwrap();
    let pods = serve(&["setpriv", "--bounding-set", "-sys_admin"], &[], &path);
    assert!(
        pods.status.code() == Some(78) && pods.stderr.contains("CAP_SYS_ADMIN"),
        "{pods:?}"
    );
    // tests/it/exposure.rs has the file that others can change.
}

#[test]
fn an_end_that_another_start_may_avoid_is_1() {
    let folder = folder();
    let path = folder.path().join("awsvid.toml");
    // Every address is taken, as by another awsvid.
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
fn an_argument_that_does_not_exist_is_2() {
    let mut command = Command::new(PROGRAM);
    command
        .env_clear()
        .args(["serve", "--confg", "/etc/awsvid/awsvid.toml"]);
    assert_eq!(run(command, b"", PATIENCE).status.code(), Some(2));
}

#[test]
fn a_signal_is_0() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let folder = folder();
        let mut daemon = Daemon::start(folder.path(), "", REST);
        daemon.process().signal(signal);
        assert_eq!(
            daemon
                .process()
                .owned()
                .wait(PATIENCE)
                .expect("it ends")
                .code(),
            Some(0)
        );
    }
    // tests/it/drain.rs has the second signal: 128 and its number.
}

fn unix(daemon: &Daemon) -> (u16, serde_json::Value) {
    ask(UnixStream::connect(daemon.unix()).unwrap())
}

#[test]
fn an_audit_file_that_cannot_be_opened_yet_is_opened_later() {
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
    // Somebody without an identity is refused as ever; the record waits.
    assert_eq!(unix(&daemon).1["code"], "no_identity");
    assert!(
        daemon.log().contains("no audit record can be written yet"),
        "{}",
        daemon.log()
    );
    fs::create_dir(&late).unwrap();
    daemon.await_line(&["the audit file is open"]);
    assert_eq!(unix(&daemon).1["code"], "no_identity");
    await_some("both records", PATIENCE, || {
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
fn without_a_required_record_nothing_is_handed_out_until_its_file_can_be_opened() {
    let folder = folder();
    let late = folder.path().join("late");
    let uid = getuid().as_raw();
    let upstream = Upstream::start(&[(uid, "me")]);
    let rule = format!(
        "\n[[workload]]\nspiffe_id = \"spiffe://example.org/user/me\"\nuid = {uid}\n{}",
        own_rule()
    );
    let text = text(folder.path(), "", &(upstream.configuration() + &rule));
    let text = text.replace("audit.log\"", "late/audit.log\"\nrequired = true");
    let daemon = Daemon::start_text(folder.path(), &text).ready();
    assert_eq!(unix(&daemon).1["code"], "not_audited");
    fs::create_dir(&late).unwrap();
    daemon.await_line(&["the audit file is open"]);
    let (status, body) = unix(&daemon);
    assert_eq!(status, 200, "{body}");
    let audit = fs::read_to_string(late.join("audit.log")).unwrap();
    assert!(
        audit.contains(body["AccessKeyId"].as_str().unwrap()),
        "{audit}"
    );
}

#[test]
fn a_token_file_that_cannot_be_written_yet_is_written_later() {
    let folder = folder();
    let late = folder.path().join("late");
    // A file is in the place of the directory.
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
    daemon.await_line(&["the token file is written"]);
    let written = fs::read_to_string(late.join("token")).unwrap();
    assert_eq!(over_tcp(&written), "no_identity");
}

#[test]
fn one_address_that_is_taken_keeps_nobody_from_the_others() {
    let folder = folder();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, closed) = (taken.local_addr().unwrap(), folder.path().join("closed"));
    // Another process has the port, and everybody may put a socket where the status is to be.
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o777)).unwrap();
    let text =
        text(folder.path(), "", REST).replace("\"127.0.0.1:0\", ", &format!("\"{address}\", "));
    let text = text.replace("status.sock", "closed/status.sock");
    let daemon = Daemon::start_text(folder.path(), &text);
    assert_eq!(unix(&daemon).1["code"], "no_identity");
    assert_eq!(
        daemon
            .log()
            .matches("is not served yet: binding it is retried")
            .count(),
        2,
        "{}",
        daemon.log()
    );
    assert_eq!(http_get(daemon.admin(), "/readyz").unwrap().0, 503);
    drop(taken);
    await_some("the port is served", PATIENCE, || {
        (http_get(address, "/probe")?.0 == 403).then_some(())
    });
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o755)).unwrap();
    await_some("the status is served", PATIENCE, || {
        UnixStream::connect(closed.join("status.sock")).ok()
    });
}

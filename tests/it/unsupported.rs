//! Features that the machine or the daemon's privileges lack, and how readiness, `/status`, `check`
//! and `exec` report them.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::unistd::getuid;
use serde_json::Value;

use crate::harness::cgroup::Cgroup;
use crate::harness::client::fetch;
use crate::harness::counterparts::process::{Output, behind, run};
use crate::harness::counterparts::{folder, http_get, root};
use crate::harness::daemon::{Daemon, PROGRAM, text};
use crate::harness::upstream::Upstream;

mod restored;

const TIMEOUT: Duration = Duration::from_secs(60);
/// Starts a program where no cgroup v2 is mounted, so that no caller over TCP can be attested.
const WITHOUT_CGROUP_V2: [&str; 8] = [
    "unshare",
    "--mount",
    "--propagation",
    "private",
    "sh",
    "-euc",
    "awk '$3 == \"cgroup2\" { print $2 }' /proc/mounts | while read -r path; do umount -l \"$path\"; done; exec \"$@\"",
    "sh",
];

/// Returns a configuration with a rule by user alone, since no cgroup is visible.
fn configuration(upstream: &Upstream) -> String {
    let rule = format!(
        "\n[[workload]]\nspiffe_id = \"spiffe://example.org/user/me\"\nuid = {}\n",
        getuid()
    );
    upstream.configuration() + &rule
}

fn upstream() -> Upstream {
    Upstream::start(&[(getuid().as_raw(), "me")])
}

/// Runs the program behind these words, without an environment.
fn awsvid(words: &[&str], arguments: &[&str]) -> Output {
    let mut command = behind(words, Path::new(PROGRAM));
    command
        .env_clear()
        .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
        .args(arguments);
    run(command, b"", TIMEOUT)
}

fn status(daemon: &Daemon) -> Value {
    let (status, body) = daemon.query_status_socket("/status");
    assert_eq!(status, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

#[test]
fn daemon_without_tcp_is_ready_on_unix_socket() {
    if !root() {
        return;
    }
    let folder = folder();
    let upstream = upstream();
    let daemon = Daemon::start_behind(
        &WITHOUT_CGROUP_V2,
        folder.path(),
        "",
        &configuration(&upstream),
    )
    .ready();
    let left_out = daemon.await_line(&["readiness leaves out", "unsupported_kernel"]);
    let addresses = [daemon.tcp().to_string(), daemon.tcp6().to_string()];
    for words in addresses
        .iter()
        .map(String::as_str)
        .chain(["no cgroup v2 tree is mounted"])
    {
        assert!(left_out.contains(words), "{words}: {left_out}");
    }
    // The fix names awsvid.socket, the unit.
    let unix = daemon.unix().display().to_string();
    assert!(!left_out.contains(&unix), "{left_out}");
    assert_eq!(daemon.log().matches("readiness leaves out").count(), 1);
    assert_eq!(fetch(UnixStream::connect(daemon.unix()).unwrap()).0, 200);
    let (code, body) = fetch(std::net::TcpStream::connect(daemon.tcp()).unwrap());
    assert_eq!(
        (code, &body["code"]),
        (403, &Value::from("unsupported_kernel")),
        "{body}"
    );
    let status = status(&daemon);
    let missing = status["unsupported_kernel"][0].as_str().unwrap();
    assert!(
        missing.starts_with("callers over TCP are rejected: no cgroup v2 tree is mounted; "),
        "{status}"
    );
    assert_eq!(
        (&status["ready"], &status["counts_executions"]),
        (&Value::from(true), &Value::Null)
    );

    // A command that could only be rejected is not started.
    let url = format!("http://{}", daemon.tcp());
    let exec = ["exec", "--url", &url, "--", "echo", "started"];
    let output = awsvid(&WITHOUT_CGROUP_V2, &exec);
    assert_eq!(
        (output.status.code(), output.stdout.as_str()),
        (Some(125), ""),
        "{output:?}"
    );
    for words in [
        "rejects all callers over TCP",
        "no cgroup v2 tree",
        "credential_process = awsvid credential-process",
    ] {
        assert!(output.stderr.contains(words), "{words}: {output:?}");
    }
}

#[test]
fn command_starts_if_daemon_serves_tcp_despite_its_namespace() {
    if !root() {
        return;
    }
    let folder = folder();
    let upstream = upstream();
    let daemon = Daemon::start(folder.path(), "", &configuration(&upstream)).ready();
    assert_eq!(
        status(&daemon)["unsupported_kernel"],
        Value::from(Vec::<Value>::new())
    );
    let url = format!("http://{}", daemon.tcp());
    let absent = "http://127.0.0.1:1".to_owned();
    for url in [url, absent] {
        let output = awsvid(
            &WITHOUT_CGROUP_V2,
            &["exec", "--url", &url, "--", "echo", "started"],
        );
        assert_eq!(output.success("awsvid exec"), "started\n", "{url}");
    }
}

#[test]
fn daemon_without_any_listener_is_not_ready() {
    if !root() {
        return;
    }
    let folder = folder();
    let upstream = upstream();
    let listen = text(folder.path(), "", &configuration(&upstream));
    let unix = format!(
        "unix = {:?}",
        folder.path().join("awsvid.sock").display().to_string()
    );
    let listen = listen.replace(&unix, "unix = \"\"");
    let daemon = Daemon::start_text_behind(&WITHOUT_CGROUP_V2, folder.path(), &listen);
    let reason = daemon.await_line(&[
        "not ready",
        "this kernel cannot attest",
        "no cgroup v2 tree is mounted",
    ]);
    assert!(reason.contains("mount -t cgroup2"), "{reason}");
    assert_eq!(http_get(daemon.admin(), "/readyz").unwrap().0, 503);
    let config = folder.path().join("awsvid.toml");
    let probe = awsvid(
        &[],
        &["probe", "ready", "--config", config.to_str().unwrap()],
    );
    assert_eq!(probe.status.code(), Some(1), "{probe:?}");
    assert!(
        probe.stdout.contains("no cgroup v2 tree is mounted"),
        "{probe:?}"
    );
}

/// STS responds without a role, so the daemon probes it although the configuration names none.
#[test]
fn readiness_waits_for_the_sts_of_requested_roles() {
    let folder = folder();
    let upstream = upstream();
    let configuration = configuration(&upstream);
    let section = |name: &str| {
        let rest = &configuration[configuration.find(name).unwrap()..];
        rest[..rest.find("\n\n").unwrap_or(rest.len())].to_owned()
    };
    let configuration = format!(
        "requested_roles.allow = [\"arn:aws:iam::123456789012:role/*\"]\n{}\n[sts]\nregion = \"us-east-1\"\n{}",
        section("[identity]"),
        section("[[workload]]")
    );
    let proxy = ["env", "HTTPS_PROXY=http://127.0.0.1:1"];
    let daemon = Daemon::start_behind(&proxy, folder.path(), "", &configuration);
    daemon.await_line(&["not ready", "STS: ", "us-east-1"]);
    assert_eq!(status(&daemon)["ready"], false);
}

#[test]
fn executions_that_are_not_counted_are_reported() {
    if !root() {
        return;
    }
    let table: [(&[&str], bool); 2] = [
        (
            &["setpriv", "--bounding-set", "-bpf,-perfmon,-sys_admin"],
            false,
        ),
        (&[], true),
    ];
    for (words, counts) in table {
        let folder = folder();
        let upstream = upstream();
        let (identity, rest) = upstream
            .configuration()
            .split_once("\n\n")
            .map(|(a, b)| (a.to_owned(), b.to_owned()))
            .unwrap();
        let identity = identity.replace("\"workload-api\"", "\"spire-delegated\"");
        let configuration =
            format!("{identity}\nadmin_socket = \"unix:///nonexistent/admin.sock\"\n\n{rest}");
        let daemon = Daemon::start_behind(words, folder.path(), "", &configuration);
        assert_eq!(
            status(&daemon)["counts_executions"],
            counts,
            "{}",
            daemon.log()
        );
        let log = daemon.log();
        let line = "executions of programs are counted";
        assert_eq!(log.matches(line).count(), usize::from(counts), "{log}");
        let config = folder.path().join("awsvid.toml");
        let config = config.to_str().unwrap();
        let checked = awsvid(&[], &["check", "--output", "json", "--config", config]);
        let report: Value = serde_json::from_str(&checked.stdout)
            .unwrap_or_else(|error| panic!("{error}: {checked:?}"));
        let findings = report["findings"].as_array().unwrap();
        let found = findings
            .iter()
            .find(|finding| finding["step"] == "daemon")
            .unwrap_or_else(|| panic!("{report:#}"));
        assert_eq!(
            found["verdict"],
            if counts { "pass" } else { "failed" },
            "{report:#}"
        );
    }
}

/// Returns words that start a program without CAP_SYS_PTRACE, and with a `/proc` of these options.
fn with_proc(options: &str) -> [String; 6] {
    let script = format!(
        "mount -t proc{options} none /proc && exec setpriv --bounding-set -sys_ptrace \"$@\""
    );
    ["unshare", "--mount", "sh", "-euc", &script, "sh"].map(str::to_owned)
}

#[test]
fn proc_that_hides_callers_is_reported() {
    if !root() {
        return;
    }
    for (options, fix) in [
        ("", None),
        // Root's group is exempt.
        (" -o hidepid=invisible", None),
        (
            " -o hidepid=invisible,gid=61009",
            Some("SupplementaryGroups=61009"),
        ),
        (" -o hidepid=ptraceable", Some("ProtectProc=default")),
    ] {
        let (folder, upstream) = (folder(), upstream());
        let words = with_proc(options);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let daemon =
            Daemon::start_behind(&words, folder.path(), "", &configuration(&upstream)).ready();
        let cgroup = Cgroup::new("hidden.service");
        let answer = daemon.curl("unix", (61_001, 61_001), &cgroup);
        let expected = fix.map_or("no_identity", |_| "caller_gone");
        assert!(answer.contains(expected), "{options}: {answer}");
        let log = daemon.log();
        let lines: Vec<&str> = log
            .lines()
            .filter(|line| line.contains("callers' processes are hidden"))
            .collect();
        assert_eq!(lines.len(), usize::from(fix.is_some()), "{options}: {log}");
        let config = folder.path().join("awsvid.toml");
        let checked = awsvid(&words, &["check", "--config", config.to_str().unwrap()]);
        let is_reported = checked
            .stdout
            .contains("callers' processes are not visible");
        assert_eq!(is_reported, fix.is_some(), "{options}: {checked:?}");
        if let Some(fix) = fix {
            assert!(lines[0].contains(fix), "{log}");
            assert!(checked.stdout.contains(fix), "{checked:?}");
        }
    }
}

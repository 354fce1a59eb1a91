//! `awsvid credential-process`, with the real daemon and the real AWS CLI.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::harness::counterparts::process::{Output, Process, run};
use crate::harness::counterparts::workload::Workload;
use crate::harness::counterparts::{folder, root, tool};
use crate::harness::daemon::{Daemon, PROGRAM};
use crate::harness::documents::block;
use crate::harness::upstream::{ME, Upstream, my_rule};

const TIMEOUT: Duration = Duration::from_secs(60);

fn fetch(arguments: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command
        .env_clear()
        .args(["credential-process", "--same-user"])
        .args(arguments);
    run(command, b"", TIMEOUT)
}

/// Starts a daemon that serves the user of this test.
fn daemon(folder: &Path) -> (Daemon, Upstream) {
    let upstream = Upstream::start_for_me();
    (
        Daemon::start(folder, "", &(upstream.configuration() + &my_rule())).ready(),
        upstream,
    )
}

#[test]
fn output_is_accepted_by_cli() {
    let folder = folder();
    let (daemon, upstream) = daemon(folder.path());
    let socket = daemon.unix().display().to_string();
    let printed = fetch(&["--socket", &socket, "--role", "dev"]);
    assert_eq!(printed.stderr, "");
    let printed: Value = serde_json::from_str(&printed.success("credential-process")).unwrap();
    let keys: Vec<&str> = printed
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(
        keys,
        [
            "AccessKeyId",
            "Expiration",
            "SecretAccessKey",
            "SessionToken",
            "Version"
        ]
    );
    let status = daemon.status(ME);
    assert_eq!(
        (&printed["Version"], &printed["AccessKeyId"]),
        (&Value::from(1), &status["access_key_id"])
    );
    assert_eq!(printed["Expiration"], status["expiration"]);

    // The socket is the configuration's, even if other tables have errors, but not if `[listen]`
    // itself has one.
    let path = folder.path().join("other.toml");
    let recorded = |text: &str| {
        fs::write(&path, text).unwrap();
        fetch(&["--config", path.to_str().unwrap()])
    };
    let text = format!(
        "[listen]\nunix = \"{socket}\"\n[[role]]\nuser = \"nobody-of-that-name\"\n[[workload]]\n"
    );
    assert_eq!(recorded(&text).status.code(), Some(0));
    let rejected = recorded(&text.replace("unix", "unx"));
    assert_eq!(
        (rejected.status.code(), rejected.stdout.as_str()),
        (Some(1), "")
    );
    assert!(rejected.stderr.contains("other.toml:2:"), "{rejected:?}");

    let Some(aws) = tool("aws") else { return };
    fs::create_dir(folder.path().join(".aws")).unwrap();
    let profile = block("cli.md", "`awsvid credential-process`", "[profile billing]");
    let same = block(
        "migrate.md",
        "From the Roles Anywhere helper",
        "[profile billing]",
    );
    assert_eq!(same, profile);
    let options = format!(
        "{PROGRAM} credential-process --same-user --config {} --role dev",
        folder.path().join("awsvid.toml").display()
    );
    let profile = profile.replace(
        "/usr/bin/awsvid credential-process --role billing",
        &options,
    );
    assert!(profile.contains(&options), "{profile}");
    fs::write(folder.path().join(".aws/config"), profile).unwrap();
    let mut command = Command::new(aws);
    command
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("HOME", folder.path())
        .env("AWS_PROFILE", "billing");
    command.env("AWS_DEFAULT_REGION", "us-east-1").args([
        "--endpoint-url",
        upstream.sts(),
        "--output",
        "text",
    ]);
    command.args(["sts", "get-caller-identity", "--query", "Arn"]);
    let arn = run(command, b"", TIMEOUT).success("aws sts get-caller-identity");
    assert_eq!(
        arn.trim(),
        "arn:aws:sts::123456789012:assumed-role/dev/example.org=user=me"
    );
}

#[test]
fn rejection_prints_only_the_fix() {
    let folder = folder();
    let (mut daemon, _upstream) = daemon(folder.path());
    let socket = daemon.unix().display().to_string();
    let rejected = fetch(&["--socket", &socket, "--role", "other"]);
    assert_eq!(
        (rejected.status.code(), rejected.stdout.as_str()),
        (Some(1), "")
    );
    assert!(
        rejected.stderr.starts_with("awsvid credential-process: "),
        "{rejected:?}"
    );
    assert!(
        rejected.stderr.to_lowercase().contains("role"),
        "{rejected:?}"
    );
    if root() {
        // Other users may be unable to enter the build folder.
        let program = folder.path().join("awsvid");
        fs::copy(PROGRAM, &program).unwrap();
        let no_identity =
            Workload::new(1777).run(&program, &["credential-process", "--socket", &socket]);
        assert_eq!(
            (no_identity.status.code(), no_identity.stdout.as_str()),
            (Some(1), "")
        );
        assert!(
            no_identity
                .stderr
                .contains("uid 1777; add a [[workload]] rule for it. (")
                && no_identity.stderr.contains("`exe` never match"),
            "{no_identity:?}"
        );
    }
    daemon.process().signal(Signal::SIGTERM);
    daemon.process().owned().wait(TIMEOUT).expect("it ends");
    let missing_socket = fetch(&["--socket", &socket]);
    assert_eq!(
        (missing_socket.status.code(), missing_socket.stdout.as_str()),
        (Some(1), "")
    );
    assert!(
        missing_socket.stderr.contains("systemctl"),
        "{missing_socket:?}"
    );
}

/// T12: a server of another user at the socket's path would return credentials of its own account.
#[test]
fn socket_of_other_user_gets_no_request() {
    if !root() {
        return;
    }
    let folder = folder();
    let theirs = folder.path().join("theirs");
    fs::create_dir(&theirs).unwrap();
    chown(&theirs, Some(1777), Some(1777)).unwrap();
    let socket = theirs.join("awsvid.sock");
    let server = "import socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.bind(sys.argv[1])\ns.listen()\n\
        print('listening', flush=True)\nwhile True:\n    print('received', s.accept()[0].recv(9), flush=True)\n";
    let mut command = Workload::new(1777).command("/usr/bin/python3");
    command
        .args(["-c", server, socket.to_str().unwrap()])
        .current_dir("/");
    let process = Process::start("a false server", command, &folder.path().join("log"));
    process.await_some("it listens", TIMEOUT, || {
        process.log().contains("listening").then_some(())
    });
    let rejected = |path: &Path, why: &str| {
        let output = fetch(&["--socket", path.to_str().unwrap()]);
        assert_eq!(
            (output.status.code(), output.stdout.as_str()),
            (Some(1), "")
        );
        assert!(
            output.stderr.contains(why) && output.stderr.contains("not trusted"),
            "{why}: {output:?}"
        );
    };
    rejected(&socket, "the directory belongs to uid 1777");
    // As if root had been made to move it, step by step.
    let directory = folder.path().join("roots");
    fs::create_dir(&directory).unwrap();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
    let moved = directory.join("awsvid.sock");
    fs::rename(&socket, &moved).unwrap();
    rejected(&moved, "the socket belongs to uid 1777");
    chown(&moved, Some(0), Some(0)).unwrap();
    rejected(&moved, "its listener runs as uid 1777");
    // A connection reveals nothing; the requested role would.
    assert!(!process.log().contains("received b'G"), "{}", process.log());
}

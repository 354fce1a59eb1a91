//! `awsvid exec -- CMD`, with the real daemon.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::harness::counterparts::process::{Output, Process, run};
use crate::harness::counterparts::{folder, tool};
use crate::harness::daemon::{Daemon, PROGRAM};
use crate::harness::upstream::{Upstream, my_rule};

mod profiles;

const TIMEOUT: Duration = Duration::from_secs(60);

/// Returns `awsvid exec` with an empty environment.
fn exec(arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .arg("exec")
        .args(arguments);
    command
}

fn output(command: Command) -> Output {
    run(command, b"", TIMEOUT)
}

/// Starts a daemon that serves the user of this test.
fn daemon(folder: &Path, listen: &str) -> (Daemon, Upstream) {
    let upstream = Upstream::start_for_me();
    (
        Daemon::start(folder, listen, &(upstream.configuration() + &my_rule())).ready(),
        upstream,
    )
}

#[test]
fn command_gets_credentials_despite_other_settings() {
    let Some(aws) = tool("aws") else { return };
    let folder = folder();
    // The token is required, not just any value.
    let (daemon, upstream) = daemon(folder.path(), "authorization = \"token\"");
    fs::create_dir(folder.path().join(".aws")).unwrap();
    let profile = "[default]\naws_access_key_id = AKIAEXAMPLE\naws_secret_access_key = s3cret\n";
    fs::write(folder.path().join(".aws/credentials"), profile).unwrap();
    let (token, url) = (
        folder.path().join("token"),
        format!("http://{}", daemon.tcp()),
    );
    let options = [
        "--url",
        &url,
        "--token-file",
        token.to_str().unwrap(),
        "--role",
        "dev",
        "--",
    ];
    let aws = [
        aws.to_str().unwrap(),
        "--endpoint-url",
        upstream.sts(),
        "--output",
        "text",
    ];
    let mut command = exec(
        &[
            &options[..],
            &aws,
            &["sts", "get-caller-identity", "--query", "Arn"],
        ]
        .concat(),
    );
    command.env("HOME", folder.path()).envs([
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE"),
        ("AWS_SECRET_ACCESS_KEY", "s3cret"),
        ("AWS_PROFILE", "other"),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/nonexistent"),
        ("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/other"),
        ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/other"),
        ("AWS_CONTAINER_AUTHORIZATION_TOKEN", "other"),
        ("http_proxy", "http://127.0.0.1:1"),
    ]);
    let output = output(command);
    assert!(
        output.stderr.contains("AWS_PROFILE") && output.stderr.contains(".aws/credentials"),
        "{output:?}"
    );
    assert!(
        !output.stderr.contains("s3cret") && !output.stderr.contains("AKIA"),
        "{output:?}"
    );
    let arn = output.success("aws sts get-caller-identity");
    assert_eq!(
        arn.trim(),
        "arn:aws:sts::123456789012:assumed-role/dev/example.org=user=me"
    );
}

#[test]
fn exec_finds_daemon_by_configuration() {
    let folder = folder();
    let config = folder.path().join("awsvid.toml");
    let configuration = "[listen]\ntcp = [\"[::1]:974\", \"127.0.0.1:975\"]\nadmin = \"\"\ntoken_file = \"/nonexistent/token\"\n\
        [identity]\nworkload_api_socket = \"unix:///nonexistent/agent.sock\"\n[sts]\nregion = \"eu-central-1\"\n\
        [[workload]]\nspiffe_id = \"spiffe://example.org/a\"\nuid = 54321\n\
        [[role]]\nname = \"a\"\nspiffe_id = \"spiffe://example.org/a\"\nrole_arn = \"arn:aws:iam::123456789012:role/a\"\n";
    fs::write(&config, configuration).unwrap();
    let config = config.to_str().unwrap();
    let environment = output(exec(&["--config", config, "--", "env"])).success("env");
    for line in [
        "AWS_CONTAINER_CREDENTIALS_FULL_URI=http://127.0.0.1:975/v1/credentials",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN=any",
        "AWS_EC2_METADATA_DISABLED=true",
        "AWS_REGION=eu-central-1",
        "AWS_DEFAULT_REGION=eu-central-1",
    ] {
        assert!(
            environment.lines().any(|found| found == line),
            "{line} in:\n{environment}"
        );
    }
    // An error in another table is for the operator, not for the user of a command.
    let wrong = configuration
        .replace("uid = 54321", "user = \"nobody-of-that-name\"")
        .replace("role_arn", "arn");
    fs::write(config, wrong.replace("eu-central-1", "nowhere!")).unwrap();
    let environment = output(exec(&["--config", config, "--", "env"])).success("env");
    assert!(
        environment.contains("FULL_URI=http://127.0.0.1:975/") && !environment.contains("nowhere"),
        "{environment}"
    );
    fs::write(config, "[listen]\ntpc = []\n").unwrap();
    let rejected = output(exec(&["--config", config, "--", "env"]));
    assert_eq!(
        (rejected.status.code(), rejected.stdout.as_str()),
        (Some(125), "")
    );
    assert!(rejected.stderr.contains("awsvid.toml:2:"), "{rejected:?}");
}

const URL: [&str; 3] = ["--url", "http://127.0.0.1:974", "--"];

#[test]
fn exec_replaces_itself_with_the_command() {
    let table = [
        ("exit 0", Some(0)),
        ("exit 7", Some(7)),
        ("kill -TERM $$", None),
        ("kill -KILL $$", None),
    ];
    for (script, status) in table {
        // By a signal if that ended the command: no process in between could report it differently.
        assert_eq!(
            output(exec(&[&URL[..], &["sh", "-c", script]].concat()))
                .status
                .code(),
            status,
            "{script}"
        );
    }
    let missing = output(exec(&[&URL[..], &["/nonexistent/command"]].concat()));
    assert_eq!(missing.status.code(), Some(127));
    assert!(
        missing
            .stderr
            .contains("/nonexistent/command: No such file"),
        "{missing:?}"
    );
    assert_eq!(
        output(exec(&[&URL[..], &["/dev/null"]].concat()))
            .status
            .code(),
        Some(126)
    );

    let folder = folder();
    let script = "trap 'exit 3' TERM; echo \"pid=$$\"; while :; do sleep 0.01; done";
    let command = exec(&[&URL[..], &["sh", "-c", script]].concat());
    let mut process = Process::start("awsvid exec", command, &folder.path().join("log"));
    let pid = format!("pid={}\n", process.id());
    process.await_some("the command runs as the same process", TIMEOUT, || {
        process.log().contains(&pid).then_some(())
    });
    process.signal(Signal::SIGTERM);
    assert_eq!(
        process.owned().wait(TIMEOUT).expect("it ends").code(),
        Some(3)
    );
}

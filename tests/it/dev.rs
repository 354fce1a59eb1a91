//! `awsvid dev` as a newcomer runs it: the real command, and the real AWS CLI.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::geteuid;

use crate::harness::counterparts::process::{Output, Process, run};
use crate::harness::counterparts::workload::Workload;
use crate::harness::counterparts::{folder, root, tool};
use crate::harness::documents::block;

const TIMEOUT: Duration = Duration::from_secs(60);

fn dev(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_awsvid"));
    command.arg("dev").args(arguments);
    command
}

fn output(command: Command) -> Output {
    run(command, b"", TIMEOUT)
}

/// The name that `dev` gives this process's own user.
fn own_name() -> String {
    let user = nix::unistd::User::from_uid(geteuid()).unwrap();
    user.map_or_else(|| format!("uid-{}", geteuid()), |user| user.name)
}

fn arn(name: &str) -> String {
    format!("arn:aws:sts::000000000000:assumed-role/dev/dev.local=user={name}")
}

#[test]
fn dev_gives_cli_its_role_despite_other_settings() {
    let Some(aws) = tool("aws") else { return };
    let home = folder();
    fs::create_dir(home.path().join(".aws")).unwrap();
    let profile = "[default]\naws_access_key_id = AKIAEXAMPLE\naws_secret_access_key = example\nregion = eu-west-1\n";
    fs::write(home.path().join(".aws/credentials"), profile).unwrap();
    let query = [
        "sts",
        "get-caller-identity",
        "--query",
        "Arn",
        "--output",
        "text",
    ];
    // The example of cli.md.
    let example = block("cli.md", "`awsvid dev`", "awsvid dev -- aws");
    assert_eq!(example.trim(), "awsvid dev -- aws sts get-caller-identity");
    let mut command = dev(&["--", aws.to_str().unwrap()]);
    command.args(query).env("HOME", home.path());
    command.envs([
        ("AWS_PROFILE", "other"),
        ("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE"),
        ("AWS_SECRET_ACCESS_KEY", "example"),
    ]);
    // A proxy that is not there: nothing on loopback may go to it.
    command.envs([
        ("http_proxy", "http://127.0.0.1:1"),
        ("HTTP_PROXY", "http://127.0.0.1:1"),
    ]);
    assert_eq!(
        output(command)
            .success("aws sts get-caller-identity")
            .trim(),
        arn(&own_name())
    );
}

#[test]
fn dev_gives_cli_the_role_of_a_certificate() {
    let Some(aws) = tool("aws") else { return };
    let home = folder();
    let script = "AWS_CONTAINER_CREDENTIALS_FULL_URI=$AWS_CONTAINER_CREDENTIALS_FULL_URI/dev-certificate \
                  exec \"$0\" sts get-caller-identity --query Arn --output text";
    let mut command = dev(&["--", "sh", "-euc", script, aws.to_str().unwrap()]);
    command.env("HOME", home.path());
    let of_token = arn(&own_name());
    assert_eq!(
        output(command)
            .success("aws sts get-caller-identity")
            .trim(),
        of_token.replace("role/dev/", "role/dev-certificate/")
    );
}

/// Runs the README's first command as it is, except the build. Its output has to be that of the
/// README, for the user of this test.
#[test]
fn dev_prints_the_output_of_the_readme() {
    let command = block("README.md", "Try it", "cargo run --release");
    let shown = block("README.md", "Try it", "{");
    let arguments = command
        .strip_prefix("cargo run --release -- ")
        .expect("a run of the default program");
    assert_eq!(command.lines().count(), 1);
    let Some(aws) = tool("aws") else { return };
    let home = folder();
    let mut shell = Command::new("sh");
    shell.args([
        "-euc",
        &format!("exec \"$0\" {arguments}"),
        env!("CARGO_BIN_EXE_awsvid"),
    ]);
    let path = [aws.parent().unwrap().to_str().unwrap(), "/usr/bin", "/bin"].join(":");
    shell.env("PATH", path).env("HOME", home.path());
    let printed = output(shell).success(&command);
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).expect("JSON");
    let (printed, shown) = (
        json(&printed),
        json(&shown.replace("user=<you>", &format!("user={}", own_name()))),
    );
    assert_eq!(
        (&printed["Account"], &printed["Arn"]),
        (&shown["Account"], &shown["Arn"])
    );
    // The part before the colon is random.
    let name = |value: &serde_json::Value| {
        value["UserId"]
            .as_str()
            .unwrap()
            .split_once(':')
            .unwrap()
            .1
            .to_owned()
    };
    assert_eq!(name(&printed), name(&shown));
}

#[test]
fn dev_runs_without_privileges() {
    if !root() {
        return;
    }
    let Some(aws) = tool("aws") else { return };
    // Other users may be unable to enter the folder that this was built in.
    let folder = folder();
    let program = folder.path().join("awsvid");
    fs::copy(env!("CARGO_BIN_EXE_awsvid"), &program).unwrap();
    let aws = aws.to_str().unwrap();
    let query = [
        "dev",
        "--",
        aws,
        "sts",
        "get-caller-identity",
        "--query",
        "Arn",
        "--output",
        "text",
    ];
    let workload = Workload::new(1777);
    assert_eq!(
        workload
            .run(&program, &query)
            .success("aws sts get-caller-identity")
            .trim(),
        arn("uid-1777")
    );

    let environment = workload
        .run(&program, &["dev", "--", "/usr/bin/env"])
        .success("env");
    let variable = |name: &str| {
        let mut lines = environment.lines().filter_map(|line| line.split_once('='));
        lines
            .find(|(found, _)| *found == name)
            .map(|(_, value)| value)
            .unwrap_or_else(|| panic!("{name}"))
    };
    let uri = variable("AWS_CONTAINER_CREDENTIALS_FULL_URI")
        .strip_prefix("http://127.0.0.1:")
        .unwrap();
    let port: u16 = uri
        .strip_suffix("/v1/credentials")
        .unwrap()
        .parse()
        .unwrap();
    assert!(port >= 1024, "{port}");
    let token_file = Path::new(variable("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"));
    assert!(
        !token_file.parent().unwrap().exists(),
        "{} is left behind",
        token_file.display()
    );
}

#[test]
fn dev_exits_with_status_of_its_command() {
    let table = [
        ("exit 0", 0),
        ("exit 7", 7),
        ("kill -TERM $$", 143),
        ("kill -KILL $$", 137),
    ];
    for (script, status) in table {
        assert_eq!(
            output(dev(&["--", "sh", "-c", script])).status.code(),
            Some(status),
            "{script}"
        );
    }
    let missing = output(dev(&["--", "/nonexistent/command"]));
    assert_eq!(missing.status.code(), Some(127));
    assert!(
        missing
            .stderr
            .contains("/nonexistent/command: No such file"),
        "{missing:?}"
    );
    assert_eq!(output(dev(&["--", "/dev/null"])).status.code(), Some(126));
}

#[test]
fn dev_reports_signal_that_ended_its_command() {
    let folder = folder();
    let script = "trap 'exit 3' TERM; trap 'exit 4' HUP; trap 'exit 5' INT; echo up; while :; do sleep 0.01; done";
    for (signal, status) in [
        (Signal::SIGTERM, 3),
        (Signal::SIGHUP, 4),
        (Signal::SIGINT, 5),
    ] {
        let log = folder.path().join(signal.as_str());
        let mut process = Process::start("awsvid dev", dev(&["--", "sh", "-c", script]), &log);
        process.await_some("the command runs", TIMEOUT, || {
            process.log().contains("up").then_some(())
        });
        process.signal(signal);
        let ended = process.owned().wait(TIMEOUT).expect("it ends");
        assert_eq!(ended.code(), Some(status), "{signal}");
    }
}

#[test]
fn dev_prints_variables_without_a_command() {
    let Some(aws) = tool("aws") else { return };
    let folder = folder();
    let mut process = Process::start("awsvid dev", dev(&[]), &folder.path().join("log"));
    let lines: Vec<String> = process.await_some("its announcement", TIMEOUT, || {
        let log = process.log();
        let lines = log
            .lines()
            .filter(|line| line.starts_with("export ") || line.starts_with("unset "));
        log.contains("Ctrl-C")
            .then(|| lines.map(str::to_owned).collect())
    });
    let mut other_terminal = Command::new("sh");
    let script = format!(
        "{}\nexec \"$0\" sts get-caller-identity --query Arn --output text",
        lines.join("\n")
    );
    other_terminal.arg("-uec").arg(script).arg(aws);
    assert_eq!(
        output(other_terminal)
            .success("aws in another terminal")
            .trim(),
        arn(&own_name())
    );

    let token_file = lines
        .iter()
        .find_map(|line| line.strip_prefix("export AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE="));
    let directory = PathBuf::from(token_file.unwrap())
        .parent()
        .unwrap()
        .to_owned();
    assert!(directory.exists());
    if root() {
        let socket = directory.join("awsvid.sock");
        let curl = [
            "-sS",
            "--unix-socket",
            socket.to_str().unwrap(),
            "http://localhost/v1/credentials",
        ];
        let rejected = Workload::new(1777)
            .run("/usr/bin/curl", &curl)
            .success("curl");
        assert!(rejected.contains("\"code\":\"no_identity\""), "{rejected}");
        // Other users cannot enter the directory of the API that signs for all users.
        let api = directory.join("workload-api");
        let mut ls = Command::new("/bin/ls");
        ls.arg(&api).uid(1777).gid(1777);
        assert!(
            !output(ls).status.success(),
            "{} can be entered",
            api.display()
        );
    }
    process.signal(Signal::SIGINT);
    let ended = process.owned().wait(TIMEOUT).expect("it ends");
    assert_eq!(ended.code(), Some(0));
    assert!(
        !directory.exists(),
        "{} is left behind",
        directory.display()
    );
}

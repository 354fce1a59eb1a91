//! The first of the README's two commands, as a newcomer runs it.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::harness::counterparts::process::{Output, Process, run};
use crate::harness::counterparts::workload::Workload;
use crate::harness::counterparts::{folder, root, tool};

/// The CLI starts in half a second, on a busy machine in several.
const PATIENCE: Duration = Duration::from_secs(60);

/// `awsvid dev` with an environment that has nothing of AWS in it, and an empty HOME.
fn dev(home: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_awsvid"));
    command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", home).arg("dev").args(arguments);
    command
}

fn played(arguments: &[&str]) -> Output {
    let home = folder();
    run(dev(home.path(), arguments), b"", PATIENCE)
}

#[test]
fn one_command_shows_the_assumed_role() {
    let Some(aws) = tool("aws") else { return };
    let output = played(&["--", aws.to_str().unwrap(), "sts", "get-caller-identity"]);
    let identity: Value = serde_json::from_str(&output.success("dev -- aws sts get-caller-identity")).unwrap();
    let arn = identity["Arn"].as_str().unwrap();
    assert!(arn.starts_with("arn:aws:sts::000000000000:assumed-role/dev/dev.local=user="), "{arn}");
    assert_eq!(identity["Account"], "000000000000");
}

#[test]
fn the_command_decides_the_exit_status() {
    assert_eq!(played(&["--", "sh", "-c", "exit 7"]).status.code(), Some(7));
    assert_eq!(played(&["--", "sh", "-c", "kill -TERM $$"]).status.code(), Some(128 + 15));
    assert_eq!(played(&["--", "/nonexistent/command"]).status.code(), Some(127));
}

#[test]
fn its_lines_work_in_another_terminal() {
    let Some(aws) = tool("aws") else { return };
    let folder = folder();
    let log = folder.path().join("dev.log");
    let process = Process::start("awsvid dev", dev(folder.path(), &[]), &log);
    let lines = process.await_some("the lines for another terminal", PATIENCE, || {
        let text = process.log();
        text.contains("Ctrl-C")
            .then(|| text.lines().filter(|line| line.starts_with("export ")).collect::<Vec<_>>().join("\n"))
    });
    let script = format!("{lines}\nexec {} sts get-caller-identity", aws.display());
    let mut shell = Command::new("sh");
    shell.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", folder.path()).args(["-c", &script]);
    let own = run(shell, b"", PATIENCE).success("aws in another terminal");
    assert!(own.contains(":assumed-role/dev/dev.local=user="), "{own}");
    if root() {
        // Somebody whom `dev` does not serve.
        let output = Workload::new(54321).run("/bin/sh", &["-c", &script]);
        assert!(!output.status.success() && output.stderr.contains("No identity is configured"), "{output:?}");
    }
}

//! `awsvid config`.

use std::fs;
use std::process::Command;
use std::time::Duration;

use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::{Output, run};
use crate::harness::daemon::PROGRAM;

const GOOD: &str = "\
[sts]
region = \"eu-central-1\"
[[workload]]
spiffe_id = \"spiffe://example.org/a\"
uid = 54321
[[role]]
name = \"a\"
spiffe_id = \"spiffe://example.org/a\"
role_arn = \"arn:aws:iam::123456789012:role/a\"
";

fn config(arguments: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command.env_clear().arg("config").args(arguments);
    run(command, b"", Duration::from_secs(20))
}

#[test]
fn check_reports_all_mistakes_and_warnings() {
    let folder = folder();
    let path = folder.path().join("a.toml");
    let name = path.to_str().unwrap();
    fs::write(&path, GOOD).unwrap();
    let good = config(&["--check", name]);
    assert_eq!((good.status.code(), good.stderr.as_str()), (Some(0), ""));
    fs::write(&path, format!("{GOOD}duration = \"15m\"\n")).unwrap();
    let unwise = config(&["--check", name]);
    assert_eq!(unwise.status.code(), Some(0));
    assert!(unwise.stderr.contains("a.toml:10: warning: role.duration"), "{unwise:?}");
    fs::write(&path, GOOD.replace("uid", "iud").replace("eu-central-1", "middle")).unwrap();
    let wrong = config(&["--check", name]);
    assert_eq!((wrong.status.code(), wrong.stdout.as_str()), (Some(78), ""));
    assert!(wrong.stderr.contains("a.toml:2: ") && wrong.stderr.contains("a.toml:5: "), "{wrong:?}");
    assert_eq!(config(&["--check", "/nonexistent.toml"]).status.code(), Some(78));
    let mut elsewhere = Command::new(PROGRAM);
    elsewhere.env_clear().env("AWSVID_CONFIG", "/nonexistent.toml").args(["config", "--check", name]);
    let elsewhere = run(elsewhere, b"", Duration::from_secs(20));
    assert!(elsewhere.stderr.contains("a.toml:2: "), "the file that is named counts: {elsewhere:?}");
    assert_eq!(config(&[]).status.code(), Some(2), "one of the two has to be said");
}

#[test]
fn what_explain_prints_is_a_configuration() {
    let folder = folder();
    let path = folder.path().join("a.toml");
    fs::write(&path, GOOD).unwrap();
    let explained = config(&["--explain", "--config", path.to_str().unwrap()]).success("config --explain");
    assert!(
        explained.lines().any(|line| line.starts_with("timeout = \"5s\"") && line.ends_with("# default")),
        "{explained}"
    );
    fs::write(&path, &explained).unwrap();
    assert_eq!(config(&["--check", path.to_str().unwrap()]).status.code(), Some(0));
    let again = config(&["--explain", "--config", path.to_str().unwrap()]).success("config --explain");
    assert!(!again.contains("# default\n"), "{again}");
}

//! `awsvid config`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use nix::unistd::geteuid;

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
    let good = config(&["validate", name]);
    assert_eq!((good.status.code(), good.stderr.as_str()), (Some(0), ""));
    fs::write(&path, format!("{GOOD}duration = \"15m\"\n")).unwrap();
    let unwise = config(&["validate", name]);
    assert_eq!(unwise.status.code(), Some(0));
    assert!(
        unwise.stderr.contains("a.toml:10: warning: role.duration"),
        "{unwise:?}"
    );
    fs::write(
        &path,
        GOOD.replace("uid", "iud").replace("eu-central-1", "middle"),
    )
    .unwrap();
    let wrong = config(&["validate", name]);
    assert_eq!((wrong.status.code(), wrong.stdout.as_str()), (Some(78), ""));
    assert!(
        wrong.stderr.contains("a.toml:2: ") && wrong.stderr.contains("a.toml:5: "),
        "{wrong:?}"
    );
    assert_eq!(
        config(&["validate", "/nonexistent.toml"]).status.code(),
        Some(78)
    );
    let mut elsewhere = Command::new(PROGRAM);
    elsewhere
        .env_clear()
        .env("AWSVID_CONFIG", "/nonexistent.toml")
        .args(["config", "validate", name]);
    let elsewhere = run(elsewhere, b"", Duration::from_secs(20));
    assert!(
        elsewhere.stderr.contains("a.toml:2: "),
        "the file that is named counts: {elsewhere:?}"
    );
    assert_eq!(
        config(&[]).status.code(),
        Some(2),
        "one of the two has to be said"
    );
}

/// `awsvid config` with this on its standard input.
fn piped(arguments: &[&str], text: &str) -> Output {
    let mut command = Command::new(PROGRAM);
    command.env_clear().arg("config").args(arguments);
    run(command, text.as_bytes(), Duration::from_secs(20))
}

#[test]
fn standard_input_is_read_as_a_file_is() {
    let wrong = GOOD.replace("uid", "iud").replace("eu-central-1", "middle");
    let by_pipe = piped(&["validate", "-"], &wrong);
    assert_eq!(
        (by_pipe.status.code(), by_pipe.stdout.as_str()),
        (Some(78), "")
    );
    let folder = folder();
    let path = folder.path().join("a.toml");
    fs::write(&path, &wrong).unwrap();
    let by_path = config(&["validate", path.to_str().unwrap()]);
    assert_eq!(
        by_pipe.stderr,
        by_path.stderr.replace(path.to_str().unwrap(), "-")
    );
    assert!(
        by_pipe.stderr.contains("-:2: ") && by_pipe.stderr.contains("-:5: "),
        "{by_pipe:?}"
    );
    let good = piped(&["validate", "-"], GOOD);
    assert_eq!(
        (
            good.status.code(),
            good.stdout.as_str(),
            good.stderr.as_str()
        ),
        (Some(0), "-: no mistakes\n", "")
    );
    assert_eq!(piped(&["validate", "-"], "").status.code(), Some(78));
}

#[test]
fn offline_nothing_of_this_machine_counts() {
    let folder = folder();
    let path = folder.path().join("a.toml");
    let name = path.to_str().unwrap();
    let elsewhere = GOOD.replace(
        "uid = 54321",
        "user = \"of-another-node\"\nexe = \"/opt/of-another-node\"",
    );
    let elsewhere = format!("{elsewhere}[audit]\nfile = \"/of-another-node/audit.log\"\n");
    fs::write(&path, &elsewhere).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    for offline in [
        config(&["validate", name, "--offline"]),
        piped(&["validate", "-", "--offline"], &elsewhere),
    ] {
        assert_eq!(
            (offline.status.code(), offline.stderr.as_str()),
            (Some(0), ""),
            "{offline:?}"
        );
    }
    let here = piped(&["validate", "-"], &elsewhere);
    assert_eq!(here.status.code(), Some(0));
    for words in [
        "-:5: warning: workload.user: there is no user \"of-another-node\"",
        "-:3: warning: workload.exe: /opt/of-another-node is not there",
        "-: warning: audit.file: there is no directory /of-another-node",
    ] {
        assert!(here.stderr.contains(words), "{words} in {here:?}");
    }
    // What is wrong with the text counts everywhere.
    fs::write(&path, format!("{elsewhere}nonsense = 1\n")).unwrap();
    let wrong = config(&["validate", name, "--offline"]);
    assert_eq!(wrong.status.code(), Some(78));
    assert!(
        wrong
            .stderr
            .contains("a.toml:13: audit.nonsense: awsvid 0."),
        "{wrong:?}"
    );
    assert_eq!(config(&["show", "--offline"]).status.code(), Some(2));
}

#[test]
fn a_file_that_others_can_change_is_a_mistake_for_root_and_a_warning_for_others() {
    let folder = folder();
    let path = folder.path().join("a.toml");
    fs::write(&path, GOOD).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    let words = "every user of this node can write the configuration; chmod o-w";
    let own = config(&["validate", path.to_str().unwrap()]);
    let status = if geteuid().is_root() {
        Some(78)
    } else {
        Some(0)
    };
    assert!(
        own.status.code() == status && own.stderr.contains(words),
        "{own:?}"
    );
    if !geteuid().is_root() {
        return;
    }
    let mut command = Command::new("setpriv");
    command
        .args([
            "--reuid",
            "51001",
            "--clear-groups",
            PROGRAM,
            "config",
            "validate",
        ])
        .arg(&path)
        .env_clear();
    let other = run(command, b"", Duration::from_secs(20));
    assert!(
        other.status.success() && other.stderr.contains(&format!("a.toml: warning: {words}")),
        "{other:?}"
    );
}

#[test]
fn what_explain_prints_is_a_configuration() {
    let folder = folder();
    let path = folder.path().join("a.toml");
    fs::write(&path, GOOD).unwrap();
    let explained = config(&["show", "--config", path.to_str().unwrap()]).success("config show");
    assert!(
        explained
            .lines()
            .any(|line| line.starts_with("timeout = \"5s\"") && line.ends_with("# default")),
        "{explained}"
    );
    fs::write(&path, &explained).unwrap();
    assert_eq!(
        config(&["validate", path.to_str().unwrap()]).status.code(),
        Some(0)
    );
    let again = config(&["show", "--config", path.to_str().unwrap()]).success("config show");
    assert!(!again.contains("# default\n"), "{again}");
}

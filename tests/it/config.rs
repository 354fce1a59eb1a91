//! Tests of the command `awsvid config`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use nix::unistd::geteuid;

use crate::harness::counterparts::process::{Output, run};
use crate::harness::counterparts::{folder, root};
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

/// Runs `awsvid config` with an agent that needs no socket.
fn config(arguments: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command
        .env_clear()
        .env("SPIFFE_ENDPOINT_SOCKET", "tcp://127.0.0.1:1")
        .arg("config")
        .args(arguments);
    run(command, b"", Duration::from_secs(20))
}

#[test]
fn validate_reports_all_errors_and_warnings() {
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
    let mut other_config = Command::new(PROGRAM);
    other_config
        .env_clear()
        .env("AWSVID_CONFIG", "/nonexistent.toml")
        .args(["config", "validate", name]);
    let other_config = run(other_config, b"", Duration::from_secs(20));
    assert!(
        other_config.stderr.contains("a.toml:2: "),
        "the file that is named counts: {other_config:?}"
    );
    assert_eq!(
        config(&[]).status.code(),
        Some(2),
        "one of the two has to be set"
    );
}

/// Runs `awsvid config` with this on its standard input, and the same agent.
fn piped(arguments: &[&str], text: &str) -> Output {
    let mut command = Command::new(PROGRAM);
    command
        .env_clear()
        .env("SPIFFE_ENDPOINT_SOCKET", "tcp://127.0.0.1:1")
        .arg("config")
        .args(arguments);
    run(command, text.as_bytes(), Duration::from_secs(20))
}

#[test]
fn standard_input_is_read_like_a_file() {
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
fn offline_validation_ignores_this_machine() {
    let folder = folder();
    let path = folder.path().join("a.toml");
    let name = path.to_str().unwrap();
    let other_config = GOOD.replace(
        "uid = 54321",
        "user = \"of-another-node\"\nexe = \"/opt/of-another-node\"",
    );
    let other_config = format!("{other_config}[audit]\nfile = \"/of-another-node/audit.log\"\n");
    fs::write(&path, &other_config).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    for offline in [
        config(&["validate", name, "--offline"]),
        piped(&["validate", "-", "--offline"], &other_config),
    ] {
        assert_eq!(
            (offline.status.code(), offline.stderr.as_str()),
            (Some(0), ""),
            "{offline:?}"
        );
    }
    let socket = folder.path().join("of-another-node.sock");
    let missing = format!(
        "{} does not exist; start the SPIFFE agent",
        socket.display()
    );
    let other_config = format!(
        "{other_config}[identity]\nworkload_api_socket = \"unix://{}\"\n",
        socket.display()
    );
    let here = piped(&["validate", "-"], &other_config);
    assert_eq!(here.status.code(), Some(0));
    for words in [
        missing.as_str(),
        "-:5: warning: workload.user: the user \"of-another-node\" does not exist on this node",
        "-:3: warning: workload.exe: /opt/of-another-node does not exist",
        "-: warning: audit.file: the directory /of-another-node does not exist",
    ] {
        assert!(here.stderr.contains(words), "{words} in {here:?}");
    }
    // An error in the text counts on every machine.
    fs::write(
        &path,
        other_config.replace("[identity]", "nonsense = 1\n[identity]"),
    )
    .unwrap();
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
fn exposed_file_is_error_for_root_and_warning_for_other_users() {
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
    if !root() {
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
fn show_output_is_valid_configuration() {
    let folder = folder();
    let path = folder.path().join("a.toml");
    fs::write(&path, GOOD).unwrap();
    let shown = config(&["show", "--config", path.to_str().unwrap()]).success("config show");
    assert!(
        shown
            .lines()
            .any(|line| line.starts_with("timeout = \"5s\"") && line.ends_with("# default")),
        "{shown}"
    );
    fs::write(&path, &shown).unwrap();
    assert_eq!(
        config(&["validate", path.to_str().unwrap()]).status.code(),
        Some(0)
    );
    let again = config(&["show", "--config", path.to_str().unwrap()]).success("config show");
    assert!(!again.contains("# default\n"), "{again}");
}

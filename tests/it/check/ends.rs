//! Ends and outputs of `check`: steps that could not be checked, servers that hang, terminals.

use std::net::TcpListener;

use super::*;
use crate::harness::terminal::on_a_terminal_until;

/// Listens, and ignores each connection.
fn silent_listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    (listener, url)
}

fn findings(report: &Value, verdict: &str) -> Vec<String> {
    let all = report["findings"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|finding| finding["verdict"] == verdict);
    all.map(|finding| {
        format!(
            "{}: {}",
            finding["step"].as_str().unwrap(),
            finding["saw"].as_str().unwrap()
        )
    })
    .collect()
}

/// A step that could not be checked is neither a pass nor a failure.
#[test]
fn unchecked_steps_have_own_exit_status() {
    if !root() {
        return;
    }
    let folder = folder();
    let upstream = Upstream::start(&[(0, "reader")]);
    let text = configuration(
        &upstream.socket(),
        UNREACHABLE,
        "arn:aws:iam::123456789012:role/app",
        "shop",
    );
    let (text, _) = text.split_once("[[role]]").unwrap();
    let text = text.replace(&format!("endpoint = \"{UNREACHABLE}\"\n"), "");
    let text =
        format!("requested_roles.allow = [\"arn:aws:iam::123456789012:role/app-*\"]\n{text}");
    let (output, report) = check(folder.path(), &text);
    assert_eq!(
        (output.status.code(), &report["result"]),
        (Some(2), &json!("unchecked")),
        "{report:#}"
    );
    assert_eq!(findings(&report, "failed"), [""; 0]);
    let [unchecked] = &findings(&report, "unchecked")[..] else {
        panic!("{report:#}")
    };
    assert!(unchecked.contains("requested_roles"), "{report:#}");
    // The report for people shows the same.
    let mut command = Command::new(PROGRAM);
    command
        .env_clear()
        .args(["check", "--config"])
        .arg(folder.path().join("check.toml"));
    let output = run(command, b"", TIMEOUT);
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.contains("  ?    sts"), "{output:?}");
    assert!(
        output
            .stdout
            .ends_with("unchecked: nothing failed, but 1 step could not be checked\n"),
        "{output:?}"
    );

    let (output, report) = check_with(&[], folder.path(), &text, &["--resolve", "nonsense"]);
    assert_eq!(output.status.code(), Some(2), "{report:#}");
    assert!(
        report.to_string().contains("HOST:PORT:ADDRESS"),
        "{report:#}"
    );
    // A failure counts more.
    let no_identity = text.replace(
        &upstream.socket().display().to_string(),
        "/nonexistent/agent.sock",
    );
    let (output, report) = check(folder.path(), &no_identity);
    assert_eq!(output.status.code(), Some(1), "{report:#}");
    // Both steps lack a token.
    assert_eq!(findings(&report, "unchecked").len(), 2, "{report:#}");
}

/// An agent that accepts connections and never replies.
#[test]
fn hanging_agent_ends_at_deadline() {
    let folder = folder();
    let socket = folder.path().join("agent.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    let text = configuration(&socket, UNREACHABLE, "arn:minio:iam:::role/r", "shop");
    let found = check(folder.path(), &text);
    assert_failed(
        &found,
        "identity",
        "did not answer within 10s",
        "read the agent's log",
    );
    let (_, report) = found;
    assert!(
        findings(&report, "pass")
            .iter()
            .any(|found| found.ends_with("agent.sock can be opened")),
        "{report:#}"
    );

    // An agent attests only a daemon that runs as root.
    if !root() {
        return;
    }
    // An agent that attests callers gets more queries, the first one about check itself.
    let attested = text.split("[[workload]]").next().unwrap().to_owned()
        + &text[text.find("[[role]]").unwrap()..];
    let other = folder.path().join("other.sock");
    let _other = UnixListener::bind(&other).unwrap();
    let table = [
        (
            "spire-delegated\"\nadmin_socket",
            "did not answer within 10s",
        ),
        (
            "spiffe-broker\"\nbroker_socket",
            "has not given awsvid its own X.509-SVID yet",
        ),
    ];
    for (source, saw) in table {
        let keys = format!(
            "[identity]\nsource = \"{source} = \"unix://{}\"\n",
            other.display()
        );
        let found = check(folder.path(), &attested.replace("[identity]\n", &keys));
        let [failed] = &findings(&found.1, "failed")[..] else {
            panic!("{:#}", found.1)
        };
        assert!(failed.contains(saw), "{:#}", found.1);
    }
}

#[test]
fn hanging_sts_ends_at_deadline() {
    let folder = folder();
    let upstream = Upstream::start(&[(0, "reader")]);
    let (_listener, sts) = silent_listener();
    let text = configuration(&upstream.socket(), &sts, "arn:minio:iam:::role/r", "shop")
        .replace("/w/", "/user/");
    let found = check(
        folder.path(),
        &text.replace("timeout = \"5s\"", "timeout = \"1s\""),
    );
    assert_failed(&found, "sts", "no answer within 1s", "DNS, the firewall");
    let notes = findings(&found.1, "note");
    assert!(
        notes
            .iter()
            .any(|note| note.contains("clock: ") && note.contains("no answer within 8s")),
        "{notes:?}"
    );
}

#[test]
fn hanging_issuer_ends_at_deadline() {
    let folder = folder();
    let upstream = Upstream::start(&[(0, "reader")]);
    let (_listener, issuer) = silent_listener();
    let text = configuration(
        &upstream.socket(),
        UNREACHABLE,
        "arn:minio:iam:::role/r",
        "shop",
    )
    .replace("/w/", "/user/");
    let found = check_with(&[], folder.path(), &text, &["--url", &issuer]);
    assert_failed(
        &found,
        "discovery",
        "no answer within 8s",
        "--resolve or --url",
    );
}

/// On a terminal that can move its cursor, the line of a pending step is replaced by the next one.
#[test]
fn check_is_coloured_only_on_a_terminal_without_no_color() {
    let folder = folder();
    let upstream = Upstream::start(&[(0, "reader")]);
    let text = configuration(
        &upstream.socket(),
        UNREACHABLE,
        "arn:minio:iam:::role/r",
        "shop",
    )
    .replace("/w/", "/user/");
    fs::write(folder.path().join("check.toml"), text).unwrap();
    let command = |variables: &[(&str, &str)]| {
        let mut command = Command::new(PROGRAM);
        command
            .env_clear()
            .envs(variables.iter().copied())
            .args(["check", "--config"]);
        command.arg(folder.path().join("check.toml"));
        command
    };
    let shown = |variables: &[(&str, &str)]| {
        let is_over = |shown: &str| {
            shown.lines().any(|line| line.contains("failed: ")) && shown.ends_with('\n')
        };
        on_a_terminal_until(command(variables), is_over)
    };
    let coloured = shown(&[("TERM", "xterm")]);
    assert!(
        coloured.contains("\x1b[31m FAIL\x1b[0m  sts"),
        "{coloured:?}"
    );
    assert!(
        coloured.contains("  ...  STS, for role \"shop\"\r\x1b[2K"),
        "{coloured:?}"
    );
    let plain = shown(&[("TERM", "xterm"), ("NO_COLOR", "1")]);
    assert!(
        plain.contains(" FAIL  sts") && !plain.contains("\x1b[3"),
        "{plain:?}"
    );
    let typed = shown(&[("TERM", "dumb")]);
    assert!(
        typed.contains(" FAIL  sts") && !typed.contains('\x1b'),
        "{typed:?}"
    );
    assert!(
        typed.contains("  ...  STS, for role \"shop\"\r\n"),
        "{typed:?}"
    );
    let output = run(command(&[("TERM", "xterm")]), b"", TIMEOUT);
    assert!(
        output.status.code() == Some(1) && !output.stdout.contains('\x1b'),
        "{output:?}"
    );
}

/// No `[[role]]` names the STS of requested roles. Its clock is compared as that of any other.
#[test]
fn clock_of_the_sts_of_requested_roles_is_compared() {
    let folder = folder();
    let text = "[identity]\nworkload_api_socket = \"unix:///nonexistent/agent.sock\"\n\
                [sts]\nregion = \"eu-central-1\"\n\
                [requested_roles]\nallow = [\"arn:aws:iam::123456789012:role/app-*\"]\n\
                [[workload]]\nspiffe_id = \"spiffe://example.org/w/reader\"\nuid = 1001\n";
    // Nothing listens there, so no call leaves this machine.
    let proxy = ["env", "HTTPS_PROXY=http://127.0.0.1:1"];
    let (_, report) = check_with(&proxy, folder.path(), text, &[]);
    let unread = "clock: STS's clock cannot be read: https://sts.eu-central-1.amazonaws.com";
    let notes = findings(&report, "note");
    assert!(
        notes.iter().any(|note| note.starts_with(unread)),
        "{report:#}"
    );
}

//! `awsvid status`, with the real daemon.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::getuid;
use serde_json::{Value, json};

use crate::harness::cgroup::own_rule;
use crate::harness::client::fetch;
use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::{Output, Process, await_some, run};
use crate::harness::daemon::{Daemon, PROGRAM};
use crate::harness::env::{Env, Setting, Source, id};
use crate::harness::terminal::{on_a_terminal, on_a_terminal_until};
use crate::harness::upstream::{ME, Upstream};

const TIMEOUT: Duration = Duration::from_secs(60);

/// A daemon that has credentials for the user of this test.
struct StatusStage {
    daemon: Daemon,
    _upstream: Upstream,
}

fn stage(folder: &Path) -> StatusStage {
    let uid = getuid().as_raw();
    let upstream = Upstream::start(&[(uid, "me")]);
    let path = folder.join("agent.sock");
    std::os::unix::fs::symlink(upstream.socket(), &path).unwrap();
    let rule = format!(
        "\n[[workload]]\nspiffe_id = \"{ME}\"\nuid = {uid}\n{}",
        own_rule()
    );
    let daemon = Daemon::start(folder, "", &(upstream.configuration_at(&path) + &rule)).ready();
    let (status, _) = fetch(std::os::unix::net::UnixStream::connect(daemon.unix()).unwrap());
    assert_eq!(status, 200);
    StatusStage {
        daemon,
        _upstream: upstream,
    }
}

fn command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .env_clear()
        .arg("status")
        .arg("--config")
        .arg(folder.join("awsvid.toml"))
        .args(arguments);
    command
}

fn status(folder: &Path, arguments: &[&str]) -> Output {
    run(command(folder, arguments), b"", TIMEOUT)
}

#[test]
fn status_is_json_without_terminal() {
    let folder = folder();
    let mut stage = stage(folder.path());
    let text = status(folder.path(), &[]).success("awsvid status");
    let found: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(found["ready"], true);
    let entry = &found["credentials"][0];
    assert_eq!(
        (&entry["spiffe_id"], &entry["session_name"]),
        (&Value::from(ME), &Value::from("example.org=user=me"))
    );
    assert!(
        entry["expiration"].is_string()
            && entry["next_try"].is_string()
            && entry["last_error"].is_null()
    );
    // With rules a refresh needs no caller, but the last request is shown.
    assert_eq!(
        (&entry["callers"], &entry["latest_uid"]),
        (&Value::from(0), &Value::from(getuid().as_raw()))
    );
    assert_eq!(found["source"]["state"], "ok", "{found}");
    assert_eq!(found["sts"][0]["state"], "ok", "{found}");
    assert!(found["sts"][0]["last_success_at"].is_string(), "{found}");
    assert!(!text.contains("SecretAccessKey") && !text.contains("eyJ"));

    // With --watch it is a line each time; here three of them.
    let mut watching = command(folder.path(), &["--watch", "1"]);
    watching.env("PATH", "/usr/bin:/bin");
    let process = Process::start("awsvid status", watching, &folder.path().join("watch.log"));
    process.await_some("it is shown again", TIMEOUT, || {
        (process.log().lines().count() > 1).then_some(())
    });
    assert!(
        process
            .log()
            .lines()
            .take(2)
            .all(|line| serde_json::from_str::<Value>(line).is_ok()),
        "{}",
        process.log()
    );
    drop(process);

    stage.daemon.process().signal(Signal::SIGTERM);
    stage
        .daemon
        .process()
        .owned()
        .wait(TIMEOUT)
        .expect("it ends");
    let missing = status(folder.path(), &[]);
    assert_eq!(
        (missing.status.code(), missing.stdout.as_str()),
        (Some(1), "")
    );
    assert!(missing.stderr.contains("systemctl"), "{missing:?}");
}

#[test]
fn status_shows_unavailable_source() {
    let folder = folder();
    let stage = stage(folder.path());
    std::fs::remove_file(folder.path().join("agent.sock")).unwrap();
    // The cache is dropped, so that the daemon has to query the source.
    let configuration = stage
        .daemon
        .text()
        .replace("name = \"dev\"", "name = \"other\"");
    assert!(stage.daemon.reload_text(&configuration));
    let _ = fetch(std::os::unix::net::UnixStream::connect(stage.daemon.unix()).unwrap());
    let failing = await_some("the source fails", TIMEOUT, || {
        let found: Value =
            serde_json::from_str(&status(folder.path(), &[]).success("awsvid status")).ok()?;
        (found["source"]["state"] == "failing").then_some(found)
    });
    assert_eq!(
        failing["source"]["last_error_reason"], "source_unavailable",
        "{failing}"
    );
    assert!(
        failing["credentials"][0]["last_error"].is_string()
            || failing["credentials"] == Value::from(Vec::<Value>::new())
    );
}

#[test]
fn status_is_table_on_terminal() {
    let folder = folder();
    let _stage = stage(folder.path());
    let mut coloured = command(folder.path(), &[]);
    coloured.env("TERM", "xterm");
    let shown = on_a_terminal(coloured);
    assert!(
        shown.contains(ME) && shown.contains("EXPIRES") && shown.contains("in 59m"),
        "{shown}"
    );
    assert!(shown.contains("\x1b["), "{shown:?}");
    let mut plain = command(folder.path(), &[]);
    plain.env("NO_COLOR", "1");
    let shown = on_a_terminal(plain);
    assert!(
        shown.contains("EXPIRES") && !shown.contains('\x1b'),
        "{shown:?}"
    );
    let json = on_a_terminal(command(folder.path(), &["--output", "json"]));
    assert!(json.contains("\"credentials\""), "{json}");
    let table = run(command(folder.path(), &["-o", "table"]), b"", TIMEOUT);
    assert!(table.success("-o table").contains("EXPIRES"));

    // Repeatedly on the same screen. Without colours too, since clearing the screen is not a
    // colour.
    for variables in [&[("TERM", "xterm")][..], &[("NO_COLOR", "1")]] {
        let mut watching = command(folder.path(), &["--watch", "1"]);
        watching.envs(variables.iter().copied());
        let shown = on_a_terminal_until(watching, |shown| shown.matches("EXPIRES").count() > 1);
        let screens: Vec<&str> = shown.split("\x1b[2J\x1b[H").collect();
        let [before, first, second, ..] = screens[..] else {
            panic!("two screens: {shown:?}")
        };
        let tables = [before, first, second].map(|screen| screen.matches("EXPIRES").count());
        assert_eq!(tables, [0, 1, 1], "{shown:?}");
        let rest = screens.concat();
        assert_eq!(rest.contains('\x1b'), variables[0].0 == "TERM", "{shown:?}");
    }
}

/// Returns one line of a table, by the header's columns.
fn cells(shown: &str, spiffe_id: &str) -> Option<Vec<String>> {
    const COLUMNS: [&str; 7] = [
        "SPIFFE ID",
        "ROLE",
        "SESSION",
        "EXPIRES",
        "NEXT TRY",
        "CALLERS",
        "STATE",
    ];
    let header = shown
        .lines()
        .find(|line| line.starts_with(COLUMNS[0]))?
        .trim_end();
    let starts = COLUMNS.map(|column| {
        header
            .find(column)
            .unwrap_or_else(|| panic!("{column} in {header}"))
    });
    let row = shown
        .lines()
        .find(|line| line.starts_with(&format!("{spiffe_id} ")))?;
    let ends = starts.iter().skip(1).copied().chain([row.len()]);
    Some(
        starts
            .iter()
            .zip(ends)
            .map(|(start, end)| row[*start..end].trim().to_owned())
            .collect(),
    )
}

/// Shows all that an operator needs of a daemon with callers that SPIRE attests: working entries
/// and failures.
#[test]
fn status_columns_show_state_of_entries() {
    let folder = folder();
    let none = format!(
        "[[role]]\nname = \"none\"\nspiffe_id = \"{}\"\nrole_arn = \"arn:minio:iam:::role/none\"\n",
        id("*")
    );
    let setting = Setting {
        source: Source::Delegated,
        role: &none,
        ..Setting::default()
    };
    let users = [(1001, "reader"), (1002, "writer"), (1003, "late")];
    let Some(mut env) = Env::start(folder.path(), &users, &setting) else {
        return;
    };
    let json = || -> Value {
        serde_json::from_str(&status(folder.path(), &[]).success("awsvid status")).unwrap()
    };
    let entry = |found: &Value, name: &str| {
        found["credentials"]
            .as_array()
            .unwrap()
            .iter()
            .find(|entry| entry["spiffe_id"] == id(name))
            .cloned()
    };
    let table = || {
        let mut plain = command(folder.path(), &[]);
        plain.env("NO_COLOR", "1");
        on_a_terminal(plain)
    };

    let issued: Value = serde_json::from_str(&env.curl(1001).1).unwrap();
    let pid = env
        .daemon
        .audit()
        .into_iter()
        .rfind(|record| record["uid"] == 1001)
        .unwrap()["pid"]
        .clone();
    let found = json();
    let reader = entry(&found, "reader").unwrap();
    let next = reader["next_try"].as_str().unwrap();
    assert!(next < issued["Expiration"].as_str().unwrap(), "{reader}");
    let expected = json!({
        "spiffe_id": id("reader"), "role": "shop", "role_arn": env.minio.role_arn(),
        "session_name": "example.org=w=reader", "access_key_id": issued["AccessKeyId"], "expiration": issued["Expiration"],
        "next_try": next, "last_error": null, "last_error_reason": null, "last_error_at": null, "refused_since": null,
        "callers": 1, "latest_uid": 1001, "latest_pid": pid,
    });
    assert_eq!(reader, expected);
    let (source, sts) = (&found["source"], &found["sts"][0]);
    assert_eq!(
        (&source["state"], &sts["state"]),
        (&json!("ok"), &json!("ok")),
        "{found}"
    );
    assert!(
        source["name"]
            .as_str()
            .unwrap()
            .ends_with("/admin/api.sock"),
        "{found}"
    );
    assert_eq!(sts["name"], env.minio.endpoint());
    let shown = table();
    let row = cells(&shown, &id("reader")).unwrap_or_else(|| panic!("{shown}"));
    assert_eq!(
        row[..3],
        [&id("reader"), "shop", "example.org=w=reader"],
        "{shown}"
    );
    assert!(
        row[3].starts_with("in 59m ") && row[4].starts_with("in ") && row[4] < row[3],
        "{shown}"
    );
    assert_eq!(
        row[5..],
        [&format!("1 (uid 1001, pid {pid})"), "ok"],
        "{shown}"
    );

    // A rejection is cached for seconds, so this may take several requests.
    let rejected = || {
        let rejected = env
            .curl_by(Path::new("/usr/bin/curl"), 1002, "unix", "/none")
            .1;
        serde_json::from_str::<Value>(&rejected).unwrap()
    };
    let (writer, why) = await_some("the rejected one", TIMEOUT, || {
        let why = rejected();
        Some((
            entry(&json(), "writer").filter(|entry| !entry["last_error"].is_null())?,
            why,
        ))
    });
    assert_eq!(
        (&writer["role"], &writer["role_arn"]),
        (&json!("none"), &json!("arn:minio:iam:::role/none"))
    );
    assert!(
        writer["access_key_id"].is_null() && writer["expiration"].is_null(),
        "{writer}"
    );
    assert_eq!(writer["last_error_reason"], why["code"], "{writer} {why}");
    assert!(
        why["message"]
            .as_str()
            .unwrap()
            .contains(writer["last_error"].as_str().unwrap()),
        "{writer} {why}"
    );
    let (row, shown) = await_some("the rejected one in the table", TIMEOUT, || {
        rejected();
        let shown = table();
        Some((
            cells(&shown, &id("writer")).filter(|row| row[6].starts_with("refused "))?,
            shown,
        ))
    });
    assert_eq!(row[1..4], ["none", "example.org=w=writer", "-"], "{shown}");
    assert!(row[5].starts_with("1 (uid 1002, pid "), "{shown}");
    assert!(
        shown.contains(&format!("({})", why["code"].as_str().unwrap())),
        "{shown}"
    );

    // STS, and then the agent, become unavailable.
    env.minio.stop();
    let fetch = |uid| drop(env.curl(uid));
    let failing = await_some("STS fails", TIMEOUT, || {
        fetch(1003);
        Some(json()["sts"][0].clone()).filter(|sts| sts["state"] == "failing")
    });
    assert_eq!(failing["last_error_reason"], "sts_unreachable", "{failing}");
    assert!(
        failing["last_success_at"].is_string() && failing["last_error_at"].is_string(),
        "{failing}"
    );
    env.spire.stop_agent();
    let failing = await_some("the source fails", TIMEOUT, || {
        drop(env.curl(1004));
        Some(json()["source"].clone()).filter(|source| source["state"] == "failing")
    });
    assert_eq!(
        failing["last_error_reason"], "source_unavailable",
        "{failing}"
    );
    let shown = table();
    for neighbour in ["identities from ", "STS from "] {
        let line = shown
            .lines()
            .find(|line| line.starts_with(neighbour))
            .unwrap_or_else(|| panic!("{shown}"));
        assert!(
            line.contains(": failing, last success ") && line.trim_end().ends_with(" ago"),
            "{shown}"
        );
    }
    // Cached credentials are still served.
    assert_eq!(cells(&shown, &id("reader")).unwrap()[6], "ok", "{shown}");
}

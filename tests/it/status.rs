//! `awsvid status`, with the real daemon.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::getuid;
use serde_json::Value;

use crate::harness::cgroup::own_rule;
use crate::harness::client::ask;
use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::{Output, Process, await_some, run};
use crate::harness::daemon::{Daemon, PROGRAM};
use crate::harness::terminal::{on_a_terminal, on_a_terminal_until};
use crate::harness::upstream::Upstream;

const PATIENCE: Duration = Duration::from_secs(60);
const ME: &str = "spiffe://example.org/user/me";

/// A daemon that has credentials for the user of this test.
struct Stage {
    daemon: Daemon,
    _upstream: Upstream,
}

fn stage(folder: &Path) -> Stage {
    let uid = getuid().as_raw();
    let upstream = Upstream::start(&[(uid, "me")]);
    let path = folder.join("agent.sock");
    std::os::unix::fs::symlink(upstream.socket(), &path).unwrap();
    let rule = format!("\n[[workload]]\nspiffe_id = \"{ME}\"\nuid = {uid}\n{}", own_rule());
    let daemon = Daemon::start(folder, "", &(upstream.configuration_at(&path) + &rule)).ready();
    let (status, _) = ask(std::os::unix::net::UnixStream::connect(daemon.unix()).unwrap());
    assert_eq!(status, 200);
    Stage { daemon, _upstream: upstream }
}

fn command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.env_clear().arg("status").arg("--config").arg(folder.join("awsvid.toml")).args(arguments);
    command
}

fn status(folder: &Path, arguments: &[&str]) -> Output {
    run(command(folder, arguments), b"", PATIENCE)
}

#[test]
fn elsewhere_than_on_a_terminal_it_is_json() {
    let folder = folder();
    let mut stage = stage(folder.path());
    let text = status(folder.path(), &[]).success("awsvid status");
    let found: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(found["ready"], true);
    let entry = &found["credentials"][0];
    assert_eq!((&entry["spiffe_id"], &entry["session_name"]), (&Value::from(ME), &Value::from("example.org=user=me")));
    assert!(entry["expiration"].is_string() && entry["next_try"].is_string() && entry["last_error"].is_null());
    assert_eq!(found["source"]["state"], "ok", "{found}");
    assert_eq!(found["sts"][0]["state"], "ok", "{found}");
    assert!(found["sts"][0]["last_success_at"].is_string(), "{found}");
    assert!(!text.contains("SecretAccessKey") && !text.contains("eyJ"));

    // With --watch it is a line each time; here three of them.
    let mut watching = command(folder.path(), &["--watch", "1"]);
    watching.env("PATH", "/usr/bin:/bin");
    let process = Process::start("awsvid status", watching, &folder.path().join("watch.log"));
    process.await_some("it is shown again", PATIENCE, || (process.log().lines().count() > 1).then_some(()));
    assert!(process.log().lines().take(2).all(|line| serde_json::from_str::<Value>(line).is_ok()), "{}", process.log());
    drop(process);

    stage.daemon.process().signal(Signal::SIGTERM);
    stage.daemon.process().owned().wait(PATIENCE).expect("it ends");
    let gone = status(folder.path(), &[]);
    assert_eq!((gone.status.code(), gone.stdout.as_str()), (Some(1), ""));
    assert!(gone.stderr.contains("systemctl"), "{gone:?}");
}

#[test]
fn a_source_that_is_away_is_seen() {
    let folder = folder();
    let stage = stage(folder.path());
    std::fs::remove_file(folder.path().join("agent.sock")).unwrap();
    // What is cached is dropped, so that the daemon has to ask.
    let configuration = stage.daemon.text().replace("name = \"dev\"", "name = \"other\"");
    assert!(stage.daemon.reload_text(&configuration));
    let _ = ask(std::os::unix::net::UnixStream::connect(stage.daemon.unix()).unwrap());
    let failing = await_some("the source fails", PATIENCE, || {
        let found: Value = serde_json::from_str(&status(folder.path(), &[]).success("awsvid status")).ok()?;
        (found["source"]["state"] == "failing").then_some(found)
    });
    assert_eq!(failing["source"]["last_error_reason"], "source_unavailable", "{failing}");
    assert!(
        failing["credentials"][0]["last_error"].is_string()
            || failing["credentials"] == Value::from(Vec::<Value>::new())
    );
}

#[test]
fn on_a_terminal_it_is_a_table() {
    let folder = folder();
    let _stage = stage(folder.path());
    let mut coloured = command(folder.path(), &[]);
    coloured.env("TERM", "xterm");
    let shown = on_a_terminal(coloured);
    assert!(shown.contains(ME) && shown.contains("EXPIRES") && shown.contains("in 59m"), "{shown}");
    assert!(shown.contains("\x1b["), "{shown:?}");
    let mut plain = command(folder.path(), &[]);
    plain.env("NO_COLOR", "1");
    let shown = on_a_terminal(plain);
    assert!(shown.contains("EXPIRES") && !shown.contains('\x1b'), "{shown:?}");
    assert!(on_a_terminal(command(folder.path(), &["--json"])).contains("\"credentials\""));

    // Again and again in the same place; without colours too, since the screen is no colour.
    for variables in [&[("TERM", "xterm")][..], &[("NO_COLOR", "1")]] {
        let mut watching = command(folder.path(), &["--watch", "1"]);
        watching.envs(variables.iter().copied());
        let shown = on_a_terminal_until(watching, |shown| shown.matches("EXPIRES").count() > 1);
        let screens: Vec<&str> = shown.split("\x1b[2J\x1b[H").collect();
        let [before, first, second, ..] = screens[..] else { panic!("two screens: {shown:?}") };
        let tables = [before, first, second].map(|screen| screen.matches("EXPIRES").count());
        assert_eq!(tables, [0, 1, 1], "{shown:?}");
        let rest = screens.concat();
        assert_eq!(rest.contains('\x1b'), variables[0].0 == "TERM", "{shown:?}");
    }
}

//! SIGHUP: another configuration takes effect as a whole or not at all, and no caller gets what
//! only the old one gave.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::harness::cgroup::own_rule;
use crate::harness::client::{Poller, answer, connect, fetch, send};
use crate::harness::counterparts::process::await_some;
use crate::harness::counterparts::{folder, http_get, skip};
use crate::harness::daemon::Daemon;
use crate::harness::pausable_proxy::PausableProxy;
use crate::harness::upstream::{Upstream, own_rules};

const ID: &str = "spiffe://example.org/user/me";
/// Bounds steps that take milliseconds on an idle machine.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The servers of `awsvid dev`, with an open proxy in front of the source, and the parts of
/// configurations for them. The user of this test is the only one.
struct ReloadStage {
    gate: PausableProxy,
    upstream: Upstream,
    folder: tempfile::TempDir,
}

impl ReloadStage {
    fn set() -> Self {
        let folder = folder();
        let upstream = Upstream::start(&[(nix::unistd::getuid().as_raw(), "me")]);
        let gate = PausableProxy::start(&folder.path().join("gate.sock"), &upstream.socket());
        gate.set_open(true);
        Self {
            gate,
            upstream,
            folder,
        }
    }

    fn start(&self, configuration: &str) -> Daemon {
        Daemon::start(self.folder.path(), "", configuration).ready()
    }

    /// Returns everything except rules, with `more` in the role.
    fn role(&self, more: &str) -> String {
        let configuration = self
            .upstream
            .configuration_at(&self.folder.path().join("gate.sock"));
        assert!(configuration.contains("[[role]]\n"));
        configuration.replace("[[role]]\n", &format!("[[role]]\n{more}\n"))
    }

    /// Returns it with the rule for the user of this test.
    fn with_rule(&self, role: &str) -> String {
        self.role(role) + &own_rules(ID, nix::unistd::getuid().as_raw())
    }

    /// Returns it with a rule for another user.
    fn without_rule(&self) -> String {
        self.role("") + &rule(54321)
    }
}

fn rule(uid: u32) -> String {
    format!(
        "\n[[workload]]\nspiffe_id = \"{ID}\"\nuid = {uid}\n{}",
        own_rule()
    )
}

fn unix(daemon: &Daemon) -> UnixStream {
    UnixStream::connect(daemon.unix()).unwrap()
}

/// Returns the access key id of the current response.
fn key(daemon: &Daemon) -> String {
    let (status, body) = fetch(unix(daemon));
    assert_eq!(status, 200, "{body}");
    body["AccessKeyId"].as_str().unwrap().to_owned()
}

fn rejection(daemon: &Daemon) -> String {
    let (status, body) = fetch(unix(daemon));
    assert_ne!(status, 200, "{body}");
    body["code"].as_str().unwrap().to_owned()
}

/// Returns how long the credentials in a response are valid.
fn lifetime(body: &Value) -> Duration {
    let expiration = humantime::parse_rfc3339(body["Expiration"].as_str().unwrap()).unwrap();
    expiration
        .duration_since(SystemTime::now())
        .unwrap_or_default()
}

#[test]
fn rule_takes_effect_and_ends_with_reload() {
    let stage = ReloadStage::set();
    let daemon = stage.start(&stage.without_rule());
    assert_eq!(rejection(&daemon), "no_identity");
    assert!(daemon.reload("", &stage.with_rule("")));
    let first = key(&daemon);
    // Nothing differs: the cache stays.
    assert!(daemon.reload("", &stage.with_rule("")));
    assert_eq!(key(&daemon), first);
    assert!(daemon.reload("", &stage.without_rule()));
    assert_eq!(rejection(&daemon), "no_identity");
    // A different rule for the same ID does not equal the old one.
    assert!(daemon.reload("", &stage.with_rule("")));
    assert_ne!(key(&daemon), first);
}

#[test]
fn narrowed_role_serves_no_wider_credentials() {
    let stage = ReloadStage::set();
    let daemon = stage.start(&stage.with_rule(""));
    let mut observed = HashSet::from([key(&daemon)]);
    let policies = [
        r#"policy = '{"Statement": []}'"#,
        r#"policy_arns = ["arn:aws:iam::aws:policy/ReadOnlyAccess"]"#,
    ];
    for more in policies {
        assert!(daemon.reload("", &stage.with_rule(more)));
        assert!(observed.insert(key(&daemon)), "{more}: an old key");
    }
    // An ARN that this STS does not know: it rejects, and the daemon serves nothing older.
    let other = stage.with_rule("").replace("role/dev", "role/other");
    assert!(daemon.reload("", &other));
    assert!(
        rejection(&daemon).starts_with("sts_"),
        "STS was called for the other ARN"
    );
    // Going back does not restore what was cached then.
    assert!(daemon.reload("", &stage.with_rule("")));
    assert!(observed.insert(key(&daemon)), "an old key");
}

#[test]
fn waiting_request_is_decided_by_new_configuration() {
    let stage = ReloadStage::set();
    let daemon = stage.start(&stage.with_rule("duration = \"2h\""));
    // Three callers wait for what the old configuration would give: a longer session, and then an
    // identity that no rule gives any more.
    let wait = || {
        stage.gate.set_open(false);
        let arrivals = stage.gate.arrivals();
        let waiting = [
            send(unix(&daemon)),
            send(unix(&daemon)),
            send(unix(&daemon)),
        ];
        stage.gate.await_arrivals(arrivals + 1);
        waiting
    };
    let waiting = wait();
    assert!(daemon.reload("", &stage.with_rule("duration = \"15m\"")));
    stage.gate.set_open(true);
    for mut stream in waiting {
        let (status, body) = answer(&mut stream);
        assert_eq!(status, 200, "{body}");
        assert!(
            lifetime(&body) <= Duration::from_secs(15 * 60),
            "a session of the old role: {body}"
        );
    }
    // Nothing is cached for this one yet.
    assert!(daemon.reload("", &stage.with_rule("duration = \"1h\"")));
    let waiting = wait();
    let waiting_request = daemon.audit().len();
    assert!(daemon.reload("", &stage.without_rule()));
    stage.gate.set_open(true);
    for mut stream in waiting {
        let (status, body) = answer(&mut stream);
        assert_eq!(
            (status, &body["code"]),
            (403, &Value::from("no_identity")),
            "{body}"
        );
    }
    for record in &daemon.audit()[waiting_request..] {
        assert!(
            record["access_key_id"].is_null() && record["role_arn"].is_null(),
            "{record}"
        );
    }
}

#[test]
fn invalid_configuration_changes_nothing() {
    let stage = ReloadStage::set();
    let daemon = stage.start(&stage.with_rule(""));
    let before = key(&daemon);
    let good = daemon.text();
    let lines = good.lines().count();
    // Two errors, and a change without effect: without the rule no caller would be served.
    let wrong = good.replace(ID, "spiffe:/wrong") + "levle = \"info\"\n[cache]\nmax_entries = 0\n";
    assert!(!daemon.reload_text(&wrong));
    assert_eq!(key(&daemon), before);
    let log = daemon.log();
    let rule = 1 + good.lines().position(|line| line.contains(ID)).unwrap();
    for line in [rule, lines + 1, lines + 3] {
        assert!(
            log.contains(&format!("awsvid.toml:{line}: ")),
            "line {line} in:\n{log}"
        );
    }
    // An error that only shows in use: a file that can't be opened.
    let wrong = daemon.text().replace("spiffe:/wrong", ID);
    assert_ne!(wrong, good);
    assert!(
        !daemon.reload_text(
            &good
                .replace("audit.log", "missing/audit.log")
                .replace(ID, "spiffe://example.org/user/x")
        )
    );
    assert!(daemon.log().contains("missing/audit.log"));
    assert_eq!(key(&daemon), before);
    fs::remove_file(stage.folder.path().join("awsvid.toml")).unwrap();
    assert_sighup_fails(&daemon);
    assert_eq!(key(&daemon), before);
    // A corrected file takes effect.
    assert!(daemon.reload_text(&good));
    assert_eq!(key(&daemon), before);
}

#[test]
fn failed_reload_keeps_numbers_of_names() {
    let stage = ReloadStage::set();
    let uid = nix::unistd::getuid();
    let Some(user) = nix::unistd::User::from_uid(uid).unwrap() else {
        return skip("this user has no name");
    };
    let user = user.name;
    let by_name = |name: &str| {
        let by_number = format!("uid = {uid}\n");
        assert!(stage.with_rule("").contains(&by_number));
        stage
            .with_rule("")
            .replace(&by_number, &format!("user = \"{name}\"\n"))
    };
    let daemon = stage.start(&by_name(&user));
    let before = key(&daemon);
    let good = daemon.text();
    // The rule with another name is valid. The audit file cannot be opened.
    let wrong = good
        .replace(&format!("\"{user}\""), "\"daemon\"")
        .replace("audit.log", "missing/audit.log");
    assert_ne!(wrong, good);
    assert!(!daemon.reload_text(&wrong));
    assert!(daemon.log().contains("missing/audit.log"));
    assert_eq!(key(&daemon), before);
}

/// Sends SIGHUP without a file, and checks that nothing changes.
fn assert_sighup_fails(daemon: &Daemon) {
    let count = || daemon.log().matches("configuration not reloaded").count();
    let before = count();
    daemon.send_sighup();
    await_some(
        "the daemon has tried to read its configuration",
        TIMEOUT,
        || (count() > before).then_some(()),
    );
}

#[test]
fn reload_keeps_listeners_and_applies_other_changes() {
    let stage = ReloadStage::set();
    let daemon = stage.start(&stage.without_rule());
    let socket = daemon.unix();
    let text = daemon
        .text()
        .replace("tcp = [\"127.0.0.1:0", "tcp = [\"127.0.0.1:1")
        .replace("awsvid.sock", "other.sock");
    let own = own_rules(ID, nix::unistd::getuid().as_raw());
    let text = text.replace(&rule(54321), &own);
    let text = text.replace(
        "token_file = ",
        "max_connections_per_workload = 7\ntoken_file = ",
    );
    assert!(daemon.reload_text(&text));
    daemon.await_line(&[
        "the change needs a restart",
        "listen",
        "unix, tcp, max_connections_per_workload",
    ]);
    assert!(socket.exists() && !socket.with_file_name("other.sock").exists());
    key(&daemon);
    assert_eq!(fetch(connect(daemon.tcp())).0, 200);
    assert_eq!(fetch(connect(daemon.tcp6())).0, 200);
    // The same listeners as at the start: nothing is logged.
    assert!(daemon.reload("", &stage.with_rule("")));
    assert_eq!(
        daemon.log().matches("the change needs a restart").count(),
        1
    );
}

#[test]
fn reload_reopens_the_audit_file() {
    let stage = ReloadStage::set();
    let daemon = stage.start(&stage.with_rule(""));
    let first = key(&daemon);
    let (current, rotated) = (
        stage.folder.path().join("audit.log"),
        stage.folder.path().join("audit.log.1"),
    );
    fs::rename(&current, &rotated).unwrap();
    // Until the reload, the daemon writes to the file that it has open.
    key(&daemon);
    assert!(!current.exists());
    assert!(daemon.reload("", &stage.with_rule("")));
    let moved = fs::read_to_string(&rotated).unwrap();
    assert_eq!(moved.matches(&first).count(), 2, "{moved}");
    key(&daemon);
    assert_eq!(daemon.audit().len(), 1);
    assert_eq!(fs::read_to_string(&rotated).unwrap(), moved);
    // To another name.
    let renamed_log = stage.folder.path().join("elsewhere.log");
    assert!(daemon.reload_text(&daemon.text().replace("audit.log", "elsewhere.log")));
    key(&daemon);
    assert_eq!(
        (
            daemon.audit().len(),
            fs::read_to_string(renamed_log).unwrap().lines().count()
        ),
        (1, 1)
    );
}

#[test]
fn reload_changes_log_level_and_format() {
    let stage = ReloadStage::set();
    let daemon = stage.start(&stage.with_rule(""));
    let text = daemon.text();
    let quiet = text
        .replace("awsvid=debug,info", "warn")
        .replace("format = \"json\"", "format = \"text\"");
    let since = daemon.log().len();
    // Its only line at this level: that the rule needs a role.
    let quiet = quiet + "\n[[workload]]\nspiffe_id = \"spiffe://other.example/x\"\nuid = 54321\n";
    daemon.write_and_send_sighup(&quiet);
    let message = await_some("a warning", TIMEOUT, || {
        let log = daemon.log();
        log[since..]
            .contains("no role is for spiffe://other.example/x")
            .then(|| log[since..].to_owned())
    });
    assert!(
        message.lines().last().unwrap().contains(" WARN "),
        "{message}"
    );
    assert!(!daemon.reload_text(&quiet.replace("[listen]", "[lisen]")));
    assert!(
        !daemon.log()[since..].contains("configuration reloaded"),
        "{}",
        &daemon.log()[since..]
    );
    assert!(daemon.reload_text(&text));
    let log = daemon.log();
    assert!(
        serde_json::from_str::<Value>(log.lines().last().unwrap()).is_ok(),
        "{log}"
    );
}

/// Writes the files as the kubelet writes a ConfigMap's volume: all through one symbolic link.
fn write_volume(directory: &Path, version: &str, files: &[(&str, &str)]) {
    let path = |name: &str| directory.join(name);
    fs::create_dir_all(path(version)).unwrap();
    for (name, text) in files {
        fs::write(path(version).join(name), text).unwrap();
    }
    symlink(version, path("..data_tmp")).unwrap();
    fs::rename(path("..data_tmp"), path("..data")).unwrap();
}

#[test]
fn watched_files_are_reloaded_without_signal() {
    let stage = ReloadStage::set();
    let volume = stage.folder.path().join("volume");
    let wrong = "[[role]]\nname = 1\n";
    write_volume(&volume, "..1", &[]);
    for name in ["a.toml", "b.toml"] {
        symlink(format!("..data/{name}"), volume.join(name)).unwrap();
    }
    write_volume(&volume, "..2", &[("a.toml", ""), ("b.toml", "")]);
    let configuration = "include = \"volume/*.toml\"\n".to_owned() + &stage.without_rule();
    let words = ["sh", "-c", "exec \"$@\" --watch", "sh"];
    let folder = stage.folder.path();
    let daemon = Daemon::start_behind(&words, folder, "", &configuration).ready();
    assert_eq!(rejection(&daemon), "no_identity");

    let rule = rule(nix::unistd::getuid().as_raw());
    write_volume(&volume, "..3", &[("a.toml", &rule), ("b.toml", "")]);
    await_some("the rule takes effect", TIMEOUT, || {
        (fetch(unix(&daemon)).0 == 200).then_some(())
    });
    let before = key(&daemon);
    let last = "awsvid_config_last_reload_successful";
    assert_eq!(daemon.metric(last), 1);

    write_volume(&volume, "..4", &[("a.toml", ""), ("b.toml", wrong)]);
    await_some("the mistake is reported", TIMEOUT, || {
        (daemon.metric(last) == 0).then_some(())
    });
    daemon.await_line(&[
        "the configuration has a mistake",
        "volume/b.toml:2: role.name",
    ]);
    assert_eq!(key(&daemon), before);

    // The main file, as an editor replaces it.
    let other = folder.join("new.toml");
    fs::write(
        &other,
        daemon.text().replace("volume/*.toml", "none/*.toml"),
    )
    .unwrap();
    fs::rename(other, folder.join("awsvid.toml")).unwrap();
    await_some("the rule ends", TIMEOUT, || {
        (daemon.metric(last) == 1).then_some(())
    });
    assert_eq!(rejection(&daemon), "no_identity");
}

#[test]
fn reload_makes_daemon_ready() {
    let stage = ReloadStage::set();
    let wrong = stage.with_rule("").replace("gate.sock", "unused.sock");
    let daemon = Daemon::start(stage.folder.path(), "", &wrong);
    await_some("it reports what is missing", TIMEOUT, || {
        daemon
            .log()
            .lines()
            .any(|line| line.contains("not ready") && line.contains("the identity source"))
            .then_some(())
    });
    assert_eq!(http_get(daemon.admin(), "/readyz").unwrap().0, 503);
    assert!(daemon.reload("", &stage.with_rule("")));
    let daemon = daemon.ready();
    // Requests use the new source, too.
    let arrivals = stage.gate.arrivals();
    key(&daemon);
    assert_eq!(stage.gate.arrivals(), arrivals + 1);
}

#[test]
fn callers_see_no_error_during_fifty_reloads() {
    let stage = ReloadStage::set();
    let daemon = stage.start(&stage.with_rule(""));
    let path = daemon.unix();
    let askers = [
        Poller::new(|| fetch(UnixStream::connect(&path).unwrap())),
        Poller::new(|| fetch(connect(daemon.tcp()))),
        Poller::new(|| fetch(connect(daemon.tcp6()))),
    ];
    thread::scope(|scope| {
        let _end = askers.each_ref().map(Poller::end_later);
        let running = askers.each_ref().map(|asker| scope.spawn(|| asker.run()));
        for round in 0..50 {
            // The role and the rules differ from the previous ones, and the file is a new one.
            let minutes = 15 + round % 5;
            let more = if round % 2 == 0 {
                rule(54321).replace("/me", "/x")
            } else {
                String::new()
            };
            let _ = fs::remove_file(stage.folder.path().join("audit.log"));
            let before = askers.each_ref().map(Poller::count);
            assert!(daemon.reload(
                "",
                &(stage.with_rule(&format!("duration = \"{minutes}m\"")) + &more)
            ));
            await_some("every caller is answered", TIMEOUT, || {
                assert!(
                    !running.iter().any(|asker| asker.is_finished()),
                    "one has seen an error"
                );
                askers
                    .iter()
                    .zip(before)
                    .all(|(asker, before)| asker.count() > before + 1)
                    .then_some(())
            });
        }
    });
}

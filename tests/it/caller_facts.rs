//! The facts of a caller that decide, by listener, as the audit records show them. No source is
//! needed for that.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::process::run;
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::Daemon;

const TIMEOUT: Duration = Duration::from_secs(30);

/// Runs curl as this user and group, in this cgroup, over the listener.
fn ask(
    daemon: &Daemon,
    listener: &str,
    (uid, gid, groups): (u32, u32, &str),
    cgroup: Option<&Cgroup>,
) -> Value {
    let unix = daemon.unix();
    let target = match listener {
        "unix" => format!(
            "--unix-socket {} http://localhost/v1/credentials",
            unix.display()
        ),
        "tcp" => daemon.uri(),
        _ => format!("http://{}/v1/credentials", daemon.tcp6()),
    };
    let enter = cgroup.map_or(String::new(), |cgroup| {
        format!("echo 0 > {}/cgroup.procs && ", cgroup.path().display())
    });
    let groups = if groups.is_empty() {
        "--clear-groups".to_owned()
    } else {
        format!("--groups {groups}")
    };
    let script = format!(
        "{enter}exec setpriv --reuid {uid} --regid {gid} {groups} curl -sS -g -H 'Authorization: x' {target}"
    );
    let before = daemon.audit().len();
    let mut command = Command::new("sh");
    command
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .args(["-c", &script]);
    let body = run(command, b"", TIMEOUT).success(&script);
    serde_json::from_str::<Value>(&body).expect("an answer in JSON");
    daemon
        .audit_after(before)
        .into_iter()
        .find(|record| record["uid"] == uid)
        .expect("the request's record")
}

fn daemon(folder: &Path, rules: &str) -> Daemon {
    let rest = r#"
[identity]
workload_api_socket = "unix:///nonexistent/agent.sock"
[sts]
region = "eu-central-1"
[[role]]
name = "all"
spiffe_id = "spiffe://example.org/**"
role_arn = "arn:aws:iam::123456789012:role/all"
"#;
    Daemon::start(folder, "", &format!("{rest}{rules}"))
}

const LISTENERS: [&str; 3] = ["unix", "tcp", "tcp6"];

#[test]
fn unit_and_cgroup_are_read_from_socket_alone() {
    if !root() {
        return;
    }
    let folder = folder();
    let daemon = daemon(
        folder.path(),
        r#"
[[workload]]
spiffe_id = "spiffe://example.org/unit"
systemd_unit = "seen.service"
[[workload]]
spiffe_id = "spiffe://example.org/cgroup"
cgroup = "/awsvid-test-*.slice/plain/*"
[[workload]]
spiffe_id = "spiffe://example.org/user"
uid = 51001
[[workload]]
spiffe_id = "spiffe://example.org/group"
uid = 51002
gid = 51009
"#,
    );
    let unit = Cgroup::new("seen.service");
    let plain = Cgroup::new("plain");
    let below = plain.below("below");
    let other_cgroup = Cgroup::new("elsewhere");
    for listener in LISTENERS {
        for (uid, cgroup, id) in [
            (51005, &unit, "unit"),
            (51006, &below, "cgroup"),
            (51001, &other_cgroup, "user"),
        ] {
            let record = ask(&daemon, listener, (uid, uid, ""), Some(cgroup));
            assert_eq!(
                record["spiffe_id"],
                format!("spiffe://example.org/{id}"),
                "{listener} {record}"
            );
            // On TCP the daemon read nothing else where the rule names the cgroup: there was no
            // search.
            assert_eq!(
                record["pid"].is_null(),
                listener != "unix" && id != "user",
                "{listener} {record}"
            );
        }
        let record = ask(&daemon, listener, (51007, 51007, ""), Some(&other_cgroup));
        assert_eq!(
            (&record["reason"], record["pid"].is_null()),
            (&"no_identity".into(), listener != "unix")
        );
        // A rule by group does need the process.
        let record = ask(&daemon, listener, (51002, 51009, ""), Some(&other_cgroup));
        assert_eq!(
            record["spiffe_id"], "spiffe://example.org/group",
            "{listener} {record}"
        );
        assert!(record["pid"].is_number());
        let record = ask(
            &daemon,
            listener,
            (51002, 51008, "51009"),
            Some(&other_cgroup),
        );
        assert_eq!(record["reason"], "no_identity", "{listener} {record}");
    }
    drop(below);
}

#[test]
fn groups_and_executable_are_read_from_process() {
    if !root() {
        return;
    }
    let folder = folder();
    let curl = fs::canonicalize("/usr/bin/curl").unwrap();
    let rules = format!(
        "[[workload]]\nspiffe_id = \"spiffe://example.org/extra\"\nuid = 52001\nsupplementary_group = 52009\n\
         [[workload]]\nspiffe_id = \"spiffe://example.org/exe\"\nuid = 52002\nexe = {curl:?}\n\
         [[workload]]\nspiffe_id = \"spiffe://example.org/other-exe\"\nuid = 52003\nexe = \"/usr/bin/env\"\n"
    );
    let daemon = daemon(folder.path(), &rules);
    for listener in LISTENERS {
        for (caller, expected) in [
            ((52001, 1, "52008,52009"), "spiffe://example.org/extra"),
            ((52001, 52009, ""), "no_identity"),
            ((52002, 1, ""), "spiffe://example.org/exe"),
            ((52003, 1, ""), "no_identity"),
        ] {
            let record = ask(&daemon, listener, caller, None);
            let got = if record["spiffe_id"].is_null() {
                &record["reason"]
            } else {
                &record["spiffe_id"]
            };
            assert_eq!(got, expected, "{listener} {caller:?} {record}");
            assert!(record["pid"].is_number());
        }
    }
}

#[test]
fn host_user_rule_does_not_match_in_container() {
    if !root() {
        return;
    }
    let folder = folder();
    let id = "0123456789abcdef".repeat(4);
    let rules = format!(
        "[[workload]]\nspiffe_id = \"spiffe://example.org/host\"\nuid = 53001\n\
         [[workload]]\nspiffe_id = \"spiffe://example.org/named\"\nuid = 53002\ncgroup = \"/awsvid-test-*/docker-{id}.scope\"\n\
         [[workload]]\nspiffe_id = \"spiffe://example.org/unit\"\nuid = 53003\nsystemd_unit = \"engine.service\"\n"
    );
    let daemon = daemon(folder.path(), &rules);
    let container = Cgroup::new(&format!("docker-{id}.scope"));
    let unit = Cgroup::new("engine.service");
    let container_in_unit = unit.below(&format!("docker-{id}.scope"));
    let host = Cgroup::new("host");
    for listener in LISTENERS {
        let reason = |uid, cgroup| {
            let record = ask(&daemon, listener, (uid, uid, ""), Some(cgroup));
            record["spiffe_id"]
                .as_str()
                .or(record["reason"].as_str())
                .unwrap()
                .to_owned()
        };
        assert_eq!(
            reason(53001, &host),
            "spiffe://example.org/host",
            "{listener}"
        );
        assert_eq!(reason(53001, &container), "no_identity", "{listener}");
        // For a rule by unit the socket alone decides over TCP: no process is read.
        assert_eq!(
            reason(53003, &unit),
            "spiffe://example.org/unit",
            "{listener}"
        );
        assert_eq!(
            reason(53003, &container_in_unit),
            "no_identity",
            "{listener}"
        );
        // A rule that names the container's own cgroup covers it.
        assert_eq!(
            reason(53002, &container),
            "spiffe://example.org/named",
            "{listener}"
        );
        assert_eq!(reason(53002, &host), "no_identity", "{listener}");
    }
}

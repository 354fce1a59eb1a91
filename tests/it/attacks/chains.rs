//! Values of chains that a workload would like to select, and workloads with similar names.

use std::collections::HashSet;
use std::fs;
use std::net::TcpStream;
use std::path::Path;

use serde_json::Value;

use crate::harness::actor::Connector;
use crate::harness::cgroup::Cgroup;
use crate::harness::chain::{CHAIN, ChainUpstream, HOPS};
use crate::harness::client::fetch;
use crate::harness::counterparts::process::{behind, run};
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::Daemon;

const TIMEOUT: std::time::Duration = std::time::Duration::from_secs(60);

/// Sends a request as this user, in a cgroup. Returns the body of the answer.
fn request(daemon: &Daemon, uid: u32, cgroup: &Cgroup) -> Value {
    let mut command = behind(&cgroup.enter(), "setpriv".as_ref());
    command
        .arg(format!("--reuid={uid}"))
        .arg("--clear-groups")
        .args(["curl", "--silent", "--unix-socket"])
        .arg(daemon.unix())
        .arg("http://localhost/v1/credentials");
    let output = run(command, b"", TIMEOUT).success("curl");
    serde_json::from_str(&output).unwrap_or_else(|error| panic!("{error}: {output}"))
}

fn rule(id: &str, uid: u32) -> String {
    format!("\n[[workload]]\nspiffe_id = \"spiffe://example.org/{id}\"\nuid = {uid}\n")
}

/// Starts a daemon with these rules, and a chain of two roles. The second one has further keys.
fn start(folder: &Path, keys: &str, rules: &str) -> (ChainUpstream, Daemon) {
    let upstream = ChainUpstream::start(folder, &["spiffe://example.org/ns/a/sa/b"]);
    let chain = "\
[[role.chain]]
role_arn = \"arn:aws:iam::222222222222:role/middle\"
external_id = \"shared-id\"
";
    let configuration = upstream.configuration(chain) + keys + rules;
    let daemon = Daemon::start(folder, "", &configuration).ready();
    (upstream, daemon)
}

/// T47: the unit of a caller becomes a tag, and a part of a policy. No name of a unit means more
/// than itself.
#[test]
fn fact_with_a_meaning_of_its_own_is_rejected_before_any_call_with_it() {
    if !root() {
        return;
    }
    let folder = folder();
    let keys = "\
tags = { \"unit\" = \"{systemd_unit}\" }
policy = '{\"Version\": \"2012-10-17\", \"Statement\": [{\"Effect\": \"Allow\", \"Action\": \"s3:*\", \"Resource\": \"arn:aws:s3:::b/{systemd_unit}/*\"}]}'
";
    let (upstream, daemon) = start(folder.path(), keys, &rule("ns/a/sa/b", 61001));
    let long = format!("{}.service", "x".repeat(247));
    let units = [
        "*.service",
        "a?.service",
        "${aws:username}.service",
        "{spiffe_id}.service",
        "{user}.service",
        "a\".service",
        "a b.service",
        "b\u{ed}lling.service",
        "a\\x2db.service",
        "a,b=c.service",
        "no-unit",
    ];
    for unit in units {
        let body = request(&daemon, 61001, &Cgroup::new(unit));
        assert_eq!(body["code"], "invalid_parameter", "{unit}: {body}");
        let message = body["message"].as_str().unwrap();
        let fix = "; correct that parameter of the [[role]]";
        assert!(
            message.contains("hop 2, `") && message.contains(fix),
            "{body}"
        );
    }
    assert_eq!(upstream.counts(), [0, 0, 0]);
    for unit in ["a:b@1.service", long.as_str()] {
        let body = request(&daemon, 61001, &Cgroup::new(unit));
        assert_eq!(body["RoleArn"], HOPS[1], "{unit}: {body}");
    }
    assert_eq!(upstream.counts(), [1, 2, 0]);
}

/// T47, T48: callers of one SPIFFE ID differ by facts of the kernel. Each has a session with its
/// own values, and a user of a container is not the user of the node with its number.
#[test]
fn facts_of_callers_with_one_identity_make_sessions_of_their_own() {
    if !root() {
        return;
    }
    let folder = folder();
    let keys = "tags = { \"account\" = \"{user}\", \"unit\" = \"{systemd_unit}\" }\n";
    let container = "\n[[workload]]\nspiffe_id = \"spiffe://example.org/ns/a/sa/b\"\ncgroup = \"/kubepods/**\"\n";
    let rules = [1, 2].map(|uid| rule("ns/a/sa/b", uid)).concat() + container;
    let (upstream, daemon) = start(folder.path(), keys, &rules);
    let name = |uid: u32| {
        nix::unistd::User::from_uid(uid.into())
            .unwrap()
            .unwrap()
            .name
    };
    let units = ["one.service", "two.service"].map(|unit| (unit, Cgroup::new(unit)));
    let callers = [(1, &units[0]), (2, &units[0]), (1, &units[1])];
    let key = |uid: u32, cgroup: &Cgroup| {
        let body = request(&daemon, uid, cgroup);
        let key = body["AccessKeyId"].as_str();
        key.unwrap_or_else(|| panic!("{body}")).to_owned()
    };
    let keys = callers.map(|(uid, (_, cgroup))| key(uid, cgroup));
    assert_eq!(keys.iter().collect::<HashSet<_>>().len(), 3, "{keys:?}");
    // Each gets its own again. All of them share the first hop, which has no facts.
    assert_eq!(callers.map(|(uid, (_, cgroup))| key(uid, cgroup)), keys);
    assert_eq!(upstream.counts(), [1, 3, 0]);
    let audit = fs::read_to_string(folder.path().join("audit.log")).unwrap();
    let records: Vec<Value> = audit
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    for (record, (uid, (unit, _))) in records.iter().zip(callers) {
        let tags = serde_json::json!({ "account": name(uid), "unit": unit });
        assert_eq!(
            (&record["uid"], &record["chain"][1]["tags"]),
            (&uid.into(), &tags)
        );
    }
    Cgroup::create_kubelets();
    let body = request(&daemon, 1, &Cgroup::of_pod(900));
    assert_eq!(body["code"], "invalid_parameter", "{body}");
    let message = body["message"].as_str().unwrap();
    assert!(
        message.contains("{user} has no value for this caller"),
        "{message}"
    );
    assert_eq!(upstream.counts(), [1, 3, 0]);
}

/// T47, T48: callers of one SPIFFE ID in two pods. Each has a session with its own pod, whose UID
/// is that of its cgroup.
#[test]
fn pods_with_one_identity_have_sessions_of_their_own() {
    if !root() {
        return;
    }
    let folder = folder();
    Cgroup::create_kubelets();
    let keys = "tags = { \"pod\" = \"{pod_uid}\" }\n";
    let container = "\n[[workload]]\nspiffe_id = \"spiffe://example.org/ns/a/sa/b\"\ncgroup = \"/kubepods/**\"\n";
    let rules = rule("ns/a/sa/b", 2) + container;
    let (upstream, daemon) = start(folder.path(), keys, &rules);
    let pods = [901, 902].map(Cgroup::of_pod);
    let requests = [&pods[0], &pods[1], &pods[0]];
    let keys = requests.map(|pod| request(&daemon, 1, pod)["AccessKeyId"].to_string());
    assert!(keys[0] != keys[1] && keys[0] == keys[2], "{keys:?}");
    // The first hop, which has no facts, is shared.
    assert_eq!(upstream.counts(), [1, 2, 0]);
    for (record, pod) in daemon.audit_after(0).iter().zip(requests) {
        let uid = Value::from(pod_uid(pod));
        assert_eq!(record["reason"], "ok", "{record}");
        assert_eq!(
            (&record["pod_uid"], &record["chain"][1]["tags"]["pod"]),
            (&uid, &uid),
            "{record}"
        );
    }
    let body = request(&daemon, 2, &Cgroup::new("outside-pods.service"));
    assert_eq!(body["code"], "invalid_parameter", "{body}");
    let message = body["message"].as_str().unwrap();
    assert!(
        message.contains("{pod_uid} has no value for this caller"),
        "{message}"
    );
    assert_eq!(upstream.counts(), [1, 2, 0]);
}

/// Returns the UID in the path of a pod's cgroup.
fn pod_uid(pod: &Cgroup) -> String {
    let name = pod.path().parent().unwrap().file_name().unwrap();
    let name = name.to_str().unwrap();
    name.strip_prefix("pod").unwrap().to_owned()
}

/// T24, T48: a rule by unit is decided by the socket alone. A role that depends on the caller's
/// user also needs a process of that user that holds the socket now.
#[test]
fn user_of_a_passed_socket_is_not_a_fact() {
    if !root() {
        return;
    }
    let folder = folder();
    let by_unit = "\n[[workload]]\nspiffe_id = \"spiffe://example.org/ns/a/sa/b\"\nsystemd_unit = \"one.service\"\n";
    let keys = "tags = { \"account\" = \"{user}\" }\n";
    let (upstream, daemon) = start(folder.path(), keys, by_unit);
    let unit = Cgroup::new("one.service");
    let address = daemon.listener("tcp");
    let maker = Connector::start(1, "tcp", &address, unit.path());
    // Of the two only the first is held by a process of user 1 as well.
    let (status, body) = fetch(TcpStream::from(maker.connect_and_keep()));
    assert_eq!(status, 200, "{body}");
    let (status, body) = fetch(TcpStream::from(maker.connect()));
    // The search begins with the connection. If it is faster than the maker, which closes its copy
    // after it has passed one, the check before the answer notices that.
    let code = body["code"].as_str().unwrap();
    assert!(
        status == 403 && matches!(code, "no_holder" | "caller_gone"),
        "{body}"
    );
    assert_eq!(upstream.counts(), [1, 1, 0]);
}

/// T48: segments that swap or join give other tags, other session names and other sessions.
#[test]
fn workloads_with_similar_names_share_no_value_and_no_session() {
    if !root() {
        return;
    }
    let folder = folder();
    let long = "x".repeat(60);
    let paths = [
        "ns/a/sa/b".to_owned(),
        "ns/b/sa/a".to_owned(),
        "ns/a.b/sa/c".to_owned(),
        "ns/a/sa/b.c".to_owned(),
        format!("ns/{long}/sa/b"),
        format!("ns/{long}/sa/c"),
    ];
    let ids: Vec<String> = paths
        .iter()
        .map(|path| format!("spiffe://example.org/{path}"))
        .collect();
    let upstream = ChainUpstream::start(
        folder.path(),
        &ids.iter().map(String::as_str).collect::<Vec<_>>(),
    );
    // The source identity would be too long for two of them.
    let chain = CHAIN.replace("{path[1]}={path[3]}", "{session_name}");
    let rules: String = paths
        .iter()
        .zip(61001..)
        .map(|(path, uid)| rule(path, uid))
        .collect();
    let configuration = upstream.configuration(&chain) + &rules;
    let daemon = Daemon::start(folder.path(), "", &configuration).ready();
    let cgroup = Cgroup::new("similar.service");
    let mut keys = HashSet::new();
    for uid in (61001..).take(paths.len()) {
        let body = request(&daemon, uid, &cgroup);
        assert!(
            keys.insert(body["AccessKeyId"].as_str().unwrap().to_owned()),
            "{body}"
        );
    }
    assert_eq!(upstream.counts(), [paths.len(); 3]);
    let audit = fs::read_to_string(folder.path().join("audit.log")).unwrap();
    let records = audit
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let mut names = HashSet::new();
    for (record, id) in records.zip(&ids) {
        assert_eq!(record["spiffe_id"], **id);
        assert!(names.insert(record["session_name"].to_string()), "{record}");
        let hop = &record["chain"][1];
        let namespace = id.split('/').nth(4).unwrap();
        assert_eq!(hop["tags"]["spiffe-id"], **id);
        assert_eq!(hop["tags"]["kubernetes-namespace"], namespace);
        assert_eq!(hop["source_identity"], record["session_name"]);
    }
    assert_eq!(names.len(), paths.len());
}

/// T49: nothing that a path can name gives the credentials of a session within a chain.
#[test]
fn session_within_a_chain_has_no_name() {
    if !root() {
        return;
    }
    let folder = folder();
    let upstream = ChainUpstream::start(folder.path(), &["spiffe://example.org/ns/a/sa/b"]);
    let configuration = upstream.configuration(CHAIN) + &rule("ns/a/sa/b", 61001);
    let daemon = Daemon::start(folder.path(), "", &configuration).ready();
    let cgroup = Cgroup::new("named.service");
    assert_eq!(request(&daemon, 61001, &cgroup)["RoleArn"], HOPS[2]);
    let encoded = |arn: &str| arn.replace(':', "%3A").replace('/', "%2F");
    let mut paths: Vec<String> = HOPS
        .iter()
        .map(|arn| format!("/{}", encoded(arn)))
        .collect();
    paths.extend(["/hop", "/%20", "/%00", "/chained/x"].map(str::to_owned));
    for path in paths {
        let mut command = behind(&cgroup.enter(), "setpriv".as_ref());
        command
            .args([
                "--reuid=61001",
                "--clear-groups",
                "curl",
                "--silent",
                "--unix-socket",
            ])
            .arg(daemon.unix())
            .arg(format!("http://localhost/v1/credentials{path}"));
        let output = run(command, b"", TIMEOUT).success("curl");
        assert!(
            output.contains("\"code\"") && !output.contains("AccessKeyId"),
            "{path}: {output}"
        );
    }
}

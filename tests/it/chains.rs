//! Chains of roles, with a verifying STS: each call is signed with the credentials of the hop
//! before it.

mod faults;
mod limits;

use std::collections::HashSet;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};

use crate::harness::chain::{CHAIN, ChainUpstream, Gate, HOPS, HopFault};
use crate::harness::client::{answer, fetch, send};
use crate::harness::counterparts::process::{Process, await_some, run};
use crate::harness::counterparts::{Port, folder, http_get, tool};
use crate::harness::daemon::{Daemon, PROGRAM};
use crate::harness::upstream::{ME, Upstream, my_rule, own_rules};

const ID: &str = "spiffe://example.org/ns/shop/sa/billing";
/// Bounds what takes milliseconds, and the second for which a failure is cached.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Starts a daemon whose callers are this test.
pub(crate) fn start(folder: &Path) -> (ChainUpstream, Daemon) {
    start_with(folder, "", None)
}

/// Starts such a daemon with these further tables, and with sessions of this lifetime.
fn start_with(folder: &Path, tables: &str, lifetime: Option<Duration>) -> (ChainUpstream, Daemon) {
    let upstream = ChainUpstream::start(folder, &[ID]);
    if let Some(lifetime) = lifetime {
        upstream.shorten_sessions(lifetime);
    }
    let uid = nix::unistd::geteuid().as_raw();
    let configuration = upstream.configuration(CHAIN) + tables + &own_rules(ID, uid);
    let daemon = Daemon::start(folder, "", &configuration).ready();
    (upstream, daemon)
}

fn request(daemon: &Daemon) -> (u16, Value) {
    fetch(UnixStream::connect(daemon.unix()).unwrap())
}

/// Sends requests until one gets credentials.
pub(crate) fn await_credentials(daemon: &Daemon) -> Value {
    await_some("credentials", TIMEOUT, || {
        let (status, body) = request(daemon);
        (status == 200).then_some(body)
    })
}

/// All requests are open before the first hop is answered, so that none finds a session.
#[test]
fn thousand_callers_of_one_identity_call_each_hop_once() {
    const CALLERS: usize = 1000;
    let (_, descriptors) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, descriptors, descriptors).unwrap();
    let folder = folder();
    let upstream = ChainUpstream::start(folder.path(), &[ID]);
    let uid = nix::unistd::geteuid().as_raw();
    // The call that is held does not end by itself.
    let configuration = upstream.configuration(CHAIN) + &own_rules(ID, uid);
    let configuration = configuration.replace("[sts]\n", "[sts]\ntimeout = \"60s\"\n");
    let listen = "max_connections_per_workload = 2000\n";
    let daemon = Daemon::start(folder.path(), listen, &configuration).ready();
    let (gate, sent) = (Arc::new(Gate::default()), Barrier::new(CALLERS + 1));
    upstream.hold_first(&gate);
    let request = || {
        let mut stream = send(UnixStream::connect(daemon.unix()).unwrap());
        sent.wait();
        let (status, body) = answer(&mut stream);
        // A slow machine may answer some that the session is pending.
        let body = match body["code"] == "pending" {
            true => await_credentials(&daemon),
            false => body,
        };
        let key = body["AccessKeyId"].as_str();
        key.unwrap_or_else(|| panic!("{status} {body}")).to_owned()
    };
    let keys: HashSet<String> = thread::scope(|scope| {
        let callers: Vec<_> = (0..CALLERS).map(|_| scope.spawn(request)).collect();
        sent.wait();
        gate.open();
        let keys = callers.into_iter().map(|caller| caller.join().unwrap());
        keys.collect()
    });
    assert_eq!((keys.len(), upstream.counts()), (1, [1, 1, 1]));
}

#[test]
fn records_and_status_have_each_hop() {
    let folder = folder();
    let (_upstream, daemon) = start(folder.path());
    let body = await_credentials(&daemon);
    let audit = fs::read_to_string(folder.path().join("audit.log")).unwrap();
    let record: Value = serde_json::from_str(audit.lines().last().unwrap()).unwrap();
    let name = "example.org=ns=shop=sa=billing";
    assert_eq!(record["role_arn"], HOPS[2]);
    assert_eq!(record["access_key_id"], body["AccessKeyId"]);
    let chain = json!([
        { "role_arn": HOPS[0], "session_name": name },
        {
            "role_arn": HOPS[1],
            "session_name": name,
            "source_identity": "shop=billing",
            "tags": { "kubernetes-namespace": "shop", "spiffe-id": ID },
        },
        { "role_arn": HOPS[2], "session_name": name },
    ]);
    assert_eq!(record["chain"], chain);
    let (_, status) = daemon.query_status_socket("/status");
    let status: Value = serde_json::from_str(&status).unwrap();
    let mut entries = status["credentials"].as_array().unwrap().clone();
    entries.sort_by_key(|entry| entry["chain"].as_array().unwrap().len());
    let hops: Vec<&Value> = entries.iter().map(|entry| &entry["hop"]).collect();
    assert_eq!(hops, [&json!(1), &json!(2), &Value::Null]);
    for (entry, count) in entries.iter().zip(1..) {
        assert_eq!(entry["chain"], json!(HOPS[..count]), "{entry}");
    }
}

/// Session policies and tags share the space in a session token.
#[test]
fn space_for_policies_and_tags_is_logged_before_it_ends() {
    let folder = folder();
    let upstream = ChainUpstream::start(folder.path(), &[ID]);
    let uid = nix::unistd::geteuid().as_raw();
    let with_tags = |count: usize| {
        let tag = |number| format!("\"tag-{number}\" = \"{}\"", "x".repeat(240));
        let tags: Vec<String> = (0..count).map(tag).collect();
        let chain = format!(
            "[[role.chain]]\nrole_arn = \"{}\"\nexternal_id = \"shared-id\"\ntags = {{ {} }}\n",
            HOPS[1],
            tags.join(", ")
        );
        upstream.configuration(&chain) + &own_rules(ID, uid)
    };
    let run = |name: &str, count: usize| {
        let folder = folder.path().join(name);
        fs::create_dir(&folder).unwrap();
        Daemon::start(&folder, "", &with_tags(count)).ready()
    };
    let daemon = run("full", 15);
    await_credentials(&daemon);
    let event = "session policies and tags nearly reach the limit of STS";
    daemon.await_line(&[event, HOPS[1], "percent=89"]);
    let daemon = run("over", 20);
    let body = await_some("the rejection", TIMEOUT, || {
        let (status, body) = request(&daemon);
        (status == 403).then_some(body)
    });
    let message = body["message"].as_str().unwrap();
    assert_eq!(body["code"], "sts_bad_policy", "{body}");
    assert!(message.contains("hop 2 "), "{message}");
}

/// Runs `awsvid <name>` with the daemon's configuration, and returns its output.
fn command(folder: &Path, name: &str) -> String {
    let mut command = Command::new(PROGRAM);
    command
        .arg(name)
        .arg("--config")
        .arg(folder.join("awsvid.toml"));
    let output = run(command, b"", TIMEOUT);
    format!("{}{}", output.stdout, output.stderr)
}

#[test]
fn check_assumes_each_role_and_names_the_one_that_fails() {
    let folder = folder();
    let (upstream, _daemon) = start(folder.path());
    let text = command(folder.path(), "check");
    for (role_arn, hop) in HOPS.iter().zip(1..) {
        assert!(
            text.contains(&format!("hop {hop}: {role_arn} assumed by {ID}")),
            "{text}"
        );
    }
    upstream.fail(HOPS[1], Some(HopFault::Denied));
    let text = command(folder.path(), "check");
    let fix = format!(
        "a policy of {} has to allow the same on {}",
        HOPS[0], HOPS[1]
    );
    assert!(
        text.contains("hop 2: STS at ") && text.contains(&fix),
        "{text}"
    );
    assert!(!text.contains("hop 3"), "{text}");
}

/// The second opinion: moto verifies by code of its own, from the second hop on, the session token,
/// the signature, the permission of the session, and the principal and external ID of the trust
/// policy. It ignores tags and the source identity, but they are in the signed body. No tag has a
/// space: moto encodes the parsed form again, in which a space becomes `+` instead of `%20`.
#[test]
fn another_sts_accepts_the_signature_of_each_hop() {
    let Some(program) = tool("moto_server") else {
        return;
    };
    let folder = folder();
    let port = Port::reserve();
    let mut server = Command::new(program);
    let number = port.address().port().to_string();
    server.args(["-H", "127.0.0.1", "-p", &number]);
    let server = Process::start("moto", server, &folder.path().join("moto.log"));
    let moto = Moto(port.address());
    let upstream = Upstream::start_for_me();
    server.await_some("moto serves", TIMEOUT, || {
        http_get(moto.0, "/moto-api/data.json").filter(|(status, _)| *status == 200)
    });
    let session = |role: &str| {
        format!(
            r#""Principal":{{"AWS":"arn:aws:sts::123456789012:assumed-role/{role}/{MY_SESSION}"}}"#
        )
    };
    let external_id = r#""Condition":{"StringEquals":{"sts:ExternalId":"shared-id"}}"#;
    moto.create_role("hop", r#""Principal":{"Federated":"any"}"#);
    moto.create_role("middle", &format!("{},{external_id}", session("hop")));
    moto.create_role("last", &session("middle"));
    moto.permit("hop");
    let role = |name: &str| format!("role_arn = \"arn:aws:iam::123456789012:role/{name}\"\n");
    let identity = upstream.configuration();
    let (identity, _) = identity.split_once("[sts]").unwrap();
    let configuration = format!(
        "{identity}[sts]\nregion = \"us-east-1\"\nendpoint = \"http://{}\"\n\
         [[role]]\nname = \"chained\"\nspiffe_id = \"{ME}\"\n{}\
         [[role.chain]]\n{}external_id = \"shared-id\"\nsource_identity = \"{{session_name}}\"\n\
         tags = {{ \"user\" = \"{{path[1]}}\", \"a/\u{fc}+=@\" = \"{{spiffe_id}}+\u{fc}\" }}\n\
         transitive_tags = [\"user\"]\n[[role.chain]]\n{}{}",
        moto.0,
        role("hop"),
        role("middle"),
        role("last"),
        my_rule(),
    );
    let daemon = Daemon::start(folder.path(), "", &configuration).ready();
    // The exchange of the token has no signature.
    moto.verify_after(1);
    let body = await_some("the rejection of the last hop", TIMEOUT, || {
        let (status, body) = request(&daemon);
        (status == 403).then_some(body)
    });
    let message = body["message"].as_str().unwrap();
    assert!(
        message.contains("hop 3 ") && message.contains("assumed-role/middle"),
        "{message}"
    );
    moto.verify_after(1);
    moto.permit("middle");
    let body = await_credentials(&daemon);
    assert_eq!(body["RoleArn"], "arn:aws:iam::123456789012:role/last");
}

/// The name of the session of [`ME`].
const MY_SESSION: &str = "example.org=user=me";

/// The address of a moto.
struct Moto(SocketAddr);

impl Moto {
    /// Creates a role. `admitted` are further keys of the statement of its trust policy.
    fn create_role(&self, role: &str, admitted: &str) {
        self.iam(
            "Action=CreateRole",
            role,
            &format!("AssumeRolePolicyDocument={}", statement(admitted)),
        );
    }

    /// Permits the sessions of a role to assume roles.
    fn permit(&self, role: &str) {
        let policy = statement(r#""Resource":"*""#);
        let policy = format!("PolicyName=any&PolicyDocument={policy}");
        self.iam("Action=PutRolePolicy", role, &policy);
    }

    fn iam(&self, action: &str, role: &str, rest: &str) {
        let header = "Authorization: AWS4-HMAC-SHA256 Credential=any/20260101/us-east-1/iam/aws4_request, \
                      SignedHeaders=host, Signature=none";
        let form = format!("Version=2010-05-08&{action}&RoleName={role}&{rest}");
        self.post("/", header, &form);
    }

    /// Accepts this number of calls of AWS's services without verification, and then none.
    fn verify_after(&self, calls: usize) {
        // moto finds no body in a form.
        let header = "Content-Type: text/plain";
        self.post("/moto-api/reset-auth", header, &calls.to_string());
    }

    fn post(&self, path: &str, header: &str, body: &str) {
        let mut command = Command::new("curl");
        command
            .args(["--silent", "--show-error", "--fail-with-body"])
            .args(["--data", body, "--header", header])
            .arg(format!("http://{}{path}", self.0));
        run(command, b"", TIMEOUT).success("curl");
    }
}

/// Returns a policy that permits all of STS, encoded for a form.
fn statement(rest: &str) -> String {
    let policy = format!(
        r#"{{"Version":"2012-10-17","Statement":[{{"Effect":"Allow","Action":"sts:*",{rest}}}]}}"#
    );
    policy.replace('"', "%22").replace('=', "%3D")
}

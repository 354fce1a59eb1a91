//! The whole path with nothing of ours in the place of the real thing: SPIRE, MinIO, the AWS CLI.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::harness::counterparts::minio::{self, Minio};
use crate::harness::counterparts::process::{Output, await_some};
use crate::harness::counterparts::spire::Spire;
use crate::harness::counterparts::workload::Workload;
use crate::harness::counterparts::{folder, root, tool};
use crate::harness::daemon::Daemon;

const READER: &str = "spiffe://example.org/w/reader";
const OTHER: &str = "spiffe://example.org/w/other";

/// SPIRE and MinIO with an object that only [`READER`] may read, and awsvid registered for both identities.
struct World {
    spire: Spire,
    minio: Minio,
    daemon: Daemon,
    aws: std::path::PathBuf,
}

impl World {
    fn start(folder: &Path) -> Option<Self> {
        if !root() {
            return None;
        }
        let aws = tool("aws")?;
        let spire = Spire::start(folder)?;
        let minio = Minio::start(folder, &spire.issuer_url(), &minio::readable_by(READER, "shop"))?;
        minio.make_bucket("shop");
        minio.put("shop", "test.txt", b"hello from the shop\n");
        // The daemon runs as root; both identities are its own at SPIRE, and its rules give them to callers.
        for id in [READER, OTHER] {
            spire.register(id, &["unix:uid:0"]);
        }
        let configuration = format!(
            r#"
[identity]
socket = "unix://{}"
audience = "{}"
[sts]
endpoint = "{}"
[[workload]]
spiffe_id = "{READER}"
uid = 1001
[[workload]]
spiffe_id = "{OTHER}"
uid = 1002
[[role]]
name = "shop"
spiffe_id = "spiffe://example.org/w/*"
role_arn = "{}"
"#,
            spire.agent_socket().display(),
            minio::AUDIENCE,
            minio.endpoint(),
            minio.role_arn(),
        );
        let daemon = Daemon::start(folder, "", &configuration).ready();
        Some(Self { spire, minio, daemon, aws })
    }

    /// `aws s3 cp` as a user that has nothing but the variables which the README names.
    fn copy(&self, uid: u32) -> Output {
        let workload = Workload::new(uid)
            .env("AWS_CONTAINER_CREDENTIALS_FULL_URI", &self.daemon.uri())
            .env("AWS_CONTAINER_AUTHORIZATION_TOKEN", "any")
            .env("AWS_REGION", "us-east-1");
        workload.run(&self.aws, &["--endpoint-url", &self.minio.endpoint(), "s3", "cp", "s3://shop/test.txt", "-"])
    }

    /// curl over the unix socket; the body.
    fn curl(&self, uid: u32) -> Value {
        let socket = self.daemon.unix();
        let arguments = ["-sS", "--unix-socket", socket.to_str().unwrap(), "http://localhost/v1/credentials"];
        let answer = Workload::new(uid).run("/usr/bin/curl", &arguments).success("curl");
        serde_json::from_str(&answer).unwrap()
    }

    /// Fetches and exchanges for an identity, by the counterparts' own logs.
    fn upstream(&self, trace: &minio::Trace, id: &str, access_key_id: &str) -> (usize, usize) {
        (self.spire.jwt_svids_fetched(id), trace.count(minio::ASSUME_ROLE, access_key_id))
    }
}

#[test]
fn each_process_gets_its_own_credentials() {
    let folder = folder();
    let Some(world) = World::start(folder.path()) else { return };
    let trace = world.minio.trace();
    // Readiness asked the source for a token of the first [[workload]]; from here on only requests do.
    let fetched_before = world.spire.jwt_svids_fetched(READER);
    // Its questions to its own listeners are requests too, and audited.
    let probes = world.daemon.audit().len();

    let output = world.copy(1001);
    assert_eq!(output.success("aws s3 cp as the reader"), "hello from the shop\n");
    let [issued] = &world.daemon.audit_after(probes)[..] else { panic!("one request, one audit record") };
    assert_eq!(issued["outcome"], "issued");
    assert_eq!(issued["uid"], 1001);
    assert_eq!(issued["spiffe_id"], READER);
    assert_eq!(issued["session_name"], "example.org=w=reader");
    assert_eq!(issued["role_arn"], world.minio.role_arn());
    assert_eq!(issued["cache"], "miss");
    let key = issued["access_key_id"].as_str().unwrap();
    let read = trace.await_record("the object is read", |record| record.api() == "s3.GetObject");
    assert_eq!((read.status(), read.access_key_id().as_deref()), (200, Some(key)));

    // The same credentials over the unix socket: one flight for both.
    let answer = world.curl(1001);
    assert_eq!(answer["AccessKeyId"], key);
    let [again] = &world.daemon.audit_after(probes + 1)[..] else { panic!("one request, one audit record") };
    assert_eq!((&again["cache"], &again["listener"]), (&Value::from("hit"), &Value::from("unix")));
    assert_eq!(world.upstream(&trace, READER, key), (fetched_before + 1, 1));

    // The other identity has a role too, which may not read the object.
    let output = world.copy(1002);
    assert!(!output.status.success() && output.stderr.contains("403"), "{output:?}");
    let [issued] = &world.daemon.audit_after(probes + 2)[..] else { panic!("one request, one audit record") };
    assert_eq!((&issued["spiffe_id"], &issued["outcome"]), (&Value::from(OTHER), &Value::from("issued")));
    let other_key = issued["access_key_id"].as_str().unwrap();
    assert_ne!(other_key, key);
    let refused = trace.await_record("the object is refused", |record| {
        record.access_key_id().as_deref() == Some(other_key) && record.api().starts_with("s3.")
    });
    assert_eq!(refused.status(), 403);
    assert_eq!(world.curl(1002)["AccessKeyId"], other_key);
    assert_eq!(world.upstream(&trace, OTHER, other_key), (1, 1));

    // Nobody's: awsvid says so, and the CLI shows it.
    let output = world.copy(1003);
    assert!(!output.status.success());
    assert!(output.stderr.contains("No identity is configured on this node for uid 1003"), "{output:?}");
    assert_eq!(world.curl(1003)["code"], "no_identity");
    let refused = world.daemon.audit_after(probes + 4);
    assert!(
        refused.iter().all(|record| record["reason"] == "no_identity" && record["access_key_id"].is_null()),
        "{refused:?}"
    );

    // Nothing secret is anywhere in what the daemon wrote.
    let secret = answer["SecretAccessKey"].as_str().unwrap();
    let token = answer["Token"].as_str().unwrap();
    let written = format!("{}{}", world.daemon.log(), serde_json::to_string(&world.daemon.audit()).unwrap());
    assert!(!written.contains(secret) && !written.contains(token) && !written.contains("eyJ"), "a secret was written");
    drop(trace);
}

#[test]
fn an_agent_that_is_away_fails_who_is_new_and_nobody_else() {
    let folder = folder();
    let Some(mut world) = World::start(folder.path()) else { return };
    let key = world.curl(1001)["AccessKeyId"].clone();
    world.spire.stop_agent();
    assert_eq!(world.curl(1001)["AccessKeyId"], key, "warm: answered from the cache");
    let cold = world.curl(1002);
    assert_eq!(cold["code"], "source_unavailable", "{cold}");
    world.spire.start_agent();
    await_some("the one who was cold is answered, without a restart of the daemon", Duration::from_secs(60), || {
        world.curl(1002)["AccessKeyId"].as_str().map(str::to_owned)
    });
    assert_eq!(world.spire.jwt_svids_signed(OTHER), 1);
}

//! awsvid between the real SPIRE and the real MinIO.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::counterparts::minio::{self, Minio};
use super::counterparts::process::Output;
use super::counterparts::spire::Spire;
use super::counterparts::workload::Workload;
use super::counterparts::{root, tool};
use super::daemon::Daemon;

/// SPIRE and MinIO with the object `shop/test.txt`, and awsvid registered for the identities of some users.
pub(crate) struct World {
    pub(crate) spire: Spire,
    pub(crate) minio: Minio,
    pub(crate) daemon: Daemon,
    aws: PathBuf,
    /// Registration entries, by SPIFFE ID.
    entries: BTreeMap<String, String>,
}

/// A user's SPIFFE ID.
pub(crate) fn id(name: &str) -> String {
    format!("spiffe://example.org/w/{name}")
}

/// What a world is made with, apart from its users.
#[derive(Default)]
pub(crate) struct Setting<'a> {
    /// Added to each rule, by the uid.
    pub(crate) rule: Option<&'a dyn Fn(u32) -> String>,
    /// Added to the role.
    pub(crate) role: &'a str,
    /// What is put before the agent's socket: makes it, and gives its path.
    pub(crate) socket: Option<&'a dyn Fn(&Path) -> PathBuf>,
}

impl World {
    /// For these users, by uid and name. The first may read the object, the others not.
    pub(crate) fn start(folder: &Path, users: &[(u32, &str)], setting: &Setting<'_>) -> Option<Self> {
        if !root() {
            return None;
        }
        let aws = tool("aws")?;
        let spire = Spire::start(folder)?;
        let minio = Minio::start(folder, &spire.issuer_url(), &minio::readable_by(&id(users[0].1), "shop"))?;
        minio.make_bucket("shop");
        minio.put("shop", "test.txt", b"hello from the shop\n");
        // The daemon runs as root; all identities are its own at SPIRE, and its rules give them to callers.
        let entries = users.iter().map(|(_, name)| (id(name), spire.register(&id(name), &["unix:uid:0"]))).collect();
        let rules: String = users
            .iter()
            .map(|(uid, name)| {
                let more = setting.rule.map_or(String::new(), |rule| rule(*uid));
                format!("[[workload]]\nspiffe_id = \"{}\"\nuid = {uid}\n{more}\n", id(name))
            })
            .collect();
        let socket = setting.socket.map_or(spire.agent_socket(), |make| make(&spire.agent_socket()));
        let configuration = format!(
            "[identity]\nsocket = \"unix://{}\"\naudience = \"{}\"\n[sts]\nendpoint = \"{}\"\n{rules}\
             [[role]]\nname = \"shop\"\nspiffe_id = \"{}\"\nrole_arn = \"{}\"\n{}\n",
            socket.display(),
            minio::AUDIENCE,
            minio.endpoint(),
            id("*"),
            minio.role_arn(),
            setting.role,
        );
        let daemon = Daemon::start(folder, "", &configuration).ready();
        Some(Self { spire, minio, daemon, aws, entries })
    }

    /// `aws s3 cp` as a user that has nothing but the variables which the README names.
    pub(crate) fn copy(&self, uid: u32) -> Output {
        let workload = Workload::new(uid)
            .env("AWS_CONTAINER_CREDENTIALS_FULL_URI", &self.daemon.uri())
            .env("AWS_CONTAINER_AUTHORIZATION_TOKEN", "any")
            .env("AWS_REGION", "us-east-1");
        workload.run(&self.aws, &["--endpoint-url", &self.minio.endpoint(), "s3", "cp", "s3://shop/test.txt", "-"])
    }

    /// curl over the unix socket: the head and the body, as they came.
    pub(crate) fn curl(&self, uid: u32) -> (String, String) {
        let socket = self.daemon.unix();
        let arguments = ["-sSi", "--unix-socket", socket.to_str().unwrap(), "http://localhost/v1/credentials"];
        let answer = Workload::new(uid).run("/usr/bin/curl", &arguments).success("curl");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
        (head.to_owned(), body.to_owned())
    }

    /// Starts the agent, and returns when it knows every identity again: one that has just started denies them.
    pub(crate) fn start_agent(&mut self) {
        self.spire.start_agent();
        self.entries.values().for_each(|entry| self.spire.await_entry(entry));
    }
}

//! SPIRE and MinIO with an identity and an object for each client. Daemons start and end.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::catalogue::{self, Client};
use super::table::Table;
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::minio::{self, Minio};
use crate::harness::counterparts::root;
use crate::harness::counterparts::spire::Spire;
use crate::harness::daemon::{Daemon, PROGRAM, imds_table};
use crate::harness::env::id;

pub(crate) const BUCKET: &str = "clients";
/// The first uids of users with an identity, and of those without one.
const FIRST_UID: u32 = 62_000;
const FIRST_STRANGER: u32 = 63_000;

/// A client that is installed here, and its user.
pub(crate) struct Member {
    pub(crate) client: Client,
    pub(crate) program: PathBuf,
    pub(crate) version: String,
    pub(crate) slug: String,
    pub(crate) uid: u32,
    /// A user without an identity, for rejections.
    pub(crate) stranger: u32,
    /// A cgroup as its service would have.
    pub(crate) cgroup: Cgroup,
}

impl Member {
    /// Returns the key of the object that only it may read.
    pub(crate) fn key(&self) -> String {
        key(&self.slug)
    }

    /// Returns the content of that object.
    pub(crate) fn content(&self) -> String {
        content(&self.slug)
    }

    pub(crate) fn spiffe_id(&self) -> String {
        id(&self.slug)
    }
}

fn key(slug: &str) -> String {
    format!("{slug}.txt")
}

fn content(slug: &str) -> String {
    format!("the object of {slug}")
}

/// The counterparts that run while the daemons change.
pub(crate) struct ClientStage {
    pub(crate) spire: Spire,
    pub(crate) minio: Minio,
    members: Vec<Member>,
    folder: PathBuf,
}

/// The settings of one daemon.
#[derive(Default)]
pub(crate) struct ClientSetting<'a> {
    /// Added to `[listen]` of the configuration.
    pub(crate) listen: &'a str,
    /// Added to the role.
    pub(crate) role: &'a str,
    /// Replaces the agent's socket.
    pub(crate) source: Option<PathBuf>,
    /// Replaces MinIO's URL as an STS.
    pub(crate) sts: Option<String>,
    /// Whether the daemon serves the instance metadata service too.
    pub(crate) serves_metadata: bool,
}

impl ClientStage {
    /// Starts it with the installed clients, in the versions of the table. Returns `None` after a
    /// printed skip.
    pub(crate) fn start(folder: &Path, table: &Table) -> Option<Self> {
        if !root() {
            return None;
        }
        let name = folder
            .file_name()
            .and_then(|name| name.to_str())
            .expect("a name in UTF-8");
        let members: Vec<Member> = catalogue::all()
            .into_iter()
            .zip(0..)
            .filter_map(|(client, number)| {
                let program = client.program()?;
                let version = client.version(&program, table.version(&client))?;
                let slug = client.slug();
                let cgroup = Cgroup::new(&format!("{slug}-{name}.service"));
                let (uid, stranger) = (FIRST_UID + number, FIRST_STRANGER + number);
                Some(Member {
                    client,
                    program,
                    version,
                    slug,
                    uid,
                    stranger,
                    cgroup,
                })
            })
            .collect();
        let spire = Spire::start(folder)?;
        let slugs: Vec<&str> = members.iter().map(|member| member.slug.as_str()).collect();
        let minio = Minio::start(folder, &spire.issuer_url(), &policy(&slugs))?;
        let objects: Vec<_> = slugs
            .iter()
            .map(|slug| (key(slug), content(slug)))
            .collect();
        minio.make_bucket(BUCKET);
        minio.put_all(BUCKET, &objects);
        // The daemon runs as root: all identities are its own at SPIRE. Readiness fetches a token
        // of its first rule.
        let ids: Vec<String> = ["root"].iter().chain(&slugs).map(|slug| id(slug)).collect();
        spire.register_all(&ids, &["unix:uid:0"]);
        // Other users have to start it, too.
        std::fs::copy(PROGRAM, folder.join("awsvid")).expect("a copy of awsvid");
        for word in members
            .iter()
            .flat_map(|member| member.client.words())
            .filter(|word| word.starts_with("tests/"))
        {
            let (file, copy) = (
                Path::new(env!("CARGO_MANIFEST_DIR")).join(word),
                folder.join(word),
            );
            std::fs::create_dir_all(copy.parent().expect("a folder")).expect("a folder");
            std::fs::copy(file, copy).expect("a copy of a client's file");
        }
        Some(Self {
            spire,
            minio,
            members,
            folder: folder.to_owned(),
        })
    }

    /// Returns the clients, in the table's order.
    pub(crate) fn members(&self) -> Vec<&Member> {
        self.members.iter().collect()
    }

    /// Returns the copy of awsvid that the clients' users can start.
    pub(crate) fn awsvid(&self) -> PathBuf {
        self.folder.join("awsvid")
    }

    /// Returns MinIO's address as an STS, for a proxy that can be cut.
    pub(crate) fn sts(&self) -> SocketAddr {
        self.minio
            .endpoint()
            .trim_start_matches("http://")
            .parse()
            .expect("MinIO's address")
    }

    /// Returns a path for a file of the test.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Returns the copy of a file of the repository that a client starts with.
    pub(crate) fn file(&self, word: &str) -> PathBuf {
        self.folder.join(word)
    }

    /// Starts a daemon with an empty cache, with its files in a folder of its own.
    pub(crate) fn daemon(&self, name: &str, setting: &ClientSetting<'_>) -> StagedDaemon {
        let StagedDaemon { daemon, folder } = self.unready_daemon(name, setting);
        StagedDaemon {
            daemon: daemon.ready(),
            folder,
        }
    }

    /// Does the same, and returns before the daemon is ready, for which STS has to answer.
    pub(crate) fn unready_daemon(&self, name: &str, setting: &ClientSetting<'_>) -> StagedDaemon {
        let folder = self.folder.join(name);
        std::fs::create_dir(&folder).expect("a new folder");
        let users = self
            .members
            .iter()
            .map(|member| (member.uid, member.slug.as_str()));
        let rules: String = [(0, "root")]
            .into_iter()
            .chain(users)
            .map(|(uid, slug)| format!("[[workload]]\nspiffe_id = \"{}\"\nuid = {uid}\n", id(slug)))
            .collect();
        let socket = setting
            .source
            .clone()
            .unwrap_or_else(|| self.spire.agent_socket());
        let imds = match setting.serves_metadata {
            true => imds_table(&folder),
            false => String::new(),
        };
        let configuration = format!(
            "{imds}[identity]\nworkload_api_socket = \"unix://{}\"\naudience = \"{}\"\n[sts]\nendpoint = \"{}\"\n{rules}\
             [[role]]\nname = \"{ROLE}\"\nspiffe_id = \"{}\"\nrole_arn = \"{}\"\n{}\n",
            socket.display(),
            minio::AUDIENCE,
            setting.sts.clone().unwrap_or_else(|| self.minio.endpoint()),
            id("*"),
            self.minio.role_arn(),
            setting.role,
        );
        StagedDaemon {
            daemon: Daemon::start(&folder, setting.listen, &configuration),
            folder,
        }
    }
}

pub(crate) const ROLE: &str = "reader";

/// Returns a policy in which each user of the role may read the object of its own name.
fn policy(slugs: &[&str]) -> Value {
    let statement = |slug: &&str| {
        json!({
            "Effect": "Allow",
            "Action": ["s3:GetObject"],
            "Resource": [format!("arn:aws:s3:::{BUCKET}/{}", key(slug))],
            "Condition": { "StringEquals": { "jwt:sub": id(slug) } },
        })
    };
    json!({ "Version": "2012-10-17", "Statement": slugs.iter().map(statement).collect::<Vec<_>>() })
}

/// A daemon and the folder of its files.
pub(crate) struct StagedDaemon {
    pub(crate) daemon: Daemon,
    folder: PathBuf,
}

impl StagedDaemon {
    pub(crate) fn token_file(&self) -> PathBuf {
        self.folder.join("token")
    }

    /// Returns the audit records of a user.
    pub(crate) fn requests(&self, uid: u32) -> Vec<Value> {
        let mut records = self.daemon.audit();
        records.retain(|record| record["uid"] == uid);
        records
    }

    /// Returns the audit records of a client's credentials. On a busy machine it may have closed
    /// its connection before, and sent a second request.
    pub(crate) fn issued(&self, member: &Member) -> Vec<Value> {
        let mut records = self.requests(member.uid);
        records.retain(|record| record["outcome"] == "issued");
        assert!(
            records
                .iter()
                .all(|record| record["spiffe_id"] == member.spiffe_id()),
            "{records:?}"
        );
        records
    }

    /// Returns the number of a user's requests.
    pub(crate) fn request_count(&self, uid: u32) -> u64 {
        self.requests(uid)
            .iter()
            .map(|record| record["repeated"].as_u64().unwrap_or(1))
            .sum()
    }
}

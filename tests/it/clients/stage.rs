//! SPIRE and MinIO with an identity and an object for each client. Daemons come and go.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::catalogue::{self, Client};
use super::table::Table;
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::minio::{self, Minio};
use crate::harness::counterparts::root;
use crate::harness::counterparts::spire::Spire;
use crate::harness::daemon::{Daemon, PROGRAM};
use crate::harness::world::id;

pub(crate) const BUCKET: &str = "clients";
/// Users with an identity have the numbers from here on, those without one from there.
const FIRST_UID: u32 = 62_000;
const FIRST_STRANGER: u32 = 63_000;

/// A client that is installed here, and its user.
pub(crate) struct Member {
    pub(crate) client: Client,
    pub(crate) program: PathBuf,
    pub(crate) version: String,
    pub(crate) slug: String,
    pub(crate) uid: u32,
    /// A user without an identity, for refusals.
    pub(crate) stranger: u32,
    /// As its service would have.
    pub(crate) cgroup: Cgroup,
}

impl Member {
    /// The key of the object that only it may read.
    pub(crate) fn key(&self) -> String {
        key(&self.slug)
    }

    /// What is in it.
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

/// What runs while the daemons change.
pub(crate) struct Stage {
    pub(crate) spire: Spire,
    pub(crate) minio: Minio,
    members: Vec<Member>,
    folder: PathBuf,
}

/// What one daemon has that others don't.
#[derive(Default)]
pub(crate) struct Setting<'a> {
    /// Put into `[listen]` ...
    pub(crate) listen: &'a str,
    /// ... and into the role.
    pub(crate) role: &'a str,
    /// In place of the agent's socket ...
    pub(crate) source: Option<PathBuf>,
    /// ... and of MinIO's URL as an STS.
    pub(crate) sts: Option<String>,
}

impl Stage {
    /// With those clients that are installed, in the versions of the table. `None` after a printed skip.
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
        // The daemon runs as root: all identities are its own at SPIRE. Readiness asks for that of its first rule.
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

    /// The clients, in the table's order.
    pub(crate) fn members(&self) -> Vec<&Member> {
        self.members.iter().collect()
    }

    /// awsvid, as the clients' users can start it.
    pub(crate) fn awsvid(&self) -> PathBuf {
        self.folder.join("awsvid")
    }

    /// Where MinIO is as an STS, for a way to it that can be cut.
    pub(crate) fn sts(&self) -> SocketAddr {
        self.minio
            .endpoint()
            .trim_start_matches("http://")
            .parse()
            .expect("MinIO's address")
    }

    /// A place for a file of the test's.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The copy of a file of the repository that a client starts with.
    pub(crate) fn file(&self, word: &str) -> PathBuf {
        self.folder.join(word)
    }

    /// Starts a daemon that has nothing cached yet, with its files in a folder of its own.
    pub(crate) fn daemon(&self, name: &str, setting: &Setting<'_>) -> Serving {
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
        let configuration = format!(
            "[identity]\nworkload_api_socket = \"unix://{}\"\naudience = \"{}\"\n[sts]\nendpoint = \"{}\"\n{rules}\
             [[role]]\nname = \"{ROLE}\"\nspiffe_id = \"{}\"\nrole_arn = \"{}\"\n{}\n",
            socket.display(),
            minio::AUDIENCE,
            setting.sts.clone().unwrap_or_else(|| self.minio.endpoint()),
            id("*"),
            self.minio.role_arn(),
            setting.role,
        );
        Serving {
            daemon: Daemon::start(&folder, setting.listen, &configuration).ready(),
            folder,
        }
    }
}

/// The role's name.
pub(crate) const ROLE: &str = "reader";

/// Whoever has the role may read the object of his own name.
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

/// A daemon and where its files are.
pub(crate) struct Serving {
    pub(crate) daemon: Daemon,
    folder: PathBuf,
}

impl Serving {
    pub(crate) fn token_file(&self) -> PathBuf {
        self.folder.join("token")
    }

    /// The audit records of a user.
    pub(crate) fn requests(&self, uid: u32) -> Vec<Value> {
        let mut records = self.daemon.audit();
        records.retain(|record| record["uid"] == uid);
        records
    }

    /// The audit records of what a client was given. On a busy machine it may have hung up before, and asked once more.
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

    /// How often a user has asked.
    pub(crate) fn asked(&self, uid: u32) -> u64 {
        self.requests(uid)
            .iter()
            .map(|record| record["repeated"].as_u64().unwrap_or(1))
            .sum()
    }
}

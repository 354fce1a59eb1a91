//! awsvid between the real SPIRE and the real MinIO.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::cgroup::Cgroup;
use super::counterparts::minio::{self, Minio};
use super::counterparts::process::{Output, behind, run};
use super::counterparts::spire::{Broker, Spire, SpireSetting};
use super::counterparts::workload::Workload;
use super::counterparts::{root, tool};
use super::daemon::{Daemon, PROGRAM};

/// SPIRE and MinIO with the object `shop/test.txt`, and awsvid registered for the identities of some users.
pub(crate) struct World {
    pub(crate) spire: Spire,
    pub(crate) minio: Minio,
    pub(crate) daemon: Daemon,
    aws: PathBuf,
    /// Registration entries, by SPIFFE ID.
    entries: BTreeMap<String, String>,
    /// Where curl runs. Over TCP it would otherwise be looked for among half of the machine's processes.
    workloads: Cgroup,
}

/// For one request, on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(60);

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
    /// Who says which user has which identity.
    pub(crate) source: Source,
    /// SPIRE's `default_x509_svid_ttl`.
    pub(crate) x509_svid_ttl: Option<&'static str>,
    /// `SpireSetting::without_hashes`.
    pub(crate) without_hashes: bool,
    /// Another build of awsvid.
    pub(crate) program: Option<&'a Path>,
    /// What the commands of awsvid and of the agent are put behind.
    pub(crate) behind: &'static [&'static str],
}

/// Where awsvid has its identities from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Source {
    /// All are registered for awsvid, whose rules give them to users.
    #[default]
    Rules,
    /// Each is registered for its user; SPIRE attests the caller, asked over its admin socket.
    Delegated,
    /// The same over the broker socket.
    Broker,
}

/// awsvid's own SPIFFE ID, where SPIRE attests callers.
pub(crate) const AWSVID: &str = "spiffe://example.org/awsvid";

impl Source {
    /// What SPIRE is started with for it.
    pub(crate) fn of_spire(self) -> SpireSetting {
        match self {
            Self::Rules => SpireSetting::default(),
            Self::Delegated => SpireSetting {
                delegates: vec![AWSVID.to_owned()],
                ..SpireSetting::default()
            },
            Self::Broker => SpireSetting {
                brokers: vec![Broker::by_pid(AWSVID)],
                ..SpireSetting::default()
            },
        }
    }

    /// Its part of `[identity]`, with the agent's Workload API at `socket`.
    fn keys(self, spire: &Spire, socket: &Path) -> String {
        let socket = format!("workload_api_socket = \"unix://{}\"", socket.display());
        match self {
            Self::Rules => socket,
            Self::Delegated => {
                let admin = spire.admin_socket();
                format!(
                    "{socket}\nsource = \"spire-delegated\"\nadmin_socket = \"unix://{}\"",
                    admin.display()
                )
            }
            Self::Broker => {
                let broker = spire.broker_socket();
                format!(
                    "{socket}\nsource = \"spiffe-broker\"\nbroker_socket = \"unix://{}\"",
                    broker.display()
                )
            }
        }
    }
}

/// What SPIRE tells awsvid by.
pub(crate) fn awsvid_selectors(program: &Path) -> [String; 2] {
    [
        "unix:uid:0".to_owned(),
        format!("unix:path:{}", program.display()),
    ]
}

impl World {
    /// For these users, by uid and name. The first may read the object, the others not.
    pub(crate) fn start(
        folder: &Path,
        users: &[(u32, &str)],
        setting: &Setting<'_>,
    ) -> Option<Self> {
        if !root() {
            return None;
        }
        let aws = tool("aws")?;
        let program = setting.program.unwrap_or(Path::new(PROGRAM));
        let spire_setting = SpireSetting {
            x509_svid_ttl: setting.x509_svid_ttl,
            without_hashes: setting.without_hashes,
            agent_behind: setting.behind.to_vec(),
            ..setting.source.of_spire()
        };
        let spire = Spire::start_with(folder, spire_setting)?;
        let minio = Minio::start(
            folder,
            &spire.issuer_url(),
            &minio::readable_by(&id(users[0].1), "shop"),
        )?;
        minio.make_bucket("shop");
        minio.put("shop", "test.txt", b"hello from the shop\n");
        let mut entries = BTreeMap::new();
        if setting.source != Source::Rules {
            entries.insert(
                AWSVID.to_owned(),
                spire.register(
                    AWSVID,
                    &awsvid_selectors(program).each_ref().map(String::as_str),
                ),
            );
        }
        for (uid, name) in users {
            // The daemon runs as root; by rules all identities are its own at SPIRE, and it gives them to callers.
            let owner = if setting.source == Source::Rules {
                0
            } else {
                *uid
            };
            entries.insert(
                id(name),
                spire.register(&id(name), &[&format!("unix:uid:{owner}")]),
            );
        }
        let rules: String = users
            .iter()
            .filter(|_| setting.source == Source::Rules)
            .map(|(uid, name)| {
                let more = setting.rule.map_or(String::new(), |rule| rule(*uid));
                format!(
                    "[[workload]]\nspiffe_id = \"{}\"\nuid = {uid}\n{more}\n",
                    id(name)
                )
            })
            .collect();
        let socket = setting
            .socket
            .map_or(spire.agent_socket(), |make| make(&spire.agent_socket()));
        let configuration = format!(
            "[identity]\n{}\naudience = \"{}\"\n[sts]\nendpoint = \"{}\"\n{rules}\
             [[role]]\nname = \"shop\"\nspiffe_id = \"{}\"\nrole_arn = \"{}\"\n{}\n",
            setting.source.keys(&spire, &socket),
            minio::AUDIENCE,
            minio.endpoint(),
            id("*"),
            minio.role_arn(),
            setting.role,
        );
        let daemon =
            Daemon::start_program(setting.behind, program, folder, "", &configuration).ready();
        let name = folder
            .file_name()
            .and_then(|name| name.to_str())
            .expect("a name in UTF-8");
        let workloads = Cgroup::new(&format!("workloads-{name}.service"));
        Some(Self {
            spire,
            minio,
            daemon,
            aws,
            entries,
            workloads,
        })
    }

    /// `aws s3 cp` as a user that has nothing but the variables which the README names.
    pub(crate) fn copy(&self, uid: u32) -> Output {
        let workload = Workload::new(uid)
            .env("AWS_CONTAINER_CREDENTIALS_FULL_URI", &self.daemon.uri())
            .env("AWS_CONTAINER_AUTHORIZATION_TOKEN", "any")
            .env("AWS_REGION", "us-east-1");
        workload.run(
            &self.aws,
            &[
                "--endpoint-url",
                &self.minio.endpoint(),
                "s3",
                "cp",
                "s3://shop/test.txt",
                "-",
            ],
        )
    }

    /// curl over the unix socket: the head and the body, as they came.
    pub(crate) fn curl(&self, uid: u32) -> (String, String) {
        self.curl_by(Path::new("/usr/bin/curl"), uid, "unix", "")
    }

    /// The same by a copy of curl, over this listener, for what is at `path` below `/v1/credentials`.
    pub(crate) fn curl_by(
        &self,
        program: &Path,
        uid: u32,
        listener: &str,
        path: &str,
    ) -> (String, String) {
        let (socket, user) = (self.daemon.unix(), uid.to_string());
        let user = [
            "setpriv",
            "--reuid",
            &user,
            "--regid",
            &user,
            "--clear-groups",
        ];
        let mut command = behind(&[&self.workloads.enter()[..], &user].concat(), program);
        command.env_clear().env("PATH", "/usr/bin:/bin").arg("-sSi");
        match listener {
            "unix" => {
                command
                    .arg("--unix-socket")
                    .arg(socket)
                    .arg(format!("http://localhost/v1/credentials{path}"));
            }
            _ => {
                command.args([
                    "-H",
                    "Authorization: any",
                    &format!("{}{path}", self.daemon.uri()),
                ]);
            }
        }
        let answer = run(command, b"", PATIENCE).success("curl");
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .unwrap_or_else(|| panic!("no answer: {answer:?}"));
        (head.to_owned(), body.to_owned())
    }

    /// The cgroup of workloads that a test starts itself.
    pub(crate) fn cgroup(&self) -> &Cgroup {
        &self.workloads
    }

    /// Registers an identity for processes with these selectors, with further options of `spire-server entry create`.
    pub(crate) fn register(&mut self, spiffe_id: &str, selectors: &[&str], options: &[&str]) {
        self.entries.insert(
            spiffe_id.to_owned(),
            self.spire.register_with(spiffe_id, selectors, options),
        );
    }

    /// Deletes the registration of an identity, and returns once the agent has forgotten it (if it runs).
    pub(crate) fn unregister(&mut self, spiffe_id: &str) {
        self.spire
            .delete_entry(&self.entries.remove(spiffe_id).expect("it is registered"));
    }

    /// Starts the agent, and returns when it knows every identity again: one that has just started denies them.
    pub(crate) fn start_agent(&mut self) {
        self.spire.start_agent();
        self.entries
            .values()
            .for_each(|entry| self.spire.await_entry(entry));
    }
}

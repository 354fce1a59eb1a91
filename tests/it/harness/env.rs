//! awsvid between the real SPIRE and the real MinIO.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::cgroup::Cgroup;
use super::counterparts::minio::{self, Minio};
use super::counterparts::process::{Output, behind, run};
use super::counterparts::spire::{Broker, Spire, SpireSetting};
use super::counterparts::workload::Workload;
use super::counterparts::{root, tool};
use super::daemon::{Daemon, PROGRAM};

/// SPIRE and MinIO with the object `shop/test.txt`, and awsvid registered for the identities of
/// some users.
pub(crate) struct Env {
    pub(crate) spire: Spire,
    pub(crate) minio: Minio,
    pub(crate) daemon: Daemon,
    aws: PathBuf,
    /// IDs of registration entries, by SPIFFE ID.
    entries: BTreeMap<String, String>,
    /// The cgroup in which curl runs. Without it, a search over TCP would read half of the
    /// machine's processes.
    workloads: Cgroup,
}

/// Bounds one request on a machine that is busy with other tests.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Returns a user's SPIFFE ID.
pub(crate) fn id(name: &str) -> String {
    format!("spiffe://example.org/w/{name}")
}

/// The settings of an environment, apart from its users.
#[derive(Default)]
pub(crate) struct Setting<'a> {
    /// Returns a text that is added to the rule for a uid.
    pub(crate) rule: Option<&'a dyn Fn(u32) -> String>,
    /// A text that is added to the role.
    pub(crate) role: &'a str,
    /// The permissions of the role, instead of those for the first user alone.
    pub(crate) permissions: Option<Value>,
    /// Makes a proxy in front of the agent's socket, and returns the proxy's path.
    pub(crate) socket: Option<&'a dyn Fn(&Path) -> PathBuf>,
    /// The source that maps users to identities.
    pub(crate) source: Source,
    pub(crate) x509_svid_ttl: Option<&'static str>,
    pub(crate) without_hashes: bool,
    /// Whether awsvid's own identity has two entries, the second with a hint.
    pub(crate) own_identity_twice: bool,
    /// Another build of awsvid.
    pub(crate) program: Option<&'a Path>,
    /// Words in front of the commands of awsvid and of the agent.
    pub(crate) behind: &'static [&'static str],
}

impl Setting<'_> {
    /// Returns the settings with this source, and nothing else set.
    pub(crate) fn of(source: Source) -> Self {
        Self {
            source,
            ..Self::default()
        }
    }
}

/// The source of awsvid's identities.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Source {
    /// All are registered for awsvid, which maps users to them by its rules.
    #[default]
    Rules,
    /// Each is registered for its user. SPIRE attests the caller over its admin socket.
    Delegated,
    /// Each is registered for its user. SPIRE attests the caller over its broker socket.
    Broker,
}

/// awsvid's own SPIFFE ID, for sources that attest callers.
pub(crate) const AWSVID: &str = "spiffe://example.org/awsvid";

impl Source {
    /// Returns the SPIRE settings that this source needs.
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

    /// Returns its part of `[identity]`, with the agent's Workload API at `socket`.
    pub(crate) fn keys(self, spire: &Spire, socket: &Path) -> String {
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

/// Returns the selectors by which SPIRE attests awsvid.
pub(crate) fn awsvid_selectors(program: &Path) -> [String; 2] {
    [
        "unix:uid:0".to_owned(),
        format!("unix:path:{}", program.display()),
    ]
}

impl Env {
    /// Starts it for these users (uid, name). Only the first may read the object.
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
            agent_behind: setting.behind.iter().map(ToString::to_string).collect(),
            ..setting.source.of_spire()
        };
        let spire = Spire::start_with(folder, spire_setting)?;
        let for_first = || minio::readable_by(&id(users[0].1), "shop");
        let permissions = setting.permissions.clone().unwrap_or_else(for_first);
        let minio = Minio::start(folder, &spire.issuer_url(), &permissions)?;
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
        if setting.own_identity_twice {
            spire.register_with(AWSVID, &["unix:uid:0"], &["-hint", "twice"]);
        }
        for (uid, name) in users {
            // The daemon runs as root. With rules, SPIRE registers all identities for the daemon,
            // which maps callers to them.
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

    /// Runs `aws s3 cp` as a user with only those variables in its environment that the README
    /// names.
    pub(crate) fn copy(&self, uid: u32) -> Output {
        self.copy_of(uid, "test.txt")
    }

    /// The same for another object of the bucket.
    pub(crate) fn copy_of(&self, uid: u32, key: &str) -> Output {
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
                &format!("s3://shop/{key}"),
                "-",
            ],
        )
    }

    /// Runs curl over the unix socket, and returns the head and body as received.
    pub(crate) fn curl(&self, uid: u32) -> (String, String) {
        self.curl_by(Path::new("/usr/bin/curl"), uid, "unix", "")
    }

    /// Runs a copy of curl over this listener, for `path` below `/v1/credentials`.
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
        let answer = run(command, b"", TIMEOUT).success("curl");
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .unwrap_or_else(|| panic!("no answer: {answer:?}"));
        (head.to_owned(), body.to_owned())
    }

    /// Returns the cgroup for workloads that a test starts itself.
    pub(crate) fn cgroup(&self) -> &Cgroup {
        &self.workloads
    }

    /// Registers an identity for processes with these selectors, with further options of
    /// `spire-server entry create`.
    pub(crate) fn register(&mut self, spiffe_id: &str, selectors: &[&str], options: &[&str]) {
        self.entries.insert(
            spiffe_id.to_owned(),
            self.spire.register_with(spiffe_id, selectors, options),
        );
    }

    /// Deletes the registration of an identity. If the agent runs, waits until it has dropped it.
    pub(crate) fn unregister(&mut self, spiffe_id: &str) {
        self.spire
            .delete_entry(&self.entries.remove(spiffe_id).expect("it is registered"));
    }

    /// Starts the agent, and waits until it knows every identity again: an agent that has just
    /// started denies them.
    pub(crate) fn start_agent(&mut self) {
        self.spire.start_agent();
        self.entries
            .values()
            .for_each(|entry| self.spire.await_entry(entry));
    }
}

//! awsvid on a stock machine, installed by the steps of the documents, with a SPIRE agent that
//! attests the machine's own processes. SPIRE's server and MinIO run on this computer.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::harness::counterparts::minio::{self, Minio};
use crate::harness::counterparts::process::{Output, run};
use crate::harness::counterparts::spire::{Broker, RemoteAgent, Spire, SpireSetting};
use crate::harness::counterparts::{folder, root, skip, tool};
use crate::harness::documents;
use crate::harness::env::{AWSVID, awsvid_selectors};
use crate::harness::is_slow;
use crate::harness::machine::{FILES, Machine, MachineStart};
use crate::harness::release::Release;

use super::TIMEOUT;
use super::tried_machines::ServedCallers;
use super::unit_caller::{ExpectedAnswer, UnitCaller};

/// The SPIFFE ID that the agent gets in addition to its own, as the parent of all entries.
const AGENT: &str = "spiffe://example.org/machine";
/// The identity of the object's only reader.
pub(super) const BILLING: &str = "spiffe://example.org/billing";
pub(super) const REPORTS: &str = "spiffe://example.org/reports";
/// Identities that are registered for awsvid, whose rules give them to callers.
pub(super) const RULES: [&str; 3] = [
    "spiffe://example.org/rules/user",
    "spiffe://example.org/rules/unit",
    "spiffe://example.org/rules/cgroup",
];
pub(super) const OBJECT: &str = "hello from the shop\n";
pub(super) const AUDIT: &str = "/var/log/awsvid/audit.log";
/// The packages of a release in the slow form, and one with the same program as a newer version.
pub(super) const PACKAGE: &str = "/machine/source/awsvid_*.deb";
pub(super) const NEWER_PACKAGE: &str = "/machine/newer.deb";
const NEWER_VERSION: &str = "9.0.0";
/// The line after the records of one caller.
const END: &str = "-- next caller";
/// Two users without any privilege.
const USERS: &str = "u billing 1001\nu shop 1002\n";

const AGENT_UNIT: &str = "\
[Unit]
Description=SPIRE agent
After=network.target
[Service]
ExecStart=/usr/local/bin/spire-agent run -config /etc/spire/agent.conf
Restart=on-failure
RuntimeDirectory=spire spire/admin spire/agent-sockets spire/broker
[Install]
WantedBy=multi-user.target
";
/// Connects a loopback port of the machine to the same port of this computer's loopback.
const OUTSIDE_SOCKET: &str = "\
[Unit]
Description=Port %i of the computer outside
[Socket]
ListenStream=127.0.0.1:%i
[Install]
WantedBy=sockets.target
";
const OUTSIDE_SERVICE: &str = "\
[Unit]
Description=Connections to port %i of the computer outside
[Service]
ExecStart=/usr/local/bin/socket-proxyd 10.0.2.2:%i
";

/// The machine, and what it needs of this computer.
pub(super) struct StockMachine {
    pub(super) machine: Machine,
    pub(super) spire: Spire,
    pub(super) minio: Minio,
    _folder: tempfile::TempDir,
}

impl StockMachine {
    /// Starts a machine of the suite and installs awsvid. The agent runs, and awsvid does not yet.
    /// Returns `None` after a printed skip.
    pub(super) fn install(suite: &str, start: MachineStart<'_>) -> Option<Self> {
        if !root() {
            return None;
        }
        let folder = folder();
        let setting = SpireSetting {
            remote_agent: Some(RemoteAgent {
                id: AGENT.to_owned(),
                node_attestor: String::new(),
            }),
            ..SpireSetting::default()
        };
        let spire = Spire::start_with(folder.path(), setting)?;
        let policy = minio::readable_by(BILLING, "shop");
        let minio = Minio::start(folder.path(), &spire.issuer_url(), &policy)?;
        minio.make_bucket("shop");
        minio.put("shop", "test.txt", OBJECT.as_bytes());
        let awsvid = awsvid_selectors(Path::new("/usr/bin/awsvid"));
        for spiffe_id in [AWSVID].into_iter().chain(RULES) {
            spire.register(spiffe_id, &awsvid.each_ref().map(String::as_str));
        }
        spire.register(BILLING, &["unix:user:billing"]);
        spire.register(REPORTS, &["systemd:id:reports.service"]);

        let files = folder.path().join("files");
        write_files(&files, &spire)?;
        let machine = Machine::start(suite, start, folder.path(), &files)?;
        let mut stock = Self {
            machine,
            spire,
            minio,
            _folder: folder,
        };
        stock.install_files()?;
        Some(stock)
    }

    /// Runs the steps of the documents: in the slow form those for a package, else those for a
    /// checkout, word by word but for the build.
    fn install_files(&mut self) -> Option<()> {
        let program = format!("{FILES}/source/target/release/awsvid");
        let steps = match is_slow() {
            true => documents::block("packages.md", "Install a package", "sudo apt-get install"),
            false => {
                let started = self.run(&format!("{program} --version"));
                if started.stderr.contains("GLIBC_") {
                    skip(&format!(
                        "this computer's build needs a newer C library: {}",
                        started.stderr
                    ));
                    return None;
                }
                let block =
                    documents::block("install-vm.md", "1. Install the files", "cargo build");
                let (_, steps) = block.split_once('\n').expect("several lines");
                steps.to_owned()
            }
        };
        let ports = [self.minio.endpoint(), self.spire.issuer_url()]
            .map(|url| url.rsplit(':').next().expect("a port").to_owned());
        // A copy of systemd's proxy, because SELinux does not let the original bind these ports.
        self.run(&format!(
            "systemd-sysusers {FILES}/workloads.conf
             install -D /lib/systemd/systemd-socket-proxyd /usr/local/bin/socket-proxyd
             install -D -m 0755 {FILES}/spire-agent /usr/local/bin/spire-agent
             install -D -m 0644 -t /etc/spire {FILES}/agent.conf {FILES}/bundle.pem
             install -m 0644 -t /etc/systemd/system {FILES}/units/*
             systemctl enable --quiet --now spire-agent.service outside@{}.socket outside@{}.socket
             cd {FILES}/source\n{steps}",
            ports[0], ports[1]
        ))
        .success("the documented installation");
        Some(())
    }

    pub(super) fn run(&mut self, script: &str) -> Output {
        self.machine.run(script)
    }

    /// Returns what a successful script prints, without the last line break.
    pub(super) fn read(&mut self, script: &str) -> String {
        let printed = self.run(script).success(script);
        printed.trim_end().to_owned()
    }

    /// Writes the configuration with this `[identity]` and these rules. MinIO is its STS.
    pub(super) fn configure(&mut self, identity: &str, rules: &str) {
        let text = format!(
            "{identity}audience = {:?}\n[sts]\nendpoint = {:?}\n[audit]\nfile = {AUDIT:?}\n{rules}\
             [[role]]\nname = \"shop\"\nspiffe_id = \"spiffe://example.org/**\"\nrole_arn = {:?}\n",
            minio::AUDIENCE,
            self.minio.endpoint(),
            self.minio.role_arn(),
        );
        let script = format!("cat >/etc/awsvid/awsvid.toml <<'EOF'\n{text}EOF\n");
        self.run(&script).success("the configuration");
        self.run("awsvid config validate")
            .success("awsvid config validate");
    }

    /// Lets each caller request credentials over the unix socket, TCP and TCP over IPv6. Returns
    /// the audit records of each.
    pub(super) fn request(&mut self, callers: &[UnitCaller]) -> Vec<Vec<Value>> {
        let one = |caller: &UnitCaller| format!("{}echo {END}\n", caller.script());
        let script: String = callers.iter().map(one).collect();
        let answers = self.read(&script);
        let records = |text: &str| -> Vec<Value> {
            let lines = text.lines().filter(|line| !line.is_empty());
            let parsed: Result<Vec<Value>, _> = lines.map(serde_json::from_str).collect();
            let mut parsed = parsed.unwrap_or_else(|error| panic!("{error} in {text}"));
            parsed.retain(|record| record["outcome"] != "failed");
            parsed
        };
        let of_callers = answers.split(END).map(records);
        of_callers.take(callers.len()).collect()
    }

    /// Asserts that the callers have their identities over each listener that is served here.
    pub(super) fn assert_identities(&mut self, callers: &[UnitCaller], served: &ServedCallers) {
        let records = self.request(callers);
        let mut wrong = Vec::new();
        for (caller, records) in callers.iter().zip(records) {
            let facts = |record: &Value| {
                let text = |name: &str| record[name].as_str().unwrap_or("-").to_owned();
                ["listener", "reason", "spiffe_id"].map(text)
            };
            let found: Vec<_> = records.iter().map(facts).collect();
            let of_unix = served.unix_answer(caller).into_iter();
            let of_tcp = served.tcp_answer(caller).into_iter();
            let expected: Vec<_> = of_unix
                .map(|answer| ("unix", answer))
                .chain(of_tcp.flat_map(|answer| [("tcp", answer); 2]))
                .map(|(listener, answer)| match answer {
                    ExpectedAnswer::Identity(spiffe_id) => [listener, "ok", spiffe_id],
                    ExpectedAnswer::Rejected(reason) => [listener, reason, "-"],
                })
                .collect();
            let is_seen = |record: &Value| {
                let found = record["systemd_unit"].as_str().unwrap_or_default();
                match caller.unit.strip_suffix('*') {
                    Some(begin) => found.starts_with(begin),
                    None => found == caller.unit,
                }
            };
            if found != expected || (served.tcp && !records.iter().all(is_seen)) {
                wrong.push(format!("{caller:?}: expected {expected:?}: {records:#?}"));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    /// Asserts that these credentials open the object at MinIO.
    pub(super) fn assert_opens_object(&self, answer: &str) {
        let answer: Value =
            serde_json::from_str(answer).unwrap_or_else(|error| panic!("{error} in {answer}"));
        let text = |name: &str| answer[name].as_str().expect("a credential").to_owned();
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--aws-sigv4", "aws:amz:us-east-1:s3", "--user"]);
        curl.arg(format!(
            "{}:{}",
            text("AccessKeyId"),
            text("SecretAccessKey")
        ));
        curl.arg("--header")
            .arg(format!("X-Amz-Security-Token: {}", text("Token")));
        curl.arg(format!("{}/shop/test.txt", self.minio.endpoint()));
        assert_eq!(run(curl, b"", TIMEOUT).success("curl"), OBJECT);
    }
}

/// Writes the files that the machine gets: the agent, and a checkout with a build or the packages
/// of a release.
fn write_files(files: &Path, spire: &Spire) -> Option<()> {
    let source = files.join("source");
    let release = source.join("target/release");
    let units = files.join("units");
    for directory in [&release, &units] {
        fs::create_dir_all(directory).expect("a directory");
    }
    let copy = |from: PathBuf, to: PathBuf| {
        let mut command = Command::new("cp");
        command
            .args(["--recursive", "--dereference"])
            .args([from, to]);
        run(command, b"", TIMEOUT).success("cp");
    };
    if is_slow() {
        write_packages(&files.with_file_name("release"), &source, copy)?;
    } else {
        let checkout = Path::new(env!("CARGO_MANIFEST_DIR"));
        copy(checkout.join("deploy"), source.join("deploy"));
        copy(env!("CARGO_BIN_EXE_awsvid").into(), release);
    }
    // The slow form has machines with an older C library than this computer's.
    let agent = if is_slow() {
        "spire-agent-static"
    } else {
        "spire-agent"
    };
    copy(tool(agent)?, files.join("spire-agent"));
    // The machine waits for those of other tests. The default is ten minutes.
    let token = spire.join_token(&["-spiffeID", AGENT, "-ttl", "86400"]);
    for (name, text) in [
        ("workloads.conf", USERS.to_owned()),
        ("bundle.pem", spire.bundle()),
        ("agent.conf", agent_configuration(spire, &token)),
        ("units/spire-agent.service", AGENT_UNIT.to_owned()),
        ("units/outside@.socket", OUTSIDE_SOCKET.to_owned()),
        ("units/outside@.service", OUTSIDE_SERVICE.to_owned()),
    ] {
        fs::write(files.join(name), text).expect("a file");
    }
    Some(())
}

/// Builds a release in `out`, and copies its deb and another one with a newer version.
fn write_packages(out: &Path, source: &Path, copy: impl Fn(PathBuf, PathBuf)) -> Option<()> {
    let release = Release::built(out)?.with_format("deb");
    release.run(&["files", "packages"]);
    let package = release.ending(".deb");
    let name = package.file_name().expect("a name").to_owned();
    fs::rename(package, source.join(name)).expect("the package");
    let newer = release.with_version(NEWER_VERSION);
    newer.run(&["packages"]);
    copy(newer.ending(".deb"), source.with_file_name("newer.deb"));
    Some(())
}

/// Returns the agent's configuration, with the sockets that the examples of `deploy` name.
fn agent_configuration(spire: &Spire, token: &str) -> String {
    // awsvid uses the first of its identities, and each of them may come first.
    let broker = |id: &str| {
        let types = format!(
            "allowed_reference_types = [{{ type_url = {:?} }}]",
            Broker::BY_PID
        );
        format!("{{ id = {id:?}, {types} }}, ")
    };
    let brokers: String = [AWSVID].into_iter().chain(RULES).map(broker).collect();
    format!(
        r#"
agent {{
    trust_domain = "{trust_domain}"
    trust_bundle_path = "/etc/spire/bundle.pem"
    data_dir = "/var/lib/spire"
    socket_path = "/run/spire/agent-sockets/spire-agent.sock"
    admin_socket_path = "/run/spire/admin/api.sock"
    authorized_delegates = ["{AWSVID}"]
    server_address = "10.0.2.2"
    server_port = {port}
    join_token = "{token}"
    log_level = "debug"
    experimental {{
        broker {{
            socket_path = "/run/spire/broker/api.sock"
            brokers = [{brokers}]
        }}
    }}
}}
plugins {{
    KeyManager "disk" {{ plugin_data {{ directory = "/var/lib/spire" }} }}
    NodeAttestor "join_token" {{ plugin_data {{ }} }}
    WorkloadAttestor "systemd" {{ plugin_data {{ }} }}
    WorkloadAttestor "unix" {{
        plugin_data {{ discover_workload_path = true, workload_size_limit = -1 }}
    }}
}}
"#,
        trust_domain = spire.trust_domain(),
        port = spire.server_address().port(),
    )
}

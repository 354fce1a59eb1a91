//! awsvid on a stock machine, installed by the steps of the documents, with a SPIRE agent that
//! attests the machine's own processes. SPIRE's server and MinIO run on this computer.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::harness::counterparts::minio::{self, Minio};
use crate::harness::counterparts::process::{Output, run};
use crate::harness::counterparts::spire::{RemoteAgent, Spire, SpireSetting};
use crate::harness::counterparts::{folder, root, skip, tool};
use crate::harness::documents;
use crate::harness::env::{AWSVID, awsvid_selectors};
use crate::harness::machine::{FILES, Machine, MachineStart};

use super::TIMEOUT;
use super::tried_machines::ServedCallers;

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
const AUDIT: &str = "/var/log/awsvid/audit.log";
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
RuntimeDirectory=spire spire/admin spire/agent-sockets
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
ExecStart=/lib/systemd/systemd-socket-proxyd 10.0.2.2:%i
";

/// A process that requests credentials, in a service of its own.
#[derive(Debug)]
pub(super) struct UnitCaller {
    pub(super) user: &'static str,
    pub(super) unit: &'static str,
    pub(super) slice: &'static str,
    /// More of the service, as options of systemd-run(1).
    pub(super) properties: &'static [&'static str],
    /// The SPIFFE ID that the caller has to have.
    pub(super) spiffe_id: Option<&'static str>,
    /// Whether it has that by its cgroup or by its unit, in a rule of awsvid's.
    pub(super) by_cgroup: bool,
    /// Whether it shares the machine's loopback.
    pub(super) has_network: bool,
}

impl UnitCaller {
    /// Returns an ordinary service of this user.
    pub(super) const fn new(
        user: &'static str,
        unit: &'static str,
        spiffe_id: Option<&'static str>,
    ) -> Self {
        Self {
            user,
            unit,
            slice: "system.slice",
            properties: &[],
            spiffe_id,
            by_cgroup: false,
            has_network: true,
        }
    }

    /// Returns the one that awsvid knows by its cgroup or its unit.
    pub(super) const fn by_cgroup(self) -> Self {
        Self {
            by_cgroup: true,
            ..self
        }
    }
}

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

    /// Runs the steps of the documents, word by word but for the build.
    fn install_files(&mut self) -> Option<()> {
        let program = format!("{FILES}/source/target/release/awsvid");
        let started = self.run(&format!("{program} --version"));
        if started.stderr.contains("GLIBC_") {
            skip(&format!(
                "this computer's build needs a newer C library: {}",
                started.stderr
            ));
            return None;
        }
        let block = documents::block("install-vm.md", "1. Install the files", "cargo build");
        let (_, steps) = block.split_once('\n').expect("several lines");
        let ports = [self.minio.endpoint(), self.spire.issuer_url()]
            .map(|url| url.rsplit(':').next().expect("a port").to_owned());
        self.run(&format!(
            "systemd-sysusers {FILES}/workloads.conf
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
    /// the audit records of each. curl retries what may pass, as SDKs do.
    pub(super) fn request(&mut self, callers: &[UnitCaller]) -> Vec<Vec<Value>> {
        let get = "--silent --output /dev/null --max-time 60 --retry 30 --retry-delay 1 \
                   --header 'Authorization: any'";
        let one = |caller: &UnitCaller| {
            let UnitCaller {
                user, unit, slice, ..
            } = caller;
            let properties = caller.properties.join(" ");
            format!(
                "before=$(wc -l <{AUDIT})
                 systemd-run --quiet --collect --wait --pipe --unit={unit} --slice={slice} --uid={user} {properties} -- \
                   curl {get} --unix-socket /run/awsvid/awsvid.sock http://localhost/v1/credentials \
                   --next {get} http://127.0.0.1:974/v1/credentials \
                   --next {get} http://[::1]:974/v1/credentials || true
                 tail -n +$((before + 1)) {AUDIT}
                 echo {END}\n"
            )
        };
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
        for (caller, records) in callers.iter().zip(records) {
            let facts = |record: &Value| {
                let text = |name: &str| record[name].as_str().unwrap_or("-").to_owned();
                ["listener", "reason", "spiffe_id"].map(text)
            };
            let found: Vec<_> = records.iter().map(facts).collect();
            let is_known = served.cgroups || !caller.by_cgroup;
            let expected = ["unix", "tcp", "tcp"].map(|listener| {
                let answer = match caller.spiffe_id.filter(|_| is_known) {
                    _ if listener == "tcp" && !served.tcp => ["unsupported_kernel", "-"],
                    Some(spiffe_id) => ["ok", spiffe_id],
                    None => ["no_identity", "-"],
                };
                [listener, answer[0], answer[1]].map(str::to_owned)
            });
            let reached = if caller.has_network { 3 } else { 1 };
            assert_eq!(found, expected[..reached], "{caller:?}: {records:#?}");
            let units: Vec<_> = records
                .iter()
                .map(|record| &record["systemd_unit"])
                .collect();
            let is_seen = |unit: &&Value| **unit == caller.unit;
            assert!(!served.tcp || units.iter().all(is_seen), "{records:#?}");
        }
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

/// Writes the files that the machine gets: a checkout with a build, and the agent.
fn write_files(files: &Path, spire: &Spire) -> Option<()> {
    let release = files.join("source/target/release");
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
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR"));
    copy(checkout.join("deploy"), files.join("source/deploy"));
    copy(env!("CARGO_BIN_EXE_awsvid").into(), release);
    copy(tool("spire-agent")?, files.join("spire-agent"));
    let token = spire.join_token(&["-spiffeID", AGENT]);
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

/// The agent's configuration, with the sockets that the examples of `deploy` name.
fn agent_configuration(spire: &Spire, token: &str) -> String {
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

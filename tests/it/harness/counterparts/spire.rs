//! SPIRE on one host: server, agent and OIDC discovery provider.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::unistd::Pid;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose};
use serde_json::{Value, json};

use super::process::{Process, behind, run};
use super::{Port, http_get, read, tool};

/// Bounds each step of SPIRE's start, and each call of its command line, on a loaded machine.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A SPIRE server, an agent that it has attested, and an OIDC discovery provider. The provider's
/// URL is the issuer of the JWT-SVIDs. All of them end when this is dropped.
pub(crate) struct Spire {
    /// Settings that the agent's next start reads. The server's part is read once.
    pub(crate) setting: SpireSetting,
    folder: PathBuf,
    programs: [PathBuf; 3],
    server_port: Port,
    oidc_port: Port,
    agent_id: String,
    // Dropped in this order, so that no program logs complaints about one that has ended.
    oidc: Option<Process>,
    agent: Option<Process>,
    server: Option<Process>,
    /// The length of the agent's log at the agent's last start.
    agent_log_start: usize,
}

/// Settings of SPIRE beyond what every test needs.
#[derive(Clone, Default)]
pub(crate) struct SpireSetting {
    /// `authorized_delegates`: the SPIFFE IDs that may use the Delegated Identity API. Its socket
    /// always exists.
    pub(crate) delegates: Vec<String>,
    /// `brokers`: the clients that may use the Broker API. Its socket exists if this is not empty.
    pub(crate) brokers: Vec<Broker>,
    /// `default_x509_svid_ttl`, in SPIRE's notation. The agent renews an SVID after half of its
    /// life, and SPIRE dates it back by 10 s: from "10s" down it renews continuously. The agent's
    /// own SVID, with which it ends, is not one of these.
    pub(crate) x509_svid_ttl: Option<&'static str>,
    /// `workload_x509_svid_key_type` of the agent.
    pub(crate) workload_key_type: Option<&'static str>,
    /// `ca_key_type` of the server.
    pub(crate) ca_key_type: Option<&'static str>,
    /// Whether the server's CA is signed by a root outside SPIRE, which is then the bundle.
    pub(crate) upstream_ca: bool,
    /// Words in front of the agent's command, to run it in other namespaces.
    pub(crate) agent_behind: Vec<String>,
    /// Whether the agent leaves out `unix:sha256`. For it, the agent reads the whole executable of
    /// the client and of the process in question at each call.
    pub(crate) without_hashes: bool,
    /// Makes `jwt_issuer` from the right one. It makes an empty text for no issuer at all.
    pub(crate) jwt_issuer: Option<fn(&str) -> String>,
    /// `domains` of the OIDC discovery provider, and its other settings.
    pub(crate) domains: Option<&'static str>,
    pub(crate) oidc: &'static str,
    /// The server's address for that provider, if not the real one.
    pub(crate) oidc_server: Option<&'static str>,
    /// Another `WorkloadAttestor` in addition to `unix`, as the agent's configuration has it.
    pub(crate) attestor: String,
    /// An agent on another machine, instead of one on the server's.
    pub(crate) remote_agent: Option<RemoteAgent>,
}

/// An agent that the test starts itself.
#[derive(Clone)]
pub(crate) struct RemoteAgent {
    /// The SPIFFE ID that it will have.
    pub(crate) id: String,
    /// The server's `NodeAttestor` for it, as its configuration has it.
    pub(crate) node_attestor: String,
}

/// A client that may use the Broker API.
#[derive(Clone)]
pub(crate) struct Broker {
    pub(crate) id: String,
    /// `allowed_reference_types`; "*" alone is all of them.
    pub(crate) reference_types: Vec<&'static str>,
}

impl Broker {
    /// The reference to a process by its pid.
    pub(crate) const BY_PID: &str = "type.googleapis.com/spiffe.broker.WorkloadPIDReference";

    /// The reference to a Kubernetes object.
    pub(crate) const BY_OBJECT: &str =
        "type.googleapis.com/spiffe.broker.KubernetesObjectReference";

    /// Returns a broker that may refer to processes.
    pub(crate) fn by_pid(id: &str) -> Broker {
        Broker {
            id: id.to_owned(),
            reference_types: vec![Self::BY_PID],
        }
    }
}

impl Spire {
    /// Starts all three with their data below `folder`, and waits until each responds. Returns
    /// `None` after a printed skip if the programs are missing (`counterparts::tool`). Other users
    /// must be able to enter `folder` (`counterparts::folder`).
    pub(crate) fn start(folder: &Path) -> Option<Spire> {
        Self::start_with(folder, SpireSetting::default())
    }

    /// Starts all three with more in the configuration.
    pub(crate) fn start_with(folder: &Path, setting: SpireSetting) -> Option<Spire> {
        let programs = [
            tool("spire-server")?,
            tool("spire-agent")?,
            tool("oidc-discovery-provider")?,
        ];
        let folder = folder.join("spire");
        // The admin and broker sockets may not be in or below the folder of the Workload API's
        // socket: the agent would end at once.
        for name in ["server", "agent", "admin", "broker"] {
            fs::create_dir_all(folder.join(name)).expect("a folder for SPIRE");
        }
        let mut spire = Spire {
            setting,
            folder,
            programs,
            server_port: Port::reserve(),
            oidc_port: Port::reserve(),
            agent_id: String::new(),
            oidc: None,
            agent: None,
            server: None,
            agent_log_start: 0,
        };
        if spire.setting.upstream_ca {
            spire.write_upstream_ca();
        }
        spire.start_server();
        let bundle = spire
            .server_command(&["bundle", "show"])
            .success("the server's bundle");
        fs::write(spire.folder.join("bundle.pem"), bundle).expect("the bundle's file");
        if let Some(remote_agent) = &spire.setting.remote_agent {
            spire.agent_id = remote_agent.id.clone();
            spire.start_oidc();
            return Some(spire);
        }
        let token = spire.join_token(&[]);
        spire.agent_id = format!(
            "spiffe://{}/spire/agent/join_token/{token}",
            spire.trust_domain()
        );
        spire.run_agent(&["-joinToken", &token]);
        spire.start_oidc();
        spire.await_agent();
        Some(spire)
    }

    /// Creates a token with which one agent may join, with more options of `spire-server token
    /// generate`. With `-spiffeID` the agent gets that SPIFFE ID in addition to its own.
    pub(crate) fn join_token(&self, options: &[&str]) -> String {
        let answer = self.server_json(&[&["token", "generate"], options].concat());
        let token = answer["value"].as_str();
        token
            .unwrap_or_else(|| panic!("no join token in {answer}"))
            .to_owned()
    }

    /// Returns the trust domain's name.
    pub(crate) fn trust_domain(&self) -> &str {
        "example.org"
    }

    /// Returns the agent's own SPIFFE ID.
    pub(crate) fn agent_id(&self) -> &str {
        &self.agent_id
    }

    /// Returns the address at which the server listens for agents.
    pub(crate) fn server_address(&self) -> SocketAddr {
        self.server_port.address()
    }

    /// Returns the server's certificates, by which agents verify it.
    pub(crate) fn bundle(&self) -> String {
        read(&self.folder.join("bundle.pem"))
    }

    /// Returns the socket of the SPIFFE Workload API. Any user may connect.
    pub(crate) fn agent_socket(&self) -> PathBuf {
        self.folder.join("agent/api.sock")
    }

    /// Returns the socket of the Delegated Identity API: mode 0770.
    pub(crate) fn admin_socket(&self) -> PathBuf {
        self.folder.join("admin/api.sock")
    }

    /// Returns the socket of the Broker API, which exists if the setting names a broker: mode 0770.
    pub(crate) fn broker_socket(&self) -> PathBuf {
        self.folder.join("broker/api.sock")
    }

    /// Returns the `iss` of the JWT-SVIDs. The discovery document is below it.
    pub(crate) fn issuer_url(&self) -> String {
        format!("http://{}", self.oidc_port.address())
    }

    /// Creates a registration entry with the agent as its parent. If the agent runs, waits until it
    /// serves the entry. Returns the entry's ID. Selectors are such as `unix:uid:1001`.
    pub(crate) fn register(&self, spiffe_id: &str, selectors: &[&str]) -> String {
        self.register_with(spiffe_id, selectors, &[])
    }

    /// Creates an entry with further options of `spire-server entry create`, such as `-admin`.
    pub(crate) fn register_with(
        &self,
        spiffe_id: &str,
        selectors: &[&str],
        options: &[&str],
    ) -> String {
        let mut arguments = vec![
            "entry",
            "create",
            "-parentID",
            &self.agent_id,
            "-spiffeID",
            spiffe_id,
        ];
        arguments.extend(
            selectors
                .iter()
                .flat_map(|selector| ["-selector", selector]),
        );
        arguments.extend(options);
        let answer = self.server_json(&arguments);
        let Some(entry) = answer["results"][0]["entry"]["id"].as_str() else {
            panic!("no entry for {spiffe_id}: {answer}")
        };
        if self.agent.is_some() {
            self.await_entry(entry);
        }
        entry.to_owned()
    }

    /// Creates an entry with these selectors for each of these IDs, and waits until the agent
    /// serves them.
    pub(crate) fn register_all(&self, spiffe_ids: &[String], selectors: &[&str]) {
        let selectors: Vec<Value> = selectors
            .iter()
            .map(|selector| selector.split_once(':').expect("a selector has a type"))
            .map(|(kind, value)| json!({ "type": kind, "value": value }))
            .collect();
        let entry = |id: &String| json!({ "parent_id": self.agent_id, "spiffe_id": id, "selectors": selectors });
        let entries: Vec<Value> = spiffe_ids.iter().map(entry).collect();
        let file = self.write("entries.json", &json!({ "entries": entries }).to_string());
        let answer = self.server_json(&[
            "entry",
            "create",
            "-data",
            file.to_str().expect("a path in UTF-8"),
        ]);
        let results = answer["results"]
            .as_array()
            .unwrap_or_else(|| panic!("no entries: {answer}"));
        for result in results {
            self.await_entry(
                result["entry"]["id"]
                    .as_str()
                    .unwrap_or_else(|| panic!("no entry: {result}")),
            );
        }
    }

    /// Waits until the agent that runs now has got an entry from the server.
    pub(crate) fn await_entry(&self, entry: &str) {
        self.await_agent_line("Entry created", entry);
    }

    /// Deletes a registration entry. If the agent runs, waits until it has dropped it.
    pub(crate) fn delete_entry(&self, entry: &str) {
        self.server_command(&["entry", "delete", "-entryID", entry])
            .success("delete an entry");
        if self.agent.is_some() {
            self.await_agent_line("Entry removed", entry);
        }
    }

    /// Fetches a JWT-SVID of the test's own process for this audience, from the agent's Workload
    /// API.
    pub(crate) fn fetch_jwt(&self, audience: &str) -> String {
        let mut command = Command::new(&self.programs[1]);
        command.args([
            "api",
            "fetch",
            "jwt",
            "-output",
            "json",
            "-audience",
            audience,
            "-socketPath",
        ]);
        command.arg(self.agent_socket());
        let answer = run(command, b"", TIMEOUT).success("fetch a JWT-SVID");
        let answer: Value =
            serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{error} in {answer}"));
        answer[0]["svids"][0]["svid"]
            .as_str()
            .expect("a token")
            .to_owned()
    }

    /// Writes the X.509-SVID of the test's own process, from the agent's Workload API, into a
    /// folder: `svid.0.pem`, `svid.0.key` and `bundle.0.pem`.
    pub(crate) fn write_x509(&self, folder: &Path) {
        let mut command = Command::new(&self.programs[1]);
        command
            .args(["api", "fetch", "x509", "-socketPath"])
            .arg(self.agent_socket())
            .arg("-write")
            .arg(folder);
        run(command, b"", TIMEOUT).success("fetch an X.509-SVID");
    }

    /// Returns the number of JWT-SVIDs with this `sub` that the server has signed, by its own log.
    /// The agent caches them, so this may be less than `jwt_svids_fetched`.
    pub(crate) fn jwt_svids_signed(&self, spiffe_id: &str) -> usize {
        count(
            &self.server_log(),
            "Server CA successfully signed JWT SVID",
            spiffe_id,
        )
    }

    /// Returns the number of JWT-SVIDs with this `sub` that the agent has returned over the
    /// Workload API, by its own log. It writes the line before it replies.
    pub(crate) fn jwt_svids_fetched(&self, spiffe_id: &str) -> usize {
        count(&self.agent_log(), "Fetched JWT SVID", spiffe_id)
    }

    /// Returns the processes that the agent has attested and found to have this selector, such as
    /// `uid:1001`, by its own log. Each attestation counts, for any client. The agent attests
    /// clients of its admin socket, too, each time.
    pub(crate) fn attested(&self, selector: &str) -> Vec<Pid> {
        let has = |line: &Value| {
            let selectors = line["selectors"].as_array();
            selectors.is_some_and(|all| all.iter().any(|one| one["value"] == selector))
        };
        let log = self.agent_log();
        let attested =
            lines(&log).filter(|line| line["msg"] == "PID attested to have selectors" && has(line));
        attested
            .map(|line| {
                Pid::from_raw(i32::try_from(line["pid"].as_i64().expect("a pid")).expect("a pid"))
            })
            .collect()
    }

    /// Returns the server's log: JSON lines, level debug.
    pub(crate) fn server_log(&self) -> String {
        read(&self.folder.join("server.log"))
    }

    /// Returns the agent's log: JSON lines, level debug, of all its starts.
    pub(crate) fn agent_log(&self) -> String {
        read(&self.folder.join("agent.log"))
    }

    pub(crate) fn agent_pid(&self) -> Pid {
        self.agent.as_ref().expect("the agent runs").id()
    }

    /// Kills the agent. Its socket file stays, as after a crash.
    pub(crate) fn stop_agent(&mut self) {
        self.agent = None;
    }

    /// Starts the agent again, with the key and SVID that it had, and waits until it responds. It
    /// still has to sync: `await_entry`.
    pub(crate) fn start_agent(&mut self) {
        self.run_agent(&[]);
        self.await_agent();
    }

    /// Ends the OIDC discovery provider, so that no STS can read the keys of tokens.
    pub(crate) fn stop_oidc(&mut self) {
        self.oidc = None;
    }

    pub(crate) fn stop_server(&mut self) {
        self.server = None;
    }

    /// Starts the server, with the keys and entries that it had, and waits until it responds.
    pub(crate) fn start_server(&mut self) {
        let config = self.write("server.conf", &self.server_config());
        let mut command = Command::new(&self.programs[0]);
        command.arg("run").arg("-config").arg(config);
        let server = Process::start("spire-server", command, &self.folder.join("server.log"));
        // The agent needs the port, the command line the socket.
        server.await_some("spire-server listens", TIMEOUT, || {
            TcpStream::connect(self.server_port.address())
                .and(UnixStream::connect(self.server_socket()))
                .ok()
        });
        self.server = Some(server);
    }

    /// Runs a command of `spire-server` against this server.
    pub(crate) fn server_command(&self, arguments: &[&str]) -> super::process::Output {
        let mut command = Command::new(&self.programs[0]);
        command
            .args(arguments)
            .arg("-socketPath")
            .arg(self.server_socket());
        run(command, b"", TIMEOUT)
    }

    fn server_json(&self, arguments: &[&str]) -> Value {
        let answer = self
            .server_command(&[arguments, &["-output", "json"]].concat())
            .success(&arguments.join(" "));
        serde_json::from_str(&answer)
            .unwrap_or_else(|error| panic!("{}: {error} in {answer}", arguments.join(" ")))
    }

    /// Makes the server know a foreign trust domain, by this server's own keys.
    pub(crate) fn federate(&self, trust_domain: &str) {
        let bundle = self
            .server_command(&["bundle", "show", "-format", "spiffe"])
            .success("the server's bundle");
        let file = self.write("foreign.json", &bundle);
        let path = file.to_str().expect("a path in UTF-8");
        self.server_command(&[
            "bundle",
            "set",
            "-format",
            "spiffe",
            "-id",
            trust_domain,
            "-path",
            path,
        ])
        .success("the foreign bundle");
    }

    /// Returns the socket of the server's API for local programs.
    pub(crate) fn server_socket(&self) -> PathBuf {
        self.folder.join("server/api.sock")
    }

    fn run_agent(&mut self, arguments: &[&str]) {
        self.agent_log_start = self.agent_log().len();
        let config = self.write("agent.conf", &self.agent_config());
        let words: Vec<&str> = self
            .setting
            .agent_behind
            .iter()
            .map(String::as_str)
            .collect();
        let mut command = behind(&words, &self.programs[1]);
        command
            .arg("run")
            .arg("-config")
            .arg(config)
            .args(arguments);
        self.agent = Some(Process::start(
            "spire-agent",
            command,
            &self.folder.join("agent.log"),
        ));
    }

    fn await_agent(&self) {
        let agent = self.agent.as_ref().expect("the agent was started");
        let mut sockets = vec![self.agent_socket(), self.admin_socket()];
        sockets.extend((!self.setting.brokers.is_empty()).then(|| self.broker_socket()));
        for socket in sockets {
            let what = format!("spire-agent listens at {}", socket.display());
            agent.await_some(&what, TIMEOUT, || UnixStream::connect(&socket).ok());
        }
    }

    fn await_agent_line(&self, message: &str, entry: &str) {
        let agent = self.agent.as_ref().expect("the agent runs");
        agent.await_some(
            &format!("{message} in the agent's log for {entry}"),
            TIMEOUT,
            || {
                lines(&self.agent_log()[self.agent_log_start..])
                    .any(|line| line["msg"] == message && line["entry"] == entry)
                    .then_some(())
            },
        );
    }

    fn start_oidc(&mut self) {
        let config = self.write("oidc.conf", &self.oidc_config());
        let mut command = Command::new(&self.programs[2]);
        command.arg("-config").arg(config);
        let oidc = Process::start(
            "oidc-discovery-provider",
            command,
            &self.folder.join("oidc.log"),
        );
        oidc.await_some("the OIDC discovery provider has keys", TIMEOUT, || {
            let (status, keys) = http_get(self.oidc_port.address(), "/keys")?;
            // A provider that is configured wrong may never respond.
            let is_right = self.setting.domains.is_none() && self.setting.oidc_server.is_none();
            (!is_right || status == 200 && keys.contains("\"kid\"")).then_some(())
        });
        self.oidc = Some(oidc);
    }

    /// Creates a root, and its files for the server.
    fn write_upstream_ca(&self) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let root = params.self_signed(&key).expect("a certificate");
        self.write("upstream.pem", &root.pem());
        self.write("upstream.key", &key.serialize_pem());
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.join(name);
        fs::write(&path, text).expect("a configuration file");
        path
    }

    // Returns the server's configuration. Keys are on disk, so that server and agent can be stopped
    // and started: a join token is good for one attestation. The two intervals are 5 s by default,
    // and an entry needs both to reach the agent.
    fn server_config(&self) -> String {
        format!(
            r#"
server {{
    trust_domain = "{trust_domain}"
    data_dir = "{folder}/server"
    socket_path = "{folder}/server/api.sock"
    bind_address = "127.0.0.1"
    bind_port = {port}
    ca_key_type = "{ca_key_type}"
    jwt_key_type = "ec-p256"
    {issuer}
    default_jwt_svid_ttl = "5m"
    {x509_svid_ttl}
    log_level = "debug"
    log_format = "json"
    experimental {{ cache_reload_interval = "200ms" }}
}}
plugins {{
    DataStore "sql" {{
        plugin_data {{ database_type = "sqlite3", connection_string = "{folder}/server/entries.sqlite3" }}
    }}
    KeyManager "disk" {{ plugin_data {{ keys_path = "{folder}/server/keys.json" }} }}
    NodeAttestor "join_token" {{ plugin_data {{ }} }}
    {node_attestor}
    {upstream_authority}
}}
"#,
            upstream_authority = match self.setting.upstream_ca {
                true => format!(
                    "UpstreamAuthority \"disk\" {{ plugin_data {{ cert_file_path = \"{0}/upstream.pem\", key_file_path = \"{0}/upstream.key\" }} }}",
                    self.folder.display()
                ),
                false => String::new(),
            },
            node_attestor = self
                .setting
                .remote_agent
                .as_ref()
                .map_or("", |remote_agent| &remote_agent.node_attestor),
            ca_key_type = self.setting.ca_key_type.unwrap_or("ec-p256"),
            trust_domain = self.trust_domain(),
            folder = self.folder.display(),
            port = self.server_port.address().port(),
            issuer = self.jwt_issuer(),
            x509_svid_ttl = self
                .setting
                .x509_svid_ttl
                .map_or(String::new(), |ttl| format!(
                    "default_x509_svid_ttl = \"{ttl}\"\n    agent_ttl = \"1h\""
                )),
        )
    }

    fn agent_config(&self) -> String {
        format!(
            r#"
agent {{
    trust_domain = "{trust_domain}"
    trust_bundle_path = "{folder}/bundle.pem"
    data_dir = "{folder}/agent"
    socket_path = "{folder}/agent/api.sock"
    admin_socket_path = "{folder}/admin/api.sock"
    authorized_delegates = {delegates:?}
    server_address = "127.0.0.1"
    server_port = {port}
    log_level = "debug"
    log_format = "json"
    {key_type}
    experimental {{
        sync_interval = "200ms"
        {broker}
    }}
}}
plugins {{
    KeyManager "disk" {{ plugin_data {{ directory = "{folder}/agent" }} }}
    NodeAttestor "join_token" {{ plugin_data {{ }} }}
    WorkloadAttestor "unix" {{ plugin_data {{ discover_workload_path = true, workload_size_limit = {size_limit} }} }}
    {attestor}
}}
"#,
            trust_domain = self.trust_domain(),
            folder = self.folder.display(),
            port = self.server_port.address().port(),
            delegates = self.setting.delegates,
            broker = self.broker_config(),
            key_type = self
                .setting
                .workload_key_type
                .map_or(String::new(), |kind| format!(
                    "workload_x509_svid_key_type = \"{kind}\""
                )),
            size_limit = if self.setting.without_hashes { -1 } else { 0 },
            attestor = self.setting.attestor,
        )
    }

    fn broker_config(&self) -> String {
        let brokers = &self.setting.brokers;
        if brokers.is_empty() {
            return String::new();
        }
        let types = |broker: &Broker| -> String {
            broker
                .reference_types
                .iter()
                .map(|name| format!("{{ type_url = \"{name}\" }}, "))
                .collect()
        };
        let brokers: String = brokers
            .iter()
            .map(|broker| {
                format!(
                    "{{ id = \"{}\", allowed_reference_types = [{}] }}, ",
                    broker.id,
                    types(broker)
                )
            })
            .collect();
        format!(
            "broker {{ socket_path = \"{}\", brokers = [{brokers}] }}",
            self.broker_socket().display()
        )
    }

    fn jwt_issuer(&self) -> String {
        let right = self.issuer_url();
        let issuer = self
            .setting
            .jwt_issuer
            .map_or(right.clone(), |wrong| wrong(&right));
        if issuer.is_empty() {
            String::new()
        } else {
            format!("jwt_issuer = \"{issuer}\"")
        }
    }

    fn oidc_config(&self) -> String {
        format!(
            r#"
domains = ["{domains}"]
{more}
insecure_addr = "{address}"
allow_insecure_scheme = true
set_key_use = true
log_level = "debug"
server_api {{ address = "unix://{server}" }}
"#,
            server = self
                .setting
                .oidc_server
                .map_or(self.server_socket(), PathBuf::from)
                .display(),
            address = self.oidc_port.address(),
            domains = self.setting.domains.unwrap_or("127.0.0.1"),
            more = self.setting.oidc,
        )
    }
}

/// Returns the lines of a JSON log. A line that is still being written is left out.
fn lines(log: &str) -> impl Iterator<Item = Value> {
    log.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
}

fn count(log: &str, message: &str, spiffe_id: &str) -> usize {
    lines(log)
        .filter(|line| line["msg"] == message && line["spiffe_id"] == spiffe_id)
        .count()
}

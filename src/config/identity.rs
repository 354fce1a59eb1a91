//! `[identity]`: the source of SPIFFE IDs and JWT-SVIDs.

use std::path::{Path, PathBuf};

use super::error::InvalidValue;
use super::toml_reader::{Location, Table};
use crate::identity::SpiffeIdPattern;
use crate::socket_endpoint::Endpoint;

/// The longest audience that IAM takes as a client id, in bytes.
const AUDIENCE_MAX: usize = 255;
/// The SPIFFE standards' variables for the addresses of the Workload API and of the Broker API.
const SOCKET_VARIABLE: &str = "SPIFFE_ENDPOINT_SOCKET";
const BROKER_VARIABLE: &str = "SPIFFE_BROKER_SOCKET";
const SOCKET_FIX: &str = "write unix:///path/of/the/socket or tcp://IP:port";
const UNIX_FIX: &str = "write unix:///path/of/the/socket";

/// The table `[identity]` of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the type of the field is documented")]
pub struct IdentityConfig {
    pub source: Source,
    /// Address of the SPIFFE Workload API.
    pub workload_api_socket: Endpoint,
    /// Audience of the JWT-SVID for roles without one of their own.
    pub audience: String,
}

/// The source that identifies callers and issues tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are named as the keys are")]
pub enum Source {
    /// The `[[workload]]` rules identify callers, and the SPIFFE Workload API issues tokens.
    WorkloadApi,
    /// A SPIRE agent identifies callers and issues tokens by its Delegated Identity API.
    SpireDelegated { socket: PathBuf },
    /// A SPIFFE agent identifies callers and issues tokens by the SPIFFE Broker API.
    SpiffeBroker {
        socket: PathBuf,
        /// Pattern of the agent's own SPIFFE ID. `None` is any SPIRE agent of the daemon's own
        /// trust domain.
        server: Option<SpiffeIdPattern>,
        reference: Reference,
    },
}

/// The form in which the daemon names a workload to an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the variants are the words of the file")]
pub enum Reference {
    /// The caller's pod if it is in one, else its process.
    Auto,
    Process,
}

impl IdentityConfig {
    /// Returns the sockets that identify callers or issue their tokens, each with its key.
    pub(crate) fn agent_sockets(&self) -> Vec<(&'static str, &Path)> {
        let agent = match &self.source {
            Source::WorkloadApi => None,
            Source::SpireDelegated { socket } => {
                return vec![("identity.admin_socket", socket.as_path())];
            }
            Source::SpiffeBroker { socket, .. } => {
                Some(("identity.broker_socket", socket.as_path()))
            }
        };
        let workload_api = match &self.workload_api_socket {
            Endpoint::Unix(path) => Some(("identity.workload_api_socket", path.as_path())),
            Endpoint::Tcp(_) => None,
        };
        agent.into_iter().chain(workload_api).collect()
    }
}

impl Default for IdentityConfig {
    fn default() -> Self {
        Self {
            source: Source::WorkloadApi,
            workload_api_socket: Endpoint::Unix(PathBuf::from(
                "/run/spire/agent-sockets/spire-agent.sock",
            )),
            audience: "sts.amazonaws.com".to_owned(),
        }
    }
}

/// The keys that only one source has.
const SOURCE_KEYS: [(&str, &str); 4] = [
    ("admin_socket", "spire-delegated"),
    ("broker_socket", "spiffe-broker"),
    ("broker_server_id", "spiffe-broker"),
    ("workload_reference", "spiffe-broker"),
];

/// Reads `[identity]`. `env` returns the sockets that the file leaves out.
///
/// The second value is whether the `[[workload]]` rules identify callers. It is `None` if `source`
/// is wrong.
pub(super) fn read(
    table: &Table<'_>,
    env: &dyn Fn(&str) -> Option<String>,
) -> (IdentityConfig, Option<bool>) {
    let default = IdentityConfig::default();
    let name = table.parse(
        "source",
        "write \"workload-api\", \"spire-delegated\" or \"spiffe-broker\"",
        source_name,
    );
    let name = name.unwrap_or_else(|| "workload-api".to_owned());
    for (key, source) in SOURCE_KEYS {
        // All of these keys are read, whatever the source is.
        let exists = table.value(key).is_some();
        if exists && source != name && !table.is_wrong("source") {
            table.error(
                key,
                format!("only the source {source:?} has it"),
                format!("remove it, or set source = {source:?}"),
            );
        }
    }
    let by_rules = (!table.is_wrong("source")).then(|| name == "workload-api");
    let config = IdentityConfig {
        source: source(table, &name, env).unwrap_or(default.source),
        workload_api_socket: socket(
            table,
            "workload_api_socket",
            SOCKET_VARIABLE,
            SOCKET_FIX,
            env,
        )
        .unwrap_or(default.workload_api_socket),
        audience: table
            .parse(
                "audience",
                "write what STS expects as the audience of a token",
                audience,
            )
            .unwrap_or(default.audience),
    };
    (config, by_rules)
}

fn source_name(text: &str) -> Result<String, &'static str> {
    match text {
        "workload-api" | "spire-delegated" | "spiffe-broker" => Ok(text.to_owned()),
        _ => Err("this source does not exist"),
    }
}

fn source(table: &Table<'_>, name: &str, env: &dyn Fn(&str) -> Option<String>) -> Option<Source> {
    let needed = |key: &'static str, what: &str, variable: &str| {
        let endpoint = socket(table, key, variable, UNIX_FIX, env);
        if endpoint.is_none() && !table.contains(key) {
            table.error("source", format!("{name:?} needs `{key}`"), what.to_owned());
        }
        match endpoint? {
            Endpoint::Unix(path) => Some(path),
            Endpoint::Tcp(_) => {
                table.error(
                    key,
                    "processes can be named to an agent on this node only".to_owned(),
                    UNIX_FIX,
                );
                None
            }
        }
    };
    match name {
        "spire-delegated" => {
            let socket = needed(
                "admin_socket",
                "write the agent's `admin_socket_path` as unix:///path",
                "",
            );
            Some(Source::SpireDelegated { socket: socket? })
        }
        "spiffe-broker" => {
            let fix =
                "write the agent's broker socket as unix:///path, or set SPIFFE_BROKER_SOCKET";
            let socket = needed("broker_socket", fix, BROKER_VARIABLE);
            let pattern = "write an ID as in \"spiffe://example.org/spire/agent/**\"";
            let server = table.parse("broker_server_id", pattern, SpiffeIdPattern::parse);
            let words = [("auto", Reference::Auto), ("process", Reference::Process)];
            let reference = table
                .word("workload_reference", &words)
                .unwrap_or(Reference::Auto);
            Some(Source::SpiffeBroker {
                socket: socket?,
                server,
                reference,
            })
        }
        _ => Some(Source::WorkloadApi),
    }
}

fn socket(
    table: &Table<'_>,
    key: &'static str,
    variable: &str,
    fix: &str,
    env: &dyn Fn(&str) -> Option<String>,
) -> Option<Endpoint> {
    let from_env = || env(variable).filter(|text| !text.is_empty());
    let (text, at) = match table.string(key) {
        Some(text) => (text.to_owned(), table.location(key)),
        None if table.contains(key) => return None,
        None => (
            from_env()?,
            Location {
                line: None,
                key: variable.to_owned(),
            },
        ),
    };
    match Endpoint::parse(&text) {
        Ok(endpoint) => {
            if matches!(endpoint, Endpoint::Tcp(address) if !address.ip().is_loopback()) {
                let what = "the tokens of all workloads cross the network in clear text";
                table.report.warn(&at, what, "use a unix socket");
            }
            Some(endpoint)
        }
        Err(error) => {
            let fix = match text.starts_with('/') {
                true => format!("write unix://{text}"),
                false => fix.to_owned(),
            };
            table.report.error(&at, format!("{text:?}: {error}"), fix);
            None
        }
    }
}

/// Parses an audience of `[identity]` or of a role.
pub(super) fn audience(text: &str) -> Result<String, InvalidValue> {
    if text.is_empty() || text.len() > AUDIENCE_MAX {
        return Err(format!("an audience has 1 to {AUDIENCE_MAX} bytes").into());
    }
    if text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err("an audience holds no spaces".into());
    }
    Ok(text.to_owned())
}

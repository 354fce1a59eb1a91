//! `[identity]`: who says what a caller's SPIFFE ID is, and gives its JWT-SVID.

use std::path::PathBuf;

use super::reader::{Place, Table};
use crate::endpoint::Endpoint;

/// The longest audience that IAM takes as a client id, in bytes.
const AUDIENCE_MAX: usize = 255;
/// Where the standard has the address of the Workload API.
const SOCKET_VARIABLE: &str = "SPIFFE_ENDPOINT_SOCKET";
const SOCKET_FIX: &str = "write unix:///path/of/the/socket or tcp://IP:port";

/// `[identity]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityConfig {
    /// Which kind of source.
    pub source: Source,
    /// Where the SPIFFE Workload API listens.
    pub socket: Endpoint,
    /// The audience of roles that have none of their own.
    pub audience: String,
}

/// Who identifies callers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The `[[workload]]` rules identify, and the SPIFFE Workload API gives the tokens.
    WorkloadApi,
}

impl Default for IdentityConfig {
    fn default() -> Self {
        Self {
            source: Source::WorkloadApi,
            socket: Endpoint::Unix(PathBuf::from("/run/spire/agent-sockets/spire-agent.sock")),
            audience: "sts.amazonaws.com".to_owned(),
        }
    }
}

/// Reads `[identity]`; `env` gives the socket if the file doesn't.
pub(super) fn read(table: &Table<'_>, env: &dyn Fn(&str) -> Option<String>) -> IdentityConfig {
    let default = IdentityConfig::default();
    ["admin_socket", "broker_socket", "broker_server", "reference"].into_iter().for_each(|key| table.not_yet(key));
    IdentityConfig {
        source: table.parse("source", "write \"workload-api\"", source).unwrap_or(default.source),
        socket: socket(table, env).unwrap_or(default.socket),
        audience: table
            .parse("audience", "write what STS expects as the audience of a token", audience)
            .unwrap_or(default.audience),
    }
}

fn source(text: &str) -> Result<Source, &'static str> {
    match text {
        "workload-api" => Ok(Source::WorkloadApi),
        "spire-delegated" | "spiffe-broker" => Err("this version of awsvid does not have this source yet"),
        _ => Err("there is no such source"),
    }
}

fn socket(table: &Table<'_>, env: &dyn Fn(&str) -> Option<String>) -> Option<Endpoint> {
    let from_env = || env(SOCKET_VARIABLE).filter(|text| !text.is_empty());
    let (text, at) = match table.string("socket") {
        Some(text) => (text.to_owned(), table.place("socket")),
        None if table.has("socket") => return None,
        None => (from_env()?, Place { line: None, key: SOCKET_VARIABLE.to_owned() }),
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
            table.report.error(&at, format!("{text:?}: {error}"), SOCKET_FIX);
            None
        }
    }
}

/// Checks an audience, of `[identity]` or of a role.
pub(super) fn audience(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > AUDIENCE_MAX {
        return Err(format!("an audience has 1 to {AUDIENCE_MAX} bytes"));
    }
    if text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err("an audience holds no spaces".to_owned());
    }
    Ok(text.to_owned())
}

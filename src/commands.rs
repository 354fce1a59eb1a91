//! Commands for users and operators, outside the daemon.
//!
//! Only `check` and `trust-policy` need the daemon's privileges. Only `credential-process` prints
//! secrets.

pub mod check;
pub mod config;
pub mod credential_process;
pub mod exec;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod https_probe;
mod live_token;
mod local_client;
mod node;
mod output;
pub mod probe;
pub mod status;
mod terminal_style;
pub mod trust_policy;
mod trusted_socket;

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::config::{Config, ConfigErrors, ListenConfig};
use trusted_socket::SocketError;

/// Default path of the configuration file.
pub const CONFIG_FILE: &str = "/etc/awsvid/awsvid.toml";

/// Option with the path of the configuration file.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ConfigFile {
    /// Path of the daemon's configuration file [default: /etc/awsvid/awsvid.toml]
    #[arg(long, env = "AWSVID_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

impl ConfigFile {
    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        self.config.as_deref().unwrap_or(Path::new(CONFIG_FILE))
    }

    /// Returns where the daemon listens, its region, and whether it serves metadata.
    ///
    /// Without the option and without the default file it returns the default addresses: a
    /// container has no configuration, but may have a socket.
    fn daemon_endpoints(&self) -> Result<DaemonEndpoints, ConfigErrors> {
        let is_absent =
            |path| std::fs::metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound);
        if self.config.is_none() && is_absent(CONFIG_FILE) {
            return Ok(DaemonEndpoints::default());
        }
        // The daemon's environment is not the one of this process.
        let (listen, region, serves_imds) = Config::load_for_callers(self.path())?;
        Ok(DaemonEndpoints {
            listen,
            region,
            serves_imds: Some(serves_imds),
        })
    }

    /// Returns the daemon's status socket: `named`, or that of the configuration.
    fn status_socket(&self, named: Option<&Path>) -> Result<PathBuf, StatusSocketError> {
        if let Some(named) = named {
            return Ok(named.to_owned());
        }
        let endpoints = self.daemon_endpoints()?;
        endpoints.listen.status.ok_or(StatusSocketError::Unset)
    }
}

/// Reason why a command has no response over the status socket.
#[derive(Debug, Error)]
enum StatusSocketError {
    #[error("{0}\nor give the socket with --socket")]
    Config(#[from] ConfigErrors),
    #[error("the configuration has no status socket; set `status` in [listen]")]
    Unset,
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// No runtime could be started.
    #[error(transparent)]
    Runtime(#[from] io::Error),
}

/// Facts about the daemon that a command needs. The default is for a command without its
/// configuration.
#[derive(Default)]
struct DaemonEndpoints {
    listen: ListenConfig,
    region: Option<String>,
    /// Whether the configuration has `[imds]` on.
    serves_imds: Option<bool>,
}

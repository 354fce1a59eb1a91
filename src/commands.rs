//! The commands beside the daemon, for whoever uses or operates it.
//!
//! None but `check` and `trust-policy` needs the daemon's privileges, and none prints a secret but `credential-process`, whose output is one.

pub mod check;
mod client;
pub mod configuration;
pub mod credential_process;
pub mod exec;
mod live;
mod node;
mod output;
pub mod probe;
mod server;
pub mod status;
mod style;
pub mod trust_policy;
mod web;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::config::{Config, ConfigErrors, Listen};

/// Where the configuration is if nobody says otherwise.
pub const CONFIG_FILE: &str = "/etc/awsvid/awsvid.toml";

/// The option that names the configuration file.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ConfigFile {
    /// The daemon's configuration file [default: /etc/awsvid/awsvid.toml].
    #[arg(long, env = "AWSVID_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

impl ConfigFile {
    /// The file.
    pub fn path(&self) -> &Path {
        self.config.as_deref().unwrap_or(Path::new(CONFIG_FILE))
    }

    /// Where the daemon listens, and its region. Where nobody has named a file and there is none, it is where a daemon listens
    /// by default: in a container there is no configuration, but perhaps a socket.
    fn daemon_endpoints(&self) -> Result<DaemonEndpoints, ConfigErrors> {
        let is_absent =
            |path| std::fs::metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound);
        if self.config.is_none() && is_absent(CONFIG_FILE) {
            return Ok(DaemonEndpoints {
                listen: Listen::default(),
                region: None,
            });
        }
        // The environment of the daemon is not this one.
        let (listen, region) = Config::load_for_callers(self.path())?;
        Ok(DaemonEndpoints { listen, region })
    }

    /// The daemon's status socket: this one, or that of the configuration.
    fn status_socket(&self, named: Option<&Path>) -> Result<PathBuf, String> {
        if let Some(named) = named {
            return Ok(named.to_owned());
        }
        let beside = self
            .daemon_endpoints()
            .map_err(|errors| format!("{errors}\nor name the socket with --socket"))?;
        let missing = "the configuration has no status socket; set `status` in [listen]";
        beside.listen.status.ok_or_else(|| missing.to_owned())
    }
}

/// What a command needs to know of the daemon beside it.
struct DaemonEndpoints {
    listen: Listen,
    region: Option<String>,
}

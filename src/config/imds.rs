//! `[imds]`: EC2's instance metadata service.

use std::path::PathBuf;

use super::listen::{AuthorizationMode, ListenConfig};
use super::pods::PodsConfig;
use super::toml_reader::Table;

/// The table `[imds]` of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImdsConfig {
    /// The addresses at which the service is served.
    pub mode: ImdsMode,
    /// Whether region and availability zone are served too.
    pub region: bool,
    /// File with the key of metadata tokens.
    pub key_file: PathBuf,
}

/// The addresses at which the daemon serves the instance metadata service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImdsMode {
    /// The daemon serves it nowhere.
    Off,
    /// The TCP addresses of the container credential endpoint.
    Endpoint,
    /// Those, and `169.254.169.254` in pods that opt in.
    Address,
}

impl ImdsMode {
    /// The modes, by their words in the file.
    pub(super) const WORDS: [(&'static str, Self); 3] = [
        ("off", Self::Off),
        ("endpoint", Self::Endpoint),
        ("address", Self::Address),
    ];

    /// Returns the word in the file.
    pub fn word(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Endpoint => "endpoint",
            Self::Address => "address",
        }
    }
}

impl Default for ImdsConfig {
    fn default() -> Self {
        Self {
            mode: ImdsMode::Off,
            region: true,
            key_file: PathBuf::from("/run/awsvid/imds-key"),
        }
    }
}

impl ImdsConfig {
    /// Returns whether the daemon serves the instance metadata service at all.
    pub fn is_on(&self) -> bool {
        self.mode != ImdsMode::Off
    }

    /// Returns the keys in which `other` differs.
    pub fn changed(&self, other: &Self) -> Vec<&'static str> {
        let Self {
            mode,
            region,
            key_file,
        } = self;
        let changed = [
            ("mode", *mode != other.mode),
            ("region", *region != other.region),
            ("key_file", *key_file != other.key_file),
        ];
        let keys = changed.into_iter().filter(|(_, changed)| *changed);
        keys.map(|(key, _)| key).collect()
    }
}

/// Reads the table `[imds]`.
pub(super) fn read(table: &Table<'_>, listen: &ListenConfig, pods: &PodsConfig) -> ImdsConfig {
    let default = ImdsConfig::default();
    let imds = ImdsConfig {
        mode: table.word("mode", &ImdsMode::WORDS).unwrap_or(default.mode),
        region: table.flag("region").unwrap_or(default.region),
        key_file: table.path("key_file").unwrap_or(default.key_file),
    };
    check(table, &imds, listen, pods);
    imds
}

fn check(table: &Table<'_>, imds: &ImdsConfig, listen: &ListenConfig, pods: &PodsConfig) {
    if imds.mode == ImdsMode::Address && !pods.enabled {
        table.error(
            "mode",
            "\"address\" serves pods only, and [pods] serves none",
            "set `enabled = true` in [pods], or use \"endpoint\"",
        );
    } else if imds.is_on() && listen.tcp.is_empty() && !pods.enabled {
        table.error(
            "mode",
            "no TCP address is left to serve it",
            "set `tcp` in [listen] or `enabled` in [pods], or use \"off\"",
        );
    }
    if imds.is_on() && listen.authorization == AuthorizationMode::Token {
        table.error(
            "mode",
            "SDKs send no token of `token_file` there, so `authorization = \"token\"` would not hold",
            "use `authorization = \"present\"`, or `mode = \"off\"`",
        );
    }
}

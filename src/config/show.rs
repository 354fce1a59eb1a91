//! The page of `awsvid config show`: the whole configuration as a file, with each value's origin.

use std::fmt::Write;
use std::time::Duration;

use toml::Value;

use super::audit::{AuditConfig, AuditFile};
use super::identity::{IdentityConfig, Reference, Source};
use super::imds::ImdsConfig;
use super::log::{LogConfig, LogFormat};
use super::pods::PodsConfig;
use super::sts::StsConfig;
use super::{CacheConfig, Config, ConfigFiles, LoadedConfig, RolesAnywhereConfig, listen};
use crate::role::RolesAnywhereTarget;

mod entries;

const DEFAULT: &str = "default";

/// The page under construction, and the files that it shows.
struct ConfigWriter<'a> {
    text: String,
    /// Content of the main file.
    file: toml::Table,
    /// The included files, with their paths.
    included: Vec<(String, toml::Table)>,
    env: &'a dyn Fn(&str) -> Option<String>,
}

impl LoadedConfig {
    /// Returns this configuration as one file, which parses to the same configuration. `env` is
    /// what it was parsed with.
    pub fn show(&self, env: &dyn Fn(&str) -> Option<String>) -> String {
        let mut writer = ConfigWriter::of(&self.files, env);
        // All fields by name, so that the compiler finds a new one.
        let Config {
            listen,
            pods,
            imds,
            identity,
            sts,
            roles_anywhere,
            cache,
            audit,
            log,
            workloads,
            roles,
            listen_lines: _,
            digest: _,
        } = &self.config;
        let requested = roles
            .requested
            .iter()
            .flat_map(|requested| &requested.allowed);
        let requested: Vec<&str> = requested.map(glob::Pattern::as_str).collect();
        writer.include();
        writer.listen(listen);
        writer.pods(pods);
        writer.imds(imds);
        writer.identity(identity);
        writer.sts(sts);
        writer.roles_anywhere(roles_anywhere);
        writer.cache(cache);
        writer.output(audit, log);
        writer.table("[requested_roles]");
        writer.key("requested_roles", "allow", requested);
        workloads
            .iter()
            .enumerate()
            .for_each(|(i, workload)| writer.workload(i, &workload.rule));
        roles
            .defined
            .iter()
            .enumerate()
            .for_each(|(i, role)| writer.role(i, role));
        writer.text
    }
}

impl<'a> ConfigWriter<'a> {
    /// Returns an empty page about these files.
    fn of(files: &ConfigFiles, env: &'a dyn Fn(&str) -> Option<String>) -> Self {
        let parsed = |text: &str| text.parse().unwrap_or_default();
        let main = files.texts.iter().find(|file| file.path.is_none());
        let included = files.texts.iter().filter_map(|file| {
            let path = file.path.as_ref()?;
            Some((path.display().to_string(), parsed(&file.text)))
        });
        Self {
            text: String::new(),
            file: main.map_or_else(toml::Table::new, |file| parsed(&file.text)),
            included: included.collect(),
            env,
        }
    }
}

impl ConfigWriter<'_> {
    fn line(&mut self, key: &str, value: impl Into<Value>, origin: &str) {
        let line = format!("{key} = {}", value.into());
        // Writing to a string cannot fail.
        let _ = match origin {
            "" => writeln!(self.text, "{line}"),
            _ => writeln!(self.text, "{line:<56} # {origin}"),
        };
    }

    /// Writes a key that is not set, and its meaning.
    fn unset(&mut self, key: &str, meaning: &str) {
        let line = format!("# {key}");
        let _ = writeln!(self.text, "{line:<56} # {meaning}");
    }

    fn table(&mut self, header: &str) {
        let _ = writeln!(self.text, "\n{header}");
    }

    fn has(&self, table: &str, key: &str) -> bool {
        self.file
            .get(table)
            .and_then(|table| table.get(key))
            .is_some()
    }

    /// Writes a key of a table, marked if it is a default.
    fn key(&mut self, table: &str, key: &str, value: impl Into<Value>) {
        let origin = if self.has(table, key) { "" } else { DEFAULT };
        self.line(key, value, origin);
    }

    /// Writes a key that an environment variable replaces where the file has none.
    fn key_or_variable(&mut self, table: &str, key: &str, value: impl Into<Value>, variable: &str) {
        let is_set = (self.env)(variable).is_some_and(|value| !value.is_empty());
        match is_set && !self.has(table, key) {
            true => self.line(key, value, &format!("from {variable}")),
            false => self.key(table, key, value),
        }
    }

    /// Shows `include` as a comment, because the page has what the files contain.
    fn include(&mut self) {
        match self.included.len() {
            0 => self.unset("include", "default: no other files"),
            files => self.unset("include", &format!("{files} files, which are below")),
        }
    }

    fn listen(&mut self, listen: &listen::ListenConfig) {
        const TABLE: &str = "listen";
        let listen::ListenConfig {
            unix,
            tcp,
            admin,
            status,
            authorization,
            token_file,
            max_connections,
            max_connections_per_workload,
        } = listen;
        self.table("[listen]");
        self.key(TABLE, "unix", unix.as_deref().map_or(String::new(), shown));
        self.key(
            TABLE,
            "tcp",
            tcp.iter().map(ToString::to_string).collect::<Vec<_>>(),
        );
        self.key(
            TABLE,
            "admin",
            admin.map_or(String::new(), |admin| admin.to_string()),
        );
        self.key(
            TABLE,
            "status",
            status.as_deref().map_or(String::new(), shown),
        );
        let word = match authorization {
            listen::AuthorizationMode::Present => "present",
            listen::AuthorizationMode::Token => "token",
            listen::AuthorizationMode::Off => "off",
        };
        self.key(TABLE, "authorization", word);
        self.key(TABLE, "token_file", shown(token_file));
        self.key(TABLE, "max_connections", number(*max_connections));
        self.key(
            TABLE,
            "max_connections_per_workload",
            number(*max_connections_per_workload),
        );
    }

    fn pods(&mut self, pods: &PodsConfig) {
        const TABLE: &str = "pods";
        let PodsConfig {
            enabled,
            netns_dir,
            cgroup_root,
            handover_socket,
        } = pods;
        self.table("[pods]");
        self.key(TABLE, "enabled", *enabled);
        self.key(TABLE, "netns_dir", shown(netns_dir));
        match cgroup_root {
            Some(path) => self.key(TABLE, "cgroup_root", path.as_str()),
            None => self.unset("cgroup_root", "default: found at the usual paths"),
        }
        match enabled {
            true => self.key(
                TABLE,
                "handover_socket",
                handover_socket.as_deref().map_or(String::new(), shown),
            ),
            false => self.unset("handover_socket", "not used unless `enabled`"),
        }
    }

    fn imds(&mut self, imds: &ImdsConfig) {
        const TABLE: &str = "imds";
        let ImdsConfig {
            mode,
            region,
            key_file,
        } = imds;
        self.table("[imds]");
        self.key(TABLE, "mode", mode.word());
        self.key(TABLE, "region", *region);
        self.key(TABLE, "key_file", shown(key_file));
    }

    fn identity(&mut self, identity: &IdentityConfig) {
        const TABLE: &str = "identity";
        let IdentityConfig {
            source,
            workload_api_socket,
            audience,
        } = identity;
        self.table("[identity]");
        let unix = |path: &std::path::Path| format!("unix://{}", path.display());
        match source {
            Source::WorkloadApi => self.key(TABLE, "source", "workload-api"),
            Source::SpireDelegated { socket } => {
                self.key(TABLE, "source", "spire-delegated");
                self.key(TABLE, "admin_socket", unix(socket));
            }
            Source::SpiffeBroker {
                socket,
                server,
                reference,
            } => {
                self.key(TABLE, "source", "spiffe-broker");
                self.key_or_variable(TABLE, "broker_socket", unix(socket), "SPIFFE_BROKER_SOCKET");
                let reference = match reference {
                    Reference::Auto => "auto",
                    Reference::Process => "process",
                };
                self.key(TABLE, "workload_reference", reference);
                match server {
                    Some(server) => self.key(TABLE, "broker_server_id", server.as_str()),
                    None => self.unset(
                        "broker_server_id",
                        "default: spiffe://<awsvid's trust domain>/spire/agent/**",
                    ),
                }
            }
        }
        self.key_or_variable(
            TABLE,
            "workload_api_socket",
            workload_api_socket.to_string(),
            "SPIFFE_ENDPOINT_SOCKET",
        );
        self.key(TABLE, "audience", audience.as_str());
    }

    fn sts(&mut self, sts: &StsConfig) {
        const TABLE: &str = "sts";
        let StsConfig {
            region,
            endpoint,
            ca_file,
            timeout,
            max_concurrent,
        } = sts;
        self.table("[sts]");
        match region {
            Some(region) => self.key(TABLE, "region", region.as_str()),
            None => self.unset("region", "not set: each role has its own, or an endpoint"),
        }
        match endpoint {
            Some(endpoint) => self.key(TABLE, "endpoint", endpoint.as_str()),
            None => self.unset("endpoint", "not set: AWS's in the region"),
        }
        match ca_file {
            Some(path) => self.key(TABLE, "ca_file", shown(path)),
            None => self.unset("ca_file", "not set: the system's certificates"),
        }
        self.key(TABLE, "timeout", duration(*timeout));
        self.key(TABLE, "max_concurrent", number(*max_concurrent));
    }

    fn roles_anywhere(&mut self, roles_anywhere: &RolesAnywhereConfig) {
        const TABLE: &str = "roles_anywhere";
        let RolesAnywhereConfig { target, ca_file } = roles_anywhere;
        let Some(target) = target else { return };
        let RolesAnywhereTarget {
            trust_anchor_arn,
            profile_arn,
            region,
            endpoint,
        } = &**target;
        self.table("[roles_anywhere]");
        self.key(TABLE, "trust_anchor_arn", trust_anchor_arn.as_str());
        self.key(TABLE, "profile_arn", profile_arn.as_str());
        match endpoint {
            Some(endpoint) => self.key(TABLE, "endpoint", endpoint.as_str()),
            None => self.unset("endpoint", &format!("not set: AWS's in {region}")),
        }
        match ca_file {
            Some(path) => self.key(TABLE, "ca_file", shown(path)),
            None => self.unset("ca_file", "not set: the system's certificates"),
        }
    }

    fn cache(&mut self, cache: &CacheConfig) {
        let CacheConfig {
            max_entries,
            revocation_grace,
        } = cache;
        self.table("[cache]");
        self.key("cache", "max_entries", number(*max_entries));
        self.key("cache", "revocation_grace", duration(*revocation_grace));
    }

    fn output(&mut self, audit: &AuditConfig, log: &LogConfig) {
        let AuditConfig { file, required } = audit;
        self.table("[audit]");
        let file = match file {
            AuditFile::Stdout => "-".to_owned(),
            AuditFile::Path(path) => shown(path),
        };
        self.key("audit", "file", file);
        self.key("audit", "required", *required);
        let LogConfig { level, format } = log;
        self.table("[log]");
        // The variable overrides the file.
        match (self.env)("AWSVID_LOG").filter(|level| !level.is_empty()) {
            Some(_) => self.line("level", level.as_str(), "from AWSVID_LOG"),
            None => self.key("log", "level", level.as_str()),
        }
        let format = match format {
            LogFormat::Auto => "auto",
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        };
        self.key("log", "format", format);
    }
}

fn shown(path: &std::path::Path) -> String {
    path.display().to_string()
}

fn number(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn duration(duration: Duration) -> String {
    humantime::format_duration(duration).to_string()
}

#[cfg(test)]
mod tests;

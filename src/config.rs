//! The configuration: read once, all of its errors reported together, valid from then on.
//!
//! TOML, as the README describes it. Nothing else configures awsvid but three variables: `AWSVID_CONFIG` (the file),
//! `AWSVID_LOG` (overrides `[log] level`) and `SPIFFE_ENDPOINT_SOCKET` (if `[identity] socket` is not set).

mod aws;
mod checks;
mod digest;
mod explain;
mod exposure;
mod identity;
mod listen;
mod output;
mod problem;
mod reader;
mod role;
mod sts;
mod workload;

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use toml::de::DeTable;

pub(crate) use aws::is_aws as is_aws_sts;
pub use digest::ConfigDigest;
pub(crate) use exposure::exposures;
pub use identity::{IdentityConfig, Reference, Source};
pub use listen::{AuthorizationMode, Listen};
pub use output::{AuditConfig, AuditFile, LogConfig, LogFormat};
pub use problem::{ConfigErrors, Problem};
pub use sts::StsConfig;
pub use workload::{ParsedWorkload, WorkloadRuleKey};

use crate::endpoint::Endpoint;
use crate::role::Roles;
use crate::rule::{AccountName, Known};
use reader::{Diagnostics, Table};

/// The trust domain of `awsvid dev`'s identities.
pub const DEV_TRUST_DOMAIN: &str = "dev.local";
/// The account of its role. AWS gives this number to nobody.
pub const DEV_ACCOUNT: &str = "000000000000";

/// Everything that the file says, with defaults for what it doesn't.
#[derive(Debug, Clone)]
pub struct Config {
    /// `[listen]`.
    pub listen: Listen,
    /// `[identity]`.
    pub identity: IdentityConfig,
    /// `[sts]`.
    pub sts: StsConfig,
    /// `[cache]`.
    pub cache: CacheConfig,
    /// `[audit]`.
    pub audit: AuditConfig,
    /// `[log]`.
    pub log: LogConfig,
    /// `[[workload]]`, in their order.
    pub workloads: Vec<ParsedWorkload>,
    /// `[[role]]` and `allow_requested_roles`.
    pub roles: Roles,
    /// The digest of the text.
    pub digest: ConfigDigest,
}

/// `[cache]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheConfig {
    /// Entries at one time.
    pub max_entries: usize,
    /// How long credentials are still served after STS has refused to renew them.
    pub revocation_grace: Duration,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            max_entries: 10_000,
            revocation_grace: Duration::from_secs(300),
        }
    }
}

/// A configuration without errors.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// What to do.
    pub config: Config,
    /// What is allowed but not wise, by line.
    pub warnings: Vec<Problem>,
}

/// What becomes of a configuration that a user other than root, or than the process itself, could change (T38).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exposure {
    /// It is an error.
    Refused,
    /// It is a warning.
    Warned,
    /// It is not checked.
    Ignored,
}

impl Exposure {
    /// For root the verdict of `serve`. Another user may check a file before it is installed.
    pub fn of_command() -> Self {
        if nix::unistd::geteuid().is_root() {
            Self::Refused
        } else {
            Self::Warned
        }
    }
}

impl Config {
    /// Reads the file; `env` gives environment variables. Users and groups are not looked up.
    ///
    /// A syntax error is reported alone. Everything else is reported together.
    pub fn load(
        path: &Path,
        exposure: Exposure,
        env: impl Fn(&str) -> Option<String>,
    ) -> Result<Loaded, ConfigErrors> {
        let failed = |problems| ConfigErrors {
            path: path.to_owned(),
            problems,
        };
        let (bytes, file) = read_file(path).map_err(|problem| failed(vec![problem]))?;
        let exposed = match exposure {
            Exposure::Ignored => Vec::new(),
            Exposure::Refused | Exposure::Warned => exposures(path, &file, "configuration"),
        };
        let loaded = Self::parse_bytes(bytes, &env);
        match (loaded, exposure) {
            (Ok(mut loaded), Exposure::Warned) => {
                loaded.warnings.extend(exposed);
                Ok(loaded)
            }
            (Ok(loaded), _) if exposed.is_empty() => Ok(loaded),
            (Ok(_), _) => Err(failed(exposed)),
            (Err(mut problems), _) => {
                problems.extend(exposed);
                Err(failed(problems))
            }
        }
    }

    /// Reads a configuration from the content of a file, as [`Config::parse`] does from its text.
    pub fn parse_bytes(
        bytes: Vec<u8>,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Loaded, Vec<Problem>> {
        Self::parse(&utf8(bytes).map_err(|problem| vec![problem])?, env)
    }

    /// What is wrong where a file, or standard input, can't be read.
    pub fn unreadable(error: &io::Error) -> Problem {
        Problem {
            line: None,
            key: String::new(),
            what: format!("the file can't be read: {error}"),
            fix: "name a file with --config or AWSVID_CONFIG".to_owned(),
        }
    }

    /// The rules that match no caller because of an earlier one, with the numbers that users and groups have on one node. What
    /// shows without the numbers is an error of the text.
    pub fn shadowed(&self, number: impl Fn(&AccountName) -> Known) -> Vec<Problem> {
        checks::shadowed(&self.workloads, number)
    }

    /// The users and groups that rules name, each with its lines.
    pub fn accounts(&self) -> BTreeMap<AccountName, Vec<usize>> {
        let mut lines: BTreeMap<AccountName, Vec<usize>> = BTreeMap::new();
        for (name, (_, line)) in self
            .workloads
            .iter()
            .flat_map(|workload| &workload.accounts)
        {
            lines.entry(name.clone()).or_default().extend(*line);
        }
        lines
    }

    /// Of the file only what somebody needs who asks the daemon: `[listen]`, and the region if it is right. Whoever asks is no
    /// operator, may know fewer users than the daemon and can't mend the rest; but of `[listen]` each error counts, since a
    /// default in place of what was meant would be another daemon's address.
    pub fn load_for_callers(path: &Path) -> Result<(Listen, Option<String>), ConfigErrors> {
        let failed = |problems| ConfigErrors {
            path: path.to_owned(),
            problems,
        };
        let (bytes, _) = read_file(path).map_err(|problem| failed(vec![problem]))?;
        let text = utf8(bytes).map_err(|problem| failed(vec![problem]))?;
        let entries = DeTable::parse(&text)
            .map_err(|error| failed(vec![syntax_error(&text, &error)]))?
            .into_inner();
        let rest = Diagnostics::new(&text);
        let region = sts::read(&rest.root(&entries).table("sts")).region;
        let report = Diagnostics::new(&text);
        let listen = listen::read(&report.root(&entries).table("listen"));
        report.finish_table("listen", &entries).map_err(failed)?;
        Ok((listen, region))
    }

    /// Reads a configuration from its text; on failure gives at least one problem, in the order of their lines. Names that
    /// only `awsvid dev` has are refused: its identities and its role are for trying things out.
    pub fn parse(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Loaded, Vec<Problem>> {
        parse(text, env, NamePolicy::OfServe)
    }

    /// Reads `awsvid dev`'s own configuration.
    pub fn parse_for_dev(
        text: &str,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Loaded, Vec<Problem>> {
        parse(text, env, NamePolicy::OfDev)
    }
}

/// Whose names a configuration may have.
#[derive(Clone, Copy, PartialEq, Eq)]
enum NamePolicy {
    OfServe,
    OfDev,
}

fn parse(
    text: &str,
    env: &dyn Fn(&str) -> Option<String>,
    names: NamePolicy,
) -> Result<Loaded, Vec<Problem>> {
    let entries = DeTable::parse(text)
        .map_err(|error| vec![syntax_error(text, &error)])?
        .into_inner();
    let report = Diagnostics::new(text);
    let mut config = read(&report.root(&entries), env, names);
    config.digest = ConfigDigest::of(text);
    let warnings = report.finish(&entries)?;
    Ok(Loaded { config, warnings })
}

/// Reads all tables. What has an error is replaced by its default or left out, so that the rest can be checked.
fn read(root: &Table<'_>, env: &dyn Fn(&str) -> Option<String>, names: NamePolicy) -> Config {
    let [
        listen_table,
        identity_table,
        sts_table,
        cache_table,
        audit_table,
        log_table,
    ] = ["listen", "identity", "sts", "cache", "audit", "log"].map(|name| root.table(name));
    let listen = listen::read(&listen_table);
    let (identity, by_rules) = identity::read(&identity_table, env);
    let sts = sts::read(&sts_table);
    let audit = output::read_audit(&audit_table);

    let defaults = role::Defaults {
        identity: &identity,
        identity_table: &identity_table,
        sts: &sts,
        sts_table: &sts_table,
    };
    let workloads = workload::read(root);
    let requested = role::read_requested(root, &defaults);
    let roles = role::read(root, &defaults);

    let audit_path = match &audit.file {
        AuditFile::Path(path) => Some(path.as_path()),
        AuditFile::Stdout => None,
    };
    let source = match &identity.socket {
        Endpoint::Unix(path) => Some(path.as_path()),
        Endpoint::Tcp(_) => None,
    };
    let agent = match &identity.source {
        Source::WorkloadApi => None,
        Source::SpireDelegated { socket } => Some(("admin_socket", socket.as_path())),
        Source::SpiffeBroker { socket, .. } => Some(("broker_socket", socket.as_path())),
    };
    let (agent_key, agent) = agent.map_or(("admin_socket", None), |(key, path)| (key, Some(path)));
    let named: [checks::PathSetting<'_>; 9] = [
        (&identity_table, agent_key, agent),
        (&identity_table, "socket", source),
        (&sts_table, "ca_file", sts.ca_file.as_deref()),
        (&listen_table, "unix", listen.unix.as_deref()),
        (&listen_table, "status", listen.status.as_deref()),
        (&listen_table, "handover", listen.handover.as_deref()),
        (&listen_table, "pods_dir", Some(&listen.pods_dir)),
        (&listen_table, "token_file", Some(&listen.token_file)),
        (&audit_table, "file", audit_path),
    ];
    if by_rules == Some(true) && root.missing("workload") {
        root.error(
            "workload",
            "nobody has an identity, so every request would be refused",
            "add a [[workload]]",
        );
    }
    if let (Some(false), Some(first)) = (by_rules, workloads.first()) {
        let what =
            "the agent says itself which workload has which identity, so rules are never looked at";
        root.report.error(
            &first.at(),
            what,
            "remove every [[workload]], or set source = \"workload-api\"",
        );
    }
    if root.missing("role") && root.missing("allow_requested_roles") {
        root.error(
            "role",
            "nobody has a role, so every request would be refused",
            "add a [[role]]",
        );
    }
    if names == NamePolicy::OfServe {
        checks::names_of_dev(root.report, &workloads, &roles);
    }
    checks::paths(root.report, &named);
    checks::rules(root.report, &workloads);
    checks::roles(root.report, &roles, requested.as_ref());
    if sts.ca_file.is_some()
        && roles
            .iter()
            .all(|defined| aws::is_aws(defined.role.sts.endpoint.as_deref()))
    {
        let what = "no role uses an STS endpoint of its own, and AWS's are trusted by the system's certificates alone";
        sts_table.error("ca_file", what, "remove it, or set `endpoint`");
    }
    if by_rules == Some(true) {
        checks::coverage(root.report, &workloads, &roles, requested.is_some());
    }

    Config {
        cache: read_cache(&cache_table),
        log: output::read_log(&log_table, env),
        workloads,
        roles: Roles {
            defined: roles.into_iter().map(|defined| defined.role).collect(),
            requested,
        },
        listen,
        identity,
        sts,
        audit,
        digest: ConfigDigest::default(),
    }
}

fn read_cache(table: &Table<'_>) -> CacheConfig {
    let default = CacheConfig::default();
    let grace = Duration::ZERO..=Duration::from_secs(12 * 3600);
    CacheConfig {
        max_entries: table
            .number("max_entries", 1..=1_000_000)
            .unwrap_or(default.max_entries),
        revocation_grace: table
            .duration("revocation_grace", grace)
            .unwrap_or(default.revocation_grace),
    }
}

fn syntax_error(text: &str, error: &toml::de::Error) -> Problem {
    let span = error.span().unwrap_or(text.len()..text.len());
    let before = text.get(..span.start).unwrap_or(text);
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    let found = text
        .get(span.clone())
        .filter(|found| (1..=40).contains(&found.len()) && !found.contains('\n'));
    let found = found
        .map(|found| format!(" at `{found}`"))
        .unwrap_or_default();
    Problem {
        line: Some(reader::line_at(text, span.start)),
        key: String::new(),
        what: format!(
            "this is not TOML: {}{found} (column {column})",
            error.message()
        ),
        fix: "correct it; the rest of the file is checked after that".to_owned(),
    }
}

/// The content of the file, and what was opened.
fn read_file(path: &Path) -> Result<(Vec<u8>, Metadata), Problem> {
    let read = || {
        let mut file = File::open(path)?;
        let (mut bytes, found) = (Vec::new(), file.metadata()?);
        file.read_to_end(&mut bytes)?;
        Ok((bytes, found))
    };
    read().map_err(|error: io::Error| Config::unreadable(&error))
}

fn utf8(bytes: Vec<u8>) -> Result<String, Problem> {
    String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        Problem {
            line: Some(valid.iter().filter(|byte| **byte == b'\n').count() + 1),
            key: String::new(),
            what: "this is not UTF-8".to_owned(),
            fix: "save the file as UTF-8".to_owned(),
        }
    })
}

#[cfg(test)]
mod tests;

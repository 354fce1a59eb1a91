//! The configuration. It is read once, reports all of its errors together, and is valid afterwards.
//!
//! The format is TOML, as `deploy/docs/configuration.md` describes it. Four variables also count:
//! `AWSVID_CONFIG` names the file, `AWSVID_LOG` overrides `[log] level`, and
//! `SPIFFE_ENDPOINT_SOCKET` and `SPIFFE_BROKER_SOCKET` stand in for keys of `[identity]`.

mod aws;
mod config_line;
mod cross_checks;
mod digest;
mod error;
mod explain;
mod exposure;
mod files;
mod identity;
mod keys;
mod listen;
mod manual;
mod output;
mod path_steps;
mod pods;
mod role;
mod sts;
mod toml_reader;
mod workload;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::time::Duration;

use toml::de::DeTable;

pub(crate) use aws::is_aws as is_aws_sts;
pub use config_line::ConfigLine;
pub use digest::ConfigDigest;
pub use error::{ConfigErrors, Problem};
pub(crate) use exposure::exposures;
pub use files::ConfigFiles;
pub use identity::{IdentityConfig, Reference, Source};
pub use listen::{AuthorizationMode, FIRST_UNPRIVILEGED_PORT, Listen};
pub use manual::manual_page;
pub use output::{AuditConfig, AuditFile, LogConfig, LogFormat};
pub(crate) use path_steps::path_steps;
pub use pods::PodsConfig;
pub use sts::StsConfig;
pub use workload::{ParsedWorkload, WorkloadRuleKey};

use crate::role::Roles;
use crate::socket_endpoint::Endpoint;
use crate::workload_rule::{AccountName, AccountState};
use files::{ConfigText, read_file, utf8};
use toml_reader::{Diagnostics, Table};

/// The trust domain of `awsvid dev`'s identities.
pub const DEV_TRUST_DOMAIN: &str = "dev.local";
/// The AWS account of `awsvid dev`'s role. AWS does not assign this number.
pub const DEV_ACCOUNT: &str = "000000000000";

/// The whole configuration, with defaults for all keys that the file leaves out.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "the fields are the tables of the file")]
pub struct Config {
    pub listen: Listen,
    pub pods: PodsConfig,
    pub identity: IdentityConfig,
    pub sts: StsConfig,
    pub cache: CacheConfig,
    pub audit: AuditConfig,
    pub log: LogConfig,
    /// The `[[workload]]` rules, in the order of the file.
    pub workloads: Vec<ParsedWorkload>,
    /// The tables `[[role]]` and `[requested_roles]`.
    pub roles: Roles,
    tcp_lines: listen::TcpLines,
    /// The digest of the files.
    pub digest: ConfigDigest,
}

/// The table `[cache]` of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheConfig {
    /// Maximum number of entries at the same time.
    pub max_entries: usize,
    /// Time for which awsvid serves cached credentials after STS has rejected their refresh.
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
#[expect(missing_docs, reason = "the type of the field is documented")]
pub struct Loaded {
    pub config: Config,
    /// Warnings, by line: settings that are allowed and risky.
    pub warnings: Vec<Problem>,
    files: ConfigFiles,
}

impl Loaded {
    /// Returns this configuration as one file, which parses to the same configuration. `env` is
    /// what it was parsed with.
    pub fn show(&self, env: &dyn Fn(&str) -> Option<String>) -> String {
        explain::show(&self.config, &self.files, env)
    }
}

/// The severity of a configuration that another user than root or the process's own could change
/// (T38).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of the variants are the severities")]
pub enum Exposure {
    Refused,
    Warned,
    /// The owner and mode are not checked.
    Ignored,
}

impl Exposure {
    /// Returns the severity for a command. For root it is that of `serve`. Another user may
    /// validate a file before its installation.
    pub fn of_command() -> Self {
        if nix::unistd::geteuid().is_root() {
            Self::Refused
        } else {
            Self::Warned
        }
    }
}

impl Config {
    /// Reads the file, and those that it includes. `env` returns environment variables. Users and
    /// groups are not resolved.
    ///
    /// Syntax errors are reported alone. All other errors are reported together.
    pub fn load(
        path: &Path,
        exposure: Exposure,
        env: impl Fn(&str) -> Option<String>,
    ) -> Result<Loaded, ConfigErrors> {
        let failed = |problems| ConfigErrors {
            path: path.to_owned(),
            problems,
        };
        let files = ConfigFiles::read(path, exposure).map_err(|problem| failed(vec![problem]))?;
        let exposed = files.exposures.clone();
        match (parse(files, &env, NamePolicy::OfServe), exposure) {
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

    /// Parses the content of a file, as [`Config::parse`] does its text.
    pub fn parse_bytes(
        bytes: Vec<u8>,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Loaded, Vec<Problem>> {
        Self::parse(&utf8(bytes, None).map_err(|problem| vec![problem])?, env)
    }

    /// Returns the problem for a file, or standard input, that cannot be read.
    pub fn unreadable(error: &io::Error) -> Problem {
        Problem {
            line: None,
            key: String::new(),
            what: format!("the file cannot be read: {error}"),
            fix: "name a file with --config or AWSVID_CONFIG".to_owned(),
        }
    }

    /// Returns warnings for rules that match no caller because of an earlier rule. `number` returns
    /// the numbers of users and groups on this node. A rule that is shadowed without them is an
    /// error already.
    pub fn shadowed(&self, number: impl Fn(&AccountName) -> AccountState) -> Vec<Problem> {
        cross_checks::shadowed(&self.workloads, number)
    }

    /// Returns warnings for TCP addresses in `[listen]` that any user can take.
    ///
    /// `first` is the first port that needs no privilege: this node's, or
    /// [`FIRST_UNPRIVILEGED_PORT`].
    pub fn unprivileged_ports(&self, first: u16) -> Vec<Problem> {
        listen::unprivileged_ports(&self.listen, &self.tcp_lines, first)
    }

    /// Returns the users and groups that rules name, each with its lines.
    pub fn accounts(&self) -> BTreeMap<AccountName, Vec<ConfigLine>> {
        let mut lines: BTreeMap<AccountName, Vec<ConfigLine>> = BTreeMap::new();
        for (name, (_, line)) in self
            .workloads
            .iter()
            .flat_map(|workload| &workload.accounts)
        {
            lines.entry(name.clone()).or_default().extend(line.clone());
        }
        lines
    }

    /// Reads the part of the file that a caller of the daemon needs: `[listen]`, and the region if
    /// it is valid.
    ///
    /// A caller cannot correct the rest of the file, and may know fewer users than the daemon. Each
    /// error in `[listen]` counts, because a default could be the address of another daemon.
    pub fn load_for_callers(path: &Path) -> Result<(Listen, Option<String>), ConfigErrors> {
        let failed = |problems| ConfigErrors {
            path: path.to_owned(),
            problems,
        };
        let (bytes, _) = read_file(path).map_err(|error| failed(vec![Self::unreadable(&error)]))?;
        let text = utf8(bytes, None).map_err(|problem| failed(vec![problem]))?;
        // Included files have no such table.
        let files = ConfigFiles::of_text(text).texts;
        let tables = parse_tables(&files).map_err(failed)?;
        let rest = Diagnostics::new(&files);
        let region = sts::read(&rest.root(&tables).table("sts")).region;
        let pods = pods::read(&rest.root(&tables).table("pods"));
        let report = Diagnostics::new(&files);
        let (listen, _) = listen::read(&report.root(&tables).table("listen"), &pods);
        report.finish_table("listen", &tables).map_err(failed)?;
        Ok((listen, region))
    }

    /// Parses a configuration. An error has at least one problem, and they are in the order of
    /// their lines. The names of `awsvid dev` are errors: its identities and role are for trials.
    pub fn parse(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Loaded, Vec<Problem>> {
        let files = ConfigFiles::of_text(text.to_owned());
        parse(files, env, NamePolicy::OfServe)
    }

    /// Parses the configuration of `awsvid dev`, with its own names.
    pub fn parse_for_dev(
        text: &str,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Loaded, Vec<Problem>> {
        let files = ConfigFiles::of_text(text.to_owned());
        parse(files, env, NamePolicy::OfDev)
    }
}

/// The names that a configuration may have: those of `awsvid dev`, or all others.
#[derive(Clone, Copy, PartialEq, Eq)]
enum NamePolicy {
    OfServe,
    OfDev,
}

fn parse(
    files: ConfigFiles,
    env: &dyn Fn(&str) -> Option<String>,
    names: NamePolicy,
) -> Result<Loaded, Vec<Problem>> {
    let tables = parse_tables(&files.texts)?;
    let report = Diagnostics::new(&files.texts);
    report.extend(files.problems.clone());
    let root = report.root(&tables);
    let included = files::read(&root);
    if let Some((at, _)) = included.first().filter(|_| !files.has_directory) {
        let what = "a text without a file has no directory for other files";
        report.error(at, what, "name the configuration by its file");
    }
    let mut config = read(&root, env, names);
    config.digest = files.digest();
    let warnings = report.finish(&tables)?;
    drop(tables);
    Ok(Loaded {
        config,
        warnings,
        files,
    })
}

/// Parses the text of each file, and reports the syntax errors of all of them.
fn parse_tables(files: &[ConfigText]) -> Result<Vec<DeTable<'_>>, Vec<Problem>> {
    let (mut tables, mut problems) = (Vec::new(), Vec::new());
    for file in files {
        match DeTable::parse(&file.text) {
            Ok(table) => tables.push(table.into_inner()),
            Err(error) => problems.push(syntax_error(file, &error)),
        }
    }
    match problems.is_empty() {
        true => Ok(tables),
        false => Err(problems),
    }
}

/// Reads all tables. A value with an error is replaced by its default or left out, so that the rest
/// can be checked.
fn read(root: &Table<'_>, env: &dyn Fn(&str) -> Option<String>, names: NamePolicy) -> Config {
    let [
        listen_table,
        pods_table,
        identity_table,
        sts_table,
        cache_table,
        audit_table,
        log_table,
        requested_table,
    ] = [
        "listen",
        "pods",
        "identity",
        "sts",
        "cache",
        "audit",
        "log",
        "requested_roles",
    ]
    .map(|name| root.table(name));
    let pods = pods::read(&pods_table);
    let (listen, tcp_lines) = listen::read(&listen_table, &pods);
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
    let requested = role::read_requested(&requested_table, &defaults);
    let roles = role::read(root, &requested_table, &defaults);

    let audit_path = match &audit.file {
        AuditFile::Path(path) => Some(path.as_path()),
        AuditFile::Stdout => None,
    };
    let source = match &identity.workload_api_socket {
        Endpoint::Unix(path) => Some(path.as_path()),
        Endpoint::Tcp(_) => None,
    };
    let agent = match &identity.source {
        Source::WorkloadApi => None,
        Source::SpireDelegated { socket } => Some(("admin_socket", socket.as_path())),
        Source::SpiffeBroker { socket, .. } => Some(("broker_socket", socket.as_path())),
    };
    let (agent_key, agent) = agent.map_or(("admin_socket", None), |(key, path)| (key, Some(path)));
    let named: [cross_checks::PathSetting<'_>; 9] = [
        (&identity_table, agent_key, agent),
        (&identity_table, "workload_api_socket", source),
        (&sts_table, "ca_file", sts.ca_file.as_deref()),
        (&listen_table, "unix", listen.unix.as_deref()),
        (&listen_table, "status", listen.status.as_deref()),
        (&listen_table, "token_file", Some(&listen.token_file)),
        (
            &pods_table,
            "handover_socket",
            pods.handover_socket.as_deref(),
        ),
        (&pods_table, "netns_dir", Some(&pods.netns_dir)),
        (&audit_table, "file", audit_path),
    ];
    if by_rules == Some(true) && root.missing("workload") {
        root.error(
            "workload",
            "no caller has an identity, so every request would be rejected",
            "add a [[workload]]",
        );
    }
    if let (Some(false), Some(first)) = (by_rules, workloads.first()) {
        let what = "the agent itself identifies callers, so the daemon never uses rules";
        root.report.error(
            &first.at(),
            what,
            "remove every [[workload]], or set source = \"workload-api\"",
        );
    }
    if root.missing("role") && requested_table.missing("allow") {
        root.error(
            "role",
            "no caller has a role, so every request would be rejected",
            "add a [[role]]",
        );
    }
    if names == NamePolicy::OfServe {
        cross_checks::names_of_dev(root.report, &workloads, &roles);
    }
    cross_checks::paths(root.report, &named);
    cross_checks::rules(root.report, &workloads);
    cross_checks::roles(root.report, &roles, requested.as_ref());
    if sts.ca_file.is_some()
        && roles
            .iter()
            .all(|defined| aws::is_aws(defined.role.sts.endpoint.as_deref()))
    {
        let what = "no role uses an STS endpoint of its own, and AWS's are trusted by the system's certificates alone";
        sts_table.error("ca_file", what, "remove it, or set `endpoint`");
    }
    if by_rules == Some(true) {
        cross_checks::coverage(root.report, &workloads, &roles, requested.is_some());
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
        pods,
        identity,
        sts,
        audit,
        tcp_lines,
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

fn syntax_error(file: &ConfigText, error: &toml::de::Error) -> Problem {
    let ConfigText { path, text } = file;
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
        line: Some(ConfigLine::new(
            path.clone(),
            toml_reader::line_at(text, span.start),
        )),
        key: String::new(),
        what: format!(
            "this is not TOML: {}{found} (column {column})",
            error.message()
        ),
        fix: "correct it; the rest of the file is checked after that".to_owned(),
    }
}

#[cfg(test)]
mod tests;

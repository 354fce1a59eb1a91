//! The configuration. It is read once, reports all of its errors together, and is valid afterwards.
//!
//! The format is TOML, as `deploy/docs/configuration.md` describes it. Four variables also count:
//! `AWSVID_CONFIG` names the file, `AWSVID_LOG` overrides `[log] level`, and
//! `SPIFFE_ENDPOINT_SOCKET` and `SPIFFE_BROKER_SOCKET` stand in for keys of `[identity]`.

mod audit;
mod aws;
mod cache;
mod chain;
mod config_line;
mod cross_checks;
mod digest;
mod error;
mod exposure;
mod files;
mod identity;
mod imds;
mod keys;
mod listen;
mod load;
mod log;
mod manual;
mod path_steps;
mod pods;
mod role;
mod roles_anywhere;
mod show;
mod sts;
mod tables;
mod templates;
mod toml_reader;
mod workload;

use std::collections::BTreeMap;

pub use audit::{AuditConfig, AuditFile};
pub(crate) use aws::{host_suffixes, is_aws as is_aws_sts, is_aws_roles_anywhere_host};
pub use cache::CacheConfig;
pub use config_line::ConfigLine;
pub use digest::ConfigDigest;
pub use error::{ConfigErrors, Problem};
pub use exposure::Exposure;
pub(crate) use exposure::{exposures, socket_exposures};
pub use files::ConfigFiles;
pub use identity::{IdentityConfig, Reference, Source};
pub use imds::{ImdsConfig, ImdsMode};
pub use listen::{AuthorizationMode, FIRST_UNPRIVILEGED_PORT, ListenConfig};
pub use load::LoadedConfig;
pub use log::{LogConfig, LogFormat};
pub use manual::manual_page;
pub(crate) use path_steps::path_steps;
pub use pods::PodsConfig;
pub use roles_anywhere::RolesAnywhereConfig;
pub use sts::StsConfig;
pub use workload::{ParsedWorkload, WorkloadRuleKey};

use crate::role::Roles;
use crate::workload_rule::{AccountName, AccountState};
use load::parse_tables;
use tables::Tables;
use toml_reader::{Diagnostics, Table};

/// The trust domain of `awsvid dev`'s identities.
pub const DEV_TRUST_DOMAIN: &str = "dev.local";
/// The AWS account of `awsvid dev`'s role. AWS does not assign this number.
pub const DEV_ACCOUNT: &str = "000000000000";

/// The whole configuration, with defaults for all keys that the file leaves out.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "the fields are the tables of the file")]
pub struct Config {
    pub listen: ListenConfig,
    pub pods: PodsConfig,
    pub imds: ImdsConfig,
    pub identity: IdentityConfig,
    pub sts: StsConfig,
    pub roles_anywhere: RolesAnywhereConfig,
    pub cache: CacheConfig,
    pub audit: AuditConfig,
    pub log: LogConfig,
    /// The `[[workload]]` rules, in the order of the file.
    pub workloads: Vec<ParsedWorkload>,
    /// The tables `[[role]]` and `[requested_roles]`.
    pub roles: Roles,
    listen_lines: listen::AddressLines,
    /// The digest of the files.
    pub digest: ConfigDigest,
}

impl Config {
    /// Returns warnings for rules that match no caller because of an earlier rule. `number` returns
    /// the numbers of users and groups on this node. A rule that is shadowed without them is an
    /// error already.
    pub fn shadowed(&self, number: impl Fn(&AccountName) -> AccountState) -> Vec<Problem> {
        cross_checks::shadowed(&self.workloads, number)
    }

    /// Returns warnings for addresses in `[listen]` that any user can take.
    ///
    /// `first` is the first port that needs no privilege: this node's, or
    /// [`FIRST_UNPRIVILEGED_PORT`].
    pub fn unprivileged_ports(&self, first: u16) -> Vec<Problem> {
        listen::unprivileged_ports(&self.listen, self.pods.enabled, &self.listen_lines, first)
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

    /// Parses a configuration. An error has at least one problem, and they are in the order of
    /// their lines. The names of `awsvid dev` are errors: its identities and role are for trials.
    pub fn parse(
        text: &str,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<LoadedConfig, Vec<Problem>> {
        let files = ConfigFiles::of_text(text.to_owned());
        parse(files, env, NamePolicy::OfServe)
    }

    /// Parses the configuration of `awsvid dev`, with its own names.
    pub fn parse_for_dev(
        text: &str,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<LoadedConfig, Vec<Problem>> {
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
) -> Result<LoadedConfig, Vec<Problem>> {
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
    Ok(LoadedConfig {
        config,
        warnings,
        files,
    })
}

/// Reads all tables. A value with an error is replaced by its default or left out, so that the rest
/// can be checked.
fn read(root: &Table<'_>, env: &dyn Fn(&str) -> Option<String>, names: NamePolicy) -> Config {
    let tables = Tables::of(root);
    let pods = pods::read(&tables.pods);
    let (listen, listen_lines) = listen::read(&tables.listen, &pods);
    let imds = imds::read(&tables.imds, &listen, &pods);
    let (identity, by_rules) = identity::read(&tables.identity, env);
    let sts = sts::read(&tables.sts);
    let roles_anywhere = roles_anywhere::read(&tables.roles_anywhere);
    let audit = audit::read(&tables.audit);

    let defaults = role::Defaults {
        identity: &identity,
        identity_table: &tables.identity,
        sts: &sts,
        sts_table: &tables.sts,
        roles_anywhere: &roles_anywhere,
        roles_anywhere_table: &tables.roles_anywhere,
    };
    let workloads = workload::read(root);
    let requested = role::read_requested(&tables.requested_roles, &defaults);
    let roles = role::read(root, &tables.requested_roles, &defaults);

    let ca_files = [sts.ca_file.as_deref(), roles_anywhere.ca_file.as_deref()];
    let paths = tables.paths(&listen, &pods, &imds, &identity, ca_files, &audit);
    cross_checks::missing(root, &tables.requested_roles, by_rules, &workloads);
    if names == NamePolicy::OfServe {
        cross_checks::names_of_dev(root.report, &workloads, &roles);
    }
    cross_checks::paths(root.report, &paths);
    cross_checks::rules(root.report, &workloads);
    cross_checks::roles(root.report, &roles, requested.as_ref());
    cross_checks::ca_file(&tables.sts, &sts, &roles);
    roles_anywhere::check_use(&tables.roles_anywhere, &roles);
    if by_rules == Some(true) {
        cross_checks::coverage(root.report, &workloads, &roles, requested.is_some());
    }

    Config {
        cache: cache::read(&tables.cache),
        log: log::read(&tables.log, env),
        workloads,
        roles: Roles {
            defined: roles.into_iter().map(|defined| defined.role).collect(),
            requested,
        },
        listen,
        pods,
        imds,
        identity,
        sts,
        roles_anywhere,
        audit,
        listen_lines,
        digest: ConfigDigest::default(),
    }
}

#[cfg(test)]
mod tests;

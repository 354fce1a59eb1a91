//! The tables of a file by their names, and the paths in them.

use std::path::Path;

use super::audit::{AuditConfig, AuditFile};
use super::cross_checks::PathSetting;
use super::identity::{IdentityConfig, Source};
use super::imds::ImdsConfig;
use super::listen::ListenConfig;
use super::pods::PodsConfig;
use super::toml_reader::Table;
use crate::socket_endpoint::Endpoint;

/// All tables that appear once. One that the file lacks reads as empty.
pub(super) struct Tables<'r> {
    pub(super) listen: Table<'r>,
    pub(super) pods: Table<'r>,
    pub(super) imds: Table<'r>,
    pub(super) identity: Table<'r>,
    pub(super) sts: Table<'r>,
    pub(super) roles_anywhere: Table<'r>,
    pub(super) cache: Table<'r>,
    pub(super) audit: Table<'r>,
    pub(super) log: Table<'r>,
    pub(super) requested_roles: Table<'r>,
}

impl<'r> Tables<'r> {
    pub(super) fn of(root: &Table<'r>) -> Self {
        Self {
            listen: root.table("listen"),
            pods: root.table("pods"),
            imds: root.table("imds"),
            identity: root.table("identity"),
            sts: root.table("sts"),
            roles_anywhere: root.table("roles_anywhere"),
            cache: root.table("cache"),
            audit: root.table("audit"),
            log: root.table("log"),
            requested_roles: root.table("requested_roles"),
        }
    }

    /// Returns the path of each file and socket that these values name. `ca_files` has those of
    /// `[sts]` and `[roles_anywhere]`.
    pub(super) fn paths<'a>(
        &'a self,
        listen: &'a ListenConfig,
        pods: &'a PodsConfig,
        imds: &'a ImdsConfig,
        identity: &'a IdentityConfig,
        ca_files: [Option<&'a Path>; 2],
        audit: &'a AuditConfig,
    ) -> [PathSetting<'a>; 11] {
        let [sts_ca, roles_anywhere_ca] = ca_files;
        let workload_api = match &identity.workload_api_socket {
            Endpoint::Unix(path) => Some(path.as_path()),
            Endpoint::Tcp(_) => None,
        };
        let (agent_key, agent) = match &identity.source {
            Source::WorkloadApi => ("admin_socket", None),
            Source::SpireDelegated { socket } => ("admin_socket", Some(socket.as_path())),
            Source::SpiffeBroker { socket, .. } => ("broker_socket", Some(socket.as_path())),
        };
        let audit_file = match &audit.file {
            AuditFile::Path(path) => Some(path.as_path()),
            AuditFile::Stdout => None,
        };
        let handover = pods.handover_socket.as_deref();
        [
            (&self.identity, agent_key, agent),
            (&self.identity, "workload_api_socket", workload_api),
            (&self.sts, "ca_file", sts_ca),
            (&self.roles_anywhere, "ca_file", roles_anywhere_ca),
            (&self.listen, "unix", listen.unix.as_deref()),
            (&self.listen, "status", listen.status.as_deref()),
            (&self.listen, "token_file", Some(&listen.token_file)),
            (&self.pods, "handover_socket", handover),
            (&self.pods, "netns_dir", Some(&pods.netns_dir)),
            (&self.imds, "key_file", Some(&imds.key_file)),
            (&self.audit, "file", audit_file),
        ]
    }
}

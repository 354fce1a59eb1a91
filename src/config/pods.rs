//! `[pods]`: listeners in the network namespaces of pods.

use std::path::PathBuf;

use super::toml_reader::{Table, absolute, socket};
use crate::cgroup::CgroupPath;

/// The handover socket, where each awsvid of the node finds it. Its directory is not the one of the
/// other sockets, because containers mount that one (T10).
const HANDOVER_SOCKET: &str = "/run/awsvid-handover/awsvid.sock";
const DIR_FIX: &str = "write the whole path of a directory, from the first `/`";
const CGROUP_FIX: &str = "write the cgroup that holds those of all pods, as in \"/kubepods.slice\"";

/// The table `[pods]` of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodsConfig {
    /// Whether the daemon listens in the network namespaces of pods.
    pub enabled: bool,
    /// Directory in which the container runtime mounts the namespaces.
    pub netns_dir: PathBuf,
    /// The kubelet's cgroup root, which holds the cgroups of all pods. `None`: the usual paths.
    pub cgroup_root: Option<CgroupPath>,
    /// Unix socket over which the listeners pass to the next awsvid. `None` if there are no
    /// listeners, or if the file has an empty string.
    pub handover_socket: Option<PathBuf>,
}

impl Default for PodsConfig {
    fn default() -> Self {
        Self {
            enabled: false,
            netns_dir: PathBuf::from("/run/netns"),
            cgroup_root: None,
            handover_socket: None,
        }
    }
}

impl PodsConfig {
    /// Returns the keys in which `other` differs.
    pub fn changed(&self, other: &Self) -> Vec<&'static str> {
        let Self {
            enabled,
            netns_dir,
            cgroup_root,
            handover_socket,
        } = self;
        let changed = [
            ("enabled", *enabled != other.enabled),
            ("netns_dir", *netns_dir != other.netns_dir),
            ("cgroup_root", *cgroup_root != other.cgroup_root),
            ("handover_socket", *handover_socket != other.handover_socket),
        ];
        changed
            .into_iter()
            .filter(|(_, changed)| *changed)
            .map(|(key, _)| key)
            .collect()
    }
}

/// Reads the table `[pods]`.
pub(super) fn read(table: &Table<'_>) -> PodsConfig {
    let default = PodsConfig::default();
    let enabled = table.flag("enabled").unwrap_or(default.enabled);
    let directory = |text: &'_ str| absolute(text.trim_end_matches('/'));
    let handover = Some(PathBuf::from(HANDOVER_SOCKET));
    PodsConfig {
        enabled,
        netns_dir: table
            .parse("netns_dir", DIR_FIX, directory)
            .unwrap_or(default.netns_dir),
        cgroup_root: table.parse("cgroup_root", CGROUP_FIX, cgroup),
        handover_socket: socket(table, "handover_socket", handover).filter(|_| enabled),
    }
}

/// Parses the path of a cgroup, as `/proc/<pid>/cgroup` shows it to the host.
fn cgroup(text: &str) -> Result<CgroupPath, &'static str> {
    if text.starts_with("/sys/") {
        return Err("it is the path of a cgroup, not of its directory");
    }
    let path = CgroupPath::parse(text.trim_end_matches('/')).filter(|path| !path.is_root());
    path.ok_or("it is not a path of a cgroup below the root")
}

//! The mount of `/proc`, which may hide callers' processes: `hidepid` of proc_pid(5).

use std::fs;

use caps::Capability;

use crate::hardening::{DaemonFeatures, ProcessStatus};

/// A mount of `/proc` that hides other users' processes from this one. It lacks CAP_SYS_PTRACE, and
/// is not in the group that the mount exempts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HidingProc {
    /// The options of the mount, for display.
    options: String,
    /// The group that the mount exempts. `None` if it exempts none.
    group: Option<u32>,
}

impl HidingProc {
    /// Finds the mount in the texts of `/proc/self/mountinfo` and `/proc/self/status`. `None` if it
    /// hides nothing from this process, or callers' processes are not read.
    pub fn find(features: DaemonFeatures, mountinfo: &str, status: &str) -> Option<Self> {
        let status = ProcessStatus(status);
        if !features.sees_processes() || status.has_capability(Capability::CAP_SYS_PTRACE) {
            return None;
        }
        // A later mount covers an earlier one.
        let options = mountinfo.lines().filter_map(proc_options).next_back()?;
        let option = |name| {
            let mut options = options.split(',');
            options.find_map(|option| option.strip_prefix(name)?.strip_prefix('='))
        };
        let hidepid = option("hidepid").filter(|mode| !matches!(*mode, "0" | "off"))?;
        let gid = option("gid").and_then(|gid| gid.parse().ok());
        let group = match hidepid {
            "4" | "ptraceable" => None,
            _ => Some(gid.unwrap_or(0)),
        };
        if group.is_some_and(|group| is_member(status, group)) {
            return None;
        }
        let gid = gid.map_or(String::new(), |gid| format!(",gid={gid}"));
        Some(Self {
            options: format!("hidepid={hidepid}{gid}"),
            group,
        })
    }

    /// Returns the effect on callers.
    pub fn effect(&self) -> String {
        format!(
            "/proc is mounted with {}, and CAP_SYS_PTRACE is missing: callers' processes are not visible, so callers are rejected",
            self.options
        )
    }

    /// Returns the fix, as an imperative.
    pub fn fix(&self) -> String {
        let group = self.group.map_or(String::new(), |group| {
            format!(", or add awsvid to its group: under systemd SupplementaryGroups={group}")
        });
        format!(
            "grant CAP_SYS_PTRACE, or mount /proc without hidepid for awsvid: under systemd ProtectProc=default{group}"
        )
    }
}

/// Logs a mount of `/proc` that hides callers' processes, because callers see only its effects.
pub(super) fn warn(features: DaemonFeatures) {
    let text = |name| fs::read_to_string(name).unwrap_or_default();
    let (mountinfo, status) = (text("/proc/self/mountinfo"), text("/proc/self/status"));
    if let Some(hiding) = HidingProc::find(features, &mountinfo, &status) {
        tracing::warn!(
            consequence = hiding.effect(),
            fix = hiding.fix(),
            "callers' processes are hidden"
        );
    }
}

/// Returns the options of the file system, if this line of mountinfo mounts it at `/proc`.
fn proc_options(line: &str) -> Option<&str> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut filesystem = filesystem.split(' ');
    let is_proc = mount.split(' ').nth(4) == Some("/proc") && filesystem.next() == Some("proc");
    filesystem.nth(1).filter(|_| is_proc)
}

/// Returns whether a process with this `status` is in the group: by its file system's group id, the
/// last of `Gid`, or by a supplementary group.
fn is_member(status: ProcessStatus<'_>, group: u32) -> bool {
    let numbers = |name| status.fields(name).filter_map(|word| word.parse().ok());
    numbers("Gid").nth(3) == Some(group) || numbers("Groups").any(|other: u32| other == group)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn features(listen: &str) -> DaemonFeatures {
        let text = format!(
            "[listen]\n{listen}\n[identity]\nworkload_api_socket = \"unix:///a\"\n[sts]\nregion = \"eu-central-1\"\n\
             [[workload]]\nspiffe_id = \"spiffe://t/a\"\ncgroup = \"/kubepods/**\"\n\
             [[role]]\nname = \"a\"\nspiffe_id = \"spiffe://t/a\"\nrole_arn = \"arn:aws:iam::123456789012:role/a\"\n"
        );
        let parsed = Config::parse(&text, &|_| None);
        DaemonFeatures::of(&parsed.unwrap_or_else(|errors| panic!("{errors:?}")).config)
    }

    fn mount(options: &str) -> String {
        format!(
            "22 1 0:21 / / rw,relatime - ext4 /dev/vda rw\n\
             45 22 0:22 / /proc rw,nosuid shared:5 - proc proc rw{options}\n\
             46 22 0:23 / /jail/proc rw - proc none rw,hidepid=invisible,gid=7\n"
        )
    }

    const ROOT: &str = "Uid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nGroups:\t \n";

    fn options(mountinfo: &str, status: &str) -> Option<String> {
        let found = HidingProc::find(features(""), mountinfo, status)?;
        Some(found.options)
    }

    /// The outcomes are those of a process without CAP_SYS_PTRACE on Linux 6.18, which reads the
    /// `status` of another user's process.
    #[test]
    fn mount_hides_processes_by_its_mode_and_group() {
        let table = [
            ("", ROOT, None),
            (",hidepid=off", ROOT, None),
            (",hidepid=0", ROOT, None),
            // The group is root's by default.
            (",hidepid=invisible", ROOT, None),
            (",hidepid=2", ROOT, None),
            (",hidepid=noaccess", ROOT, None),
            (",hidepid=ptraceable", ROOT, Some("hidepid=ptraceable")),
            (",hidepid=4", ROOT, Some("hidepid=4")),
            (",gid=50,hidepid=1", ROOT, Some("hidepid=1,gid=50")),
            (
                ",gid=50,hidepid=invisible",
                ROOT,
                Some("hidepid=invisible,gid=50"),
            ),
            (
                ",gid=50,hidepid=invisible",
                "Gid:\t0\t0\t0\t0\nGroups:\t7 50 \n",
                None,
            ),
            (
                ",gid=50,hidepid=invisible",
                "Gid:\t0\t0\t0\t50\nGroups:\t7 \n",
                None,
            ),
            (
                ",gid=50,hidepid=invisible",
                "Gid:\t50\t50\t50\t0\nGroups:\t \n",
                Some("hidepid=invisible,gid=50"),
            ),
            (
                ",gid=50,hidepid=ptraceable",
                "Gid:\t0\t0\t0\t50\nGroups:\t50 \n",
                Some("hidepid=ptraceable,gid=50"),
            ),
        ];
        for (mounted, status, expected) in table {
            assert_eq!(
                options(&mount(mounted), status).as_deref(),
                expected,
                "{mounted} {status}"
            );
        }
        for (set, is_hidden) in [
            ("000001ffffffffff", false),
            ("0000000000080000", false),
            ("000001fffff7ffff", true),
        ] {
            let status = format!("{ROOT}CapInh:\t0000000000000000\nCapEff:\t{set}\n");
            let hidden = options(&mount(",hidepid=ptraceable"), &status);
            assert_eq!(hidden.is_some(), is_hidden, "{set}");
        }
        let covered = mount(",hidepid=4") + "47 45 0:24 / /proc rw - proc proc rw\n";
        assert_eq!(options(&covered, ROOT), None);
        assert_eq!(options("", ROOT), None);
    }

    #[test]
    fn mount_does_not_matter_where_all_callers_are_pods() {
        let pods = "tcp = []\nunix = \"\"\n[pods]\nenabled = true";
        let hiding = mount(",hidepid=4");
        assert_eq!(HidingProc::find(features(pods), &hiding, ROOT), None);
    }

    #[test]
    fn fix_names_the_group_that_the_mount_exempts() {
        let fix = |mounted: &str| {
            let found = HidingProc::find(features(""), &mount(mounted), ROOT);
            found.unwrap().fix()
        };
        assert!(fix(",gid=50,hidepid=2").ends_with("SupplementaryGroups=50"));
        assert!(!fix(",gid=50,hidepid=4").contains("group"));
    }
}

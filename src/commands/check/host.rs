//! Checks of the kernel and of this process's privileges, all read from `/proc`, so that tests can
//! replace it.

use std::fs;
use std::path::Path;

use super::report::CheckReport;
use crate::attest::{self, ExecMonitor, ExecMonitorError, TcpUnsupported, UnixSupport};
use crate::config::Config;
use crate::hardening::{DaemonFeatures, HidingProc, ProcessStatus, apparmor};

const STEP: &str = "machine";
/// The number of the initial cgroup namespace, by linux/nsfs.h.
const INITIAL_CGROUP_NAMESPACE: &str = "cgroup:[4026531835]";

/// Results of trying the kernel's features.
#[derive(Debug)]
pub(super) struct KernelSupport {
    unix: UnixSupport,
    tcp: Result<(), TcpUnsupported>,
    /// `None` where no process is referred to an agent.
    executions: Option<Result<(), ExecMonitorError>>,
}

impl KernelSupport {
    /// Tries the features as the daemon does.
    pub(super) fn tried(config: &Config, proc: &Path) -> Self {
        let executions = DaemonFeatures::of(config)
            .names_processes()
            .then(count_an_execution);
        Self {
            unix: attest::unix_support(),
            tcp: attest::try_tcp(proc),
            executions,
        }
    }
}

fn count_an_execution() -> Result<(), ExecMonitorError> {
    ExecMonitor::start().map(drop)
}

/// Runs the checks. `proc` is the mount point of `/proc`.
pub(super) fn check(config: &Config, proc: &Path, tried: &KernelSupport, report: &mut CheckReport) {
    kernel(config, proc, tried, report);
    cgroups(config, proc, report);
    privileges(config, proc, report);
    confinement(config, proc, report);
    namespaces(config, proc, report);
    if config.pods.enabled {
        own_kernels(proc, report);
    }
}

/// Reads a file of `/proc`. An unreadable one is empty, which no step takes as a pass.
fn text(proc: &Path, name: &str) -> String {
    fs::read_to_string(proc.join(name)).unwrap_or_default()
}

fn kernel(config: &Config, proc: &Path, tried: &KernelSupport, report: &mut CheckReport) {
    let release = text(proc, "sys/kernel/osrelease");
    let release = release.trim();
    let over_tcp = config.pods.enabled || !config.listen.tcp.is_empty();
    match &tried.tcp {
        Err(missing) if over_tcp => {
            report.failed(
                STEP,
                format!("Linux {release}: callers over TCP are rejected: {missing}"),
                missing.fix(tried.unix),
            );
        }
        _ => report.ok(STEP, format!("Linux {release}")),
    }
    match tried.unix {
        _ if config.listen.unix.is_none() => {}
        UnixSupport::Process => {}
        UnixSupport::Pid => report.info(
            STEP,
            "callers in containers are rejected on the unix socket: this kernel does not report their process (Linux 6.5)",
            match tried.tcp.is_ok() && over_tcp {
                true => "use TCP for them, or a newer kernel",
                false => "use a newer kernel",
            },
        ),
        UnixSupport::NoPidfd => report.failed(
            STEP,
            "all callers are rejected on the unix socket: this kernel has no pidfd_open(2) (Linux 5.3)",
            "use a newer kernel",
        ),
    }
    match &tried.executions {
        None => {}
        Some(Ok(())) => report.ok(STEP, "executions of programs are counted"),
        Some(Err(error)) => {
            let saw = format!(
                "executions of programs cannot be counted, so callers are rejected (unseen_program): {error}"
            );
            report.failed(STEP, saw, error.fix());
        }
    }
}

fn cgroups(config: &Config, proc: &Path, report: &mut CheckReport) {
    let mounts = text(proc, "self/mountinfo");
    // The directory of the hierarchy that each mount shows. In a cgroup namespace the path to its
    // root begins with `/..`.
    let roots: Vec<&str> = mounts
        .lines()
        .filter(|line| line.contains(" - cgroup2 "))
        .filter_map(|line| line.split(' ').nth(3))
        .collect();
    let namespace = fs::read_link(proc.join("self/ns/cgroup")).unwrap_or_default();
    let is_whole = |root: &&str| match namespace.to_str() {
        Some(INITIAL_CGROUP_NAMESPACE) => *root == "/",
        _ => root.starts_with("/.."),
    };
    let rules = || config.workloads.iter().map(|workload| &workload.rule.rule);
    let is_used = rules().next().is_none()
        || rules().any(|rule| rule.systemd_unit.is_some() || rule.cgroup.is_some());
    if roots.is_empty() && !is_used {
        report.ok(STEP, "cgroup v2 is not mounted, and no rule needs it");
    } else if roots.is_empty() {
        report.info(
            STEP,
            "cgroup v2 is not mounted, so rules by systemd_unit and cgroup match no caller",
            "boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 none /sys/fs/cgroup/unified",
        );
    } else if roots.iter().any(is_whole) {
        report.ok(STEP, "cgroup v2 is mounted");
    } else {
        report.info(
            STEP,
            "of the cgroups only a part is seen from here: callers outside of it are rejected (unreadable_cgroup)",
            "mount the host's /sys/fs/cgroup read-only in addition to the container's own, or use --cgroupns=host",
        );
    }
}

fn privileges(config: &Config, proc: &Path, report: &mut CheckReport) {
    let status = text(proc, "self/status");
    let status = ProcessStatus(&status);
    // The real uid, then the effective one.
    let uid = status.fields("Uid").nth(1).unwrap_or("?");
    if uid != "0" {
        report.failed(
            STEP,
            format!("this runs as uid {uid}, so an agent does not take it for awsvid"),
            "run it as the daemon runs: sudo awsvid check",
        );
    }
    let missing = DaemonFeatures::of(config)
        .required_capabilities()
        .filter(|(needed, _)| !status.has_capability(*needed));
    let missing: Vec<String> = missing
        .map(|(needed, fails)| format!("{needed} ({fails})"))
        .collect();
    match missing.is_empty() {
        true => report.ok(STEP, format!("uid {uid} with the capabilities that awsvid uses")),
        false => report.failed(
            STEP,
            format!("without {}", missing.join(", ")),
            "run it as root; in a unit or pod, grant these capabilities (deploy/docs/install-vm.md)",
        ),
    }
}

fn confinement(config: &Config, proc: &Path, report: &mut CheckReport) {
    let profile = apparmor::enforced_profile(proc);
    let inspects = DaemonFeatures::of(config).inspects_processes();
    if let Some(profile) = profile.filter(|_| inspects) {
        report.info(
            STEP,
            format!(
                "the AppArmor profile {profile} confines this: {}",
                apparmor::CONFINED
            ),
            apparmor::CONFINED_FIX,
        );
    }
}

fn namespaces(config: &Config, proc: &Path, report: &mut CheckReport) {
    let map = text(proc, "self/uid_map");
    let is_hosts = map.split_ascii_whitespace().eq(["0", "0", "4294967295"]);
    if !is_hosts {
        report.failed(
            STEP,
            "this runs in a user namespace, where uids mean something else than on the host",
            "run it, and awsvid, in the host's user namespace",
        );
    }
    // Only the host's pid namespace shows the kernel's own processes.
    let sees_all = text(proc, "2/comm").trim() == "kthreadd";
    match (is_hosts, sees_all) {
        (_, false) if DaemonFeatures::of(config).sees_processes() => report.info(
            STEP,
            "this is not the host's pid namespace: callers outside of this one cannot be identified",
            "in Kubernetes set hostPID: true; in a container use --pid=host",
        ),
        (true, false) => report.ok(
            STEP,
            "the host's user namespace; the host's pid namespace is not needed, because callers are pods",
        ),
        (true, true) => report.ok(STEP, "the host's user and pid namespace"),
        (false, _) => {}
    }
    let (mountinfo, status) = (text(proc, "self/mountinfo"), text(proc, "self/status"));
    if let Some(hiding) = HidingProc::find(DaemonFeatures::of(config), &mountinfo, &status) {
        report.failed(STEP, hiding.effect(), hiding.fix());
    }
}

/// Programs that start pods with a kernel of their own, under the names that containerd and CRI-O
/// use.
const OWN_KERNELS: [(&str, &str); 2] = [
    ("containerd-shim-runsc-v1", "gVisor"),
    ("containerd-shim-kata-v2", "Kata"),
];

/// The name of all of containerd's shims. The kernel keeps 15 bytes of a name.
const SHIM: &str = "containerd-shim";

/// Returns whether root runs the process, under the name of a shim.
///
/// Only such a process's `cmdline` is read. For that the kernel takes locks that a process can hold
/// for as long as it likes (T25). It takes none for `status`.
fn is_roots_shim(process: &Path) -> bool {
    let status = std::fs::read_to_string(process.join("status")).unwrap_or_default();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    let is_roots = |uids: &str| uids.split_ascii_whitespace().all(|uid| uid == "0");
    field("Name:").is_some_and(|name| name.trim() == SHIM) && field("Uid:").is_some_and(is_roots)
}

/// Reports pods with a loopback that awsvid cannot listen on, because it belongs to another kernel.
fn own_kernels(proc: &Path, report: &mut CheckReport) {
    let programs: Vec<Vec<u8>> = std::fs::read_dir(proc)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| is_roots_shim(&entry.path()))
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .map(|line| {
            line.split(|byte| *byte == 0)
                .next()
                .unwrap_or_default()
                .to_owned()
        })
        .collect();
    for (program, name) in OWN_KERNELS {
        let is =
            |path: &Vec<u8>| path.rsplit(|byte| *byte == b'/').next() == Some(program.as_bytes());
        if programs.iter().any(is) {
            report.info(
                STEP,
                format!("pods of {name} run here: they have a loopback of their own, and awsvid is not in it"),
                "give pods that need credentials another runtimeClassName, one with pods that share this kernel",
            );
        }
    }
}

#[cfg(test)]
mod tests;

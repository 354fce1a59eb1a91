//! The kernel, and what this process may do and see.

use std::path::Path;

use caps::{CapSet, Capability};

use super::report::Report;
use crate::config::{Config, Source};

const STEP: &str = "machine";

pub(super) fn check(config: &Config, report: &mut Report) {
    kernel(report);
    privileges(config, report);
    namespaces(report);
    if config.listen.pods {
        own_kernels(Path::new("/proc"), report);
    }
}

fn kernel(report: &mut Report) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    match version {
        (0..=4, _) | (5, 0..=14) => report.failed(
            STEP,
            format!("Linux {release}: before 5.15 the kernel does not tell which cgroup a TCP caller is in"),
            "use the unix socket only ([listen] tcp = []), or a newer kernel",
        ),
        (5, _) | (6, 0..=4) => report.note(
            STEP,
            format!("Linux {release}: before 6.5 callers in containers are refused on the unix socket"),
            "use TCP for them, or a newer kernel",
        ),
        _ => report.pass(STEP, format!("Linux {release}")),
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    match mounts.lines().any(|line| line.contains(" - cgroup2 ")) {
        true => report.pass(STEP, "cgroup v2 is mounted"),
        false => report.failed(
            STEP,
            "cgroup v2 is not mounted, so TCP callers are refused",
            "boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 none /sys/fs/cgroup/unified",
        ),
    }
}

fn privileges(config: &Config, report: &mut Report) {
    let uid = nix::unistd::geteuid();
    if !uid.is_root() {
        report.failed(
            STEP,
            format!("this runs as uid {uid}, so an agent does not take it for awsvid"),
            "run it as the daemon runs: sudo awsvid check",
        );
    }
    let mut needed =
        vec![Capability::CAP_SYS_PTRACE, Capability::CAP_DAC_READ_SEARCH, Capability::CAP_NET_BIND_SERVICE];
    if config.identity.source != Source::WorkloadApi {
        needed.push(Capability::CAP_PERFMON);
    }
    let held = caps::read(None, CapSet::Effective).unwrap_or_default();
    let missing: Vec<String> = needed.iter().filter(|needed| !held.contains(needed)).map(ToString::to_string).collect();
    match missing.is_empty() {
        true => report.pass(STEP, format!("uid {uid} with the capabilities that awsvid uses")),
        false => report.failed(
            STEP,
            format!("without {}", missing.join(", ")),
            "run it as root; in a unit or pod, grant these capabilities (deploy/README.md, \"What it needs\")",
        ),
    }
}

fn namespaces(report: &mut Report) {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    match map.split_ascii_whitespace().collect::<Vec<_>>()[..] {
        ["0", "0", "4294967295"] => {}
        _ => report.failed(
            STEP,
            "this runs in a user namespace, where uids mean something else than on the host",
            "run it, and awsvid, in the host's user namespace",
        ),
    }
    // Only the host's pid namespace has the kernel's own processes.
    let kthreadd = std::fs::read_to_string("/proc/2/comm").unwrap_or_default();
    match kthreadd.trim() == "kthreadd" {
        true => report.pass(STEP, "the host's user and pid namespace"),
        false => report.note(
            STEP,
            "this is not the host's pid namespace: callers outside of this one cannot be told",
            "in Kubernetes set hostPID: true; in a container use --pid=host",
        ),
    }
}

/// Who starts pods that have a kernel of their own, as containerd and CRI-O call the program.
const OWN_KERNELS: [(&str, &str); 2] = [("containerd-shim-runsc-v1", "gVisor"), ("containerd-shim-kata-v2", "Kata")];

/// Pods in whose loopback awsvid cannot listen: it is not one of this kernel's.
fn own_kernels(proc: &Path, report: &mut Report) {
    let programs: Vec<Vec<u8>> = std::fs::read_dir(proc)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .map(|line| line.split(|byte| *byte == 0).next().unwrap_or_default().to_owned())
        .collect();
    for (program, name) in OWN_KERNELS {
        let is = |path: &Vec<u8>| path.rsplit(|byte| *byte == b'/').next() == Some(program.as_bytes());
        if programs.iter().any(is) {
            report.note(
                STEP,
                format!("pods of {name} run here: they have a loopback of their own, and awsvid is not in it"),
                "give pods that need credentials another runtimeClassName, whose pods share this kernel",
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::Verdict;
    use super::*;

    #[test]
    fn pods_with_a_kernel_of_their_own_are_seen_by_who_starts_them() {
        let table: [(&[u8], Option<&str>); 5] = [
            (b"/opt/bin/containerd-shim-kata-v2\0-namespace\0k8s.io\0", Some("Kata")),
            (b"containerd-shim-runsc-v1\0", Some("gVisor")),
            (b"/usr/bin/containerd-shim-runc-v2\0-id\0containerd-shim-kata-v2\0", None),
            (b"grep\0containerd-shim-runsc-v1\0", None),
            (b"", None),
        ];
        for (line, name) in table {
            let proc = tempfile::tempdir().unwrap();
            std::fs::create_dir(proc.path().join("7")).unwrap();
            std::fs::write(proc.path().join("7/cmdline"), line).unwrap();
            let mut report = Report::new(true);
            own_kernels(proc.path(), &mut report);
            let found: Vec<_> = report.findings().iter().map(|finding| (finding.verdict, &finding.saw)).collect();
            match name {
                None => assert!(found.is_empty(), "{found:?}"),
                Some(name) => {
                    let right = matches!(found[..], [(Verdict::Note, saw)] if saw.contains(name));
                    assert!(right, "{name}: {found:?}");
                }
            }
        }
    }
}

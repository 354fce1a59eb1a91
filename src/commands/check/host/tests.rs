//! Machines that no test runs on, as their `/proc` shows them.

use std::io;
use std::os::unix::fs::symlink;

use caps::Capability;
use tempfile::TempDir;

use super::super::doc_tables::assert_documented;
use super::super::report::Verdict;
use super::*;
use crate::config::Config;

const CGROUP2: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n";
/// The first 41 bits, which are all capabilities of today.
const ALL: &str = "000001ffffffffff";

/// A host that lacks nothing, except for the changes of a test.
struct Proc(TempDir);

impl Proc {
    fn right() -> Self {
        let proc = Self(tempfile::tempdir().unwrap());
        for folder in ["sys/kernel", "self/ns", "self/attr/apparmor", "2"] {
            fs::create_dir_all(proc.0.path().join(folder)).unwrap();
        }
        symlink(
            INITIAL_CGROUP_NAMESPACE,
            proc.0.path().join("self/ns/cgroup"),
        )
        .unwrap();
        proc.with("sys/kernel/osrelease", "6.12.9-amd64\n")
            .with("self/mountinfo", CGROUP2)
            .with(
                "self/status",
                &format!("Name:\tawsvid\nUid:\t0\t0\t0\t0\nCapEff:\t{ALL}\n"),
            )
            .with("self/uid_map", "         0          0 4294967295\n")
            .with("2/comm", "kthreadd\n")
    }

    fn with(self, name: &str, text: &str) -> Self {
        fs::write(self.0.path().join(name), text).unwrap();
        self
    }

    /// A cgroup namespace that a container runtime has made.
    fn in_a_cgroup_namespace(self) -> Self {
        let path = self.0.path().join("self/ns/cgroup");
        fs::remove_file(&path).unwrap();
        symlink("cgroup:[4026532805]", path).unwrap();
        self
    }

    fn without_kthreadd(self) -> Self {
        fs::remove_dir_all(self.0.path().join("2")).unwrap();
        self
    }

    /// Returns all findings except passes.
    fn faults(&self, config: &Config) -> Vec<(Verdict, String, String)> {
        self.faults_of(
            config,
            &KernelSupport {
                unix: UnixSupport::Process,
                tcp: Ok(()),
                executions: Some(Ok(())),
            },
        )
    }

    fn faults_of(&self, config: &Config, kernel: &KernelSupport) -> Vec<(Verdict, String, String)> {
        let mut report = CheckReport::new(true);
        check(config, self.0.path(), kernel, &mut report);
        let all = report
            .findings()
            .iter()
            .filter(|finding| finding.verdict != Verdict::Pass);
        all.map(|finding| {
            (
                finding.verdict,
                finding.saw.clone(),
                finding.fix.clone().unwrap(),
            )
        })
        .collect()
    }

    /// Asserts that this fault is the only one.
    fn assert_fault(&self, config: &Config, verdict: Verdict, saw: &str, fix: &str) {
        let faults = self.faults(config);
        faults
            .iter()
            .for_each(|(_, saw, fix)| assert_documented(STEP, saw, fix));
        let is_right = matches!(&faults[..], [(found, at, expected_fix)] if *found == verdict && at.contains(saw) && expected_fix.contains(fix));
        assert!(is_right, "not just {verdict:?} {saw:?} {fix:?}: {faults:?}");
    }
}

fn config(listen: &str, identity: &str) -> Config {
    let rule = "[[workload]]\nspiffe_id = \"spiffe://t/a\"\nuid = 1\ngid = 1\n";
    let rules = if identity.is_empty() { rule } else { "" };
    let text = format!(
        "[listen]\n{listen}\n[identity]\nworkload_api_socket = \"unix:///a\"\n{identity}\n[sts]\nregion = \"eu-central-1\"\n{rules}\
         [[role]]\nname = \"a\"\nspiffe_id = \"spiffe://t/a\"\nrole_arn = \"arn:aws:iam::123456789012:role/a\"\n"
    );
    Config::parse(&text, &|_| None)
        .unwrap_or_else(|problems| panic!("{problems:?}"))
        .config
}

const BROKER: &str = "source = \"spiffe-broker\"\nbroker_socket = \"unix:///b\"";

#[test]
fn complete_host_passes() {
    assert_eq!(Proc::right().faults(&config("", "")), []);
    // The same checks with the real /proc, with any result.
    let mut report = CheckReport::new(true);
    let (config, proc) = (config("", ""), Path::new("/proc"));
    check(
        &config,
        proc,
        &KernelSupport::tried(&config, proc),
        &mut report,
    );
    let findings = report
        .findings()
        .iter()
        .map(|finding| finding.saw.as_str())
        .collect::<Vec<_>>()
        .join("\n");
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(
        findings.contains(release.trim())
            && findings.contains(&format!("uid {}", nix::unistd::geteuid())),
        "{findings}"
    );
}

/// Kernels that lack one part each, with the finding of check.
#[test]
fn missing_kernel_features_are_reported() {
    use Verdict::{Failed, Note};
    let right = || KernelSupport {
        unix: UnixSupport::Process,
        tcp: Ok(()),
        executions: None,
    };
    let without_tcp = |missing| KernelSupport {
        tcp: Err(missing),
        ..right()
    };
    let unix = "tcp = []";
    let error = || std::io::Error::from_raw_os_error(libc::ENOENT);
    let table = [
        (
            without_tcp(TcpUnsupported::NoCgroups),
            "",
            Some((Failed, "no cgroup v2 tree", "mount -t cgroup2")),
        ),
        (
            without_tcp(TcpUnsupported::NoSockDiag(error().to_string())),
            "",
            Some((Failed, "sock_diag", "tcp_diag")),
        ),
        (
            without_tcp(TcpUnsupported::NoCgroupId),
            "",
            Some((Failed, "does not report the cgroup", "Linux 5.8")),
        ),
        (
            without_tcp(TcpUnsupported::WrongCgroupId),
            "",
            Some((Failed, "wrong cgroup", "net_prio")),
        ),
        (
            without_tcp(TcpUnsupported::NoLoopback(error())),
            "",
            Some((Failed, "loopback", "ip link set lo up")),
        ),
        // The fix of the error itself is used.
        (without_tcp(TcpUnsupported::NoCgroupId), unix, None),
        (
            without_tcp(TcpUnsupported::NoCgroupId),
            "[pods]\nenabled = true",
            Some((Failed, "does not report the cgroup", "Linux 5.8")),
        ),
        // Without TCP support the fix does not propose TCP.
        (
            KernelSupport {
                unix: UnixSupport::Pid,
                ..right()
            },
            unix,
            Some((Note, "Linux 6.5", "use a newer kernel")),
        ),
        (
            KernelSupport {
                unix: UnixSupport::Pid,
                ..without_tcp(TcpUnsupported::NoCgroupId)
            },
            unix,
            Some((Note, "Linux 6.5", "use a newer kernel")),
        ),
        // The configuration does not use the unix socket.
        (
            KernelSupport {
                unix: UnixSupport::NoPidfd,
                ..right()
            },
            "unix = \"\"",
            None,
        ),
        (
            KernelSupport {
                unix: UnixSupport::Pid,
                ..right()
            },
            "",
            Some((Note, "Linux 6.5", "use TCP for them")),
        ),
        (
            KernelSupport {
                unix: UnixSupport::NoPidfd,
                ..right()
            },
            "",
            Some((Failed, "pidfd_open", "newer kernel")),
        ),
        (
            KernelSupport {
                executions: Some(Err(ExecMonitorError::Denied {
                    step: "a program",
                    source: io::ErrorKind::PermissionDenied.into(),
                })),
                ..right()
            },
            "",
            Some((
                Failed,
                "executions of programs cannot be counted",
                "CAP_BPF",
            )),
        ),
    ];
    for (kernel, listen, expected) in table {
        let faults = Proc::right().faults_of(&config(listen, ""), &kernel);
        faults
            .iter()
            .for_each(|(_, saw, fix)| assert_documented(STEP, saw, fix));
        let is_right = match (&faults[..], expected) {
            ([], None) => true,
            ([(verdict, saw, fix)], Some((right, at, expected_fix))) => {
                *verdict == right && saw.contains(at) && fix.contains(expected_fix)
            }
            _ => false,
        };
        assert!(is_right, "{kernel:?} {listen}: {faults:?}");
    }
}

#[test]
fn missing_or_partial_cgroups_are_reported() {
    let with = |mounts: &str| Proc::right().with("self/mountinfo", mounts);
    let v1 = "31 23 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
    let mut by_unit = config("", "");
    by_unit.workloads[0].rule.rule.systemd_unit = Some("a.service".to_owned());
    for mounts in [v1, ""] {
        for config in [&by_unit, &config("", BROKER)] {
            with(mounts).assert_fault(
                config,
                Verdict::Note,
                "cgroup v2 is not mounted",
                "mount -t cgroup2",
            );
        }
        // A rule by user alone does not need it.
        assert_eq!(with(mounts).faults(&config("tcp = []", "")), []);
    }
    assert_eq!(with(&format!("{v1}{CGROUP2}")).faults(&config("", "")), []);
    let (saw, fix) = ("only a part is seen", "--cgroupns=host");
    with(&CGROUP2.replace("/ /sys", "/system.slice /sys")).assert_fault(
        &config("", ""),
        Verdict::Note,
        saw,
        fix,
    );
    // In a container's own namespace its own cgroup is the root, and the host's tree lies above.
    with(CGROUP2)
        .in_a_cgroup_namespace()
        .assert_fault(&config("", ""), Verdict::Note, saw, fix);
    let hosts = CGROUP2.replace("/ /sys/fs", "/../../.. /host");
    assert_eq!(
        with(&format!("{CGROUP2}{hosts}"))
            .in_a_cgroup_namespace()
            .faults(&config("", "")),
        []
    );
}

#[test]
fn profile_is_reported_if_processes_are_inspected() {
    let profile = |shown: &str| Proc::right().with("self/attr/apparmor/current", shown);
    let confined = profile("cri-containerd.apparmor.d (enforce)\n");
    let (saw, fix) = (
        "the AppArmor profile cri-containerd.apparmor.d",
        "Unconfined",
    );
    confined.assert_fault(&config("", ""), Verdict::Note, saw, fix);
    let pods = "tcp = []\nunix = \"\"\n[pods]\nenabled = true";
    assert_eq!(confined.faults(&config(pods, BROKER)), []);
    assert_eq!(profile("unconfined\n").faults(&config("", "")), []);
}

#[test]
fn foreign_namespaces_are_reported() {
    let map = "         0       1000          1\n         1     100000      65536\n";
    let foreign = Proc::right().with("self/uid_map", map);
    foreign.assert_fault(
        &config("", ""),
        Verdict::Failed,
        "in a user namespace",
        "the host's user namespace",
    );
    let pids = Proc::right().without_kthreadd();
    pids.assert_fault(
        &config("", ""),
        Verdict::Note,
        "not the host's pid namespace",
        "hostPID: true",
    );
    let pods = "tcp = []\nunix = \"\"\n[pods]\nenabled = true";
    assert_eq!(
        pids.faults(&config(pods, BROKER)),
        [],
        "where all callers are pods no process is searched for"
    );
    let process = format!("{BROKER}\nworkload_reference = \"process\"");
    pids.assert_fault(
        &config(pods, &process),
        Verdict::Note,
        "not the host's pid namespace",
        "hostPID: true",
    );
    pids.assert_fault(
        &config("[pods]\nenabled = true", BROKER),
        Verdict::Note,
        "not the host's pid namespace",
        "hostPID: true",
    );
}

#[test]
fn proc_that_hides_processes_is_reported() {
    let with = |options: &str, capabilities: &str| {
        let mounts = format!("{CGROUP2}45 23 0:21 / /proc rw - proc proc rw{options}\n");
        let status = format!("Uid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nCapEff:\t{capabilities}\n");
        Proc::right()
            .with("self/mountinfo", &mounts)
            .with("self/status", &status)
    };
    // A rule by user alone needs no capability on the unix socket.
    let (by_user, none) = (config("tcp = []", ""), "0000000000000000");
    for (options, fix) in [
        (",hidepid=ptraceable", "ProtectProc=default"),
        (",gid=50,hidepid=invisible", "SupplementaryGroups=50"),
    ] {
        let hidden = "callers' processes are not visible";
        with(options, none).assert_fault(&by_user, Verdict::Failed, hidden, fix);
        assert_eq!(with(options, ALL).faults(&by_user), []);
    }
    for options in ["", ",hidepid=invisible"] {
        assert_eq!(with(options, none).faults(&by_user), [], "{options}");
    }
}

#[test]
fn privileges_depend_on_the_configuration() {
    let bits =
        |capabilities: &[Capability]| capabilities.iter().fold(0, |set, one| set | one.bitmask());
    let held = |set: u64| {
        Proc::right().with(
            "self/status",
            &format!("Uid:\t0\t0\t0\t0\nCapEff:\t{set:016x}\nCapBnd:\t{ALL}\n"),
        )
    };
    let (ptrace, search) = (Capability::CAP_SYS_PTRACE, Capability::CAP_DAC_READ_SEARCH);
    let (bind, admin) = (Capability::CAP_NET_BIND_SERVICE, Capability::CAP_SYS_ADMIN);
    let pods = "tcp = []\nunix = \"\"\n[pods]\nenabled = true";
    let table: [(Config, &[Capability], &str); 7] = [
        (config("", ""), &[ptrace, search, bind], ""),
        (
            config("", ""),
            &[bind],
            "without CAP_SYS_PTRACE (callers' processes",
        ),
        // The kernel reports the group of a caller on the unix socket.
        (config("tcp = []", ""), &[], ""),
        (
            config("", BROKER),
            &[search, bind],
            "without CAP_SYS_PTRACE",
        ),
        (
            config("[pods]\nenabled = true", ""),
            &[ptrace, search, bind],
            "without CAP_SYS_ADMIN",
        ),
        // The privileges of the DaemonSet.
        (config(pods, BROKER), &[admin, bind], ""),
        (
            config(pods, BROKER),
            &[admin],
            "without CAP_NET_BIND_SERVICE",
        ),
    ];
    for (config, capabilities, saw) in table {
        let proc = held(bits(capabilities));
        match saw {
            "" => assert_eq!(proc.faults(&config), [], "{capabilities:?}"),
            _ => proc.assert_fault(&config, Verdict::Failed, saw, "run it as root"),
        }
    }
    let other = Proc::right().with(
        "self/status",
        &format!("Uid:\t0\t1001\t0\t0\nCapEff:\t{ALL}\n"),
    );
    other.assert_fault(
        &config("", ""),
        Verdict::Failed,
        "runs as uid 1001",
        "sudo awsvid check",
    );
}

#[test]
fn pods_with_own_kernels_are_found_by_their_shims() {
    let shim = "Name:\tcontainerd-shim\nUid:\t0\t0\t0\t0\n";
    let users = "Name:\tcontainerd-shim\nUid:\t1000\t1000\t1000\t1000\n";
    let other = "Name:\tgrep\nUid:\t0\t0\t0\t0\n";
    let table: [(&str, &[u8], Option<&str>); 7] = [
        (
            shim,
            b"/opt/bin/containerd-shim-kata-v2\0-namespace\0k8s.io\0",
            Some("Kata"),
        ),
        (shim, b"containerd-shim-runsc-v1\0", Some("gVisor")),
        (users, b"containerd-shim-runsc-v1\0", None),
        (other, b"containerd-shim-runsc-v1\0", None),
        (
            shim,
            b"/usr/bin/containerd-shim-runc-v2\0-id\0containerd-shim-kata-v2\0",
            None,
        ),
        (shim, b"grep\0containerd-shim-runsc-v1\0", None),
        (shim, b"", None),
    ];
    for (status, line, name) in table {
        let proc = Proc::right();
        fs::create_dir(proc.0.path().join("7")).unwrap();
        fs::write(proc.0.path().join("7/status"), status).unwrap();
        fs::write(proc.0.path().join("7/cmdline"), line).unwrap();
        assert_eq!(
            proc.faults(&config("", "")),
            [],
            "it is of interest where pods are served"
        );
        match name {
            None => assert_eq!(proc.faults(&config("[pods]\nenabled = true", "")), []),
            Some(name) => {
                proc.assert_fault(
                    &config("[pods]\nenabled = true", ""),
                    Verdict::Note,
                    name,
                    "another runtimeClassName",
                );
            }
        }
    }
}

//! Hardening before the daemon has threads: its memory becomes unreadable, and it drops privileges.

pub mod apparmor;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod proc_mount;
mod process_status;
mod sys;

pub use proc_mount::HidingProc;
pub use process_status::ProcessStatus;

use std::path::Path;

use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;
use nix::sys::prctl::{set_dumpable, set_no_new_privs};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::{Config, ImdsMode, Reference, Source};
use crate::workload_rule::NamedRule;

/// Capabilities that are kept wherever they are granted. A reload may bring listeners and rules
/// that need them.
const ALWAYS_KEPT: [Capability; 3] = [
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_NET_BIND_SERVICE,
];

/// Features of the daemon that need privileges and depend on the configuration.
#[derive(Debug, Clone, Copy)]
pub struct DaemonFeatures {
    /// Searches the process that owns a caller's socket, and inspects other users' processes.
    inspects_processes: bool,
    /// Serves callers outside of pods.
    listens_on_host: bool,
    /// Refers callers to an agent by their process, and so observes executions while the agent
    /// inspects it.
    names_processes: bool,
    /// Enters pods' network namespaces.
    enters_namespaces: bool,
    /// Adds the metadata address in pods.
    sets_addresses: bool,
    /// Listens on ports below 1024.
    listens_low: bool,
}

/// A required capability, and the failure without it.
pub type RequiredCapability = (Capability, &'static str);

impl DaemonFeatures {
    /// Returns the features that this configuration needs.
    pub fn of(config: &Config) -> Self {
        let Config {
            listen,
            pods,
            imds,
            identity,
            workloads,
            ..
        } = config;
        let listens_on_host = listen.unix.is_some() || !listen.tcp.is_empty();
        let names_processes = match identity.source {
            Source::WorkloadApi => false,
            // Callers in pods are referred to by their pod.
            Source::SpiffeBroker {
                reference: Reference::Auto,
                ..
            } => listens_on_host,
            Source::SpireDelegated { .. }
            | Source::SpiffeBroker {
                reference: Reference::Process,
                ..
            } => true,
        };
        // On the unix socket the kernel reports the process and its groups.
        let searches = pods.enabled || !listen.tcp.is_empty();
        let needs_process =
            |rule: &NamedRule| rule.rule.exe.is_some() || (searches && !rule.socket_decides());
        let rules_inspect = workloads
            .iter()
            .any(|workload| needs_process(&workload.rule));
        Self {
            inspects_processes: names_processes || rules_inspect,
            listens_on_host,
            names_processes,
            enters_namespaces: pods.enabled,
            sets_addresses: imds.mode == ImdsMode::Address,
            listens_low: pods.enabled
                || listen
                    .tcp
                    .iter()
                    .any(|address| (1..1024).contains(&address.port())),
        }
    }

    /// Reports whether callers are referred to an agent by their process.
    pub fn names_processes(self) -> bool {
        self.names_processes
    }

    /// Reports whether callers' processes are inspected, of whichever user they are.
    pub fn inspects_processes(self) -> bool {
        self.inspects_processes
    }

    /// Reports whether callers' processes have to be visible: all but those in pods that are
    /// referred to by their pod.
    pub fn sees_processes(self) -> bool {
        self.listens_on_host || self.names_processes
    }

    /// Returns the capabilities that these features need.
    pub fn required_capabilities(self) -> impl Iterator<Item = RequiredCapability> {
        let cannot_inspect = "callers' processes cannot be found and inspected";
        [
            (
                self.inspects_processes,
                Capability::CAP_SYS_PTRACE,
                cannot_inspect,
            ),
            (
                self.inspects_processes,
                Capability::CAP_DAC_READ_SEARCH,
                cannot_inspect,
            ),
            (
                self.listens_low,
                Capability::CAP_NET_BIND_SERVICE,
                "ports below 1024, such as 974 in pods, may not be bound",
            ),
            (
                self.enters_namespaces,
                Capability::CAP_SYS_ADMIN,
                "pods' network namespaces cannot be entered",
            ),
            (
                self.sets_addresses,
                Capability::CAP_NET_ADMIN,
                "169.254.169.254 cannot be set up in pods",
            ),
        ]
        .into_iter()
        .filter_map(|(needed, capability, fails)| needed.then_some((capability, fails)))
    }
}

/// Logs each capability that is missing, and a `/proc` that hides callers' processes. Callers see
/// only the effects.
pub fn warn_missing(features: DaemonFeatures) {
    proc_mount::warn(features);
    let permitted = caps::read(None, CapSet::Permitted).unwrap_or_default();
    for (capability, fails) in features
        .required_capabilities()
        .filter(|(capability, _)| !permitted.contains(capability))
    {
        let name = capability.to_string();
        let short = name.trim_start_matches("CAP_");
        let fix = format!(
            "in Kubernetes add {short} to the container's securityContext.capabilities.add, under systemd {name} to \
             CapabilityBoundingSet=; if a reload has made it needed, restart awsvid"
        );
        tracing::warn!(
            capability = name,
            consequence = fails,
            fix,
            "a capability is missing"
        );
    }
}

/// A use of the kernel, the failure without it, the fix, and a harmless attempt of it.
///
/// No attempt reads another process: that process may block the read (T25), and a security module
/// may protect just that one.
struct KernelUse {
    /// The capability that it needs, if it needs one.
    capability: Option<Capability>,
    call: &'static str,
    fails: &'static str,
    fix: &'static str,
    attempt: fn() -> Result<(), Errno>,
}

impl DaemonFeatures {
    fn uses(self) -> impl Iterator<Item = KernelUse> {
        let cgroups = KernelUse {
            capability: Some(Capability::CAP_DAC_READ_SEARCH),
            call: "open_by_handle_at",
            fails: "cgroups cannot be opened by their id, so callers beyond the first 512 cgroups of a unit are rejected",
            fix: "under systemd add it to SystemCallFilter=, in a container allow it in the seccomp profile",
            attempt: sys::open_by_handle_at,
        };
        let namespaces = KernelUse {
            capability: Some(Capability::CAP_SYS_ADMIN),
            call: "setns",
            fails: "pods' network namespaces cannot be entered",
            fix: "under systemd set RestrictNamespaces=net, and allow it in SystemCallFilter=, in a container allow it in the \
                  seccomp profile",
            attempt: sys::setns_net,
        };
        let processes = KernelUse {
            capability: None,
            call: "pidfd_open",
            fails: "callers over TCP are rejected where a rule or an agent needs their process (no_holder)",
            fix: "under systemd add it to SystemCallFilter=, in a container allow it in the seccomp profile",
            attempt: sys::pidfd_open,
        };
        let executables = KernelUse {
            capability: None,
            call: "statx",
            fails: "executables are not visible, so no rule with `exe` matches and an agent is not queried",
            fix: "under systemd add it to SystemCallFilter=, in a container allow it in the seccomp profile",
            attempt: sys::statx,
        };
        [
            (true, cgroups),
            (self.enters_namespaces, namespaces),
            (self.inspects_processes, processes),
            (self.inspects_processes, executables),
        ]
        .into_iter()
        .filter_map(|(used, one)| used.then_some(one))
    }
}

/// Returns the uses that are forbidden although their capability is held, as by a seccomp filter.
fn forbidden(
    uses: impl Iterator<Item = KernelUse>,
    held: &CapsHashSet,
) -> impl Iterator<Item = KernelUse> {
    uses.filter(|one| {
        one.capability.is_none_or(|needed| held.contains(&needed))
            && matches!((one.attempt)(), Err(Errno::EPERM | Errno::EACCES))
    })
}

/// Logs each use that is forbidden, once, because callers see only its effects.
fn log_forbidden(features: DaemonFeatures) {
    let held = caps::read(None, CapSet::Effective).unwrap_or_default();
    for one in forbidden(features.uses(), &held) {
        tracing::warn!(
            call = one.call,
            held = one.capability.map(tracing::field::display),
            consequence = one.fails,
            fix = one.fix,
            "a system call is forbidden"
        );
    }
}

/// Logs the AppArmor profile that hides processes from the daemon, because callers see only its
/// effects.
fn warn_confined(features: DaemonFeatures) {
    let profile = apparmor::enforced_profile(Path::new("/proc"));
    if let Some(profile) = profile.filter(|_| features.inspects_processes) {
        tracing::warn!(
            profile,
            consequence = apparmor::CONFINED,
            fix = apparmor::CONFINED_FIX,
            "an AppArmor profile confines the daemon"
        );
    }
}

/// Hardens the process. Failures are logged and tolerated. Has to be called before any thread is
/// started, because capabilities belong to threads.
pub fn harden_before_threads(features: DaemonFeatures) {
    warn_missing(features);
    log_forbidden(features);
    warn_confined(features);
    let log = |what: &str, failed: bool| {
        if failed {
            tracing::warn!(
                what,
                "hardening failed: the daemon runs with less protection"
            );
        }
    };
    // No core dump. Processes of the same user cannot read its memory through /proc or ptrace.
    log(
        "making the process non-dumpable",
        set_dumpable(false).is_err(),
    );
    log(
        "disabling core dumps",
        setrlimit(Resource::RLIMIT_CORE, 0, 0).is_err(),
    );
    log("giving up new privileges", set_no_new_privs().is_err());
    log(
        "dropping capabilities",
        drop_capabilities(features).is_err(),
    );
    let descriptors = getrlimit(Resource::RLIMIT_NOFILE);
    let raised = descriptors.and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    log("raising the number of descriptors", raised.is_err());
}

/// Drops the capabilities that are not used.
///
/// CAP_SYS_ADMIN is worth the most to an attacker in the daemon. It is kept only if the
/// configuration at the start needs it. CAP_BPF and CAP_PERFMON are not needed after this point.
fn drop_capabilities(features: DaemonFeatures) -> Result<(), caps::errors::CapsError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let capabilities: CapsHashSet = ALWAYS_KEPT
        .into_iter()
        .chain(
            features
                .required_capabilities()
                .map(|(capability, _)| capability),
        )
        .filter(|one| permitted.contains(one))
        .collect();
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &capabilities)?;
    caps::set(None, CapSet::Permitted, &capabilities)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_forbidden(
        capability: Option<Capability>,
        attempt: fn() -> Result<(), Errno>,
        held: &[Capability],
    ) -> bool {
        let one = KernelUse {
            capability,
            call: "call",
            fails: "it fails",
            fix: "allow it",
            attempt,
        };
        let held = held.iter().copied().collect();
        forbidden(std::iter::once(one), &held).count() == 1
    }

    #[test]
    fn forbidden_use_is_logged_if_its_capability_is_held() {
        let ptrace = Capability::CAP_SYS_PTRACE;
        for denied in [|| Err(Errno::EPERM), || Err(Errno::EACCES)] {
            assert!(is_forbidden(Some(ptrace), denied, &[ptrace]));
            // Another line names the missing capability.
            assert!(!is_forbidden(Some(ptrace), denied, &[]));
            assert!(is_forbidden(None, denied, &[]));
        }
        // Other errors have other causes: a bad address, a kernel without the call.
        for allowed in [|| Ok(()), || Err(Errno::EFAULT), || Err(Errno::ENOSYS)] {
            assert!(!is_forbidden(Some(ptrace), allowed, &[ptrace]));
            assert!(!is_forbidden(None, allowed, &[]));
        }
    }

    #[test]
    fn attempts_succeed_or_fail_harmlessly() {
        assert_eq!(sys::open_by_handle_at(), Err(Errno::EFAULT));
        assert_eq!(sys::pidfd_open(), Ok(()));
        assert_eq!(sys::statx(), Ok(()));
    }
}

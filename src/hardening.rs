//! Hardening before the daemon has threads: its memory becomes unreadable, and it drops privileges.

mod sys;

use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;
use nix::sys::prctl::{set_dumpable, set_no_new_privs};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::{Config, Reference, Source};
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
    /// Listens on ports below 1024.
    listens_low: bool,
}

/// A required capability, and the failure without it.
pub type Need = (Capability, &'static str);

impl DaemonFeatures {
    /// Returns the features that this configuration needs.
    pub fn of(config: &Config) -> Self {
        let Config {
            listen,
            pods,
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

    /// Reports whether callers' processes have to be visible: all but those in pods that are
    /// referred to by their pod.
    pub fn sees_processes(self) -> bool {
        self.listens_on_host || self.names_processes
    }

    /// Returns the capabilities that these features need.
    pub fn required_capabilities(self) -> impl Iterator<Item = Need> {
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
        ]
        .into_iter()
        .filter_map(|(needed, capability, fails)| needed.then_some((capability, fails)))
    }
}

/// Logs each capability that is missing, once, because callers see only its effects.
pub fn warn_missing(features: DaemonFeatures) {
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

/// A system call that needs a capability, the failure without it, and a harmless attempt of it.
struct SyscallUse {
    capability: Capability,
    call: &'static str,
    fails: &'static str,
    unit: &'static str,
    attempt: fn() -> Errno,
}

impl DaemonFeatures {
    fn uses(self) -> impl Iterator<Item = SyscallUse> {
        let cgroups = SyscallUse {
            capability: Capability::CAP_DAC_READ_SEARCH,
            call: "open_by_handle_at",
            fails: "cgroups cannot be opened by their id, so callers beyond the first 512 cgroups of a unit are refused",
            unit: "add it to SystemCallFilter=",
            attempt: sys::open_by_handle_at,
        };
        let namespaces = SyscallUse {
            capability: Capability::CAP_SYS_ADMIN,
            call: "setns",
            fails: "pods' network namespaces cannot be entered",
            unit: "set RestrictNamespaces=net, and allow it in SystemCallFilter=",
            attempt: sys::setns_net,
        };
        [(true, cgroups), (self.enters_namespaces, namespaces)]
            .into_iter()
            .filter_map(|(used, one)| used.then_some(one))
    }
}

/// Logs each capability that is held but useless, because a seccomp filter forbids its system call.
fn log_forbidden_calls(features: DaemonFeatures) {
    let effective = caps::read(None, CapSet::Effective).unwrap_or_default();
    for SyscallUse {
        capability,
        call,
        fails,
        unit,
        attempt,
    } in features.uses()
    {
        if effective.contains(&capability) && attempt() == Errno::EPERM {
            let fix =
                format!("under systemd {unit}, in a container allow {call} in its seccomp profile");
            tracing::warn!(
                %capability,
                call,
                consequence = fails,
                fix,
                "a system call is forbidden although its capability is held"
            );
        }
    }
}

/// Hardens the process. Failures are logged and tolerated. Has to be called before any thread is
/// started, because capabilities belong to threads.
pub fn harden_before_threads(features: DaemonFeatures) {
    warn_missing(features);
    log_forbidden_calls(features);
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

//! What the daemon takes away from itself before it has threads: its memory is not to be read, its privileges are few.

mod sys;

use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;
use nix::sys::prctl::{set_dumpable, set_no_new_privs};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::{Config, Reference, Source};
use crate::rule::NamedRule;

/// Kept wherever they are granted: what listeners and rules need that a reload may bring.
const KEPT: [Capability; 3] = [
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_NET_BIND_SERVICE,
];

/// What the daemon does that not every configuration asks for.
#[derive(Debug, Clone, Copy)]
pub struct DaemonFeatures {
    /// Looks for the process that holds a caller's socket, and at what other users' processes run.
    looks_at_processes: bool,
    /// Meets callers outside of pods.
    listens_on_host: bool,
    /// Names callers to an agent by their process, and so notices that one executes a program while the agent looks at it.
    names_processes: bool,
    /// Enters pods' network namespaces.
    enters_namespaces: bool,
    /// Listens on ports below 1024.
    listens_low: bool,
}

/// A capability that something needs, and what fails without it.
pub type Need = (Capability, &'static str);

impl DaemonFeatures {
    /// What this configuration asks for.
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
            // Callers in pods are named by their pod.
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
        // On the unix socket the kernel names the process, and tells its groups.
        let searches = pods.enabled || !listen.tcp.is_empty();
        let needs_process =
            |rule: &NamedRule| rule.rule.exe.is_some() || (searches && !rule.socket_decides());
        let rules_look = workloads
            .iter()
            .any(|workload| needs_process(&workload.rule));
        Self {
            looks_at_processes: names_processes || rules_look,
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

    /// Whether callers are named to an agent by their process.
    pub fn names_processes(self) -> bool {
        self.names_processes
    }

    /// Whether callers can be processes that have to be seen: all but those in pods that are named by their pod.
    pub fn sees_processes(self) -> bool {
        self.listens_on_host || self.names_processes
    }

    /// The capabilities without which some of that fails.
    pub fn required_capabilities(self) -> impl Iterator<Item = Need> {
        let looks = "callers' processes cannot be looked for and looked at";
        [
            (self.looks_at_processes, Capability::CAP_SYS_PTRACE, looks),
            (
                self.looks_at_processes,
                Capability::CAP_DAC_READ_SEARCH,
                looks,
            ),
            (
                self.listens_low,
                Capability::CAP_NET_BIND_SERVICE,
                "ports below 1024 may be closed to it, as 974 in pods",
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

/// Says what is needed and is not there, once, and not only to the callers whom it concerns.
pub fn warn_missing(does: DaemonFeatures) {
    let permitted = caps::read(None, CapSet::Permitted).unwrap_or_default();
    for (capability, fails) in does
        .required_capabilities()
        .filter(|(capability, _)| !permitted.contains(capability))
    {
        let name = capability.to_string();
        let short = name.trim_start_matches("CAP_");
        tracing::warn!(
            "{name} is missing: {fails}; in Kubernetes add {short} to the container's securityContext.capabilities.add, under \
             systemd {name} to CapabilityBoundingSet=; if a reload has made it needed, restart awsvid"
        );
    }
}

/// A system call that a capability is for, what is forbidden without it, and how to see whether it is.
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

/// Logs each capability that is held in vain: a seccomp filter forbids the system call that it is for.
fn log_forbidden_calls(does: DaemonFeatures) {
    let effective = caps::read(None, CapSet::Effective).unwrap_or_default();
    for SyscallUse {
        capability,
        call,
        fails,
        unit,
        attempt,
    } in does.uses()
    {
        if effective.contains(&capability) && attempt() == Errno::EPERM {
            tracing::warn!(
                "{capability} is held and {call} is forbidden all the same: {fails}; under systemd {unit}, in a container allow \
                 {call} in its seccomp profile"
            );
        }
    }
}

/// Call it before any thread is started: capabilities are a thread's own. What can't be had is logged and goes without.
pub fn harden_before_threads(does: DaemonFeatures) {
    warn_missing(does);
    log_forbidden_calls(does);
    let log = |what: &str, failed: bool| {
        if failed {
            tracing::warn!("{what} failed; the daemon runs with less protection");
        }
    };
    // No core dump, and no reading of its memory through /proc or ptrace by processes of the same user.
    log(
        "making the process non-dumpable",
        set_dumpable(false).is_err(),
    );
    log(
        "switching core dumps off",
        setrlimit(Resource::RLIMIT_CORE, 0, 0).is_err(),
    );
    log("giving up new privileges", set_no_new_privs().is_err());
    log("dropping capabilities", drop_capabilities(does).is_err());
    let descriptors = getrlimit(Resource::RLIMIT_NOFILE);
    let raised = descriptors.and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    log("raising the number of descriptors", raised.is_err());
}

/// Gives up what is not used. CAP_SYS_ADMIN, which is worth the most to whoever would take the daemon over, is kept only where
/// the configuration at the start needs it; CAP_BPF and CAP_PERFMON have been of use by now.
fn drop_capabilities(does: DaemonFeatures) -> Result<(), caps::errors::CapsError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = KEPT
        .into_iter()
        .chain(
            does.required_capabilities()
                .map(|(capability, _)| capability),
        )
        .filter(|one| permitted.contains(one))
        .collect();
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)
}

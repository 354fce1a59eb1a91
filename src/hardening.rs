//! What the daemon takes away from itself before it has threads: its memory is not to be read, its privileges are few.

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl::{set_dumpable, set_no_new_privs};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// What the daemon does that not every configuration asks for.
#[derive(Debug, Clone, Copy)]
pub struct Does {
    /// Names callers to an agent by their process, and so notices that one executes a program while the agent looks at it.
    pub names_processes: bool,
    /// Names pods to an agent, and a caller outside of pods by its process.
    pub names_pods: bool,
    /// Enters pods' network namespaces.
    pub enters_namespaces: bool,
}

/// Why a capability is asked for.
struct Use {
    capability: Capability,
    /// It is kept where it is granted.
    used: bool,
    /// Without it, something that the configuration asks for fails.
    needed: bool,
    /// What fails.
    fails: &'static str,
}

impl Does {
    fn uses(self) -> [Use; 5] {
        let Self { names_processes, names_pods, enters_namespaces } = self;
        let looks = "which process holds a caller's socket cannot be seen";
        let of = |capability, used, needed, fails| Use { capability, used, needed, fails };
        [
            // Other users' /proc/<pid>/fd, `exe` and `cgroup`. Rules by user or cgroup do without.
            of(Capability::CAP_SYS_PTRACE, true, names_processes, looks),
            of(Capability::CAP_DAC_READ_SEARCH, true, names_processes, looks),
            of(
                Capability::CAP_PERFMON,
                names_processes || names_pods,
                names_processes,
                "a caller's process that executes another program meanwhile is not noticed",
            ),
            // Ports below 1024. Whoever may not bind them is told so there.
            of(Capability::CAP_NET_BIND_SERVICE, true, enters_namespaces, "nobody can listen on port 974 in pods"),
            // Without it the daemon does not start, and says why.
            of(Capability::CAP_SYS_ADMIN, enters_namespaces, false, ""),
        ]
    }
}

/// Call it before any thread is started: capabilities are a thread's own. What can't be had is logged and goes without.
pub fn before_threads(does: Does) {
    let log = |what: &str, failed: bool| {
        if failed {
            tracing::warn!("{what} failed; the daemon runs with less protection");
        }
    };
    // No core dump, and no reading of its memory through /proc or ptrace by processes of the same user.
    log("making the process non-dumpable", set_dumpable(false).is_err());
    log("switching core dumps off", setrlimit(Resource::RLIMIT_CORE, 0, 0).is_err());
    log("giving up new privileges", set_no_new_privs().is_err());
    log("dropping capabilities", drop_capabilities(does).is_err());
    let descriptors = getrlimit(Resource::RLIMIT_NOFILE);
    let raised = descriptors.and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    log("raising the number of descriptors", raised.is_err());
}

/// Gives up all but what is used. What is needed and was not granted is told here, once, and not only to the callers whom
/// it concerns.
fn drop_capabilities(does: Does) -> Result<(), caps::errors::CapsError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let uses = does.uses();
    for lacking in uses.iter().filter(|used| used.needed && !permitted.contains(&used.capability)) {
        let name = lacking.capability.to_string();
        let short = name.trim_start_matches("CAP_");
        tracing::warn!(
            "{name} is missing: {}; in Kubernetes add {short} to the container's securityContext.capabilities.add, under \
             systemd {name} to CapabilityBoundingSet=",
            lacking.fails
        );
    }
    let kept = uses.into_iter().filter(|used| used.used && permitted.contains(&used.capability));
    let kept: CapsHashSet = kept.map(|used| used.capability).collect();
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)
}

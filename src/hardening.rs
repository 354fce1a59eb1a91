//! What the daemon takes away from itself before it has threads: its memory is not to be read, its privileges are few.

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl::{set_dumpable, set_no_new_privs};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// What attestation and listeners need: other users' `/proc/<pid>/fd`, `exe` and `cgroup`, to notice that they execute a
/// program while an agent looks at them, and ports below 1024.
const KEPT: [Capability; 4] = [
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_PERFMON,
    Capability::CAP_NET_BIND_SERVICE,
];

/// Call it before any thread is started: capabilities are a thread's own. What can't be had is logged and goes without.
/// Whether an agent is asked about processes decides whether they have to be watched meanwhile.
pub fn before_threads(agent_attests: bool) {
    let log = |what: &str, failed: bool| {
        if failed {
            tracing::warn!("{what} failed; the daemon runs with less protection");
        }
    };
    // No core dump, and no reading of its memory through /proc or ptrace by processes of the same user.
    log("making the process non-dumpable", set_dumpable(false).is_err());
    log("switching core dumps off", setrlimit(Resource::RLIMIT_CORE, 0, 0).is_err());
    log("giving up new privileges", set_no_new_privs().is_err());
    log("dropping capabilities", drop_capabilities(agent_attests).is_err());
    let descriptors = getrlimit(Resource::RLIMIT_NOFILE);
    let raised = descriptors.and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    log("raising the number of descriptors", raised.is_err());
}

fn drop_capabilities(agent_attests: bool) -> Result<(), caps::errors::CapsError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let needed = |capability: &Capability| agent_attests || *capability != Capability::CAP_PERFMON;
    let keep: CapsHashSet =
        KEPT.into_iter().filter(needed).filter(|capability| permitted.contains(capability)).collect();
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &keep)?;
    caps::set(None, CapSet::Permitted, &keep)
}

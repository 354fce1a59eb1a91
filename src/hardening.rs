//! What the daemon takes away from itself before it has threads: its memory is not to be read, its privileges are few.

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl::{set_dumpable, set_no_new_privs};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// What attestation and listeners need: other users' `/proc/<pid>/fd`, `exe` and `cgroup`, and ports below 1024.
const KEPT: [Capability; 3] =
    [Capability::CAP_SYS_PTRACE, Capability::CAP_DAC_READ_SEARCH, Capability::CAP_NET_BIND_SERVICE];

/// What the daemon does that not every configuration asks for.
#[derive(Debug, Clone, Copy)]
pub struct Does {
    /// Notices that a process executes a program while an agent looks at it.
    pub watches_programs: bool,
    /// Enters pods' network namespaces.
    pub enters_namespaces: bool,
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

fn drop_capabilities(does: Does) -> Result<(), caps::errors::CapsError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let watching = does.watches_programs.then_some(Capability::CAP_PERFMON);
    let entering = does.enters_namespaces.then_some(Capability::CAP_SYS_ADMIN);
    let needed = KEPT.into_iter().chain(watching).chain(entering);
    let keep: CapsHashSet = needed.filter(|capability| permitted.contains(capability)).collect();
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &keep)?;
    caps::set(None, CapSet::Permitted, &keep)
}

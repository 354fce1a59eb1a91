//! Detects that a process executes a program while an agent attests it.
//!
//! Between two reads a process may execute a setuid program, be attested by the agent as another
//! user, and return to its old state. All facts that can be read are then as before. So an eBPF
//! program at the kernel's tracepoint `sched_process_exec` counts the executions of each process.
//! It counts in a table that the daemon has mapped. The tracepoint runs before the new program's
//! first instruction, so a process that has returned to its old state has been counted.
//!
//! The program is loaded once, at the start, with CAP_BPF and CAP_PERFMON, which are dropped
//! afterwards. To watch a process means to read one number. Unlike perf_event_open(2) (T25) it
//! takes no lock of that process, so it never blocks.
//!
//! Interfaces: bpf(2), `BPF_PROG_TYPE_RAW_TRACEPOINT` (Linux 4.17), `BPF_F_MMAPABLE` (5.5),
//! bpf-helpers(7).

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use thiserror::Error;

use crate::caller::ExecWatch;

mod bpf;

use bpf::{BpfProgram, Counters, Instruction};

/// The number of counters in the table. The mapping from processes to counters is a secret of the
/// daemon, so no process can choose to share the counter of another. If a process does so by chance
/// (1 of 65,536 executions at that time), the attestation is repeated.
const COUNTERS: u32 = 1 << INDEX_BITS;
const INDEX_BITS: i32 = 16;
/// The name of the kernel's initial pid namespace: `PID_NS_INIT_INO` of linux/nsfs.h.
const INITIAL_PID_NAMESPACE: &str = "pid:[4026531836]";
/// The number of levels of the cgroup tree that count. Workloads are less deep in the tree than
/// this.
const CGROUP_LEVELS: i32 = 12;

/// The unit by which executions are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CountBy {
    /// The pid. The daemon and the kernel use the same pids in the initial pid namespace.
    Pid,
    /// Each cgroup that the process is in or below. Used where the daemon is in a pid namespace of
    /// its own, and so has other pids than the kernel.
    Cgroup,
}

/// A monitor that counts executions until it is dropped.
pub struct ExecMonitor {
    counters: Counters,
    /// Spread keys over the table. They are odd, so that each bit of a key affects the index.
    multipliers: [u64; 2],
    count_by: CountBy,
    /// Keeps the program attached while it is open.
    _attached: OwnedFd,
}

/// The reason why executions cannot be counted here.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug, Error)]
pub enum ExecMonitorError {
    /// The privileges are missing, or a filter blocks the system call.
    #[error("bpf(2) failed for {step}: {source}")]
    Denied {
        step: &'static str,
        source: io::Error,
    },
    /// The kernel lacks eBPF, or its tracepoints.
    #[error("bpf(2) failed for {step}: {source}")]
    Unsupported {
        step: &'static str,
        source: io::Error,
    },
}

impl ExecMonitorError {
    /// Returns the fix, as an imperative.
    pub fn fix(&self) -> &'static str {
        match self {
            Self::Denied { .. } => {
                "give awsvid CAP_BPF and CAP_PERFMON: under systemd by CapabilityBoundingSet=, with bpf in SystemCallFilter= and \
                 LimitMEMLOCK=8M; in Kubernetes add BPF and PERFMON to the container's securityContext.capabilities.add"
            }
            Self::Unsupported { .. } => {
                "use a kernel with CONFIG_BPF_SYSCALL and CONFIG_BPF_EVENTS"
            }
        }
    }
}

/// The counter of a process when its watch began.
#[derive(Debug)]
pub(crate) struct ExecCountWatch {
    monitor: Arc<ExecMonitor>,
    index: u32,
    count: u64,
}

impl fmt::Debug for ExecMonitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExecMonitor")
            .field("count_by", &self.count_by)
            .finish_non_exhaustive()
    }
}

impl ExecMonitor {
    /// Loads the program and attaches it. Call it while the privileges are held; the monitor needs
    /// none.
    pub fn start() -> Result<Self, ExecMonitorError> {
        let namespace = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        Self::counting_by(if namespace == Path::new(INITIAL_PID_NAMESPACE) {
            CountBy::Pid
        } else {
            CountBy::Cgroup
        })
    }

    fn counting_by(count_by: CountBy) -> Result<Self, ExecMonitorError> {
        // Before Linux 5.11 the table counts as locked memory.
        if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_MEMLOCK) {
            let _ = setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard);
        }
        let multipliers = [fastrand::u64(..) | 1, fastrand::u64(..) | 1];
        let map = bpf::create_counters(COUNTERS).map_err(failed("the table"))?;
        let program = program(count_by, multipliers, map.as_raw_fd());
        let program = bpf::load(&program).map_err(failed("the program"))?;
        let attached = bpf::attach_raw_tracepoint(c"sched_process_exec", &program)
            .map_err(failed("the tracepoint"))?;
        let counters = Counters::map(&map, COUNTERS).map_err(failed("the table's memory"))?;
        Ok(Self {
            counters,
            multipliers,
            count_by,
            _attached: attached,
        })
    }

    /// Returns whether an execution is counted: that of `command`, or another one at the same time.
    pub fn counts(&self, command: &mut Command) -> io::Result<bool> {
        let sum = || {
            (0..COUNTERS).fold(0_u64, |sum, index| {
                sum.wrapping_add(self.counters.get(index))
            })
        };
        let before = sum();
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        Ok(sum() != before)
    }

    /// Returns the key by which the executions of a process are counted: its pid, or the id of its
    /// workload's cgroup, which `cgroup` returns.
    pub(crate) fn key<E>(
        &self,
        pid: u32,
        cgroup: impl FnOnce() -> Result<u64, E>,
    ) -> Result<u64, E> {
        match self.count_by {
            CountBy::Pid => Ok(u64::from(pid)),
            CountBy::Cgroup => cgroup(),
        }
    }

    /// Starts to watch the process with this key.
    pub(crate) fn watch(self: &Arc<Self>, key: u64) -> ExecCountWatch {
        let index = self.index(key);
        ExecCountWatch {
            monitor: self.clone(),
            index,
            count: self.counters.get(index),
        }
    }

    fn index(&self, key: u64) -> u32 {
        let spread = key.wrapping_mul(self.multipliers[0]);
        let spread = (spread ^ spread >> 32).wrapping_mul(self.multipliers[1]);
        u32::try_from(spread >> (u64::BITS.cast_signed() - INDEX_BITS)).unwrap_or_default()
    }
}

impl ExecWatch for ExecCountWatch {
    fn no_exec_seen(&self) -> bool {
        self.monitor.counters.get(self.index) == self.count
    }
}

fn failed(step: &'static str) -> impl FnOnce(io::Error) -> ExecMonitorError {
    move |source| match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => ExecMonitorError::Denied { step, source },
        _ => ExecMonitorError::Unsupported { step, source },
    }
}

/// Builds the program: it loads the key into register 0 and counts, once per process or once for
/// each cgroup above it.
fn program(count_by: CountBy, multipliers: [u64; 2], map: i32) -> BpfProgram {
    use Instruction as I;
    let mut program = BpfProgram::default();
    let count = |program: &mut BpfProgram| {
        // The same computation as in `ExecMonitor::index`.
        program.extend([I::load(1, multipliers[0]), I::multiply(0, 1)]);
        program.extend([I::copy(1, 0), I::shift_right(1, 32), I::exclusive_or(0, 1)]);
        program.extend([I::load(1, multipliers[1]), I::multiply(0, 1)]);
        program.extend([I::shift_right(0, u64::BITS.cast_signed() - INDEX_BITS)]);
        // The helper takes the address of the index, which is on the stack.
        program.extend([
            I::store_u32(bpf::FRAME, -4, 0),
            I::copy(2, bpf::FRAME),
            I::add(2, -4),
        ]);
        program.extend([I::load_map(1, map)]);
        program.extend([I::call(bpf::MAP_LOOKUP_ELEM)]);
        // The result is never null, since the index is below the length of the table. The kernel's
        // verifier requires the check.
        program.extend([
            I::jump_if_zero(0, 2),
            I::set(1, 1),
            I::atomic_add_u64(0, 0, 1),
        ]);
    };
    match count_by {
        CountBy::Pid => {
            // The upper half is the number of the process, the lower half that of the thread.
            program.extend([I::call(bpf::GET_CURRENT_PID_TGID), I::shift_right(0, 32)]);
            count(&mut program);
        }
        CountBy::Cgroup => {
            for level in 0..CGROUP_LEVELS {
                program.extend([
                    I::set(1, level),
                    I::call(bpf::GET_CURRENT_ANCESTOR_CGROUP_ID),
                ]);
                program.jump_to_end_if_zero(0);
                count(&mut program);
            }
        }
    }
    program.end();
    program.extend([I::set(0, 0), I::exit()]);
    program
}

#[cfg(test)]
mod tests;

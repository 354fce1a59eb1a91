//! Notices that a process executes a program, while an agent looks at that process.
//!
//! Between two looks at a process it may execute a setuid program, be taken for another user by the agent, and be back at
//! what it was: all that can be read of it is then as before. So an eBPF program at the kernel's tracepoint
//! `sched_process_exec` counts, in a table that this process has mapped, how often each process has executed a program. The
//! tracepoint runs before the new program's first instruction, so a process that is back at what it was has been counted.
//!
//! The program is loaded once, at the start, with CAP_BPF and CAP_PERFMON, which are given up after that. To watch a process is
//! to read one number: it takes no lock of that process (as perf_event_open(2) does, T25), and nothing can keep it waiting.
//!
//! Interfaces: bpf(2), `BPF_PROG_TYPE_RAW_TRACEPOINT` (Linux 4.17), `BPF_F_MMAPABLE` (5.5), bpf-helpers(7).

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

/// Numbers in the table. Which of them is a process's is a secret of the daemon's, so that nobody can choose to share the
/// number of another; a process that does so by chance (1 of 65,536 executions meanwhile) is attested again.
const COUNTERS: u32 = 1 << INDEX_BITS;
const INDEX_BITS: i32 = 16;
/// The kernel's first pid namespace has this number, as linux/nsfs.h has it (`PID_NS_INIT_INO`).
const INITIAL_PID_NAMESPACE: &str = "pid:[4026531836]";
/// Cgroups above a process that count: workloads are not as deep in the tree as this.
const CGROUP_LEVELS: i32 = 12;

/// By what the executions of a process are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CountBy {
    /// Its number, which the daemon and the kernel have in common in the first pid namespace.
    Pid,
    /// Each cgroup that it is in or below: the daemon is in a pid namespace of its own, and numbers processes otherwise
    /// than the kernel.
    Cgroup,
}

/// Counts executions until it is dropped.
pub struct ExecMonitor {
    counters: Counters,
    /// What spreads keys over the table: odd, so that each bit of a key has its part in the index.
    multipliers: [u64; 2],
    count_by: CountBy,
    /// Holds the program in place.
    _attached: OwnedFd,
}

/// Why executions cannot be counted here.
#[derive(Debug, Error)]
pub enum ExecMonitorError {
    /// The privileges are missing, or the system call is filtered.
    #[error("bpf(2), {step}: {source}")]
    Denied {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel has no eBPF, or no tracepoints for it.
    #[error("bpf(2), {step}: {source}")]
    Unsupported {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl ExecMonitorError {
    /// What to do about it.
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

/// The number of a process when its watch began.
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
    /// Loads the program and attaches it. To be called while the privileges are there; what it gives needs none.
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

    /// Whether an execution is counted: that of this command, or another one at the same time.
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

    /// What the executions of a process are counted by: its number, or else the id of the cgroup that is its workload's,
    /// which `cgroup` gives.
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

    /// Begins to watch.
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

/// The program: the key into register 0, then the counting; once for a process, or once for each cgroup above it.
fn program(count_by: CountBy, multipliers: [u64; 2], map: i32) -> BpfProgram {
    use Instruction as I;
    let mut program = BpfProgram::default();
    let count = |program: &mut BpfProgram| {
        // As `ExecMonitor::index` does it.
        program.extend([I::load(1, multipliers[0]), I::multiply(0, 1)]);
        program.extend([I::copy(1, 0), I::shift_right(1, 32), I::exclusive_or(0, 1)]);
        program.extend([I::load(1, multipliers[1]), I::multiply(0, 1)]);
        program.extend([I::shift_right(0, u64::BITS.cast_signed() - INDEX_BITS)]);
        // The index goes by its address, in the stack.
        program.extend([
            I::store_u32(bpf::FRAME, -4, 0),
            I::copy(2, bpf::FRAME),
            I::add(2, -4),
        ]);
        program.extend([I::load_map(1, map)]);
        program.extend([I::call(bpf::MAP_LOOKUP_ELEM)]);
        // Never, since the index is less than the length of the table; the kernel's verifier wants to see it.
        program.extend([
            I::jump_if_zero(0, 2),
            I::set(1, 1),
            I::atomic_add_u64(0, 0, 1),
        ]);
    };
    match count_by {
        CountBy::Pid => {
            // The upper half is the number of the process, the lower that of its thread.
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

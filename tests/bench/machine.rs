//! The machine: its description, its clocks, its memory figures, its cgroups.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::kill;
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::{Pid, SysconfVar, sysconf};

use crate::BenchError;

/// The prefix of the bench's slice among the root's cgroups. The bench's pid follows.
const SLICE: &str = "awsvid-bench-";

/// Returns the user and system time that a process has used, all threads together, to the
/// nanosecond.
pub(crate) fn cpu_time(pid: u32) -> Result<Duration, BenchError> {
    let clock = clock_getcpuclockid(Pid::from_raw(pid.try_into()?))?;
    Ok(clock_gettime(clock)?.into())
}

/// Waits until a process is idle: its work after the last response belongs to the run, too.
pub(crate) fn settled(pid: u32) -> Result<Duration, BenchError> {
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut before = cpu_time(pid)?;
    loop {
        sleep(Duration::from_millis(5));
        let now = cpu_time(pid)?;
        if now - before < Duration::from_micros(20) || Instant::now() > deadline {
            return Ok(now);
        }
        before = now;
    }
}

/// Returns the time of the one clock that all processes share.
pub(crate) fn monotonic() -> Duration {
    // It exists on every Linux.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

/// Returns the CPU time for which the whole machine has been busy, over all its processors. Time
/// stolen by other machines is busy, too.
pub(crate) fn busy() -> Result<Duration, BenchError> {
    let stat = fs::read_to_string("/proc/stat")?;
    let ticks = stat
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1);
    let ticks = ticks.map(str::parse).collect::<Result<Vec<u64>, _>>()?;
    // user, nice, system, idle, iowait, irq, softirq, steal: proc_stat(5).
    let busy: u64 = [0, 1, 2, 5, 6, 7]
        .iter()
        .filter_map(|field| ticks.get(*field))
        .sum();
    let per_second = sysconf(SysconfVar::CLK_TCK)?.ok_or("no clock tick")?;
    Ok(Duration::from_secs(busy) / u32::try_from(per_second)?)
}

/// Returns the number of processors.
pub(crate) fn processors() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1))
}

/// Describes the machine in one line.
pub(crate) fn description() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'));
        value.unwrap_or("?").trim().to_owned()
    };
    let memory = field(&read("/proc/meminfo"), "MemTotal");
    let kibibytes: f64 = memory.trim_end_matches(" kB").parse().unwrap_or_default();
    format!(
        "{} x {}, {:.0} GiB, Linux {}",
        processors(),
        field(&read("/proc/cpuinfo"), "model name"),
        kibibytes / 1024.0 / 1024.0,
        read("/proc/sys/kernel/osrelease").trim(),
    )
}

/// A process's memory, in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Memory {
    /// `RssAnon`: heap and stacks.
    pub(crate) anonymous: u64,
    /// Memory of this process alone, with pages of the program file (`Private_*` of smaps_rollup).
    pub(crate) private: u64,
    /// All resident memory, shared or not.
    pub(crate) resident: u64,
}

/// Reads them (proc_pid_status(5), proc_pid_smaps(5)).
pub(crate) fn memory(pid: u32) -> Result<Memory, BenchError> {
    let bytes = |file: &str, names: &[&str]| -> Result<u64, BenchError> {
        let text = fs::read_to_string(format!("/proc/{pid}/{file}"))?;
        let fields = text.lines().filter_map(|line| line.split_once(':'));
        let values = fields
            .filter(|(name, _)| names.contains(name))
            .map(|(_, value)| value.trim().trim_end_matches(" kB"));
        Ok(values.map(str::parse::<u64>).sum::<Result<u64, _>>()? * 1024)
    };
    Ok(Memory {
        anonymous: bytes("status", &["RssAnon"])?,
        private: bytes("smaps_rollup", &["Private_Clean", "Private_Dirty"])?,
        resident: bytes("status", &["VmRSS"])?,
    })
}

/// Returns the mount point of cgroup v2.
fn mount() -> Result<PathBuf, BenchError> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let point = mounts
        .lines()
        .find(|line| line.contains(" - cgroup2 "))
        .and_then(|line| line.split(' ').nth(4));
    Ok(point.ok_or("no cgroup v2 tree is mounted")?.into())
}

/// The cgroups of this run, in a slice of their own, all removed at the end.
#[derive(Debug)]
pub(crate) struct Cgroups {
    root: PathBuf,
    slice: PathBuf,
}

impl Cgroups {
    /// Creates the slice, and removes those of benches that were killed.
    pub(crate) fn new() -> Result<Self, BenchError> {
        let root = mount()?;
        for entry in fs::read_dir(&root)?.filter_map(Result::ok) {
            let name = entry.file_name().into_string().unwrap_or_default();
            let pid = name
                .strip_prefix(SLICE)
                .and_then(|rest| rest.strip_suffix(".slice")?.parse().ok());
            if pid.is_some_and(|pid| kill(Pid::from_raw(pid), None).is_err()) {
                remove(&entry.path());
            }
        }
        let slice = root.join(format!("{SLICE}{}.slice", std::process::id()));
        fs::create_dir(&slice)?;
        Ok(Self { root, slice })
    }

    /// Returns the root of the hierarchy, where processes of containers without cgroups and of
    /// rescue shells live.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Creates one as systemd would for the unit `name`.
    pub(crate) fn unit(&self, name: &str) -> Result<PathBuf, BenchError> {
        let path = self.slice.join(format!("{name}.service"));
        match fs::create_dir(&path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error.into()),
            _ => Ok(path),
        }
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        remove(&self.slice);
    }
}

/// Removes a slice and its units. A unit's last process may take a moment to disappear.
fn remove(slice: &Path) {
    for _ in 0..200 {
        for entry in fs::read_dir(slice)
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
        {
            if entry.path().is_dir() {
                let _ = fs::remove_dir(entry.path());
            }
        }
        match fs::remove_dir(slice) {
            Err(error) if error.kind() != ErrorKind::NotFound => sleep(Duration::from_millis(10)),
            _ => return,
        }
    }
}

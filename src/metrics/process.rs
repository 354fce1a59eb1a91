//! The metrics of the daemon's own process, by the names that Prometheus's client libraries use.
//!
//! They come from `/proc/self/stat`, the directory `/proc/self/fd`, and getrlimit(2).

use std::fs;
use std::time::UNIX_EPOCH;

use nix::sys::resource::{Resource, getrlimit};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{SysconfVar, sysconf};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use crate::clock::Clock;

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;

/// The start of this process in seconds since the Unix epoch; `None` without `/proc`.
///
/// It is computed once, because the wall clock may be set later.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProcessStart(Option<f64>);

/// The fields of `/proc/self/stat` that metrics need, see proc_pid_stat(5).
struct ProcessStat {
    cpu_ticks: f64,
    threads: u64,
    start_ticks: f64,
    virtual_bytes: u64,
    resident_pages: u64,
}

impl ProcessStart {
    pub(super) fn of_this_process() -> Self {
        Self(Self::read())
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "/proc counts from the boot, as this clock does"
    )]
    fn read() -> Option<f64> {
        let stat = ProcessStat::read()?;
        let since_boot = clock_gettime(ClockId::CLOCK_BOOTTIME).ok()?;
        let since_boot = std::time::Duration::from(since_boot).as_secs_f64();
        let now = Clock::system().now().duration_since(UNIX_EPOCH).ok()?;
        Some(now.as_secs_f64() - since_boot + stat.start_ticks / ticks_per_second()?)
    }

    /// Registers the metrics as of now. One that cannot be read is left out.
    pub(super) fn register(self, own: &mut Registry) {
        if let Some(start) = self.0 {
            own.register_with_unit(
                "start_time",
                "Start time since the Unix epoch",
                Unit::Seconds,
                ConstGauge::new(start),
            );
        }
        if let Some(stat) = ProcessStat::read() {
            stat.register(own);
        }
        if let Some(open) = open_descriptors() {
            own.register("open_fds", "Open file descriptors", ConstGauge::new(open));
        }
        if let Ok((soft, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
            own.register(
                "max_fds",
                "Limit of open file descriptors",
                ConstGauge::new(soft),
            );
        }
    }
}

impl ProcessStat {
    fn read() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/self/stat").ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        // The program's name, in parentheses, may contain spaces and parentheses.
        let (_, fields) = text.rsplit_once(')')?;
        // The first of these is field 3.
        let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        let ticks = |field: usize| fields.get(field - 3)?.parse::<f64>().ok();
        Some(Self {
            cpu_ticks: ticks(14)? + ticks(15)?,
            threads: number(20)?,
            start_ticks: ticks(22)?,
            virtual_bytes: number(23)?,
            resident_pages: number(24)?,
        })
    }

    fn register(&self, own: &mut Registry) {
        if let Some(ticks) = ticks_per_second() {
            own.register_with_unit(
                "cpu",
                "Processor time, user and system",
                Unit::Seconds,
                ConstCounter::new(self.cpu_ticks / ticks),
            );
        }
        own.register_with_unit(
            "virtual_memory",
            "Virtual memory",
            Unit::Bytes,
            ConstGauge::new(self.virtual_bytes),
        );
        let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
        if let Some(page) = page.and_then(|page| u64::try_from(page).ok()) {
            own.register_with_unit(
                "resident_memory",
                "Resident memory",
                Unit::Bytes,
                ConstGauge::new(self.resident_pages * page),
            );
        }
        own.register(
            "threads",
            "Threads of the process",
            ConstGauge::new(self.threads),
        );
    }
}

fn ticks_per_second() -> Option<f64> {
    let ticks = sysconf(SysconfVar::CLK_TCK).ok().flatten()?;
    Some(f64::from(u32::try_from(ticks).ok()?))
}

/// Returns the number of open descriptors, which Linux 6.2 and later report as the size of the
/// directory.
fn open_descriptors() -> Option<u64> {
    const FD_DIR: &str = "/proc/self/fd";
    match fs::metadata(FD_DIR).ok()?.len() {
        // The listing's own descriptor is one of them.
        0 => u64::try_from(fs::read_dir(FD_DIR).ok()?.count())
            .ok()?
            .checked_sub(1),
        open => Some(open),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_stat_is_parsed_behind_any_name() {
        let text =
            "7 (a) b (c) S 1 7 7 0 -1 4194560 100 0 0 0 150 50 0 0 20 0 9 0 4200 1048576 25 0";
        let stat = ProcessStat::parse(text).unwrap();
        assert_eq!((stat.cpu_ticks, stat.start_ticks), (200.0, 4200.0));
        assert_eq!(
            (stat.threads, stat.virtual_bytes, stat.resident_pages),
            (9, 1_048_576, 25)
        );
    }
}

//! The daemon's memory, and the time of its start.

use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::cold::at_once;
use super::ratio::{DESCRIPTORS, TCP_PID, USER, measure};
use crate::caller::Caller;
use crate::daemon::{Daemon, Transport, role, rule};
use crate::load::{Load, Plan, Sequence};
use crate::machine::{self, Memory};
use crate::process::Part;
use crate::table::{Line, Spread, mebibytes, micros};
use crate::upstream::Upstream;
use crate::{Bench, BenchError};

/// Measures the daemon's memory after one exchange, and after all kinds of load.
pub(crate) fn memory(bench: &Bench) -> Result<Vec<Line>, BenchError> {
    let folder = bench.folder()?;
    // A real STS has TLS, and TLS takes memory.
    let upstream = Upstream::start(&folder, Duration::ZERO, true)?;
    let daemon = Daemon::start(&folder, &upstream, &TCP_PID.rules()?)?;
    let plan = |transport| -> Result<Plan, BenchError> {
        Ok(Plan {
            caller: Caller {
                uid: USER,
                cgroup: bench.cgroups.unit("load")?,
                descriptors: DESCRIPTORS,
            },
            address: daemon.address(transport)?,
            path: "/v1/credentials".to_owned(),
            sequence: Sequence::Container,
            threads: 8,
            warm_up: 0,
            requests: bench.count(20_000, 200),
            rate: None,
        })
    };
    let mut once = Load::start(&Plan {
        threads: 1,
        requests: 1,
        ..plan(Transport::Tcp)?
    })?;
    once.begin()?;
    once.report()?.all_issued()?;
    let idle = later(&daemon)?;
    measure(bench, daemon.pid(), &plan(Transport::Tcp)?)?;
    measure(bench, daemon.pid(), &plan(Transport::Unix)?)?;
    let loaded = later(&daemon)?;
    at_once(
        bench,
        &daemon.address(Transport::Tcp)?,
        4,
        bench.count(1000, 40),
    )?;
    let after_callers = later(&daemon)?;
    let line = |row,
                Memory {
                    anonymous,
                    private,
                    resident,
                },
                bound| {
        let others = format!(
            "private {}, resident {}",
            mebibytes(private),
            mebibytes(resident)
        );
        Line::new(
            row,
            format!("anonymous {}", mebibytes(anonymous)),
            bound,
            others,
        )
    };
    Ok(vec![
        line("memory idle", idle, "at most 8 MiB"),
        line("memory after load", loaded, "at most 12 MiB"),
        line("memory after callers", after_callers, "at most 12 MiB"),
    ])
}

/// Measures once its work after the last response is done.
fn later(daemon: &Daemon) -> Result<Memory, BenchError> {
    sleep(Duration::from_secs(1));
    machine::settled(daemon.pid())?;
    machine::memory(daemon.pid())
}

/// Measures the size of a cache entry, in a process with nothing but a cache.
pub(crate) fn entries(bench: &Bench) -> Result<Vec<Line>, BenchError> {
    let count = bench.count(100_000, 1000);
    let mut part = Part::start(&["entries", &count.to_string()])?;
    part.next_line()?;
    let empty = machine::memory(part.pid())?;
    part.write_text("\n")?;
    part.next_line()?;
    let full = machine::memory(part.pid())?;
    part.end()?;
    let bytes = f64::from(u32::try_from(
        full.anonymous.saturating_sub(empty.anonymous),
    )?) / f64::from(u32::try_from(count)?);
    Ok(vec![Line::new(
        "entries-size",
        format!("{:.2} KiB each", bytes / 1024.0),
        "at most 3 KiB",
        format!(
            "{} for {count}, {} before",
            mebibytes(full.anonymous),
            mebibytes(empty.anonymous)
        ),
    )])
}

/// Measures the time from the start of the program until it accepts connections, and until it is
/// ready.
pub(crate) fn start(bench: &Bench) -> Result<Vec<Line>, BenchError> {
    let (mut listening, mut ready) = (Vec::new(), Vec::new());
    for _ in 0..bench.count(10, 2) {
        let folder = bench.folder()?;
        let upstream = Upstream::start(&folder, Duration::ZERO, false)?;
        let begin = Instant::now();
        let mut daemon = Daemon::spawn(
            &folder,
            &upstream,
            &format!("{}\n{}", rule(USER, ""), role("bench")),
        )?;
        let socket = daemon.address(Transport::Unix)?;
        daemon.wait("listening", |_| UnixStream::connect(&socket).is_ok())?;
        listening.push(micros(begin.elapsed()) / 1000.0);
        daemon.wait("ready", Daemon::is_ready)?;
        ready.push(micros(begin.elapsed()) / 1000.0);
    }
    let (listening, ready) = (Spread::of(listening), Spread::of(ready));
    Ok(vec![
        Line::new(
            "start listening",
            listening.show("ms"),
            "",
            "first connection on the unix socket".to_owned(),
        ),
        Line::new(
            "start ready",
            ready.show("ms"),
            "at most 50 ms",
            "`/readyz` is 200; polled every 0.5 ms".to_owned(),
        ),
    ])
}

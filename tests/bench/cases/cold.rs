//! The latency of requests with an empty cache.

use std::time::Duration;

use super::ratio::{DESCRIPTORS, USER};
use crate::caller::Caller;
use crate::daemon::{Daemon, Transport, role, rule};
use crate::load::{Load, Plan, Sequence};
use crate::table::{Line, Spread, micros, millis};
use crate::upstream::Upstream;
use crate::{Bench, BenchError};

/// The time that the source and STS take for each reply.
const DELAY: Duration = Duration::from_millis(50);

/// Measures a thousand callers of one identity at once: four units of one user with 250 each, since
/// one unit may have 512 connections.
pub(crate) fn concurrent_callers(bench: &Bench) -> Result<Vec<Line>, BenchError> {
    const UNITS: usize = 4;
    let folder = bench.folder()?;
    let upstream = Upstream::start(&folder, DELAY, false)?;
    let daemon = Daemon::start(
        &folder,
        &upstream,
        &format!("{}\n{}", rule(USER, ""), role("bench")),
    )?;
    let before = upstream.counts();
    let callers = bench.count(1000, 40);
    let reports = at_once(bench, &daemon.address(Transport::Tcp)?, UNITS, callers)?;
    let after = upstream.counts();
    let last = reports.iter().max().copied().unwrap_or_default();
    let (tokens, sessions) = (
        after.tokens - before.tokens,
        after.sessions - before.sessions,
    );
    Ok(vec![Line::new(
        "concurrent-callers",
        format!(
            "last answer {} after STS's",
            millis(micros(last.saturating_sub(after.answered)))
        ),
        "at most 100 ms; 1 JWT fetch and 1 STS call",
        format!("{tokens} JWT fetch and {sessions} STS call for {callers} callers"),
    )])
}

/// Sends a request from each of `callers` at one time, from `units` processes in cgroups of their
/// own. Returns when each process had its last response.
pub(crate) fn at_once(
    bench: &Bench,
    address: &str,
    units: usize,
    callers: usize,
) -> Result<Vec<Duration>, BenchError> {
    let mut loads = Vec::new();
    for unit in 0..units {
        let cgroup = bench.cgroups.unit(&format!("callers-{unit}"))?;
        loads.push(Load::callers(&Plan {
            caller: Caller {
                uid: USER,
                cgroup,
                descriptors: DESCRIPTORS,
            },
            address: address.to_owned(),
            path: "/v1/credentials".to_owned(),
            sequence: Sequence::Container,
            threads: 1,
            warm_up: 0,
            requests: callers / units,
            rate: None,
        })?);
    }
    for load in &mut loads {
        load.begin()?;
    }
    let mut finished = Vec::new();
    for load in loads {
        let report = load.report()?;
        report.all_issued()?;
        finished.push(report.finished);
    }
    Ok(finished)
}

/// Measures one caller after the other, each for a role that has not been requested yet.
pub(crate) fn cold(bench: &Bench) -> Result<Vec<Line>, BenchError> {
    let folder = bench.folder()?;
    let upstream = Upstream::start(&folder, DELAY, false)?;
    let tries = bench.count(20, 3);
    let roles: Vec<String> = (0..tries)
        .map(|number| role(&format!("cold-{number}")))
        .collect();
    let daemon = Daemon::start(
        &folder,
        &upstream,
        &format!("{}\n{}", rule(USER, ""), roles.join("\n")),
    )?;
    let caller = Caller {
        uid: USER,
        cgroup: bench.cgroups.unit("load")?,
        descriptors: DESCRIPTORS,
    };
    let mut added = Vec::new();
    for number in 0..tries {
        let before = upstream.counts();
        let mut load = Load::start(&Plan {
            caller: caller.clone(),
            address: daemon.address(Transport::Tcp)?,
            path: format!("/v1/credentials/cold-{number}"),
            sequence: Sequence::Container,
            threads: 1,
            warm_up: 0,
            requests: 1,
            rate: None,
        })?;
        load.begin()?;
        let report = load.report()?;
        report.all_issued()?;
        added.push(report.max - micros(upstream.counts().spent - before.spent));
    }
    let added = Spread::of(added);
    Ok(vec![Line::new(
        "cold",
        format!("{} over their sum", millis(added.median)),
        "at most 5 ms",
        format!(
            "{} tries, {} to {}",
            tries,
            millis(added.least),
            millis(added.most)
        ),
    )])
}

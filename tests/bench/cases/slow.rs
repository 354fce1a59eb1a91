//! Latencies: at a steady rate, and while another user keeps the daemon busy.

use super::ratio::{
    DESCRIPTORS, Pair, Run, TCP_PID, TCP_SOCKET, UNIX_FACTS, UNIX_UID, USER, measure,
};
use crate::caller::Caller;
use crate::daemon::{Daemon, Transport, role, rule};
use crate::load::{Load, Plan, Report, Sequence};
use crate::table::{Line, Spread, millis};
use crate::upstream::Upstream;
use crate::{Bench, BenchError};

/// The steady rate, in requests a second.
const RATE: u32 = 1500;
/// The user of the endless requests in [`hostile`].
const HOSTILE: u32 = 61102;

/// Measures the latency at 1,500 requests a second.
pub(crate) fn paced(bench: &Bench) -> Result<Vec<Line>, BenchError> {
    let mut lines = Vec::new();
    for shape in [TCP_SOCKET, TCP_PID, UNIX_UID, UNIX_FACTS] {
        let caller = Caller {
            uid: USER,
            cgroup: bench.cgroups.unit("load")?,
            descriptors: DESCRIPTORS,
        };
        let pair = Pair::start(bench, &shape, caller)?;
        let requests = bench.count(1600, 160);
        let paced = |plan: &Plan| Plan {
            rate: Some(RATE),
            requests,
            warm_up: 320,
            ..plan.clone()
        };
        let (mut direct, mut runs) = (Vec::new(), Vec::new());
        for _ in 0..bench.rounds() {
            direct.push(measure(
                bench,
                pair.direct.pid(),
                &paced(&pair.direct_plan),
            )?);
            runs.push(measure(bench, pair.daemon.pid(), &paced(&pair.plan))?);
        }
        let median = |runs: &[Run], value: fn(&Report) -> f64| {
            Spread::of(runs.iter().map(|run| value(&run.report)))
        };
        let (ours, theirs) = (
            median(&runs, |report| report.p50),
            median(&direct, |report| report.p50),
        );
        let p99s = [&runs, &direct].map(|runs| millis(median(runs, |report| report.p99).median));
        lines.push(Line::new(
            format!("paced {}", shape.name()),
            format!("p50 {:.2} x", ours.median / theirs.median),
            "at most 1.5",
            format!(
                "p50 {} / direct {}; p99 {} / {}",
                ours.show("us"),
                theirs.show("us"),
                p99s[0],
                p99s[1]
            ),
        ));
    }
    Ok(lines)
}

/// Measures one user's latency while another one makes the daemon search thousands of descriptors.
pub(crate) fn hostile(bench: &Bench) -> Result<Vec<Line>, BenchError> {
    let folder = bench.folder()?;
    let upstream = Upstream::start(&folder, std::time::Duration::ZERO, false)?;
    let rules = [USER, HOSTILE]
        .map(|uid| rule(uid, &format!("gid = {uid}\n")))
        .join("\n");
    let daemon = Daemon::start(&folder, &upstream, &format!("{rules}\n{}", role("bench")))?;
    let plan = |uid, unit, descriptors| -> Result<Plan, BenchError> {
        let caller = Caller {
            uid,
            cgroup: bench.cgroups.unit(unit)?,
            descriptors,
        };
        let (address, path) = (
            daemon.address(Transport::Tcp)?,
            "/v1/credentials".to_owned(),
        );
        Ok(Plan {
            caller,
            address,
            path,
            sequence: Sequence::Container,
            threads: 8,
            warm_up: 0,
            requests: 0,
            rate: None,
        })
    };
    let requests = bench.count(2000, 80);
    let victim = Plan {
        requests,
        rate: Some(400),
        warm_up: 80,
        ..plan(USER, "load", DESCRIPTORS)?
    };
    let alone = measure(bench, daemon.pid(), &victim)?.report;
    let mut hostile = Load::start(&plan(HOSTILE, "hostile", 10_000)?)?;
    hostile.begin()?;
    let mut load = Load::start(&victim)?;
    load.begin()?;
    let report = load.report()?;
    let hostile = hostile.stop()?;
    report.all_issued()?;
    Ok(vec![Line::new(
        "hostile",
        format!("p99 {}", millis(report.p99)),
        "below 10 ms",
        format!(
            "p50 {}, max {}; without it p50 {}, p99 {}; its own p50 {} and answers by status {:?}",
            millis(report.p50),
            millis(report.max),
            millis(alone.p50),
            millis(alone.p99),
            millis(hostile.p50),
            hostile.answers,
        ),
    )])
}

//! Latencies: at a steady rate, and while another user keeps the daemon busy.

use std::path::Path;
use std::time::Duration;

use super::ratio::{
    DESCRIPTORS, Pair, Run, TCP_PID, TCP_SOCKET, UNIX_FACTS, UNIX_UID, USER, imds_table, measure,
};
use crate::caller::Caller;
use crate::daemon::{Daemon, Transport, role, rule};
use crate::load::{Load, Plan, Report, Sequence};
use crate::table::{Line, Spread, millis};
use crate::upstream::Upstream;
use crate::{Bench, BenchError};

/// The steady rate, in requests a second.
const RATE: u32 = 1500;
/// The user of the endless requests in an [`Attack`].
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

/// One user's latencies without another user's load and with it, and the report of that load.
struct Attack {
    alone: Report,
    during: Report,
    load: Report,
}

impl Attack {
    /// Sends 400 requests a second of one user, and requests of another without end.
    fn run(
        bench: &Bench,
        table: impl Fn(&Path) -> String,
        (sequence, descriptors): (Sequence, usize),
    ) -> Result<Self, BenchError> {
        let folder = bench.folder()?;
        let upstream = Upstream::start(&folder, Duration::ZERO, false)?;
        let rules = [USER, HOSTILE]
            .map(|uid| rule(uid, &format!("gid = {uid}\n")))
            .join("\n");
        let tables = format!("{}{rules}\n{}", table(&folder), role("bench"));
        let daemon = Daemon::start(&folder, &upstream, &tables)?;
        let plan = |uid, unit, descriptors| -> Result<Plan, BenchError> {
            Ok(Plan {
                caller: Caller {
                    uid,
                    cgroup: bench.cgroups.unit(unit)?,
                    descriptors,
                },
                address: daemon.address(Transport::Tcp)?,
                path: "/v1/credentials".to_owned(),
                sequence: Sequence::Container,
                threads: 8,
                warm_up: 0,
                requests: 0,
                rate: None,
            })
        };
        let victim = Plan {
            requests: bench.count(2000, 80),
            rate: Some(400),
            warm_up: 80,
            ..plan(USER, "load", DESCRIPTORS)?
        };
        let alone = measure(bench, daemon.pid(), &victim)?.report;
        let mut hostile = Load::start(&Plan {
            sequence,
            ..plan(HOSTILE, "hostile", descriptors)?
        })?;
        hostile.begin()?;
        let mut load = Load::start(&victim)?;
        load.begin()?;
        let during = load.report()?;
        let load = hostile.stop()?;
        during.all_issued()?;
        Ok(Self {
            alone,
            during,
            load,
        })
    }

    /// Returns the line of the victim's latencies. `own` has figures of the other load.
    fn line(&self, row: &str, own: &str) -> Line {
        let Self { alone, during, .. } = self;
        Line::new(
            row,
            format!("p99 {}", millis(during.p99)),
            "below 10 ms",
            format!(
                "p50 {}, max {}; without it p50 {}, p99 {}; {own}",
                millis(during.p50),
                millis(during.max),
                millis(alone.p50),
                millis(alone.p99),
            ),
        )
    }
}

/// Measures one user's latency while another one makes the daemon search thousands of descriptors.
pub(crate) fn hostile(bench: &Bench) -> Result<Vec<Line>, BenchError> {
    let no_table = |_: &Path| String::new();
    let attack = Attack::run(bench, no_table, (Sequence::Container, 10_000))?;
    let own = format!(
        "its own p50 {} and answers by status {:?}",
        millis(attack.load.p50),
        attack.load.answers,
    );
    Ok(vec![attack.line("hostile", &own)])
}

/// Measures one user's latency while another one requests metadata tokens, and how many it gets.
pub(crate) fn puts(bench: &Bench) -> Result<Vec<Line>, BenchError> {
    let attack = Attack::run(bench, imds_table, (Sequence::MetadataPut, DESCRIPTORS))?;
    attack.load.all_issued()?;
    let own = format!(
        "{:.0} PUTs a second, their p50 {}",
        attack.load.per_second(),
        millis(attack.load.p50),
    );
    Ok(vec![attack.line("imds-puts", &own)])
}

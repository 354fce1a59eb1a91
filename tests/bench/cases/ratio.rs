//! CPU time per request, in multiples of a baseline that is measured in alternation with it.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::background_load::BackgroundLoad;
use crate::caller::Caller;
use crate::daemon::{Daemon, Direct, Transport, role, rule};
use crate::load::{Load, Plan, Report, Sequence};
use crate::table::{Line, Spread, micros, millis};
use crate::upstream::Upstream;
use crate::{Bench, BenchError, caller, machine};

/// The user of the load in most rows.
pub(crate) const USER: u32 = 61101;
/// The number of a caller's descriptors in most rows.
pub(crate) const DESCRIPTORS: usize = 20;

/// The facts of the caller that the rules need.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    name: &'static str,
    pub(crate) transport: Transport,
    keys: Keys,
    at_most: f64,
    aim: f64,
}

#[derive(Debug, Clone, Copy)]
enum Keys {
    /// The user and the unit.
    Unit,
    Uid,
    Executable,
}

pub(crate) const TCP_SOCKET: Shape = Shape {
    name: "tcp-socket",
    transport: Transport::Tcp,
    keys: Keys::Unit,
    at_most: 1.4,
    aim: 1.25,
};
pub(crate) const TCP_PID: Shape = Shape {
    name: "tcp-pid",
    transport: Transport::Tcp,
    keys: Keys::Uid,
    at_most: 3.0,
    aim: 1.8,
};
pub(crate) const UNIX_UID: Shape = Shape {
    name: "unix-uid",
    transport: Transport::Unix,
    keys: Keys::Uid,
    at_most: 1.5,
    aim: 1.3,
};
pub(crate) const UNIX_FACTS: Shape = Shape {
    name: "unix-facts",
    transport: Transport::Unix,
    keys: Keys::Executable,
    at_most: 2.0,
    aim: 1.7,
};
const SHAPES: [Shape; 4] = [TCP_SOCKET, TCP_PID, UNIX_UID, UNIX_FACTS];

impl Shape {
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// Returns the configuration's rule and role.
    pub(crate) fn rules(&self) -> Result<String, BenchError> {
        let more = match self.keys {
            Keys::Unit => "systemd_unit = \"load.service\"\n".to_owned(),
            Keys::Uid => String::new(),
            // The load is this program.
            Keys::Executable => format!(
                "gid = {USER}\nexe = {:?}\n",
                std::env::current_exe()?.display().to_string()
            ),
        };
        Ok(format!("{}\n{}", rule(USER, &more), role("bench")))
    }
}

/// A daemon with all that it needs, and the `direct` that is its baseline.
pub(crate) struct Pair {
    pub(crate) daemon: Daemon,
    pub(crate) direct: Direct,
    /// The load on the daemon.
    pub(crate) plan: Plan,
    /// The load on `direct`.
    pub(crate) direct_plan: Plan,
    _upstream: Upstream,
}

impl Pair {
    /// Starts both. One request to the daemon gives it credentials, and `direct` the bytes of its
    /// responses.
    pub(crate) fn start(bench: &Bench, shape: &Shape, caller: Caller) -> Result<Self, BenchError> {
        Self::start_with(bench, shape, caller, |_| String::new())
    }

    /// Starts both, with the tables that `more` returns for the daemon's folder.
    fn start_with(
        bench: &Bench,
        shape: &Shape,
        caller: Caller,
        more: impl Fn(&Path) -> String,
    ) -> Result<Self, BenchError> {
        let folder = bench.folder()?;
        let upstream = Upstream::start(&folder, Duration::ZERO, false)?;
        let rules = more(&folder) + &shape.rules()?;
        let daemon = Daemon::start(&folder, &upstream, &rules)?;
        let requests = bench.count(10_000, 200);
        let plan = Plan {
            caller,
            address: daemon.address(shape.transport)?,
            path: "/v1/credentials".to_owned(),
            sequence: Sequence::Container,
            threads: 8,
            warm_up: requests / 5,
            requests,
            rate: None,
        };
        let mut once = Load::start(&Plan {
            threads: 1,
            warm_up: 0,
            requests: 1,
            ..plan.clone()
        })?;
        once.begin()?;
        let once = once.report()?;
        once.all_issued()?;
        let direct = Direct::start(&folder, shape.transport, &once.body)?;
        let direct_plan = Plan {
            address: direct.address.clone(),
            ..plan.clone()
        };
        Ok(Self {
            daemon,
            direct,
            plan,
            direct_plan,
            _upstream: upstream,
        })
    }

    /// Does one run on each.
    fn round(&self, bench: &Bench) -> Result<(Run, Run), BenchError> {
        Ok((
            measure(bench, self.direct.pid(), &self.direct_plan)?,
            measure(bench, self.daemon.pid(), &self.plan)?,
        ))
    }
}

/// The measurements of one run.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    /// CPU time of the server per request, in microseconds.
    pub(crate) cpu: f64,
    pub(crate) report: Report,
}

/// Runs one load on a server, from its warm-up to its last response.
pub(crate) fn measure(bench: &Bench, server: u32, plan: &Plan) -> Result<Run, BenchError> {
    let mut load = Load::start(plan)?;
    let (start, busy, before) = (Instant::now(), machine::busy()?, machine::settled(server)?);
    load.begin()?;
    let report = load.report()?;
    let cpu = machine::settled(server)? - before;
    report.all_issued()?;
    let mut others = bench.others.get();
    others.elapsed += start.elapsed();
    others.theirs += (machine::busy()? - busy).saturating_sub(cpu + report.cpu);
    bench.others.set(others);
    let requests = u32::try_from(report.requests())?;
    Ok(Run {
        cpu: micros(cpu) / f64::from(requests),
        report,
    })
}

/// The medians of several runs.
#[derive(Debug, Clone, Copy)]
struct Figures {
    cpu: Spread,
    per_second: f64,
    p50: f64,
    p99: f64,
}

impl Figures {
    fn of(runs: &[Run]) -> Self {
        let median = |value: fn(&Run) -> f64| Spread::of(runs.iter().map(value)).median;
        Self {
            cpu: Spread::of(runs.iter().map(|run| run.cpu)),
            per_second: median(|run| run.report.per_second()),
            p50: median(|run| run.report.p50),
            p99: median(|run| run.report.p99),
        }
    }

    fn compared_with(self, name: &str, other: Self) -> String {
        format!(
            "CPU {} / {name} {}; {:.0} req/s / {:.0}; p50 {} / {}; p99 {} / {}",
            self.cpu.show("us"),
            other.cpu.show("us"),
            self.per_second,
            other.per_second,
            millis(self.p50),
            millis(other.p50),
            millis(self.p99),
            millis(other.p99),
        )
    }
}

/// Returns the line for these runs, in multiples of `base`, which the table calls `name`.
fn line(row: &str, name: &str, base: &[Run], runs: &[Run], bound: String) -> Line {
    let (base, figures) = (Figures::of(base), Figures::of(runs));
    let ratio = figures.cpu.median / base.cpu.median;
    Line::new(
        row,
        format!("{ratio:.2} x"),
        bound,
        figures.compared_with(name, base),
    )
}

fn bound(at_most: f64, aim: f64) -> String {
    format!("at most {at_most}, aim {aim}")
}

/// Measures a shape, with the load in a cgroup of its own.
pub(crate) fn own_cgroup(bench: &Bench, shape: &Shape) -> Result<Vec<Line>, BenchError> {
    against_direct(
        bench,
        shape,
        shape.name,
        &bench.cgroups.unit("load")?,
        DESCRIPTORS,
        bound(shape.at_most, shape.aim),
    )
}

/// Measures with the load in the root cgroup, where no cgroup distinguishes it from other
/// processes.
pub(crate) fn root_cgroup(bench: &Bench) -> Result<Vec<Line>, BenchError> {
    against_direct(
        bench,
        &TCP_PID,
        "tcp-pid-root",
        bench.cgroups.root(),
        DESCRIPTORS,
        "no bound".to_owned(),
    )
}

/// Measures the curve over the caller's descriptors.
pub(crate) fn descriptors(bench: &Bench) -> Result<Vec<Line>, BenchError> {
    let cgroup = bench.cgroups.unit("load")?;
    let curve = [20, 200, 2000].map(|count| {
        let row = format!("descriptors {count}");
        against_direct(
            bench,
            &TCP_PID,
            &row,
            &cgroup,
            count,
            "the curve".to_owned(),
        )
    });
    Ok(curve
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .flatten()
        .collect())
}

fn against_direct(
    bench: &Bench,
    shape: &Shape,
    row: &str,
    cgroup: &Path,
    descriptors: usize,
    bound: String,
) -> Result<Vec<Line>, BenchError> {
    let caller = Caller {
        uid: USER,
        cgroup: cgroup.to_owned(),
        descriptors,
    };
    let mut pair = Pair::start(bench, shape, caller)?;
    if descriptors > DESCRIPTORS {
        // A search of thousands takes milliseconds, so that fewer of them are enough.
        for plan in [&mut pair.plan, &mut pair.direct_plan] {
            (plan.requests, plan.warm_up) = (plan.requests / 5, plan.warm_up / 5);
        }
    }
    let rounds = (0..bench.rounds())
        .map(|_| pair.round(bench))
        .collect::<Result<Vec<_>, _>>()?;
    let (direct, runs): (Vec<_>, Vec<_>) = rounds.into_iter().unzip();
    Ok(vec![line(row, "direct", &direct, &runs, bound)])
}

/// Returns the table for requests of metadata, of a daemon with its files in this folder.
pub(crate) fn imds_table(folder: &Path) -> String {
    let key = folder.join("imds-key");
    format!("[imds]\nmode = \"endpoint\"\nkey_file = {key:?}\n\n")
}

/// Measures requests for metadata: one with a known token against the same request to the container
/// credential endpoint and against one of `direct`, and an SDK's three requests against three of
/// `direct`.
pub(crate) fn imds(bench: &Bench) -> Result<Vec<Line>, BenchError> {
    let caller = Caller {
        uid: USER,
        cgroup: bench.cgroups.unit("load")?,
        descriptors: DESCRIPTORS,
    };
    let pair = Pair::start_with(bench, &TCP_SOCKET, caller, imds_table)?;
    let get = Plan {
        path: format!("{}bench", caller::ROLES),
        sequence: Sequence::MetadataGet,
        ..pair.plan.clone()
    };
    let sdk = Plan {
        sequence: Sequence::MetadataSdk,
        ..pair.plan.clone()
    };
    let [mut direct, mut threes, mut container, mut gets, mut sdks] = [const { Vec::new() }; 5];
    for _ in 0..bench.rounds() {
        let (one, other) = pair.round(bench)?;
        threes.push(Run {
            cpu: one.cpu * 3.0,
            ..one.clone()
        });
        direct.push(one);
        container.push(other);
        gets.push(measure(bench, pair.daemon.pid(), &get)?);
        sdks.push(measure(bench, pair.daemon.pid(), &sdk)?);
    }
    let at_most = "at most 1.1".to_owned();
    let no_bound = || "no bound".to_owned();
    Ok(vec![
        line("imds-get", "tcp-socket", &container, &gets, at_most),
        line("imds-get direct", "direct", &direct, &gets, no_bound()),
        line("imds-sdk", "three direct", &threes, &sdks, no_bound()),
    ])
}

/// Measures each shape without and with background load, which starts and ends in each round.
pub(crate) fn busy_node(bench: &Bench) -> Result<Vec<Line>, BenchError> {
    let caller = Caller {
        uid: USER,
        cgroup: bench.cgroups.unit("load")?,
        descriptors: DESCRIPTORS,
    };
    let pairs = SHAPES.map(|shape| Pair::start(bench, &shape, caller.clone()));
    let pairs = pairs.into_iter().collect::<Result<Vec<_>, _>>()?;
    let mut runs = vec![(Vec::new(), Vec::new()); pairs.len()];
    for _ in 0..bench.rounds() {
        for (pair, (without, _)) in pairs.iter().zip(&mut runs) {
            without.push(measure(bench, pair.daemon.pid(), &pair.plan)?);
        }
        let background = bench.cgroups.unit("background")?;
        let background =
            BackgroundLoad::start(bench.count(10_000, 100), bench.count(2000, 20), &background)?;
        for (pair, (_, with)) in pairs.iter().zip(&mut runs) {
            with.push(measure(bench, pair.daemon.pid(), &pair.plan)?);
        }
        background.end()?;
    }
    let lines = SHAPES.iter().zip(&runs).map(|(shape, (without, with))| {
        line(
            &format!("busy-node {}", shape.name),
            "without",
            without,
            with,
            bound(1.2, 1.1),
        )
    });
    Ok(lines.collect())
}

//! CPU time per request where many processes of one cgroup send requests one after another.
//!
//! The daemon searches these processes for the one that holds the socket, so its time grows with
//! their number. It must not jump where a cache of the daemon is full.

use crate::caller::Caller;
use crate::cases::ratio::{self, TCP_PID};
use crate::load::Plan;
use crate::process::Part;
use crate::table::{Line, Spread, micros};
use crate::{Bench, BenchError, machine};

/// The numbers of processes. 128 handles were kept until the cache evicted the least recently used.
const COUNTS: [usize; 4] = [50, 127, 129, 1000];

/// Measures one line for each number of processes.
pub(crate) fn processes(bench: &Bench) -> Result<Vec<Line>, BenchError> {
    let caller = Caller {
        uid: ratio::USER,
        cgroup: bench.cgroups.unit("load")?,
        // None of its own.
        descriptors: 3,
    };
    let pair = ratio::Pair::start(bench, &TCP_PID, caller)?;
    let (mut callers, mut lines) = (Vec::new(), Vec::new());
    for count in COUNTS {
        while callers.len() < count {
            callers.push(start(&pair.plan)?);
        }
        let repeats = bench.count(2000, 1).div_ceil(count).max(2);
        each(&mut callers)?;
        let runs = (0..bench.rounds())
            .map(|_| measure(pair.daemon.pid(), &mut callers, repeats))
            .collect::<Result<Vec<_>, _>>()?;
        let cpu = Spread::of(runs);
        lines.push(Line::new(
            format!("processes {count}"),
            format!("{:.0} us", cpu.median),
            if count == 129 {
                "at most 1.1 x 127"
            } else {
                "the curve"
            }
            .to_owned(),
            format!(
                "CPU {}; {:.2} us for each process",
                cpu.show("us"),
                cpu.median / f64::from(u32::try_from(count)?)
            ),
        ));
    }
    Ok(lines)
}

fn start(plan: &Plan) -> Result<Part, BenchError> {
    let mut caller = Part::start(&["caller", &serde_json::to_string(plan)?])?;
    match caller.next_line()?.as_str() {
        "ready" => Ok(caller),
        other => Err(format!("unexpected line of a caller: {other:?}").into()),
    }
}

/// Makes each of these processes send one request, one after the other.
fn each(callers: &mut [Part]) -> Result<(), BenchError> {
    for caller in callers {
        caller.write_text("go\n")?;
        match caller.next_line()?.as_str() {
            "200" => {}
            other => return Err(format!("a caller got status {other}").into()),
        }
    }
    Ok(())
}

/// Returns the server's CPU time per request, in microseconds.
fn measure(server: u32, callers: &mut [Part], repeats: usize) -> Result<f64, BenchError> {
    let before = machine::settled(server)?;
    for _ in 0..repeats {
        each(callers)?;
    }
    let cpu = machine::settled(server)? - before;
    Ok(micros(cpu) / f64::from(u32::try_from(repeats * callers.len())?))
}

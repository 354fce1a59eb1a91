//! The load: blocking client threads in a process of its own, a new connection for each request.

use std::collections::BTreeMap;
use std::io::{self, BufRead};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::BenchError;
use crate::caller::{self, Answer, Caller};
use crate::machine;
use crate::process::Part;

/// The requests by which a client gets credentials. One that is measured is the whole sequence.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) enum Sequence {
    /// One GET of the path.
    Container,
    /// One PUT for a metadata token.
    MetadataPut,
    /// One GET of a role, with a metadata token that the client has.
    MetadataGet,
    /// As an SDK does: a PUT for the token, a GET of the role's name, and one of the role.
    MetadataSdk,
}

/// The settings of a load.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) caller: Caller,
    pub(crate) address: String,
    /// The path of the requests.
    pub(crate) path: String,
    pub(crate) sequence: Sequence,
    /// The number of threads, each with one request at a time.
    pub(crate) threads: usize,
    /// Requests before anything is measured.
    pub(crate) warm_up: usize,
    /// Requests that are measured. 0: until standard input is closed.
    pub(crate) requests: usize,
    /// Requests per second, begun on time whether or not earlier ones have been answered (while a
    /// thread is free). `None` is as many as possible.
    pub(crate) rate: Option<u32>,
}

/// The measurements of the clients.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    /// Responses by status. 0 counts requests without one.
    pub(crate) answers: BTreeMap<u16, usize>,
    /// From the first request to the last response.
    pub(crate) seconds: f64,
    /// The median of the latencies in microseconds, from before connect(2) to the last byte of the
    /// body.
    pub(crate) p50: f64,
    /// The 99th percentile of the latencies.
    pub(crate) p99: f64,
    /// The maximum of the latencies.
    pub(crate) max: f64,
    /// The time of the last response, by the machine's monotonic clock.
    pub(crate) finished: Duration,
    /// CPU time of this process for the measured requests.
    pub(crate) cpu: Duration,
    /// The body of the first response other than 200, else that of the last.
    pub(crate) body: String,
}

impl Report {
    /// Returns the number of all requests, answered or not.
    pub(crate) fn requests(&self) -> usize {
        self.answers.values().sum()
    }

    /// Returns the number of requests per second.
    pub(crate) fn per_second(&self) -> f64 {
        f64::from(u32::try_from(self.requests()).unwrap_or(0)) / self.seconds
    }

    /// Returns an error unless each request was answered with 200.
    pub(crate) fn all_issued(&self) -> Result<(), BenchError> {
        if self.answers.keys().eq([&200]) {
            return Ok(());
        }
        Err(format!(
            "answers by status (0: none): {:?}; one body without credentials: {}",
            self.answers, self.body
        )
        .into())
    }
}

/// The bench's handle of a load.
pub(crate) struct Load(Part);

impl Load {
    /// Starts it, and waits until it has warmed up.
    pub(crate) fn start(plan: &Plan) -> Result<Self, BenchError> {
        Self::part("load", plan)
    }

    /// Starts it with all of its requests at one time (see [`callers`]).
    pub(crate) fn callers(plan: &Plan) -> Result<Self, BenchError> {
        Self::part("callers", plan)
    }

    fn part(name: &str, plan: &Plan) -> Result<Self, BenchError> {
        let mut part = Part::start(&[name, &serde_json::to_string(plan)?])?;
        match part.next_line()?.as_str() {
            "ready" => Ok(Self(part)),
            other => Err(format!("unexpected line of the load: {other:?}").into()),
        }
    }

    /// Starts the measured requests.
    pub(crate) fn begin(&mut self) -> Result<(), BenchError> {
        self.0.write_text("go\n")
    }

    /// Waits for its end.
    pub(crate) fn report(mut self) -> Result<Report, BenchError> {
        Ok(serde_json::from_str(&self.0.next_line()?)?)
    }

    /// Ends a load without a number of requests.
    pub(crate) fn stop(mut self) -> Result<Report, BenchError> {
        self.0.close_input();
        self.report()
    }
}

/// Prints that it is ready, and waits for the start.
fn ready() -> Result<(), BenchError> {
    println!("ready");
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    if line == "go\n" {
        Ok(())
    } else {
        Err("not needed any more".into())
    }
}

/// Runs the part `load`.
pub(crate) fn run(plan: Plan) -> Result<(), BenchError> {
    let _descriptors = plan.caller.become_it()?;
    let plan = Arc::new(plan);
    let gate = Arc::new(Barrier::new(plan.threads + 1));
    let stop = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..plan.threads)
        .map(|index| {
            let (plan, gate, stop) = (plan.clone(), gate.clone(), stop.clone());
            thread::spawn(move || client(index, &plan, &gate, &stop))
        })
        .collect();
    gate.wait();
    ready()?;
    let (cpu, start) = (machine::cpu_time(std::process::id())?, Instant::now());
    gate.wait();
    if plan.requests == 0 {
        // Returns nothing until standard input is closed.
        io::stdin().lock().read_line(&mut String::new())?;
        stop.store(true, Ordering::Relaxed);
    }
    let samples = threads
        .into_iter()
        .flat_map(|thread| thread.join().unwrap_or_default())
        .collect();
    let cpu = machine::cpu_time(std::process::id())? - cpu;
    println!(
        "{}",
        serde_json::to_string(&Report {
            cpu,
            ..summary(start, samples)
        })?
    );
    Ok(())
}

/// The time that a request took, and its response. `None`: no response.
type Sample = (Duration, Option<Answer>);

/// Runs one thread. It waits twice at the gate: before `ready`, and for the start.
fn client(index: usize, plan: &Plan, gate: &Barrier, stop: &AtomicBool) -> Vec<Sample> {
    // A client whose first request fails has no sample.
    let Ok(request) = first_request(plan) else {
        gate.wait();
        gate.wait();
        return Vec::new();
    };
    let exchange = || match plan.sequence {
        Sequence::Container | Sequence::MetadataPut | Sequence::MetadataGet => {
            caller::exchange(&plan.address, &request)
        }
        Sequence::MetadataSdk => caller::as_sdk(&plan.address),
    };
    for _ in 0..plan.warm_up / plan.threads {
        let _ = exchange();
    }
    gate.wait();
    gate.wait();
    let begin = Instant::now();
    let mut samples: Vec<Sample> = Vec::new();
    let all = if plan.requests == 0 {
        usize::MAX
    } else {
        plan.requests / plan.threads
    };
    while samples.len() < all && !stop.load(Ordering::Relaxed) {
        let start = match plan.rate {
            None => Instant::now(),
            Some(rate) => on_time(begin + due_at(index, samples.len(), plan.threads, rate)),
        };
        let answer = exchange().ok();
        let at = answer
            .as_ref()
            .map_or_else(Instant::now, |answer| answer.at);
        // Of the credentials only the last are of interest.
        if let Some((_, Some(previous))) = samples
            .last_mut()
            .filter(|(_, answer)| answer.as_ref().is_some_and(is_issued))
        {
            previous.body = String::new();
        }
        samples.push((at - start, answer));
    }
    samples
}

/// Returns the request of each sample, with a metadata token if it needs one.
fn first_request(plan: &Plan) -> io::Result<Vec<u8>> {
    match plan.sequence {
        Sequence::Container | Sequence::MetadataSdk => Ok(caller::request(&plan.path)),
        Sequence::MetadataPut => Ok(caller::METADATA_PUT.to_vec()),
        Sequence::MetadataGet => {
            let token = caller::metadata_token(&plan.address)?;
            Ok(caller::metadata_request(&plan.path, &token))
        }
    }
}

fn is_issued(answer: &Answer) -> bool {
    answer.status == 200
}

/// Returns the time at which thread `index` has its `number`th request to make.
fn due_at(index: usize, number: usize, threads: usize, rate: u32) -> Duration {
    let number = u32::try_from(number * threads + index).unwrap_or(u32::MAX);
    Duration::from_secs(1) * number / rate
}

/// Sleeps until `due`, and returns the moment that the request's latency counts from. That is `due`
/// itself if this thread was still busy with an earlier request then: a wait for a slow server
/// counts from there. A sleep that is too long is not the server's fault.
fn on_time(due: Instant) -> Instant {
    let wait = due.saturating_duration_since(Instant::now());
    if wait.is_zero() {
        return due;
    }
    thread::sleep(wait);
    Instant::now()
}

fn summary(start: Instant, samples: Vec<Sample>) -> Report {
    let mut report = Report {
        finished: machine::monotonic(),
        ..Report::default()
    };
    report.seconds = start.elapsed().as_secs_f64();
    let mut latencies: Vec<f64> = samples
        .iter()
        .map(|(latency, _)| latency.as_secs_f64() * 1e6)
        .collect();
    latencies.sort_by(f64::total_cmp);
    let at = |part: f64| {
        latencies
            .get(rank(part, latencies.len()))
            .copied()
            .unwrap_or_default()
    };
    (report.p50, report.p99, report.max) = (at(0.5), at(0.99), at(1.0));
    let mut unissued = None;
    for (_, answer) in samples {
        *report
            .answers
            .entry(answer.as_ref().map_or(0, |answer| answer.status))
            .or_default() += 1;
        match answer {
            Some(answer) if !is_issued(&answer) => unissued = unissued.or(Some(answer.body)),
            Some(answer) if !answer.body.is_empty() => report.body = answer.body,
            _ => {}
        }
    }
    report.body = unissued.unwrap_or(report.body);
    report
}

/// Returns the index of the quantile `part` among `count` values in their order.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "small numbers"
)]
fn rank(part: f64, count: usize) -> usize {
    ((part * count as f64).ceil() as usize).saturating_sub(1)
}

/// Runs the part `caller`: sends a request for each line on standard input, and prints the status.
pub(crate) fn caller(plan: &Plan) -> Result<(), BenchError> {
    let _descriptors = plan.caller.become_it()?;
    let request = caller::request(&plan.path);
    println!("ready");
    for line in io::stdin().lock().lines() {
        line?;
        let mut wire = caller::connect(&plan.address)?;
        wire.write_all(&request)?;
        println!("{}", caller::answer(&mut *wire)?.status);
    }
    Ok(())
}

/// Runs the part `callers`: connects as often as it has requests, and then sends all of them at
/// once.
pub(crate) fn callers(plan: &Plan) -> Result<(), BenchError> {
    let _descriptors = plan.caller.become_it()?;
    let mut wires = (0..plan.requests)
        .map(|_| caller::connect(&plan.address))
        .collect::<Result<Vec<_>, _>>()?;
    let request = caller::request(&plan.path);
    ready()?;
    let start = Instant::now();
    let mut samples: Vec<Sample> = Vec::new();
    for wire in &mut wires {
        wire.write_all(&request)?;
    }
    for wire in &mut wires {
        let answer = caller::answer(&mut **wire).ok();
        samples.push((start.elapsed(), answer));
    }
    println!("{}", serde_json::to_string(&summary(start, samples))?);
    Ok(())
}

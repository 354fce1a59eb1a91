//! Processes that live for one request each, or for none, started at the rate that the test sets.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{ForkResult, fork, pipe};
use serde_json::{Value, json};

use crate::process::{become_user, stay};
use crate::raw_http::{self, Address};

/// The bytes in which a process reports its response: small enough for an atomic write.
const RECORD: usize = 64;

/// Starts `rate` processes in a second that each send their first request, for this number of
/// seconds, of one user after another. Prints the number and latencies of each kind of response,
/// and the access key ids of each user.
///
/// All of them exist before the first request and until the last response, so that their starts and
/// ends do not load the machine.
pub(crate) fn fetch(users: &str, rate: &str, seconds: &str, to: &Address) -> String {
    let users: Vec<u32> = users.split(',').map(|uid| uid.parse().unwrap()).collect();
    let (rate, seconds): (u128, u128) = (rate.parse().unwrap(), seconds.parse().unwrap());
    ignore_children();
    let [(mut record_pipe, mut record_end), (cue, cues)] = [(); 2].map(|()| {
        let (read, write): (OwnedFd, OwnedFd) = pipe().unwrap();
        (File::from(read), File::from(write))
    });
    let count = usize::try_from(rate * seconds).unwrap();
    for number in 0..count {
        let uid = users[number % users.len()];
        fork_detached(|| {
            become_user(uid);
            // Each byte wakes one of the waiting processes.
            (&cue).read_exact(&mut [0]).unwrap();
            record_end.write_all(&record(uid, to)).unwrap();
            stay()
        });
    }
    fcntl(&record_pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let mut results = Results::default();
    let (began, mut cued, mut busy) = (Instant::now(), 0, None);
    while cued < count {
        let due = usize::try_from(began.elapsed().as_micros() * rate / 1_000_000)
            .unwrap()
            .min(count);
        (&cues).write_all(&vec![0; due - cued]).unwrap();
        cued = due;
        results.read(&mut record_pipe);
        if busy.is_none() && cued >= count / 4 {
            busy = Some((Instant::now(), results.count("200")));
        }
        thread::sleep(Duration::from_millis(1));
    }
    // Without the first quarter, in which the first have no response yet.
    let per_second = busy.map(|(since, before)| {
        f64::from(results.count("200") - before) / since.elapsed().as_secs_f64()
    });
    while results.all() < count {
        results.read(&mut record_pipe);
        thread::sleep(Duration::from_millis(1));
    }
    results.show(json!({ "requests": count, "answered_per_second": per_second }))
}

/// Starts this number of processes of a user, which do nothing until this one ends. Prints their
/// pids.
pub(crate) fn idle(uid: &str, count: &str) -> ! {
    become_user(uid.parse().unwrap());
    for _ in 0..count.parse().unwrap() {
        println!("{}", fork_detached(|| stay()));
    }
    println!("all");
    stay()
}

/// Lets the kernel reap children, so that they leave no zombies.
fn ignore_children() {
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::SA_NOCLDWAIT, SigSet::empty());
    // SAFETY: no handler is set.
    unsafe { sigaction(Signal::SIGCHLD, &ignore) }.unwrap();
}

fn fork_detached(act: impl FnOnce()) -> nix::unistd::Pid {
    // SAFETY: this program has one thread.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            set_pdeathsig(Signal::SIGKILL).unwrap();
            act();
            // SAFETY: ends this process without running the parent's exit code in it.
            unsafe { libc::_exit(0) }
        }
    }
}

/// Sends one request and returns its record: user, kind of response, microseconds, access key id.
fn record(uid: u32, to: &Address) -> [u8; RECORD] {
    let began = Instant::now();
    let answer = to
        .try_connect()
        .map(|fd| raw_http::fetch(&fd))
        .unwrap_or_default();
    let took = began.elapsed().as_micros();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    let status = head.get(9..12).unwrap_or("nothing");
    let again = if head.contains("\r\nretry-after: ") {
        "+retry-after"
    } else {
        ""
    };
    let body: Value = serde_json::from_str(body).unwrap_or_default();
    let key = body["AccessKeyId"]
        .as_str()
        .or(body["code"].as_str())
        .unwrap_or("-");
    let mut record = [b' '; RECORD];
    let text = format!("{uid} {status}{again} {took} {key}");
    record[..text.len()].copy_from_slice(text.as_bytes());
    record
}

#[derive(Default)]
struct Results {
    rest: Vec<u8>,
    /// By kind of response, in microseconds.
    took: BTreeMap<String, Vec<u64>>,
    /// By user and kind of response.
    keys: BTreeMap<String, BTreeSet<String>>,
}

impl Results {
    /// Reads all that is there: up to the end, if the pipe blocks.
    fn read(&mut self, record_pipe: &mut File) {
        // An error means that the pipe is empty for now.
        let _ = record_pipe.read_to_end(&mut self.rest);
        let whole = self.rest.len() / RECORD * RECORD;
        let records: Vec<u8> = self.rest.drain(..whole).collect();
        for record in records.chunks(RECORD) {
            let text = std::str::from_utf8(record).unwrap();
            let mut words = text.split_ascii_whitespace();
            let [uid, kind, took, key] = [(); 4].map(|()| words.next().unwrap());
            self.took
                .entry(kind.to_owned())
                .or_default()
                .push(took.parse().unwrap());
            self.keys
                .entry(format!("{uid} {kind}"))
                .or_default()
                .insert(key.to_owned());
        }
    }

    fn all(&self) -> usize {
        self.took.values().map(Vec::len).sum()
    }

    fn count(&self, kind: &str) -> u32 {
        u32::try_from(self.took.get(kind).map_or(0, Vec::len)).unwrap()
    }

    /// Adds the results to `all` and prints them.
    fn show(mut self, mut all: Value) -> String {
        let answers = self.took.iter_mut().map(|(kind, took)| {
            took.sort_unstable();
            let at = |part: usize| {
                Duration::from_micros(took[(took.len() - 1) * part / 100]).as_secs_f64()
            };
            (
                kind.clone(),
                json!({ "count": took.len(), "p50": at(50), "p99": at(99), "longest": at(100) }),
            )
        });
        all["answers"] = answers.collect();
        all["keys"] = json!(self.keys);
        all.to_string()
    }
}

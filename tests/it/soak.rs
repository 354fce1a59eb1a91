//! Twenty processes of four users send requests continuously, while SPIRE's agent and STS are
//! killed and started again at random.
//!
//! `tests/run` has a short form. `tests/run slow` has the whole one of half an hour, in which each
//! session of 15 minutes is renewed several times. Alone: `AWSVID_TESTS=slow cargo test --test it
//! soak -- --nocapture`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::harness::actor::program;
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::{Process, await_some};
use crate::harness::env::{Env, Setting, id};
use crate::harness::{campaign_seed, is_slow};

const USERS: [(u32, &str); 4] = [
    (61011, "one"),
    (61012, "two"),
    (61013, "three"),
    (61014, "four"),
];
const PROCESSES: usize = 20;
/// The pause between the requests of each. Without one the machine would measure itself, and the
/// audit file be gigabytes.
const PAUSE_MS: u64 = 100;
const TIMEOUT: Duration = Duration::from_secs(60);

/// The length and the bounds of a run.
struct Form {
    length: Duration,
    /// The time of the first reading of memory.
    settled: Duration,
    /// The longest outage, as ordered. With the start of the counterpart it is some seconds longer.
    outage: Duration,
    /// The shortest time between two outages. A due refresh is retried at least every 90 s, so that
    /// two outages do not become one of double length.
    between: Duration,
    /// The growth of anonymous memory that is allowed, in per cent and in KiB.
    growth: (u64, u64),
    /// The least number of keys that each user gets.
    keys: usize,
}

impl Form {
    fn selected() -> Self {
        let seconds = Duration::from_secs;
        if is_slow() {
            // The figures of the specification.
            Self {
                length: seconds(1800),
                settled: seconds(60),
                outage: seconds(285),
                between: seconds(150),
                growth: (10, 0),
                keys: 3,
            }
        } else {
            // Some seconds are too short for a percentage: allocator and buffers still grow to what
            // twenty processes at one time need. A leak for each request (there are thousands) or
            // each outage shows all the same.
            Self {
                length: seconds(20),
                settled: seconds(5),
                outage: seconds(3),
                between: seconds(2),
                growth: (10, 2048),
                keys: 1,
            }
        }
    }
}

/// One process that sends requests.
struct SoakClient {
    process: Process,
    user: &'static str,
}

/// The sums over all processes.
#[derive(Debug, Default, PartialEq, Eq)]
struct Totals {
    errors: u64,
    expired: u64,
    empty: u64,
    others: u64,
}

#[test]
fn workloads_see_no_error_during_random_outages() {
    let form = Form::selected();
    let seed = campaign_seed();
    let folder = folder();
    // Over TCP the daemon has to search for this user's process; see `start`.
    let rule = |uid| {
        if uid == USERS[0].0 {
            format!("gid = {uid}")
        } else {
            String::new()
        }
    };
    let setting = Setting {
        rule: Some(&rule),
        role: "duration = \"15m\"",
        ..Setting::default()
    };
    let Some(mut env) = Env::start(folder.path(), &USERS, &setting) else {
        return;
    };
    let cgroups = USERS.map(|(uid, _)| Cgroup::new(&format!("soak-{uid}.service")));
    for (uid, _) in USERS {
        env.curl(uid);
    }
    let sts = env
        .minio
        .endpoint()
        .rsplit_once(':')
        .unwrap()
        .1
        .parse()
        .unwrap();
    let pid = env.daemon.process().owned().id().as_raw().cast_unsigned();
    let idle = descriptors(pid, sts);

    let began = Instant::now();
    let mut askers: Vec<SoakClient> = (0..PROCESSES)
        .map(|number| start(&env, folder.path(), number, &cgroups))
        .collect();
    thread::sleep(form.settled);
    let settled = anonymous_kib(pid);
    let (mut rng, mut outages) = (Rng::with_seed(seed), Vec::new());
    while began.elapsed() < form.length {
        thread::sleep(between(&mut rng, form.between, form.between * 3 / 2));
        // As many quick restarts as outages of any length.
        let longest = if rng.bool() {
            form.outage
        } else {
            form.outage.min(Duration::from_secs(10))
        };
        outages.push(outage(&mut env, &mut rng, longest));
    }
    let at_end = anonymous_kib(pid);

    let mut observations = Observations::default();
    for asker in &mut askers {
        asker.process.signal(Signal::SIGTERM);
        asker.process.owned().wait(TIMEOUT).expect("it ends");
        observations.add(asker);
    }
    observations.compare(&folder.path().join("audit.log"));
    let left = await_some("nothing is open but what was before", TIMEOUT, || {
        let left = descriptors(pid, sts);
        (left == idle).then_some(left)
    });
    let longest = outages.iter().max().copied().unwrap_or_default();
    eprintln!(
        "soak: seed {seed}, {} s, {PROCESSES} processes, {} outages (longest {} s), {} answers, {} errors, {} expired, \
         {} empty, {} of another identity, {} keys, anonymous memory {settled} -> {at_end} KiB, descriptors {idle} -> {left}",
        began.elapsed().as_secs(),
        outages.len(),
        longest.as_secs(),
        observations.answers,
        observations.totals.errors,
        observations.totals.expired,
        observations.totals.empty,
        observations.totals.others,
        observations.keys.values().map(BTreeSet::len).sum::<usize>(),
    );
    assert_eq!(
        observations.totals,
        Totals::default(),
        "{}",
        observations.bad.join("\n")
    );
    for (_, name) in USERS {
        assert!(
            observations.keys[name].len() >= form.keys,
            "{name} was given {:?}",
            observations.keys[name]
        );
    }
    let allowed = settled + settled * form.growth.0 / 100 + form.growth.1;
    assert!(
        at_end <= allowed,
        "anonymous memory grew from {settled} to {at_end} KiB"
    );
    assert!(
        longest <= Duration::from_secs(300),
        "an outage of {longest:?} is more than is promised for"
    );
}

/// Starts such a process, in its user's cgroup, over one of the listeners.
fn start(env: &Env, folder: &Path, number: usize, cgroups: &[Cgroup]) -> SoakClient {
    let (uid, user) = USERS[number % USERS.len()];
    let listeners = ["unix", "tcp", "tcp6"];
    // A search has 20 ms, which is little on a machine that is busy with other tests. The unix
    // socket needs none.
    let listener = listeners[if uid == USERS[0].0 {
        0
    } else {
        number / USERS.len() % listeners.len()
    }];
    let address = env.daemon.listener(listener);
    let cgroup = cgroups[number % USERS.len()].path().display().to_string();
    let enter = "echo 0 >\"$1/cgroup.procs\" && shift && exec \"$@\"";
    let mut command = Command::new("sh");
    command
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .args(["-c", enter, "enter", &cgroup]);
    command.arg(program()).args([
        "soak",
        &uid.to_string(),
        listener,
        &address,
        &PAUSE_MS.to_string(),
    ]);
    let process = Process::start(
        &format!("asker {number}"),
        command,
        &folder.join(format!("asker-{number}.log")),
    );
    SoakClient { process, user }
}

/// Stops the agent, STS or both for a while, and returns for how long.
fn outage(env: &mut Env, rng: &mut Rng, longest: Duration) -> Duration {
    let which = rng.u8(0..3);
    let (agent, sts) = (which != 1, which != 0);
    let began = Instant::now();
    if agent {
        env.spire.stop_agent();
    }
    if sts {
        env.minio.stop();
    }
    thread::sleep(between(rng, Duration::from_millis(100), longest));
    if sts {
        env.minio.restart();
    }
    if agent {
        env.start_agent();
    }
    began.elapsed()
}

fn between(rng: &mut Rng, least: Duration, most: Duration) -> Duration {
    least + (most - least).mul_f64(rng.f64())
}

/// The processes' output, and the audit's records of their keys.
#[derive(Default)]
struct Observations {
    answers: u64,
    totals: Totals,
    bad: Vec<String>,
    /// The keys by user.
    keys: BTreeMap<&'static str, BTreeSet<String>>,
}

impl Observations {
    fn add(&mut self, asker: &SoakClient) {
        let lines: Vec<Value> = asker
            .process
            .log()
            .lines()
            .map(|line| serde_json::from_str(line).expect("a line of JSON"))
            .collect();
        for line in &lines {
            self.bad.extend(
                line["bad"]
                    .as_str()
                    .map(|bad| format!("{}: {bad}", asker.user)),
            );
            self.keys
                .entry(asker.user)
                .or_default()
                .extend(line["key"].as_str().map(str::to_owned));
        }
        let total = lines.last().expect("what it has counted");
        let count = |what: &str| total[what].as_u64().expect(what);
        self.answers += count("answers");
        self.totals.errors += count("errors");
        self.totals.expired += count("expired");
        self.totals.empty += count("empty");
    }

    /// Checks that each key that a user got, and each record of a user, is of its own identity.
    fn compare(&mut self, audit: &Path) {
        let mut identities: BTreeMap<String, String> = BTreeMap::new();
        // As the file may be large, one line at a time.
        for line in BufReader::new(fs::File::open(audit).unwrap()).lines() {
            let record: Value =
                serde_json::from_str(&line.unwrap()).expect("an audit record is a line of JSON");
            let (Some(key), Some(spiffe_id)) = (
                record["access_key_id"].as_str(),
                record["spiffe_id"].as_str(),
            ) else {
                continue;
            };
            let user = USERS
                .iter()
                .find(|(uid, _)| record["uid"] == *uid)
                .map(|(_, name)| id(name));
            if user.as_deref() != Some(spiffe_id) {
                self.totals.others += 1;
                self.bad.push(record.to_string());
            }
            identities.insert(key.to_owned(), spiffe_id.to_owned());
        }
        for (user, keys) in &self.keys {
            let others = keys
                .iter()
                .filter(|key| identities.get(*key) != Some(&id(user)))
                .count();
            self.totals.others += u64::try_from(others).unwrap();
        }
    }
}

/// Returns the anonymous memory of a process, in KiB.
fn anonymous_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .expect("RssAnon");
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Returns the number of the daemon's descriptors, without those that it keeps for the next
/// request. Those are connections to this port, and handles of some processes and cgroups. `attest`
/// has their bounds.
fn descriptors(pid: u32, but: u16) -> usize {
    let remote = format!(":{but:04X}");
    let records_kept: BTreeSet<String> = ["tcp", "tcp6"]
        .iter()
        .flat_map(|family| {
            let table = fs::read_to_string(format!("/proc/{pid}/net/{family}")).unwrap();
            let inode = |line: &str| {
                let fields: Vec<_> = line.split_whitespace().collect();
                fields[2]
                    .ends_with(&remote)
                    .then(|| format!("socket:[{}]", fields[9]))
            };
            table.lines().skip(1).filter_map(inode).collect::<Vec<_>>()
        })
        .collect();
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    // One that is closed in between can't be read.
    let targets = open.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    let is_kept = |target: &str| {
        let of_caller = ["pidfd:[", "anon_inode:[pidfd]", "/proc/"]
            .iter()
            .any(|start| target.starts_with(start));
        records_kept.contains(target) || of_caller || target.contains("cgroup.procs")
    };
    let (records_kept, others): (Vec<_>, Vec<_>) =
        targets.partition(|target| is_kept(&target.to_string_lossy()));
    assert!(records_kept.len() < 500, "{records_kept:?}");
    others.len()
}

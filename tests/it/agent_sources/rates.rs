//! More new processes than the agent can attest: the agent stays busy all the same, and the surplus
//! gets a 503 at once.
//!
//! The agent has one processor, and all other programs have the others, for every client of the
//! agent. Otherwise the test would compare how many processors are left for the agent. `tests/run`
//! checks the responses to a crowd. `tests/run slow` measures, with the release build.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use awsvid::socket_endpoint::Endpoint;
use awsvid::svid::agent::AttestingAgent;
use awsvid::svid::own_svid::OwnSvidSource;
use awsvid::svid::spiffe_broker::BrokerApi;
use awsvid::svid::spire_delegated::SpireDelegated;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::{Pid, gettid};
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::harness::actor::program;
use crate::harness::counterparts::folder;
use crate::harness::counterparts::minio::AUDIENCE;
use crate::harness::counterparts::process::{OwnedProcess, await_some, behind, run, spawn};
use crate::harness::daemon::release_build;
use crate::harness::env::{AWSVID, Env, Setting, Source, id};
use crate::harness::is_slow;

const TIMEOUT: Duration = Duration::from_secs(120);
/// While rates are measured, other tests have a lower priority than the agent and awsvid.
const RAISED_PRIORITY: [&str; 3] = ["nice", "-n", "-10"];
const USERS: [(u32, &str); 2] = [(51_001, "one"), (51_002, "two")];
/// The queries at one time of clients that bypass awsvid.
const IN_FLIGHT: usize = 16;
/// The number of measurements of each, one after the other, since the machine's other load varies.
const ROUNDS: u32 = 5;
/// The length of each measurement. Its first quarter is left out.
const ROUND: Duration = Duration::from_secs(4);

/// The processors of the agent, and those of all others.
struct Processors {
    agent: CpuSet,
    others: CpuSet,
    /// The others as taskset(1) takes them.
    others_list: String,
}

impl Processors {
    fn of_this_machine() -> Self {
        let all = sched_getaffinity(Pid::this()).unwrap();
        let numbers: Vec<usize> = (0..CpuSet::count())
            .filter(|cpu| all.is_set(*cpu).unwrap())
            .collect();
        let set = |numbers: &[usize]| {
            let mut set = CpuSet::new();
            numbers.iter().for_each(|cpu| set.set(*cpu).unwrap());
            set
        };
        let (agent, others) = match numbers.split_last() {
            Some((last, others)) if !others.is_empty() => (std::slice::from_ref(last), others),
            _ => (&numbers[..], &numbers[..]),
        };
        let list = others
            .iter()
            .map(usize::to_string)
            .collect::<Vec<_>>()
            .join(",");
        Self {
            agent: set(agent),
            others: set(others),
            others_list: list,
        }
    }

    /// Returns words in front of a command of root. They make it run in the cgroup of workloads, on
    /// the others' processors, at a lower priority than awsvid, as if on another machine.
    fn behind<'a>(&'a self, env: &'a Env) -> Vec<&'a str> {
        [
            &env.cgroup().enter()[..],
            &[
                "nice",
                "-n",
                "10",
                "taskset",
                "--cpu-list",
                &self.others_list,
            ],
        ]
        .concat()
    }
}

/// Keeps all threads of a process on these processors.
fn keep_on(process: Pid, processors: &CpuSet) {
    for task in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
        let thread = task
            .unwrap()
            .file_name()
            .into_string()
            .unwrap()
            .parse()
            .unwrap();
        // A thread that has ended meanwhile needs none.
        let _ = sched_setaffinity(Pid::from_raw(thread), processors);
    }
}

/// Idle processes that queries are about.
struct Idle {
    _owned: OwnedProcess,
    pids: Vec<u32>,
}

impl Idle {
    fn start(env: &Env, processors: &Processors, uid: u32, count: usize) -> Self {
        let mut command = behind(&processors.behind(env), &program());
        command.env_clear().env("PATH", "/usr/bin:/bin").args([
            "idle",
            &uid.to_string(),
            &count.to_string(),
        ]);
        command.stdout(Stdio::piped());
        let mut owned = spawn(command).unwrap();
        let lines = BufReader::new(owned.stdout().unwrap()).lines();
        let pids: Vec<u32> = lines.map_while(|line| line.unwrap().parse().ok()).collect();
        assert_eq!(pids.len(), count);
        Self {
            _owned: owned,
            pids,
        }
    }
}

/// A client of the agent that bypasses awsvid.
struct Direct {
    runtime: Runtime,
    agent: Arc<dyn AttestingAgent>,
}

impl Direct {
    fn new(source: Source, env: &Env, processors: &Processors) -> Self {
        let others = processors.others;
        let position = move || {
            sched_setaffinity(Pid::from_raw(0), &others).unwrap();
            let mut renice = Command::new("renice");
            renice.args([&RAISED_PRIORITY[1..], &["-p", &gettid().to_string()]].concat());
            run(renice, b"", TIMEOUT).success("renice");
        };
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .on_thread_start(position)
            .enable_all()
            .build()
            .unwrap();
        // This test's own process is a permitted client of the agent.
        let own = fs::read_link("/proc/self/exe").unwrap();
        env.spire.register(
            AWSVID,
            &["unix:uid:0", &format!("unix:path:{}", own.display())],
        );
        let agent: Arc<dyn AttestingAgent> = match source {
            Source::Broker => {
                let _within = runtime.enter();
                let own = OwnSvidSource::at(Endpoint::Unix(env.spire.agent_socket()));
                Arc::new(BrokerApi::new(
                    &env.spire.broker_socket(),
                    own,
                    None,
                    TIMEOUT,
                ))
            }
            _ => Arc::new(SpireDelegated::new(&env.spire.admin_socket(), TIMEOUT)),
        };
        Self { runtime, agent }
    }

    /// Returns how many processes that are new to it the agent attests in a second, once it is
    /// busy.
    fn rate(&self, env: &Env, processors: &Processors) -> f64 {
        let most = 2500 * usize::try_from(ROUND.as_secs()).unwrap();
        let idle = Idle::start(env, processors, USERS[0].0, most);
        let pids = Arc::new(idle.pids.clone());
        let [next, answered] = [(); 2].map(|()| Arc::new(AtomicUsize::new(0)));
        let query = || {
            let (agent, pids, next, answered) = (
                self.agent.clone(),
                pids.clone(),
                next.clone(),
                answered.clone(),
            );
            async move {
                while let Some(pid) = pids.get(next.fetch_add(1, Ordering::Relaxed)) {
                    assert_eq!(agent.fetch_for_pid(*pid, AUDIENCE).await.unwrap().len(), 1);
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            }
        };
        self.runtime.block_on(async {
            let mut queries: JoinSet<()> = (0..IN_FLIGHT).map(|_| query()).collect();
            sleep(ROUND / 4).await;
            let (began, before) = (Instant::now(), answered.load(Ordering::Relaxed));
            sleep(ROUND * 3 / 4).await;
            let (took, more) = (began.elapsed(), answered.load(Ordering::Relaxed) - before);
            queries.abort_all();
            while let Some(ended) = queries.join_next().await {
                let error = ended.expect_err("there were unknown processes until the end");
                assert!(error.is_cancelled(), "{error}");
            }
            f64::from(u32::try_from(more).unwrap()) / took.as_secs_f64()
        })
    }
}

/// Starts new processes at this rate, and returns their responses, by `tests/actor/short_lived.rs`.
fn short_lived_callers(env: &Env, processors: &Processors, rate: f64, length: Duration) -> Value {
    let users = USERS.map(|(uid, _)| uid.to_string()).join(",");
    let mut command = behind(&processors.behind(env), &program());
    command.env_clear().env("PATH", "/usr/bin:/bin").args([
        "short-lived",
        &users,
        &format!("{rate:.0}"),
    ]);
    command.args([
        &length.as_secs().to_string(),
        "unix",
        env.daemon.unix().to_str().unwrap(),
    ]);
    serde_json::from_str(&run(command, b"", TIMEOUT).success("the processes")).unwrap()
}

/// Checks that each process got its own credentials or a 503.
fn assert_right(env: &Env, report: &Value) {
    let answers = report["answers"].as_object().unwrap();
    assert!(
        answers
            .values()
            .all(|of_kind| of_kind["longest"].as_f64().unwrap() < 6.0),
        "{report}"
    );
    let kinds: BTreeSet<&str> = answers.keys().map(String::as_str).collect();
    assert!(
        kinds.contains("200") && kinds.is_subset(&["200", "503+retry-after"].into()),
        "{report}"
    );
    for (uid, name) in USERS {
        let key = &env.daemon.status(&id(name))["access_key_id"];
        assert_eq!(
            report["keys"][format!("{uid} 200")],
            Value::from([key.clone()]),
            "{report}"
        );
        let rejected = &report["keys"][format!("{uid} 503+retry-after")];
        let cached = |code: &Value| {
            ["source_busy", "source_unavailable"]
                .iter()
                .any(|cached| code == cached)
        };
        assert!(
            rejected
                .as_array()
                .is_none_or(|codes| codes.iter().all(cached)),
            "{report}"
        );
    }
}

/// Returns the daemon's resident memory in KiB, and the number of its descriptors.
fn resources(env: &Env) -> (u64, usize) {
    let pid = env.daemon.pid();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    (
        line.trim().trim_end_matches(" kB").parse().unwrap(),
        descriptors,
    )
}

/// Starts everything, with all identities warm, and the agent on a processor of its own.
fn start(folder: &Path, processors: &Processors, setting: &Setting<'_>) -> Option<Env> {
    let env = Env::start(folder, &USERS, setting)?;
    keep_on(env.spire.agent_pid(), &processors.agent);
    keep_on(env.daemon.pid(), &processors.others);
    for (uid, _) in USERS {
        assert!(env.curl(uid).0.starts_with("HTTP/1.1 200"));
    }
    Some(env)
}

/// Checks that nothing is left of short-lived processes once they have ended.
fn assert_nothing_left(env: &Env, before: (u64, usize)) {
    let (kib, _) = resources(env);
    assert!(
        kib < before.0 + 64 * 1024,
        "{} KiB of memory, and {kib} after the processes",
        before.0
    );
    // The daemon closes handles of ended processes every 10 s.
    let left = await_some(
        "the descriptors of those that are gone are closed",
        TIMEOUT,
        || Some(resources(env)).filter(|(_, descriptors)| *descriptors < before.1 + 3 * 128 + 50),
    );
    eprintln!("KiB and descriptors: {before:?} before, {kib} KiB at the end, {left:?} later");
}

fn check_surge(source: Source) {
    let (folder, processors) = (folder(), Processors::of_this_machine());
    let setting = Setting::of(source);
    let Some(env) = start(folder.path(), &processors, &setting) else {
        return;
    };
    let before = resources(&env);
    // This agent attests some tens in a second: at each query it reads the whole of a large awsvid.
    // The processes are fewer than the connections of each user, so that no connection is reset.
    let report = short_lived_callers(&env, &processors, 400.0, Duration::from_secs(2));
    eprintln!("{}", report["answers"]);
    assert_right(&env, &report);
    assert!(
        !report["answers"]["503+retry-after"].is_null(),
        "no caller had to wait: {report}"
    );
    assert_nothing_left(&env, before);
}

/// Returns how many are attested through awsvid when half as many more arrive, as a share of the
/// measured agent's own rate.
fn share_through_awsvid(source: Source, without_hashes: bool) -> Option<f64> {
    let (folder, processors) = (folder(), Processors::of_this_machine());
    let program = folder.path().join("awsvid");
    fs::copy(release_build(), &program).unwrap();
    if !without_hashes {
        // If the agent hashes its client's program, awsvid's is as long as this test's own: zeros
        // at the end of a program have no effect.
        let own = fs::metadata("/proc/self/exe").unwrap().len();
        assert!(fs::metadata(&program).unwrap().len() <= own);
        File::options()
            .write(true)
            .open(&program)
            .unwrap()
            .set_len(own)
            .unwrap();
    }
    let setting = Setting {
        source,
        without_hashes,
        program: Some(&program),
        behind: &RAISED_PRIORITY,
        ..Setting::default()
    };
    let env = start(folder.path(), &processors, &setting)?;
    let direct = Direct::new(source, &env, &processors);
    let before = resources(&env);
    let (mut alone, mut through) = (0.0, 0.0);
    for _ in 0..ROUNDS {
        let rate = direct.rate(&env, &processors);
        let report = short_lived_callers(&env, &processors, rate * 1.5, ROUND);
        assert_right(&env, &report);
        let completed = report["answered_per_second"].as_f64().unwrap();
        eprintln!(
            "{rate:.0}/s alone, {completed:.0}/s through awsvid: {}",
            report["answers"]
        );
        (alone, through) = (alone + rate, through + completed);
    }
    let share = through / alone;
    eprintln!("without hashes: {without_hashes}, share {share:.2}");
    assert_nothing_left(&env, before);
    Some(share)
}

#[test]
fn surge_gets_credentials_or_503_with_spire_delegated() {
    check_surge(Source::Delegated);
}

#[test]
fn default_agent_stays_busy_with_spire_delegated() {
    if is_slow()
        && let Some(share) = share_through_awsvid(Source::Delegated, false)
    {
        assert!(share >= 0.9, "{share}");
    }
}

#[test]
fn fast_agent_stays_busy_with_spire_delegated() {
    if is_slow()
        && let Some(share) = share_through_awsvid(Source::Delegated, true)
    {
        assert!(share >= 0.6, "{share}");
    }
}

#[test]
fn surge_gets_credentials_or_503_with_spiffe_broker() {
    check_surge(Source::Broker);
}

#[test]
fn default_agent_stays_busy_with_spiffe_broker() {
    if is_slow()
        && let Some(share) = share_through_awsvid(Source::Broker, false)
    {
        assert!(share >= 0.9, "{share}");
    }
}

#[test]
fn fast_agent_stays_busy_with_spiffe_broker() {
    if is_slow()
        && let Some(share) = share_through_awsvid(Source::Broker, true)
    {
        assert!(share >= 0.6, "{share}");
    }
}

//! Runs a client and parses its output.

use std::os::unix::fs::chown;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::catalogue::{ReadObject, Start};
use super::stage::{BUCKET, ClientStage, Member, StagedDaemon};
use crate::harness::counterparts::process::{Output, behind, run};

/// Bounds one task of a client, with all its tries, on a machine that is busy with others.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(180);

/// The settings of a client's read.
#[derive(Clone)]
pub(crate) struct ReadSettings<'a> {
    pub(crate) uid: u32,
    pub(crate) key: String,
    pub(crate) times: u32,
    pub(crate) pause: Duration,
    /// The value of `awsvid exec --url`.
    pub(crate) url: String,
    /// For its option `--role`.
    pub(crate) role: Option<&'a str>,
    /// Whether the client has the token's file alone, of the two that `awsvid exec` sets.
    pub(crate) file_alone: bool,
    /// Whether the client has the address of the instance metadata service alone, without `awsvid
    /// exec`.
    pub(crate) by_metadata: bool,
}

impl ReadSettings<'_> {
    /// Returns the settings for one read of the client's own object.
    pub(crate) fn single_read(member: &Member, serving: &StagedDaemon) -> Self {
        let url = format!("http://{}", serving.daemon.tcp());
        Self {
            uid: member.uid,
            key: member.key(),
            times: 1,
            pause: Duration::ZERO,
            url,
            role: None,
            file_alone: false,
            by_metadata: false,
        }
    }
}

/// The results of a client's reads.
#[derive(Debug)]
pub(crate) struct Reads {
    /// The content, or the client's error.
    pub(crate) each: Vec<Result<String, String>>,
    /// With the start of the program.
    pub(crate) took: Duration,
    /// All output that a person would have seen.
    pub(crate) printed: String,
}

impl Reads {
    /// Returns whether each read got this content.
    pub(crate) fn all_equal(&self, content: &str) -> bool {
        !self.each.is_empty() && self.each.iter().all(|read| read.as_deref() == Ok(content))
    }
}

/// Runs a client's reads.
pub(crate) fn read(
    stage: &ClientStage,
    member: &Member,
    serving: &StagedDaemon,
    reading: &ReadSettings<'_>,
) -> Reads {
    let home = tempfile::Builder::new()
        .prefix("awsvid-home-")
        .tempdir()
        .expect("a temporary folder");
    chown(home.path(), Some(reading.uid), Some(reading.uid)).expect("chown, as root");
    let began = Instant::now();
    let command = || command(stage, member, serving, reading, home.path());
    let within = TIMEOUT + reading.pause * reading.times;
    let (each, printed) = match member.client.start {
        Start::Program(_) => {
            let output = run(command(), b"", within);
            (lines(&output, &member.slug), output.stdout + &output.stderr)
        }
        Start::Command(_) => {
            let outputs: Vec<Output> = (0..reading.times)
                .map(|number| {
                    thread::sleep(if number == 0 {
                        Duration::ZERO
                    } else {
                        reading.pause
                    });
                    run(command(), b"", within)
                })
                .collect();
            let printed = outputs
                .iter()
                .map(|output| output.stdout.clone() + &output.stderr)
                .collect();
            (outputs.into_iter().map(content).collect(), printed)
        }
    };
    Reads {
        each,
        took: began.elapsed(),
        printed,
    }
}

/// Parses the lines of a program.
fn lines(output: &Output, slug: &str) -> Vec<Result<String, String>> {
    let line = |line: &str| match line.split_once(' ') {
        Some(("read", content)) => Ok(content.to_owned()),
        Some(("failed", message)) => Err(message.to_owned()),
        _ => panic!("{slug} prints {line:?}: {output:?}"),
    };
    let mut reads: Vec<_> = output.stdout.lines().map(line).collect();
    if reads.is_empty() || output.status.code().is_none() {
        reads.push(Err(format!("{}: {}", output.status, output.stderr)));
    }
    assert_eq!(
        output.status.success(),
        reads.last().is_some_and(Result::is_ok),
        "{slug}: {output:?}"
    );
    reads
}

fn content(output: Output) -> Result<String, String> {
    if output.status.success() {
        Ok(output.stdout.trim().to_owned())
    } else {
        Err(output.stdout + &output.stderr)
    }
}

/// Returns the client behind `awsvid exec`, or with an address alone, as its user, in its cgroup,
/// with nothing else in its environment.
fn command(
    stage: &ClientStage,
    member: &Member,
    serving: &StagedDaemon,
    reading: &ReadSettings<'_>,
    home: &Path,
) -> Command {
    let uid = reading.uid.to_string();
    // A test program that is killed also ends its clients.
    let user = [
        "setpriv",
        "--pdeathsig",
        "keep",
        "--reuid",
        &uid,
        "--regid",
        &uid,
        "--clear-groups",
    ];
    let program = match reading.by_metadata {
        true => member.program.clone(),
        false => stage.awsvid(),
    };
    let mut command = behind(&[&member.cgroup.enter()[..], &user].concat(), &program);
    let endpoint = stage.minio.endpoint();
    command
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("HOME", home)
        .env("AWS_REGION", "us-east-1");
    command.envs(member.client.variables(&endpoint));
    command.current_dir(home);
    if reading.by_metadata {
        command.env("AWS_EC2_METADATA_SERVICE_ENDPOINT", &reading.url);
    } else {
        behind_exec(&mut command, serving, reading);
        command.arg(&member.program);
    }
    let object = ReadObject {
        endpoint: &endpoint,
        bucket: BUCKET,
        key: &reading.key,
        times: reading.times,
        pause: reading.pause,
    };
    command.args(member.client.arguments(&object, |word| stage.file(word)));
    command
}

/// Adds the arguments of `awsvid exec` in front of a client.
fn behind_exec(command: &mut Command, serving: &StagedDaemon, reading: &ReadSettings<'_>) {
    command
        .args(["exec", "--url", &reading.url, "--token-file"])
        .arg(serving.token_file());
    command
        .args(reading.role.iter().flat_map(|role| ["--role", role]))
        .arg("--");
    if reading.file_alone {
        command.args(["env", "-u", "AWS_CONTAINER_AUTHORIZATION_TOKEN"]);
    }
}

/// Runs `act` for each client, by its index, for some of them at one time.
pub(crate) fn for_each<T: Send>(
    members: &[&Member],
    at_once: usize,
    act: impl Fn(usize, &Member) -> T + Sync,
) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let work = || -> Vec<(usize, T)> {
        let numbers = std::iter::repeat_with(|| next.fetch_add(1, Ordering::Relaxed));
        numbers
            .map_while(|number| Some((number, act(number, members.get(number)?))))
            .collect()
    };
    let mut done: Vec<(usize, T)> = thread::scope(|scope| {
        let threads: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().expect("a client's thread"))
            .collect()
    });
    done.sort_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, result)| result).collect()
}

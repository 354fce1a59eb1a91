//! The audit and the log when their readers have stopped, or the disk is full (T30).

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use crate::harness::client::{connect, fetch};
use crate::harness::counterparts::process::{Process, await_some, behind, spawn};
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::{Daemon, PROGRAM};
use crate::harness::hanging::HangingFiles;
use crate::harness::upstream::{Upstream, my_rule};

const TIMEOUT: Duration = Duration::from_secs(60);

/// Returns a pipe that is full from the start: its reader, and an end for a program to write to.
fn full_pipe() -> (fs::File, std::os::fd::OwnedFd) {
    let (from, to) = nix::unistd::pipe().unwrap();
    fcntl(&to, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    while nix::unistd::write(&to, &[b'\n'; 4096]).is_ok() {}
    fcntl(&to, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    (from.into(), to)
}

/// Standard error and standard output without a reader: the log and the audit.
#[test]
fn stopped_log_readers_do_not_stop_daemon() {
    let upstream = Upstream::start_for_me();
    for reads_again in [false, true] {
        let folder = folder();
        let path = |name: &str| folder.path().join(name);
        let (socket, config) = (path("awsvid.sock"), path("awsvid.toml"));
        let text = format!(
            "{}\n{}\n[listen]\nunix = {socket:?}\ntcp = []\nadmin = \"\"\nstatus = {:?}\ntoken_file = {:?}\n[log]\nformat = \"json\"\n",
            upstream.configuration(),
            my_rule(),
            path("status.sock"),
            path("token"),
        );
        fs::write(&config, text).unwrap();
        let ((mut log, stderr), (mut audit, stdout)) = (full_pipe(), full_pipe());
        let mut command = Command::new(PROGRAM);
        command
            .env_clear()
            .args(["serve", "--config"])
            .arg(&config)
            .stdin(Stdio::null());
        let mut daemon = spawn({
            command.stdout(stdout).stderr(stderr);
            command
        })
        .unwrap();
        for _ in 0..500 {
            let stream = await_some("it listens", TIMEOUT, || UnixStream::connect(&socket).ok());
            stream.set_read_timeout(Some(TIMEOUT)).unwrap();
            assert_eq!(fetch(stream).0, 200);
        }
        let ready = || {
            let mut stream = UnixStream::connect(path("status.sock")).unwrap();
            stream.write_all(b"GET /readyz HTTP/1.0\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer.contains("\r\n\r\nready\n").then_some(())
        };
        await_some("it is ready", TIMEOUT, ready);
        let reading = reads_again.then(|| {
            [&mut log, &mut audit].map(|pipe| {
                let mut pipe = pipe.try_clone().unwrap();
                std::thread::spawn(move || {
                    let mut text = String::new();
                    pipe.read_to_string(&mut text).unwrap();
                    text.lines()
                        .filter(|line| !line.is_empty())
                        .map(|line| serde_json::from_str(line).unwrap())
                        .collect()
                })
            })
        });
        kill(daemon.id(), Signal::SIGTERM).unwrap();
        let status = daemon
            .wait(TIMEOUT)
            .expect("it ends without a reader as well");
        assert!(status.success(), "{status}");
        let Some(reading) = reading else { continue };
        let [log, audit]: [Vec<Value>; 2] = reading.map(|thread| thread.join().unwrap());
        for message in ["serving workloads", "ready", "draining"] {
            let has = |line: &Value| {
                line["message"]
                    .as_str()
                    .is_some_and(|text| text.starts_with(message))
            };
            assert!(log.iter().any(has), "{message} in {log:?}");
        }
        let issued = audit.iter().filter(|record| record["outcome"] == "issued");
        assert_eq!(
            issued
                .map(|record| record["repeated"].as_u64().unwrap_or(1))
                .sum::<u64>(),
            500
        );
    }
}

/// The audit file is a pipe without a reader, or on a file system that hangs: the daemon starts and
/// answers. Its records are written when the file can be opened.
#[test]
fn audit_file_that_blocks_does_not_stop_daemon() {
    if !root() {
        return;
    }
    let upstream = Upstream::start_for_me();
    for hangs in [false, true] {
        let folder = folder();
        let mut files = HangingFiles::mount();
        files.hang();
        let enter = files.enter();
        let enter: Vec<&str> = enter.iter().map(String::as_str).collect();
        let path = |name: &str| folder.path().join(name);
        let pipe = path("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (words, file) = match hangs {
            true => (&enter[..], files.program()),
            false => (&[][..], &*pipe),
        };
        let (socket, config) = (path("awsvid.sock"), path("awsvid.toml"));
        let text = format!(
            "{}\n{}\n[audit]\nfile = {file:?}\n[listen]\nunix = {socket:?}\ntcp = []\nadmin = \"\"\n\
             status = {:?}\ntoken_file = {:?}\n",
            upstream.configuration(),
            my_rule(),
            path("status.sock"),
            path("token"),
        );
        fs::write(&config, text).unwrap();
        let mut command = behind(words, Path::new(PROGRAM));
        command.env_clear().env("PATH", "/usr/bin:/bin");
        command.args(["serve", "--config"]).arg(&config);
        let daemon = Process::start("awsvid", command, &path("log"));
        // The server ends first, since the daemon cannot end before.
        let stage = (files, daemon);
        let daemon = &stage.1;
        let stream = || UnixStream::connect(&socket).ok();
        let answer = |stream| fetch(stream).0;
        let connected = daemon.await_some("it listens", TIMEOUT, stream);
        assert_eq!(answer(connected), 200);
        let why = if hangs {
            "the server of its file system does not respond"
        } else {
            "no process reads from this pipe"
        };
        assert!(daemon.log().contains(why), "{}", daemon.log());
        if !hangs {
            let mut line = String::new();
            BufReader::new(fs::File::open(&pipe).unwrap())
                .read_line(&mut line)
                .unwrap();
            assert!(line.contains("\"outcome\":\"issued\""), "{line}");
        }
        // A reload with such a file changes nothing, and ends.
        kill(daemon.id(), Signal::SIGHUP).unwrap();
        if hangs {
            daemon.await_some("the reload ends", TIMEOUT, || {
                let log = daemon.log();
                (log.matches(why).count() == 2).then_some(())
            });
        }
        assert_eq!(answer(stream().unwrap()), 200);
        kill(daemon.id(), Signal::SIGTERM).unwrap();
        await_some("it ends", TIMEOUT, || (!socket.exists()).then_some(()));
    }
}

/// Returns the number of requests that these records stand for. One line may be broken.
fn sum(text: &str) -> u64 {
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    let records: Vec<Value> = lines
        .iter()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    assert!(lines.len() - records.len() <= 1, "{text}");
    records
        .iter()
        .map(|record| record["repeated"].as_u64().unwrap_or(1))
        .sum()
}

#[test]
fn required_audit_blocks_credentials_on_full_disk() {
    if !root() {
        return;
    }
    let folder = folder();
    let small = folder.path().join("small");
    fs::create_dir(&small).unwrap();
    let upstream = Upstream::start_for_me();
    let script = format!(
        "mount -t tmpfs -o size=128k awsvid {} && exec \"$@\"",
        small.display()
    );
    let words = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        &script,
        "sh",
    ];
    let configuration = upstream.configuration() + &my_rule();
    let mut daemon = Daemon::start_behind(&words, folder.path(), "", &configuration).ready();
    let inside =
        |path: &Path| PathBuf::from(format!("/proc/{}/root{}", daemon.pid(), path.display()));
    let (file, filler) = (small.join("audit.log"), small.join("filler"));
    let audit = daemon.text();
    let (before, after) = audit.split_once("[audit]\n").unwrap();
    let rest = after.split_once('\n').unwrap().1;
    assert!(daemon.reload_text(&format!(
        "{before}[audit]\nrequired = true\nfile = {file:?}\n{rest}"
    )));
    let listeners = ["unix", "tcp", "tcp6"];
    let answer = |listener: &str| match listener {
        "unix" => fetch(UnixStream::connect(daemon.unix()).unwrap()),
        "tcp" => fetch(connect(daemon.tcp())),
        _ => fetch(connect(daemon.tcp6())),
    };
    for listener in listeners {
        assert_eq!(answer(listener).0, 200);
    }
    // Some are still being written, and some hits are only counted.
    let mut all = fs::File::create(inside(&filler)).unwrap();
    while all.write_all(&[b'x'; 4096]).is_ok() {}
    for listener in listeners {
        await_some("no credentials are served", TIMEOUT, || {
            let (status, body) = answer(listener);
            assert!(status == 200 || body["code"] == "not_audited", "{body}");
            (status == 503).then_some(())
        });
        for _ in 0..20 {
            let (status, body) = answer(listener);
            assert_eq!(
                (status, &body["code"]),
                (503, &"not_audited".into()),
                "over {listener}"
            );
        }
    }
    daemon.await_line(&["an audit record cannot be written", "No space left"]);
    fs::remove_file(inside(&filler)).unwrap();
    drop(all);
    for listener in listeners {
        assert_eq!(answer(listener).0, 200, "over {listener}");
    }
    daemon.await_line(&["audit records can be written again"]);
    // With those that were lost the records stand for all requests.
    let requests: u64 = daemon
        .metrics()
        .lines()
        .filter(|line| line.starts_with("awsvid_requests_total{"))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
        .sum();
    assert!(
        daemon.metric(
            "awsvid_requests_total{listener=\"unix\",protocol=\"container\",outcome=\"failed\",reason=\"not_audited\"}"
        ) >= 21
    );
    let file = fs::File::open(inside(&file)).unwrap();
    daemon.process().signal(Signal::SIGTERM);
    assert!(
        daemon
            .process()
            .owned()
            .wait(TIMEOUT)
            .expect("it ends")
            .success()
    );
    let [first, second] = [
        fs::read_to_string(folder.path().join("audit.log")),
        std::io::read_to_string(file),
    ];
    let (first, second) = (first.unwrap(), second.unwrap());
    assert_eq!(sum(&first) + sum(&second), requests, "{first}\n{second}");
    assert_eq!(
        second.matches("\"outcome\":\"lost\"").count(),
        1,
        "{second}"
    );
}

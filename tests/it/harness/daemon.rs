//! `awsvid serve` as a process of its own.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::Value;

use super::cgroup::Cgroup;
use super::counterparts::http_get;
use super::counterparts::process::{Process, behind, run};

/// How long the daemon may take for anything that it does in milliseconds, on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(30);

/// As it was built with these tests.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_awsvid");

/// The program as it is released, built now if it is not there.
pub(crate) fn released() -> PathBuf {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    cargo.args([
        "build",
        "--quiet",
        "--locked",
        "--release",
        "--bin",
        "awsvid",
        "--message-format",
        "json",
    ]);
    let messages = run(cargo, b"", Duration::from_secs(3600)).success("cargo build --release");
    let mut messages = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let path = messages.find_map(|message| message["executable"].as_str().map(PathBuf::from));
    path.expect("cargo names what it has built")
}

/// A configuration as [`Daemon::start`] writes it, with `[listen]`, `[audit]` and `[log]`.
pub(crate) fn text(folder: &Path, listen: &str, configuration: &str) -> String {
    let path = |name: &str| folder.join(name).display().to_string();
    format!(
        "{configuration}\n\
         [listen]\nunix = {:?}\ntcp = [\"127.0.0.1:0\", \"[::1]:0\"]\nadmin = \"127.0.0.1:0\"\nstatus = {:?}\ntoken_file = {:?}\n{listen}\n\
         [audit]\nfile = {:?}\n[log]\nlevel = \"awsvid=debug,info\"\nformat = \"json\"\n",
        path("awsvid.sock"),
        path("status.sock"),
        path("token"),
        path("audit.log"),
    )
}

/// A running daemon, with its files below one folder.
pub(crate) struct Daemon {
    process: Process,
    /// As a service has. Over TCP the daemon's questions to itself are looked for among the processes of its cgroup, which
    /// without one of its own would be half of the machine's.
    _cgroup: Option<Cgroup>,
    folder: PathBuf,
    /// By access key id, as far as it was asked.
    issued: Mutex<HashMap<String, String>>,
}

impl Daemon {
    /// Starts `awsvid serve` with this configuration, to which `[listen]`, `[audit]` and `[log]` are added: ports that the
    /// kernel picks, files below `folder`. `listen` is put into `[listen]`. Returns when its listeners are bound.
    pub(crate) fn start(folder: &Path, listen: &str, configuration: &str) -> Self {
        Self::start_behind(&[], folder, listen, configuration)
    }

    /// The same behind another command, such as one that makes it another user's.
    pub(crate) fn start_behind(
        words: &[&str],
        folder: &Path,
        listen: &str,
        configuration: &str,
    ) -> Self {
        Self::start_program(words, Path::new(PROGRAM), folder, listen, configuration)
    }

    /// The same with another build of the program.
    pub(crate) fn start_program(
        words: &[&str],
        program: &Path,
        folder: &Path,
        listen: &str,
        configuration: &str,
    ) -> Self {
        Self::begin(words, program, folder, listen, configuration).listening()
    }

    /// Starts it with this whole configuration.
    pub(crate) fn start_text(folder: &Path, text: &str) -> Self {
        Self::start_text_behind(&[], folder, text)
    }

    /// The same behind another command.
    pub(crate) fn start_text_behind(words: &[&str], folder: &Path, text: &str) -> Self {
        std::fs::write(folder.join("awsvid.toml"), text).expect("write the configuration");
        Self::spawn(words, Path::new(PROGRAM), folder).listening()
    }

    fn listening(self) -> Self {
        self.process
            .await_some("the daemon's listeners", PATIENCE, || {
                self.address("serving operators", "127.0.0.1:")
            });
        self
    }

    /// The same where it is to end by itself before it listens: its exit status and all that it has logged.
    pub(crate) fn refused(
        words: &[&str],
        folder: &Path,
        configuration: &str,
    ) -> (Option<i32>, String) {
        Self::refused_with(words, folder, "", configuration)
    }

    /// The same with this in `[listen]`.
    pub(crate) fn refused_with(
        words: &[&str],
        folder: &Path,
        listen: &str,
        configuration: &str,
    ) -> (Option<i32>, String) {
        let mut daemon = Self::begin(words, Path::new(PROGRAM), folder, listen, configuration);
        let status = daemon
            .process
            .owned()
            .wait(PATIENCE)
            .expect("it ends by itself");
        (status.code(), daemon.log())
    }

    fn begin(
        words: &[&str],
        program: &Path,
        folder: &Path,
        listen: &str,
        configuration: &str,
    ) -> Self {
        std::fs::write(
            folder.join("awsvid.toml"),
            text(folder, listen, configuration),
        )
        .expect("write the configuration");
        Self::spawn(words, program, folder)
    }

    /// With the configuration that is in the folder.
    fn spawn(words: &[&str], program: &Path, folder: &Path) -> Self {
        let config = folder.join("awsvid.toml");
        let cgroup = nix::unistd::geteuid().is_root().then(|| {
            let name = folder
                .file_name()
                .and_then(|name| name.to_str())
                .expect("a name in UTF-8");
            Cgroup::new(&format!("daemon-{name}.service"))
        });
        let enter = cgroup.as_ref().map(Cgroup::enter);
        let words = [enter.as_ref().map_or(&[][..], |enter| enter), words].concat();
        let mut command = behind(&words, program);
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .args(["serve", "--config"])
            .arg(&config);
        let process = Process::start("awsvid", command, &folder.join("awsvid.log"));
        Self {
            process,
            _cgroup: cgroup,
            folder: folder.to_owned(),
            issued: Mutex::default(),
        }
    }

    /// Replaces the configuration by another one as `start` would write it, and sends SIGHUP. Returns whether the daemon
    /// has taken it, once it has said so.
    pub(crate) fn reload(&self, listen: &str, configuration: &str) -> bool {
        self.reload_text(&text(&self.folder, listen, configuration))
    }

    /// The same with the whole file.
    pub(crate) fn reload_text(&self, text: &str) -> bool {
        const DONE: &str = "the configuration was reloaded";
        const REFUSED: &str = "the configuration was not reloaded";
        let count = |message: &str| self.process.log().matches(message).count();
        let before = [DONE, REFUSED].map(count);
        self.write_and_hang_up(text);
        self.process.await_some(
            "the daemon has read its configuration again",
            PATIENCE,
            || {
                let after = [DONE, REFUSED].map(count);
                (after != before).then(|| after[0] > before[0])
            },
        )
    }

    /// The same without waiting for it.
    pub(crate) fn write_and_hang_up(&self, text: &str) {
        std::fs::write(self.folder.join("awsvid.toml"), text).expect("write the configuration");
        self.hang_up();
    }

    /// Sends SIGHUP.
    pub(crate) fn hang_up(&self) {
        self.process.signal(Signal::SIGHUP);
    }

    /// The configuration as it is.
    pub(crate) fn text(&self) -> String {
        std::fs::read_to_string(self.folder.join("awsvid.toml")).expect("the configuration")
    }

    /// Waits until `/readyz` is 200.
    pub(crate) fn ready(self) -> Self {
        self.process
            .await_some("the daemon is ready", PATIENCE, || {
                http_get(self.admin(), "/readyz").filter(|(status, _)| *status == 200)
            });
        self
    }

    /// Waits for a line of its log whose message has all of these words; the message.
    pub(crate) fn await_line(&self, words: &[&str]) -> String {
        self.process.await_some(
            &format!("a line with {words:?} in the log"),
            PATIENCE,
            || {
                let mut messages = self
                    .log_lines()
                    .filter_map(|line| Some(line["message"].as_str()?.to_owned()));
                messages.find(|message| words.iter().all(|word| message.contains(word)))
            },
        )
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> Pid {
        self.process.id()
    }

    /// How much memory it has of its own, in KiB.
    pub(crate) fn memory(&self) -> u64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("its status");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"))
            .expect("its memory");
        line.trim()
            .trim_end_matches(" kB")
            .parse()
            .expect("a number")
    }

    /// How many descriptors it has open.
    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .expect("its descriptors")
            .count()
    }

    /// How long after the start of its process all pods were listened in that were there then.
    pub(crate) fn listening_in_pods_after(&self) -> Duration {
        let line = self
            .log_lines()
            .find(|line| line["message"] == "serving workloads in pods")
            .expect("the line");
        let at = humantime::parse_rfc3339(line["time"].as_str().expect("a time")).expect("a time");
        let stat =
            std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("its times");
        let (_, fields) = stat.rsplit_once(')').expect("a name");
        let ticks: u64 = fields
            .split(' ')
            .nth(20)
            .expect("the start")
            .parse()
            .expect("a number");
        let since_boot = Duration::from_millis(ticks * 10);
        let uptime = std::fs::read_to_string("/proc/uptime").expect("the uptime");
        let uptime: f64 = uptime
            .split(' ')
            .next()
            .expect("seconds")
            .parse()
            .expect("a number");
        let boot = std::time::SystemTime::now() - Duration::from_secs_f64(uptime);
        at.duration_since(boot + since_boot).unwrap_or_default()
    }

    /// The process.
    pub(crate) fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    fn address(&self, message: &str, prefix: &str) -> Option<SocketAddr> {
        self.log_lines().find_map(|line| {
            let here = line["message"] == message && line["address"].as_str()?.starts_with(prefix);
            if here {
                line["address"].as_str()?.parse().ok()
            } else {
                None
            }
        })
    }

    fn log_lines(&self) -> impl Iterator<Item = Value> + use<> {
        let lines: Vec<Value> = self
            .process
            .log()
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect();
        lines.into_iter()
    }

    /// Everything that it has logged.
    pub(crate) fn log(&self) -> String {
        self.process.log()
    }

    /// Where it listens on 127.0.0.1.
    pub(crate) fn tcp(&self) -> SocketAddr {
        self.address("serving workloads", "127.0.0.1:")
            .expect("a TCP listener")
    }

    /// Where it listens on ::1.
    pub(crate) fn tcp6(&self) -> SocketAddr {
        self.address("serving workloads", "[::1]:")
            .expect("a TCP listener on ::1")
    }

    /// Where it answers operators.
    pub(crate) fn admin(&self) -> SocketAddr {
        self.address("serving operators", "127.0.0.1:")
            .expect("an operators' listener")
    }

    /// The unix socket.
    pub(crate) fn unix(&self) -> PathBuf {
        self.folder.join("awsvid.sock")
    }

    /// The metrics as of this moment: only the status socket has them, over TCP they may be a second old.
    pub(crate) fn metrics(&self) -> String {
        let (status, text) = self.ask_locally("/metrics");
        assert_eq!(status, 200, "{text}");
        text
    }

    /// The status and body of an answer over the status socket.
    pub(crate) fn ask_locally(&self, path: &str) -> (u16, String) {
        let mut stream =
            UnixStream::connect(self.folder.join("status.sock")).expect("the status socket");
        // Without chunks.
        write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").expect("send a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        (head[9..12].parse().expect("a status"), body.to_owned())
    }

    /// A counter of `/metrics`, by its name with labels; 0 if it is not there.
    pub(crate) fn metric(&self, name: &str) -> u64 {
        let text = self.metrics();
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0, |value| value.parse().expect("a number"))
    }

    /// How many requests were answered with credentials. The audit has one record for several that come quickly.
    pub(crate) fn issued(&self) -> u64 {
        let metrics = self.metrics();
        let counts = metrics.lines().filter(|line| {
            line.starts_with("awsvid_requests_total{") && line.contains("=\"issued\"")
        });
        counts
            .map(|line| {
                line.rsplit(' ')
                    .next()
                    .and_then(|count| count.parse::<u64>().ok())
                    .expect("a number")
            })
            .sum()
    }

    /// The credentials that `/status` has for this SPIFFE ID and the first role.
    pub(crate) fn status(&self, spiffe_id: &str) -> Value {
        let (status, body) = self.ask_locally("/status");
        assert_eq!(status, 200, "{body}");
        let body: Value = serde_json::from_str(&body).expect("JSON");
        let all = body["credentials"].as_array().expect("a list");
        all.iter()
            .find(|entry| entry["spiffe_id"] == spiffe_id)
            .cloned()
            .unwrap_or_default()
    }

    /// Where clients of a listener connect, by its name in the actor's scenes: `unix`, `tcp` or `tcp6`.
    pub(crate) fn listener(&self, name: &str) -> String {
        match name {
            "unix" => self.unix().display().to_string(),
            "tcp" => self.tcp().to_string(),
            _ => self.tcp6().to_string(),
        }
    }

    /// What curl gets over a listener, as this user and group, from this cgroup.
    pub(crate) fn curl(&self, listener: &str, (uid, gid): (u32, u32), cgroup: &Cgroup) -> String {
        let target = match listener {
            "unix" => format!(
                "--unix-socket {} http://localhost/v1/credentials",
                self.unix().display()
            ),
            "tcp" => self.uri(),
            _ => format!("http://{}/v1/credentials", self.tcp6()),
        };
        let script = format!(
            "echo 0 > {}/cgroup.procs && exec setpriv --reuid {uid} --regid {gid} --clear-groups curl -sS -g -H 'Authorization: x' {target}",
            cgroup.path().display()
        );
        let mut command = Command::new("sh");
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .args(["-c", &script]);
        run(command, b"", 2 * PATIENCE).success(&script)
    }

    /// The URI for SDKs.
    pub(crate) fn uri(&self) -> String {
        format!("http://{}/v1/credentials", self.tcp())
    }

    /// All audit records so far.
    pub(crate) fn audit(&self) -> Vec<Value> {
        self.audit_where(|_, _| true)
    }

    /// The audit records that this is true of: their number, from 0, and their text.
    pub(crate) fn audit_where(&self, mut wanted: impl FnMut(usize, &str) -> bool) -> Vec<Value> {
        let text = std::fs::read_to_string(self.folder.join("audit.log")).unwrap_or_default();
        let lines = text
            .lines()
            .enumerate()
            .filter(|(i, line)| wanted(*i, line));
        lines
            .map(|(_, line)| serde_json::from_str(line).expect("an audit record is a line of JSON"))
            .collect()
    }

    /// The audit records after the first `count`, once there is at least one.
    pub(crate) fn audit_after(&self, count: usize) -> Vec<Value> {
        self.process.await_some("an audit record", PATIENCE, || {
            let records = self.audit_where(|i, _| i >= count);
            (!records.is_empty()).then_some(records)
        })
    }

    /// For which SPIFFE ID these credentials were handed out first, by the audit.
    pub(crate) fn first_issued_to(&self, access_key_id: &str) -> String {
        let mut issued = self.issued.lock().unwrap();
        let mut found = false;
        let mut first = || {
            self.audit_where(|_, line| {
                let is_first = !found && line.contains(access_key_id);
                found |= is_first;
                is_first
            })
        };
        let of = |records: &[Value]| {
            let record = records.first().expect("what is handed out is in the audit");
            assert_eq!(record["access_key_id"], access_key_id);
            record["spiffe_id"]
                .as_str()
                .expect("a SPIFFE ID")
                .to_owned()
        };
        issued
            .entry(access_key_id.to_owned())
            .or_insert_with(|| of(&first()))
            .clone()
    }
}

//! `awsvid serve` as a child process.

use std::collections::{BTreeSet, HashMap};
use std::io::{self, Read, Write};
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
use super::counterparts::process::{Process, await_some, behind, run};

mod audit;

/// Bounds steps that the daemon does in milliseconds, on a machine that is busy with other tests.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The program that was built with these tests.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_awsvid");

/// Returns the path of the release build, and builds it if it does not exist.
pub(crate) fn release_build() -> PathBuf {
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

/// Returns a configuration as [`Daemon::start`] writes it, with `[listen]`, `[audit]` and `[log]`.
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

/// Returns the table with which a daemon serves metadata at its TCP addresses.
pub(crate) fn imds_table(folder: &Path) -> String {
    let key = folder.join("imds-key");
    format!("[imds]\nmode = \"endpoint\"\nkey_file = {key:?}\n")
}

/// A running daemon, with its files below one folder.
pub(crate) struct Daemon {
    process: Process,
    /// A cgroup of its own, as a service has. Over TCP the daemon searches the processes of its
    /// cgroup for its own readiness probes. In the test's cgroup that would be half of the
    /// machine's processes.
    _cgroup: Option<Cgroup>,
    folder: PathBuf,
    /// SPIFFE IDs by access key id, as far as a test has queried them.
    issued: Mutex<HashMap<String, String>>,
}

impl Daemon {
    /// Starts `awsvid serve` with this configuration. It adds `[listen]`, `[audit]` and `[log]`:
    /// ports that the kernel picks, files below `folder`. `listen` goes into `[listen]`. Returns
    /// when the listeners are bound.
    pub(crate) fn start(folder: &Path, listen: &str, configuration: &str) -> Self {
        Self::start_behind(&[], folder, listen, configuration)
    }

    /// Starts it behind another command, such as one that changes the user.
    pub(crate) fn start_behind(
        words: &[&str],
        folder: &Path,
        listen: &str,
        configuration: &str,
    ) -> Self {
        Self::start_program(words, Path::new(PROGRAM), folder, listen, configuration)
    }

    /// Starts another build of the program.
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

    /// Starts it with this whole configuration, behind another command.
    pub(crate) fn start_text_behind(words: &[&str], folder: &Path, text: &str) -> Self {
        std::fs::write(folder.join("awsvid.toml"), text).expect("write the configuration");
        Self::spawn(words, Path::new(PROGRAM), folder).listening()
    }

    fn listening(self) -> Self {
        self.process
            .await_some("the daemon's listeners", TIMEOUT, || {
                self.address("serving operators", "127.0.0.1:")
            });
        self
    }

    /// Starts a daemon that is to exit before it listens. Returns its exit status and its log.
    pub(crate) fn run_to_exit(
        words: &[&str],
        folder: &Path,
        configuration: &str,
    ) -> (Option<i32>, String) {
        Self::run_to_exit_with(words, folder, "", configuration)
    }

    /// Starts such a daemon with this text in `[listen]`.
    pub(crate) fn run_to_exit_with(
        words: &[&str],
        folder: &Path,
        listen: &str,
        configuration: &str,
    ) -> (Option<i32>, String) {
        let mut daemon = Self::begin(words, Path::new(PROGRAM), folder, listen, configuration);
        let status = daemon
            .process
            .owned()
            .wait(TIMEOUT)
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

    /// Starts it with the configuration that is in the folder.
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

    /// Replaces the configuration by one as `start` would write it, and sends SIGHUP. Waits for the
    /// daemon's log line, and returns whether it applied the configuration.
    pub(crate) fn reload(&self, listen: &str, configuration: &str) -> bool {
        self.reload_text(&text(&self.folder, listen, configuration))
    }

    /// Replaces the whole file and sends SIGHUP, like `reload`.
    pub(crate) fn reload_text(&self, text: &str) -> bool {
        const DONE: &str = "configuration reloaded";
        const NOT_RELOADED: &str = "configuration not reloaded";
        let count = |message: &str| self.process.log().matches(message).count();
        let before = [DONE, NOT_RELOADED].map(count);
        self.write_and_send_sighup(text);
        self.process.await_some(
            "the daemon has read its configuration again",
            TIMEOUT,
            || {
                let after = [DONE, NOT_RELOADED].map(count);
                (after != before).then(|| after[0] > before[0])
            },
        )
    }

    /// Replaces the whole file and sends SIGHUP, but does not wait.
    pub(crate) fn write_and_send_sighup(&self, text: &str) {
        std::fs::write(self.folder.join("awsvid.toml"), text).expect("write the configuration");
        self.send_sighup();
    }

    pub(crate) fn send_sighup(&self) {
        self.process.signal(Signal::SIGHUP);
    }

    /// Returns the text of the current configuration file.
    pub(crate) fn text(&self) -> String {
        std::fs::read_to_string(self.folder.join("awsvid.toml")).expect("the configuration")
    }

    /// Waits until `/readyz` is 200.
    pub(crate) fn ready(self) -> Self {
        self.process.await_some("the daemon is ready", TIMEOUT, || {
            http_get(self.admin(), "/readyz").filter(|(status, _)| *status == 200)
        });
        self
    }

    /// Waits for a log line with all of these words in its event and fields. Returns both as text.
    pub(crate) fn await_line(&self, words: &[&str]) -> String {
        self.process.await_some(
            &format!("a line with {words:?} in the log"),
            TIMEOUT,
            || {
                let mut texts = self.log_lines().filter_map(|line| event_text(&line));
                texts.find(|message| words.iter().all(|word| message.contains(word)))
            },
        )
    }

    /// Returns the number of log lines with exactly this event and these fields.
    pub(crate) fn line_count(&self, text: &str) -> usize {
        self.log_lines()
            .filter(|line| event_text(line).as_deref() == Some(text))
            .count()
    }

    pub(crate) fn pid(&self) -> Pid {
        self.process.id()
    }

    /// Returns the size of its private memory, in KiB.
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

    /// Returns the number of its open descriptors.
    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .expect("its descriptors")
            .count()
    }

    /// Returns the time from the start of its process until it listened in all pods of that moment.
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

    pub(crate) fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Waits until it has ended by itself or after a signal, with success.
    pub(crate) fn await_end(&mut self) {
        let status = self.process.owned().wait(TIMEOUT).expect("it ends");
        assert!(status.success(), "{status}");
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

    /// Returns all of its log.
    pub(crate) fn log(&self) -> String {
        self.process.log()
    }

    /// Returns the address of its listener on 127.0.0.1.
    pub(crate) fn tcp(&self) -> SocketAddr {
        self.address("serving workloads", "127.0.0.1:")
            .expect("a TCP listener")
    }

    /// Returns the address of its listener on ::1.
    pub(crate) fn tcp6(&self) -> SocketAddr {
        self.address("serving workloads", "[::1]:")
            .expect("a TCP listener on ::1")
    }

    /// Returns the admin address.
    pub(crate) fn admin(&self) -> SocketAddr {
        self.address("serving operators", "127.0.0.1:")
            .expect("an operators' listener")
    }

    /// Returns the path of its unix socket.
    pub(crate) fn unix(&self) -> PathBuf {
        self.folder.join("awsvid.sock")
    }

    /// Returns the current metrics. Only the status socket has them; over TCP they may be a second
    /// old.
    pub(crate) fn metrics(&self) -> String {
        let (status, text) = self.query_status_socket("/metrics");
        assert_eq!(status, 200, "{text}");
        text
    }

    /// Sends a request over the status socket, and returns the response's status and body.
    pub(crate) fn query_status_socket(&self, path: &str) -> (u16, String) {
        // It is bound after the listeners for workloads.
        let stream = await_some("the status socket", TIMEOUT, || {
            self.connect_to_status_socket().ok()
        });
        answer_of(stream, path).expect("an answer")
    }

    fn connect_to_status_socket(&self) -> io::Result<UnixStream> {
        UnixStream::connect(self.folder.join("status.sock"))
    }

    /// Returns a counter of `/metrics` by its name with labels, or 0 if it does not exist.
    pub(crate) fn metric(&self, name: &str) -> u64 {
        let text = self.metrics();
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0, |value| value.parse().expect("a number"))
    }

    /// Returns the number of requests that got credentials. The audit has one record for several in
    /// quick succession.
    pub(crate) fn issued(&self) -> u64 {
        requests(&self.metrics(), "=\"issued\"")
    }

    /// Returns the credentials in `/status` for this SPIFFE ID and the first role.
    pub(crate) fn status(&self, spiffe_id: &str) -> Value {
        self.cached_credentials()
            .into_iter()
            .find(|entry| entry["spiffe_id"] == spiffe_id)
            .unwrap_or_default()
    }

    /// Returns the SPIFFE IDs in `/status`, whose tokens were exchanged.
    pub(crate) fn exchanged_ids(&self) -> BTreeSet<String> {
        let all = self.cached_credentials();
        let ids = all.iter().map(|entry| entry["spiffe_id"].as_str());
        ids.map(|id| id.expect("an ID").to_owned()).collect()
    }

    /// Returns the entries of the cache in `/status`.
    pub(crate) fn cached_credentials(&self) -> Vec<Value> {
        let (status, body) = self.query_status_socket("/status");
        assert_eq!(status, 200, "{body}");
        let body: Value = serde_json::from_str(&body).expect("JSON");
        body["credentials"].as_array().expect("a list").clone()
    }

    /// Returns the address of a listener, by its name in the actor's scenes: `unix`, `tcp` or
    /// `tcp6`.
    pub(crate) fn listener(&self, name: &str) -> String {
        match name {
            "unix" => self.unix().display().to_string(),
            "tcp" => self.tcp().to_string(),
            _ => self.tcp6().to_string(),
        }
    }

    /// Runs curl against a listener as this user and group, from this cgroup, and returns its
    /// output.
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
        run(command, b"", 2 * TIMEOUT).success(&script)
    }

    /// Returns the URI for SDKs.
    pub(crate) fn uri(&self) -> String {
        format!("http://{}/v1/credentials", self.tcp())
    }
}

/// Sends a request, and returns the response's status and body.
fn answer_of(mut stream: UnixStream, path: &str) -> io::Result<(u16, String)> {
    // HTTP/1.0, for a response without chunks.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok((head[9..12].parse().expect("a status"), body.to_owned()))
}

/// Returns the number of requests by those counters of these metrics that have this label.
fn requests(metrics: &str, label: &str) -> u64 {
    let counts = metrics
        .lines()
        .filter(|line| line.starts_with("awsvid_requests_total{") && line.contains(label));
    counts
        .map(|line| {
            line.rsplit(' ')
                .next()
                .and_then(|count| count.parse::<u64>().ok())
                .expect("a number")
        })
        .sum()
}

/// Returns a log line's event, and its fields as `name=value`.
fn event_text(line: &Value) -> Option<String> {
    let mut text = line["message"].as_str()?.to_owned();
    for (name, value) in line.as_object()? {
        if !["message", "target", "level", "time"].contains(&name.as_str()) {
            let value = value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned);
            text.push_str(&format!(" {name}={value}"));
        }
    }
    Some(text)
}

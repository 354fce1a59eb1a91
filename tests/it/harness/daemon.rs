//! `awsvid serve` as a process of its own.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::Value;

use super::counterparts::http_get;
use super::counterparts::process::Process;

/// How long the daemon may take for anything that it does in milliseconds, on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(30);

/// The configuration with `[listen]`, `[audit]` and `[log]`.
fn text(folder: &Path, listen: &str, configuration: &str) -> String {
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
    folder: PathBuf,
}

impl Daemon {
    /// Starts `awsvid serve` with this configuration, to which `[listen]`, `[audit]` and `[log]` are added: ports that the
    /// kernel picks, files below `folder`. `listen` is put into `[listen]`. Returns when its listeners are bound.
    pub(crate) fn start(folder: &Path, listen: &str, configuration: &str) -> Self {
        let config = folder.join("awsvid.toml");
        std::fs::write(&config, text(folder, listen, configuration)).expect("write the configuration");
        let mut command = Command::new(env!("CARGO_BIN_EXE_awsvid"));
        command.env_clear().args(["serve", "--config"]).arg(&config);
        let process = Process::start("awsvid", command, &folder.join("awsvid.log"));
        let daemon = Self { process, folder: folder.to_owned() };
        daemon
            .process
            .await_some("the daemon's listeners", PATIENCE, || daemon.address("serving operators", "127.0.0.1:"));
        daemon
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
        self.process.await_some("the daemon has read its configuration again", PATIENCE, || {
            let after = [DONE, REFUSED].map(count);
            (after != before).then(|| after[0] > before[0])
        })
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
        self.process.await_some("the daemon is ready", PATIENCE, || {
            http_get(self.admin(), "/readyz").filter(|(status, _)| *status == 200)
        });
        self
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> Pid {
        self.process.id()
    }

    /// The process.
    pub(crate) fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    fn address(&self, message: &str, prefix: &str) -> Option<SocketAddr> {
        self.log_lines().find_map(|line| {
            let here = line["message"] == message && line["address"].as_str()?.starts_with(prefix);
            if here { line["address"].as_str()?.parse().ok() } else { None }
        })
    }

    fn log_lines(&self) -> impl Iterator<Item = Value> + use<> {
        let lines: Vec<Value> = self.process.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        lines.into_iter()
    }

    /// Everything that it has logged.
    pub(crate) fn log(&self) -> String {
        self.process.log()
    }

    /// Where it listens on 127.0.0.1.
    pub(crate) fn tcp(&self) -> SocketAddr {
        self.address("serving workloads", "127.0.0.1:").expect("a TCP listener")
    }

    /// Where it listens on ::1.
    pub(crate) fn tcp6(&self) -> SocketAddr {
        self.address("serving workloads", "[::1]:").expect("a TCP listener on ::1")
    }

    /// Where it answers operators.
    pub(crate) fn admin(&self) -> SocketAddr {
        self.address("serving operators", "127.0.0.1:").expect("an operators' listener")
    }

    /// The unix socket.
    pub(crate) fn unix(&self) -> PathBuf {
        self.folder.join("awsvid.sock")
    }

    /// A counter of `/metrics`, by its name with labels; 0 if it is not there.
    pub(crate) fn metric(&self, name: &str) -> u64 {
        let (_, text) = http_get(self.admin(), "/metrics").expect("/metrics");
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0, |value| value.parse().expect("a number"))
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
        let lines = text.lines().enumerate().filter(|(i, line)| wanted(*i, line));
        lines.map(|(_, line)| serde_json::from_str(line).expect("an audit record is a line of JSON")).collect()
    }

    /// The audit records after the first `count`, once there is at least one.
    pub(crate) fn audit_after(&self, count: usize) -> Vec<Value> {
        self.process.await_some("an audit record", PATIENCE, || {
            let records = self.audit_where(|i, _| i >= count);
            (!records.is_empty()).then_some(records)
        })
    }
}

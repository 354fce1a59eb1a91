//! The servers that are measured: `awsvid serve` and `direct`, each in a process of its own.

use std::fs::{self, File};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::process::{Part, spawn};
use crate::upstream::{TRUST_DOMAIN, Upstream};
use crate::{BenchError, caller};

/// The variable with the path of another build of the program, to compare builds.
const PROGRAM: &str = "AWSVID_BENCH_PROGRAM";

/// Bounds steps of the daemon that take milliseconds.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The listener of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp,
    Unix,
}

/// A running daemon, which ends with this value.
pub(crate) struct Daemon {
    child: Child,
    folder: PathBuf,
}

impl Daemon {
    /// Starts `awsvid serve` with its files in `folder`: these rules and roles, ports that the
    /// kernel picks, the audit to a file, and otherwise the defaults.
    pub(crate) fn spawn(
        folder: &Path,
        upstream: &Upstream,
        rules: &str,
    ) -> Result<Self, BenchError> {
        let path = |name: &str| folder.join(name).display().to_string();
        let text = format!(
            "{}\n[listen]\nunix = {:?}\ntcp = [\"127.0.0.1:0\"]\nadmin = \"127.0.0.1:0\"\nstatus = {:?}\ntoken_file = {:?}\n\n\
             [audit]\nfile = {:?}\n\n{rules}",
            upstream.configuration(),
            path("awsvid.sock"),
            path("status.sock"),
            path("token"),
            path("audit.log"),
        );
        fs::write(folder.join("awsvid.toml"), text)?;
        let built = || env!("CARGO_BIN_EXE_awsvid").into();
        let mut command = Command::new(std::env::var_os(PROGRAM).unwrap_or_else(built));
        command
            .env_clear()
            .args(["serve", "--config", &path("awsvid.toml")]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(folder.join("awsvid.log"))?);
        Ok(Self {
            child: spawn(command)?,
            folder: folder.to_owned(),
        })
    }

    /// Starts it and waits until `/readyz` is 200.
    pub(crate) fn start(
        folder: &Path,
        upstream: &Upstream,
        rules: &str,
    ) -> Result<Self, BenchError> {
        let mut daemon = Self::spawn(folder, upstream, rules)?;
        daemon.wait("ready", Self::is_ready)?;
        Ok(daemon)
    }

    /// Polls every half of a millisecond.
    pub(crate) fn wait(
        &mut self,
        what: &str,
        done: impl Fn(&Self) -> bool,
    ) -> Result<(), BenchError> {
        let deadline = Instant::now() + TIMEOUT;
        while !done(self) {
            let ended = self.child.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                return Err(format!(
                    "the daemon is not {what} ({ended:?}). Its log:\n{}",
                    self.log()
                )
                .into());
            }
            sleep(Duration::from_micros(500));
        }
        Ok(())
    }

    /// Returns whether `/readyz` is 200.
    pub(crate) fn is_ready(&self) -> bool {
        let Some(admin) = self.logged_address("serving operators") else {
            return false;
        };
        let probe = || {
            let mut stream = TcpStream::connect(admin)?;
            std::io::Write::write_all(&mut stream, &caller::request("/readyz"))?;
            caller::answer(&mut stream)
        };
        probe().is_ok_and(|answer| answer.status == 200)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.join("awsvid.log")).unwrap_or_default()
    }

    fn logged_address(&self, message: &str) -> Option<String> {
        let log = self.log();
        let mut lines = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.find_map(|line| {
            let address = line["address"]
                .as_str()
                .filter(|address| address.starts_with("127.0.0.1:"))?;
            (line["message"] == message).then(|| address.to_owned())
        })
    }

    /// Returns the address of this listener.
    pub(crate) fn address(&self, transport: Transport) -> Result<String, BenchError> {
        match transport {
            Transport::Tcp => self
                .logged_address("serving workloads")
                .ok_or("the daemon has no TCP listener".into()),
            Transport::Unix => Ok(self.folder.join("awsvid.sock").display().to_string()),
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Errors mean that it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) struct Direct {
    part: Part,
    pub(crate) address: String,
}

impl Direct {
    /// Starts it. It responds to each request with `body`.
    pub(crate) fn start(
        folder: &Path,
        transport: Transport,
        body: &str,
    ) -> Result<Self, BenchError> {
        let socket = folder.join("direct.sock").display().to_string();
        let mut part = Part::start(&[
            "direct",
            if transport == Transport::Tcp {
                "tcp"
            } else {
                &socket
            },
        ])?;
        part.write_text(body)?;
        part.close_input();
        let address = part.next_line()?;
        Ok(Self { part, address })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.part.pid()
    }
}

/// Returns a `[[workload]]` rule for `uid`, with more keys if there are any.
pub(crate) fn rule(uid: u32, more: &str) -> String {
    format!("[[workload]]\nspiffe_id = \"spiffe://{TRUST_DOMAIN}/{uid}\"\nuid = {uid}\n{more}\n")
}

/// Returns a `[[role]]` for all identities.
pub(crate) fn role(name: &str) -> String {
    format!(
        "[[role]]\nname = \"{name}\"\nspiffe_id = \"spiffe://{TRUST_DOMAIN}/*\"\n\
         role_arn = \"arn:aws:iam::123456789012:role/{name}\"\naudience = \"bench\"\n"
    )
}

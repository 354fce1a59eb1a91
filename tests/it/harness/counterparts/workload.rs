//! A workload: a process of some user, with only those variables in its environment that the test
//! sets.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use super::process::{Output, run};

/// Bounds one command of a workload. The AWS CLI retries for a while before it gives up.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Runs commands as one user, by number: no passwd entry is needed. The environment has only HOME,
/// an empty folder of that user, and what `env` adds.
pub(crate) struct Workload {
    uid: u32,
    gid: u32,
    home: TempDir,
    environment: BTreeMap<String, String>,
}

impl Workload {
    /// Makes a workload with this uid, the gid of the same number, and no supplementary groups.
    /// Needs root (`counterparts::root`).
    pub(crate) fn new(uid: u32) -> Workload {
        let home = tempfile::Builder::new()
            .prefix("awsvid-home-")
            .tempdir()
            .expect("a temporary folder");
        let path = home.path().to_str().expect("a path in UTF-8").to_owned();
        Workload {
            uid,
            gid: uid,
            home,
            environment: BTreeMap::new(),
        }
        .env("HOME", &path)
    }

    /// Sets another gid for it.
    pub(crate) fn gid(mut self, gid: u32) -> Workload {
        self.gid = gid;
        self
    }

    /// Adds one more environment variable.
    pub(crate) fn env(mut self, name: &str, value: &str) -> Workload {
        self.environment.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Returns the workload's HOME and working directory.
    pub(crate) fn home(&self) -> &Path {
        self.home.path()
    }

    /// Returns a command of this workload, to be changed further and passed to `process::run`,
    /// `Process::start` or `process::spawn`. `program` is a path, since PATH is not set.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        chown(self.home(), Some(self.uid), Some(self.gid))
            .expect("chown of the workload's HOME, as root");
        let mut command = Command::new(program);
        // std also drops root's supplementary groups when it sets a uid.
        command
            .env_clear()
            .envs(&self.environment)
            .current_dir(self.home())
            .uid(self.uid)
            .gid(self.gid);
        command
    }

    /// Runs a program to its end, for at most 60 s.
    pub(crate) fn run(&self, program: impl AsRef<OsStr>, arguments: &[&str]) -> Output {
        let mut command = self.command(program);
        command.args(arguments);
        run(command, b"", TIMEOUT)
    }
}

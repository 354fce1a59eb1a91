//! A file system that stops responding, in a mount namespace of its own: see `tests/actor/fuse.rs`.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use nix::unistd::Pid;

use super::actor;
use super::counterparts::process::{OwnedProcess, spawn};

/// A file system with one file, the program `tests/actor`. It ends with the value, and each pending
/// call then gets an error. Drop it before all that may wait for it, which cannot end earlier.
pub(crate) struct HangingFiles {
    owned: OwnedProcess,
    /// Is `None` once the server has been ended.
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    program: PathBuf,
}

impl HangingFiles {
    /// Mounts it. It responds until `hang` is called.
    pub(crate) fn mount() -> Self {
        let mut command = Command::new(actor::program());
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .arg("hanging-files");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut owned = spawn(command).expect("the actor");
        let input = owned.stdin();
        let output = BufReader::new(owned.stdout().expect("a pipe"));
        let mut files = Self {
            owned,
            input,
            output,
            program: PathBuf::new(),
        };
        files.program = files.line().into();
        files
    }

    /// Returns the path of its file, as seen behind [`HangingFiles::enter`].
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// Returns words in front of a command that make it see the file system.
    pub(crate) fn enter(&self) -> [String; 3] {
        [
            "nsenter".to_owned(),
            format!("--mount=/proc/{}/ns/mnt", self.pid()),
            "--".to_owned(),
        ]
    }

    /// Returns the process whose mount namespace has the file system.
    pub(crate) fn pid(&self) -> Pid {
        self.owned.id()
    }

    /// Makes lookups and status calls of the file hang from here on. Data that was read of it can
    /// be read again.
    pub(crate) fn hang(&mut self) {
        self.step("hang");
    }

    /// Ends its server, like a server that is killed: from here on calls fail at once.
    pub(crate) fn end_server(&mut self) {
        self.step("end");
    }

    fn step(&mut self, word: &str) {
        writeln!(self.input.as_ref().expect("a pipe"), "{word}").expect("the actor lives");
        assert_eq!(self.line(), "done");
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("the actor's word");
        line.trim_end().to_owned()
    }
}

impl Drop for HangingFiles {
    fn drop(&mut self) {
        drop(self.input.take());
        // The server unmounts it and removes the directory. If it does not, it is killed, and the
        // mount ends with it.
        self.owned.wait(Duration::from_secs(10));
    }
}

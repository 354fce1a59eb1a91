//! A file system that stops answering, in a mount namespace of its own: see `tests/actor/fuse.rs`.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use super::actor;
use super::counterparts::process::{Owned, spawn};

/// With one file, which is the program `tests/actor`. Ends with the value, and whatever waits for an answer then gets an
/// error: so this is to be dropped before what may wait, which cannot end before.
pub(crate) struct HangingFiles {
    owned: Owned,
    /// `None` once it is told to end.
    hears: Option<ChildStdin>,
    says: BufReader<ChildStdout>,
    program: PathBuf,
}

impl HangingFiles {
    /// Mounts it. It answers until it is told to hang.
    pub(crate) fn mount() -> Self {
        let mut command = Command::new(actor::program());
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .arg("hanging-files");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut owned = spawn(command).expect("the actor");
        let hears = owned.stdin();
        let says = BufReader::new(owned.stdout().expect("a pipe"));
        let mut files = Self {
            owned,
            hears,
            says,
            program: PathBuf::new(),
        };
        files.program = files.line().into();
        files
    }

    /// Its file, as seen behind [`HangingFiles::enter`].
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// Words behind which a command sees it.
    pub(crate) fn enter(&self) -> [String; 3] {
        [
            "nsenter".to_owned(),
            format!("--mount=/proc/{}/ns/mnt", self.owned.id()),
            "--".to_owned(),
        ]
    }

    /// From here on it does not answer where the file is, nor what it is. What was read of it can be read again.
    pub(crate) fn hang(&mut self) {
        self.step("hang");
    }

    /// Its server ends, as one does that is killed: from here on there are errors instead of answers.
    pub(crate) fn end_server(&mut self) {
        self.step("end");
    }

    fn step(&mut self, word: &str) {
        writeln!(self.hears.as_ref().expect("a pipe"), "{word}").expect("the actor lives");
        assert_eq!(self.line(), "done");
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.says.read_line(&mut line).expect("the actor's word");
        line.trim_end().to_owned()
    }
}

impl Drop for HangingFiles {
    fn drop(&mut self) {
        drop(self.hears.take());
        // It unmounts it and removes the directory; if it does not, it is killed, and the mount ends with its server.
        self.owned.wait(Duration::from_secs(10));
    }
}

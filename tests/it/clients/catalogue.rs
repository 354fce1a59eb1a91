//! The clients: their names, versions and commands.

mod command_lines;
mod python;
mod sdks;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::harness::counterparts::process::run;
use crate::harness::counterparts::{skip, tool};

/// A client as its users have it.
pub(crate) struct Client {
    /// Its name in the table.
    pub(crate) name: &'static str,
    /// The registry that it was installed from.
    pub(crate) registry: &'static str,
    pub(crate) version: Version,
    pub(crate) start: Start,
    /// Added to the environment: the variables that its users set for an S3 other than AWS's.
    /// `{endpoint}` is filled in.
    pub(crate) environment: &'static [(&'static str, &'static str)],
    /// A short fact for users that the table's other columns do not have.
    pub(crate) note: &'static str,
}

/// The source of its version, so that it is written in one file.
pub(crate) enum Version {
    /// The first one that follows these words in this file of the repository.
    Locked {
        file: &'static str,
        after: &'static str,
    },
    /// The first one that its program prints with these arguments. It is the system's, which is not
    /// pinned.
    Printed(&'static [&'static str]),
}

/// The way in which reads are done. The first word is a program that `tests/counterparts/get`
/// provides. A word that begins with `tests/` is a file of the repository, of which the client gets
/// a copy.
pub(crate) enum Start {
    /// One process does all of them with one client of its SDK. `ENDPOINT BUCKET KEY TIMES PAUSE`
    /// are added (PAUSE in seconds). For each read it prints one line, `read <content>` or `failed
    /// <message>`. It ends with 0 if the last read succeeded, else with 1.
    Program(&'static [&'static str]),
    /// Each read is a run of a command, which prints the content and ends with 0, or prints an
    /// error. `{endpoint}`, `{bucket}` and `{key}` are filled in.
    Command(&'static [&'static str]),
}

/// The object that a client reads.
pub(crate) struct ReadObject<'a> {
    pub(crate) endpoint: &'a str,
    pub(crate) bucket: &'a str,
    pub(crate) key: &'a str,
    /// The number of reads of one process, and the time between two.
    pub(crate) times: u32,
    pub(crate) pause: Duration,
}

/// A note: the user then sees only S3's rejection.
const UNSIGNED: &str = "without credentials it sends its request unsigned";

/// Returns all of them, in the order of the table.
pub(crate) fn all() -> Vec<Client> {
    [command_lines::clients(), python::clients(), sdks::clients()]
        .into_iter()
        .flatten()
        .collect()
}

impl Client {
    /// Returns its name in SPIFFE IDs, object keys and names of files.
    pub(crate) fn slug(&self) -> String {
        let words = self
            .name
            .split(|c: char| !c.is_ascii_alphanumeric())
            .filter(|word| !word.is_empty());
        words.collect::<Vec<_>>().join("-").to_lowercase()
    }

    /// Returns its program, or `None` after a printed skip if it is missing.
    pub(crate) fn program(&self) -> Option<PathBuf> {
        // Not the link: Python knows its libraries by the path that it was started with.
        std::fs::read_link(tool(self.words()[0])?).ok()
    }

    /// Returns the program's name and its arguments.
    pub(crate) fn words(&self) -> &'static [&'static str] {
        match self.start {
            Start::Program(words) | Start::Command(words) => words,
        }
    }

    /// Returns the program's arguments for these reads. `file` returns the path of its copy of a
    /// file of the repository.
    pub(crate) fn arguments(
        &self,
        object: &ReadObject<'_>,
        file: impl Fn(&str) -> PathBuf,
    ) -> Vec<OsString> {
        let filled = |word: &&str| match word.starts_with("tests/") {
            true => file(word).into_os_string(),
            false => word
                .replace("{endpoint}", object.endpoint)
                .replace("{bucket}", object.bucket)
                .replace("{key}", object.key)
                .into(),
        };
        let mut arguments: Vec<OsString> = self.words()[1..].iter().map(filled).collect();
        if matches!(self.start, Start::Program(_)) {
            let (times, pause) = (object.times.to_string(), object.pause.as_secs().to_string());
            let words = [object.endpoint, object.bucket, object.key, &times, &pause];
            arguments.extend(words.map(OsString::from));
        }
        arguments
    }

    /// Returns its variables for an S3 with this endpoint.
    pub(crate) fn variables(&self, endpoint: &str) -> Vec<(&'static str, String)> {
        let filled =
            |(name, value): &(&'static str, &str)| (*name, value.replace("{endpoint}", endpoint));
        self.environment.iter().map(filled).collect()
    }

    /// Returns its version, or `None` after a printed skip for a system's client in another version
    /// than the expected one.
    pub(crate) fn version(&self, program: &Path, expected: Option<&str>) -> Option<String> {
        let arguments = match self.version {
            Version::Locked { file, after } => return Some(locked(file, after)),
            Version::Printed(arguments) => arguments,
        };
        let mut command = std::process::Command::new(program);
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .args(arguments);
        let output = run(command, b"", Duration::from_secs(60));
        let version = first_version(&(output.stdout + &output.stderr));
        match expected.filter(|expected| *expected != version) {
            Some(expected) => skip(&format!(
                "{} is {version} here, and {expected} in deploy/docs/sdks.md",
                self.name
            )),
            None => return Some(version),
        }
        None
    }
}

/// Returns the version in a file that pins it.
fn locked(file: &str, after: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{file}: {error}"));
    let (_, rest) = text
        .split_once(after)
        .unwrap_or_else(|| panic!("{file} has no {after:?}"));
    first_version(rest)
}

/// Returns the first word that begins with a digit, up to the end of its version number.
fn first_version(text: &str) -> String {
    let version = text.split(|c: char| !(c.is_ascii_alphanumeric() || ".-+".contains(c)));
    let version = version
        .map(|word| word.trim_start_matches('v'))
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    version
        .unwrap_or_else(|| panic!("no version in {text:?}"))
        .to_owned()
}

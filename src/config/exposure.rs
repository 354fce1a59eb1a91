//! Finds users that could change a file which the daemon trusts, and with it the credentials that
//! workloads get (T38).

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{getegid, geteuid};

use super::error::Problem;
use super::path_steps::path_steps;

const STICKY: u32 = 0o1000;
const GROUP_WRITES: u32 = 0o020;
const OTHERS_WRITE: u32 = 0o002;

/// The severity of a configuration that another user than root or the process's own could change
/// (T38).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of the variants are the severities")]
pub enum Exposure {
    Rejected,
    Warned,
    /// The owner and mode are not checked.
    Ignored,
}

impl Exposure {
    /// Returns the severity for a command. For root it is that of `serve`. Another user may
    /// validate a file before its installation.
    pub fn of_command() -> Self {
        if nix::unistd::geteuid().is_root() {
            Self::Rejected
        } else {
            Self::Warned
        }
    }
}

/// The owners, and the groups with write permission, that the file and the directories above it may
/// have: those of root and of the process itself.
struct TrustedFile<'a> {
    uids: [u32; 2],
    gids: [u32; 2],
    /// The word for the file in problems.
    noun: &'a str,
    kind: FileKind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum FileKind {
    Regular,
    /// A socket, which its server removes and binds again.
    Socket,
}

/// Returns the ways in which another user could change or replace the file at `path`. `file` is the
/// opened file, and `noun` its name in problems, such as "configuration".
///
/// Follows symbolic links as the kernel does, so each directory on the way counts. Blocks while the
/// file system does not answer.
pub(crate) fn exposures(path: &Path, file: &Metadata, noun: &str) -> Vec<Problem> {
    let trusted = TrustedFile::of_own_process(noun, FileKind::Regular);
    let mut problems = Vec::new();
    trusted.check_file(path, file, &mut problems);
    trusted.report_way(path, &mut problems);
    problems
}

/// Returns the ways in which another user could put a socket of its own at `path`, where awsvid
/// expects the agent's. The agent may be down, so its socket may be absent.
///
/// Blocks while the file system does not answer.
pub(crate) fn socket_exposures(path: &Path) -> Vec<Problem> {
    let mut problems = Vec::new();
    TrustedFile::of_own_process("socket", FileKind::Socket).report_way(path, &mut problems);
    problems
}

impl<'a> TrustedFile<'a> {
    fn of_own_process(noun: &'a str, kind: FileKind) -> Self {
        Self {
            uids: [0, geteuid().as_raw()],
            gids: [0, getegid().as_raw()],
            noun,
            kind,
        }
    }

    /// Returns the fix for a directory of another user, or one that it can write.
    fn directory_fix(&self, command: &str) -> String {
        match self.kind {
            FileKind::Regular => format!("{command}, or move the file"),
            FileKind::Socket => "move it to a directory of root's".to_owned(),
        }
    }

    fn report_way(&self, path: &Path, problems: &mut Vec<Problem>) {
        if let Err(error) = self.check_way(path, problems) {
            let noun = self.noun;
            let what =
                format!("the directories that lead to the {noun} cannot be checked: {error}");
            let fix = self.directory_fix("make them readable for awsvid");
            problems.push(problem(what, fix));
        }
    }

    fn check_file(&self, path: &Path, file: &Metadata, problems: &mut Vec<Problem>) {
        let (shown, noun) = (path.display(), self.noun);
        if !self.uids.contains(&file.uid()) {
            let what = format!("uid {} owns the {noun} and could change it", file.uid());
            problems.push(problem(what, format!("chown root:root {shown}")));
        }
        if file.mode() & GROUP_WRITES != 0 && !self.gids.contains(&file.gid()) {
            problems.push(problem(
                format!("gid {} can write the {noun}", file.gid()),
                format!("chmod g-w {shown}"),
            ));
        }
        if file.mode() & OTHERS_WRITE != 0 {
            let what = format!("every user of this node can write the {noun}");
            problems.push(problem(what, format!("chmod o-w {shown}")));
        }
    }

    fn check_way(&self, path: &Path, problems: &mut Vec<Problem>) -> io::Result<()> {
        for step in path_steps(path)? {
            let entry = match (step.entry, self.kind) {
                (Ok(entry), FileKind::Socket) if !entry.is_dir() && !entry.is_symlink() => None,
                (Err(error), FileKind::Socket) if error.kind() == io::ErrorKind::NotFound => None,
                (entry, _) => Some(entry?),
            };
            self.check_directory(&step.directory, entry.as_ref(), problems)?;
        }
        Ok(())
    }

    /// Reports each way in which another user can replace `entry` in this directory. `None` is an
    /// entry that may be absent.
    fn check_directory(
        &self,
        directory: &Path,
        entry: Option<&Metadata>,
        problems: &mut Vec<Problem>,
    ) -> io::Result<()> {
        let found = fs::symlink_metadata(directory)?;
        let (shown, noun) = (directory.display(), self.noun);
        let mut report = |what: String, fix: String| {
            let problem = problem(what, fix);
            if !problems.contains(&problem) {
                problems.push(problem);
            }
        };
        if !self.uids.contains(&found.uid()) {
            let what = format!(
                "uid {} owns {shown} and could put another {noun} there",
                found.uid()
            );
            let fix = self.directory_fix(&format!("chown root:root {shown}"));
            // An agent without root's rights needs a directory of its own.
            let fix = match self.kind {
                FileKind::Regular => fix,
                FileKind::Socket => format!("{fix}, unless only the agent runs as this user"),
            };
            report(what, fix);
        }
        let mode = found.mode();
        let group_writes = mode & GROUP_WRITES != 0 && !self.gids.contains(&found.gid());
        let others_write = mode & OTHERS_WRITE != 0;
        // A volume of Kubernetes has mode 0777 and is mounted read-only. The directory of an
        // agent's socket can be written where the agent runs.
        let is_fixed = || self.kind == FileKind::Regular && is_read_only(directory);
        if !(group_writes || others_write) || is_fixed() {
            return Ok(());
        }
        // In a sticky directory only its owner can replace an entry that exists. The owner of a
        // file or directory is checked elsewhere.
        let Some(entry) = entry.filter(|_| mode & STICKY != 0) else {
            let writer = if others_write {
                "every user of this node".to_owned()
            } else {
                format!("gid {}", found.gid())
            };
            let what = format!("{writer} can write to {shown} and put another {noun} there");
            report(what, self.directory_fix(&format!("chmod go-w {shown}")));
            return Ok(());
        };
        if entry.is_symlink() && !self.uids.contains(&entry.uid()) {
            let what = format!(
                "uid {} owns a symbolic link in {shown} and could lead it elsewhere",
                entry.uid()
            );
            report(what, "name the file itself".to_owned());
        }
        Ok(())
    }
}

fn is_read_only(path: &Path) -> bool {
    statvfs(path).is_ok_and(|found| found.flags().contains(FsFlags::ST_RDONLY))
}

fn problem(what: String, fix: String) -> Problem {
    Problem {
        line: None,
        key: String::new(),
        what,
        fix,
    }
}

#[cfg(test)]
mod tests;

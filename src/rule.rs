//! The `[[workload]]` rules: which SPIFFE ID a caller on this node has, where the node's configuration says so.

use std::hash::{Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::caller::{Caller, Executable, GroupDetail, Looks};
use crate::identity::SpiffeId;

/// The kernel's stand-in for an id that has no mapping in the reader's user namespace. It is nobody in particular, so it
/// matches no rule (attack 14).
pub const OVERFLOW_ID: u32 = 65534;

/// How `cgroup` is compared.
pub const CGROUP_GLOB: glob::MatchOptions =
    glob::MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: false };

/// One rule. Each key that is given must match.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Rule {
    /// What a caller that matches is.
    pub spiffe_id: SpiffeId,
    /// The user.
    pub uid: Option<u32>,
    /// The primary group.
    pub gid: Option<u32>,
    /// One of the supplementary groups.
    pub supplementary_group: Option<u32>,
    /// The executable.
    pub exe: Option<ProgramFile>,
    /// The systemd unit.
    pub systemd_unit: Option<String>,
    /// The cgroup, as a glob: `*` stays within one segment, `**` doesn't. The only key that can name a container.
    pub cgroup: Option<glob::Pattern>,
}

/// The file of a program, by its path in the daemon's own mount namespace.
#[derive(Debug, Clone)]
pub struct ProgramFile {
    path: PathBuf,
    seen: Arc<Mutex<Option<Seen>>>,
}

/// What was at a path, and when.
#[derive(Debug)]
struct Seen {
    file: (u64, u64, (i64, i64)),
    at: Instant,
}

/// A file that was at its path so long ago, and has not been changed since, is taken to be still there: one that was removed
/// from there, renamed or replaced has been changed by that. What this does not see is another directory in the place of one
/// that leads to it.
const SEEN: Duration = Duration::from_millis(100);

/// What the rules say of a caller.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision<'a> {
    /// This rule is the first that matches.
    Matched(&'a Rule),
    /// None does.
    NoMatch,
    /// It depends on the process, which has not been looked at, or on what it runs, which was not.
    NeedsProcess,
}

/// Finds the first rule that matches; stops with `NeedsProcess` at the first that can't be decided from what is known.
pub fn decide<'a>(rules: &'a [Rule], caller: &Caller) -> Decision<'a> {
    for rule in rules {
        match rule.matches(caller) {
            Some(true) => return Decision::Matched(rule),
            Some(false) => {}
            None => return Decision::NeedsProcess,
        }
    }
    Decision::NoMatch
}

/// What has to be looked at of the caller's process; `None` if what is known decides. It is the same for all callers of
/// these rules, so that it does not depend on the caller what is compared when several processes hold one socket.
pub fn needs(rules: &[Rule], caller: &Caller) -> Option<Looks> {
    (decide(rules, caller) == Decision::NeedsProcess).then(|| Looks {
        groups: match rules.iter().any(|rule| rule.supplementary_group.is_some()) {
            true => GroupDetail::List,
            false => GroupDetail::None,
        },
        program: rules.iter().any(|rule| rule.exe.is_some()),
        started: false,
    })
}

impl Rule {
    /// `None`: not without the process. Keys that the socket alone decides come first, so that a rule for somebody else
    /// never causes a search.
    fn matches(&self, caller: &Caller) -> Option<bool> {
        if caller.uid == OVERFLOW_ID || self.uid.is_some_and(|uid| uid != caller.uid) || !self.cgroup_matches(caller) {
            return Some(false);
        }
        // A uid or a unit's name means the host's. Only a rule that names the container's own cgroup lets it in (attack 6).
        if self.cgroup.is_none() && caller.in_container()? {
            return Some(false);
        }
        if self.gid.is_none() && self.supplementary_group.is_none() && self.exe.is_none() {
            return Some(true);
        }
        let process = caller.process.as_ref()?;
        Some(
            self.gid.is_none_or(|gid| gid == process.gid && gid != OVERFLOW_ID)
                && match (self.supplementary_group, &process.groups) {
                    (None, _) => true,
                    (Some(group), Some(groups)) => groups.contains(group)? && group != OVERFLOW_ID,
                    (Some(_), None) => return None,
                }
                && match (&self.exe, &process.program) {
                    (None, _) => true,
                    (Some(file), Some(program)) => program.exe.as_ref().is_some_and(|exe| file.is(exe)),
                    (Some(_), None) => return None,
                },
        )
    }

    fn cgroup_matches(&self, caller: &Caller) -> bool {
        let glob = self.cgroup.as_ref().is_none_or(|pattern| {
            caller.cgroup.as_ref().is_some_and(|path| pattern.matches_with(path.as_str(), CGROUP_GLOB))
        });
        let unit = self
            .systemd_unit
            .as_ref()
            .is_none_or(|unit| caller.cgroup.as_ref().and_then(|path| path.systemd_unit()) == Some(unit));
        glob && unit
    }
}

impl ProgramFile {
    /// The one at this path, whichever that is at the time.
    pub fn new(path: PathBuf) -> Self {
        Self { path, seen: Arc::default() }
    }

    /// As it is written in the configuration.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether this is what somebody runs. An upgrade replaces the file by another inode, so it is looked at again and again.
    fn is(&self, exe: &Executable) -> bool {
        let seen = || self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let running = (exe.device, exe.inode, exe.changed);
        if seen().as_ref().is_some_and(|seen| seen.file == running && seen.at.elapsed() < SEEN) {
            return true;
        }
        let at = Instant::now();
        let found = std::fs::metadata(&self.path).ok();
        let file = found.map(|file| (file.dev(), file.ino(), (file.ctime(), file.ctime_nsec())));
        *seen() = file.map(|file| Seen { file, at });
        file.is_some_and(|(device, inode, _)| (device, inode) == (exe.device, exe.inode))
    }
}

impl PartialEq for ProgramFile {
    fn eq(&self, other: &Self) -> bool {
        self.path == other.path
    }
}

impl Eq for ProgramFile {}

impl Hash for ProgramFile {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.path.hash(state);
    }
}

#[cfg(test)]
mod tests;

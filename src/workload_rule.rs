//! The `[[workload]]` rules: which SPIFFE ID a caller on this node has, where the node's configuration says so.

use std::hash::{Hash, Hasher};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use crate::caller::{Caller, Executable, GroupDetail, ListenerKind, ProcessFacts};
use crate::identity::SpiffeId;

mod named;

pub use named::{AccountName, Known, MissingNames, NamedRule, Resolved};

/// The kernel's stand-in for an id that has no mapping in the reader's user namespace. It is nobody in particular, so it
/// matches no rule (attack 14).
pub const OVERFLOW_ID: u32 = 65534;

/// How `cgroup` is compared.
pub const CGROUP_GLOB: glob::MatchOptions = glob::MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: false,
};

/// One rule. Each key that is given must match.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WorkloadRule {
    /// What a caller that matches is.
    pub spiffe_id: SpiffeId,
    /// The user.
    pub uid: Option<u32>,
    /// The primary group.
    pub gid: Option<u32>,
    /// One of the supplementary groups.
    pub supplementary_group: Option<u32>,
    /// The executable.
    pub exe: Option<ExeMatcher>,
    /// The systemd unit.
    pub systemd_unit: Option<String>,
    /// The cgroup, as a glob: `*` stays within one segment, `**` doesn't. The only key that can name a container.
    pub cgroup: Option<glob::Pattern>,
}

/// The file of a program, by its path in the daemon's own mount namespace.
#[derive(Debug, Clone)]
pub struct ExeMatcher {
    path: PathBuf,
    seen: Arc<Mutex<Option<CachedStat>>>,
    /// Held by whoever looks: of a file server that does not answer, one look waits.
    looking: Arc<tokio::sync::Mutex<()>>,
}

/// What was at a path, and when that was looked at.
#[derive(Debug, Clone, Copy)]
struct CachedStat {
    file: StatResult,
    at: Instant,
    /// The same by the clock that file systems tell the time by.
    wall: SystemTime,
}

/// What was at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StatResult {
    /// A file with this device and inode, changed last at this time.
    File {
        device: u64,
        inode: u64,
        changed: (i64, i64),
    },
    /// Nothing.
    Nothing,
    /// That cannot be looked at: a file server is away, or a directory is closed to the daemon.
    Unreadable,
}

impl StatResult {
    fn of(looked: &io::Result<std::fs::Metadata>) -> Self {
        match looked {
            Ok(file) => {
                let changed = (file.ctime(), file.ctime_nsec());
                Self::File {
                    device: file.dev(),
                    inode: file.ino(),
                    changed,
                }
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                Self::Nothing
            }
            Err(_) => Self::Unreadable,
        }
    }

    /// Whether it is this file, whenever that was changed.
    fn is(self, exe: &Executable) -> bool {
        matches!(self, Self::File { device, inode, .. } if (device, inode) == (exe.device, exe.inode))
    }
}

/// A file that was at its path so long ago, and has not been changed since, is taken to be still there: one that was removed
/// from there, renamed or replaced has been changed by that. What this does not see is another directory in the place of one
/// that leads to it.
const STAT_TTL: Duration = Duration::from_millis(100);

/// File systems tell the time of a change by whole ticks, and some by whole seconds.
const CLOCK_TICK: Duration = Duration::from_secs(2);

/// What the rules say of a caller.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision<'a> {
    /// This rule is the first that matches.
    Matched(&'a WorkloadRule),
    /// None does.
    NoMatch,
    /// It depends on the process, which has not been looked at, or on what it runs, which was not.
    NeedsProcess,
    /// It depends on what this file is now.
    NeedsFile(&'a ExeMatcher),
}

/// Why it is not known whether a rule matches.
enum UndecidedFact<'a> {
    Process,
    File(&'a ExeMatcher),
}

/// Finds the first rule that matches; stops at the first that can't be decided from what is known. Files of rules have been
/// looked at since `asked`, or it is said which has to be.
pub fn decide<'a>(rules: &'a [WorkloadRule], caller: &Caller, asked: Instant) -> Decision<'a> {
    for rule in rules {
        match rule.matches(caller, asked) {
            Ok(true) => return Decision::Matched(rule),
            Ok(false) => {}
            Err(UndecidedFact::Process) => return Decision::NeedsProcess,
            Err(UndecidedFact::File(file)) => return Decision::NeedsFile(file),
        }
    }
    Decision::NoMatch
}

/// What has to be looked at of the caller's process; `None` if what is known decides. It is what the rules need that are for a
/// socket of this user in this cgroup, and so the same for all processes that may hold it.
pub fn facts_needed(rules: &[WorkloadRule], caller: &Caller) -> Option<ProcessFacts> {
    if decide(rules, caller, Instant::now()) != Decision::NeedsProcess {
        return None;
    }
    let of_socket = |rule: &&WorkloadRule| rule.is_for_socket_of(caller);
    let names_group = rules
        .iter()
        .filter(of_socket)
        .any(|rule| rule.supplementary_group.is_some());
    Some(ProcessFacts {
        groups: if names_group {
            GroupDetail::List
        } else {
            GroupDetail::None
        },
        program: rules
            .iter()
            .filter(of_socket)
            .any(|rule| rule.exe.is_some()),
        started: false,
    })
}

impl WorkloadRule {
    /// Keys that the socket alone decides come first, so that a rule for somebody else never causes a search, and the file
    /// comes last.
    ///
    /// On the host's TCP listeners the socket alone decides only where the rule names the place of the socket's maker, and
    /// that is not root: else a process that is there has to hold the socket, and to agree. A program that was given a socket
    /// which root has made is not root (T24), and a container without a name of its own is not its user on the host (T31).
    fn matches(&self, caller: &Caller, asked: Instant) -> Result<bool, UndecidedFact<'_>> {
        if !self.is_for_socket_of(caller) {
            return Ok(false);
        }
        // A uid or a unit's name means the host's. Only a rule that names the container's own cgroup lets it in (attack 6).
        if self.cgroup.is_none() && caller.in_container().ok_or(UndecidedFact::Process)? {
            return Ok(false);
        }
        if caller.listener == ListenerKind::Tcp
            && caller.process.is_none()
            && (caller.uid == 0 || !self.names_place())
        {
            return Err(UndecidedFact::Process);
        }
        if self.gid.is_none() && self.supplementary_group.is_none() && self.exe.is_none() {
            return Ok(true);
        }
        let process = caller.process.as_ref().ok_or(UndecidedFact::Process)?;
        if self
            .gid
            .is_some_and(|gid| gid != process.gid || gid == OVERFLOW_ID)
        {
            return Ok(false);
        }
        if let Some(group) = self.supplementary_group {
            let is_member = process
                .groups
                .as_ref()
                .and_then(|groups| groups.contains(group))
                .ok_or(UndecidedFact::Process)?;
            if group == OVERFLOW_ID || !is_member {
                return Ok(false);
            }
        }
        let Some(file) = &self.exe else {
            return Ok(true);
        };
        let program = process.program.as_ref().ok_or(UndecidedFact::Process)?;
        let Some(exe) = &program.exe else {
            return Ok(false);
        };
        file.is(exe, asked).ok_or(UndecidedFact::File(file))
    }

    /// Whether a caller on the host's TCP listeners can match it by its socket alone.
    pub fn socket_decides(&self) -> bool {
        let needs_facts =
            self.gid.is_some() || self.supplementary_group.is_some() || self.exe.is_some();
        self.names_place() && self.uid != Some(0) && !needs_facts
    }

    /// Whether it says where its callers' sockets are made.
    fn names_place(&self) -> bool {
        self.cgroup.is_some() || self.systemd_unit.is_some()
    }

    /// Whether it is for the user and the place of this caller's socket.
    fn is_for_socket_of(&self, caller: &Caller) -> bool {
        caller.uid != OVERFLOW_ID
            && self.uid.is_none_or(|uid| uid == caller.uid)
            && self.cgroup_matches(caller)
    }

    fn cgroup_matches(&self, caller: &Caller) -> bool {
        let glob = self.cgroup.as_ref().is_none_or(|pattern| {
            caller
                .cgroup
                .as_ref()
                .is_some_and(|path| pattern.matches_with(path.as_str(), CGROUP_GLOB))
        });
        let unit = self.systemd_unit.as_ref().is_none_or(|unit| {
            caller.cgroup.as_ref().and_then(|path| path.systemd_unit()) == Some(unit)
        });
        glob && unit
    }
}

impl ExeMatcher {
    /// The one at this path, whichever that is at the time.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            seen: Arc::default(),
            looking: Arc::default(),
        }
    }

    /// As it is written in the configuration.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Looks at what is at the path now, and returns whether that can be seen. An upgrade replaces the file by another inode,
    /// so it is looked at again and again; the file system that it is on may not answer, so that is waited for elsewhere.
    pub async fn look(&self) -> bool {
        let begun = Instant::now();
        let looking = self.looking.clone().lock_owned().await;
        let is_readable = |seen: CachedStat| seen.file != StatResult::Unreadable;
        if let Some(seen) = self.seen().filter(|seen| seen.at >= begun) {
            return is_readable(seen);
        }
        let (path, seen) = (self.path.clone(), self.seen.clone());
        let look = move || {
            let _looking = looking;
            let (at, wall) = (Instant::now(), SystemTime::now());
            let looked = std::fs::metadata(&path);
            let file = StatResult::of(&looked);
            let before = seen
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .replace(CachedStat { file, at, wall });
            let is_news = before.is_none_or(is_readable);
            if let Some(error) = looked
                .err()
                .filter(|_| is_news && file == StatResult::Unreadable)
            {
                tracing::warn!(
                    %error,
                    exe = %path.display(),
                    "a rule's program cannot be looked at; callers that the rule may be for are refused until it can"
                );
            }
        };
        let _ = tokio::task::spawn_blocking(look).await;
        self.seen().is_some_and(is_readable)
    }

    /// Whether this is what somebody runs; `None` if the file has to be looked at first.
    fn is(&self, exe: &Executable, asked: Instant) -> Option<bool> {
        let CachedStat { file, at, wall } = self.seen()?;
        if file == StatResult::Unreadable {
            return None;
        }
        if at >= asked {
            return Some(file.is(exe));
        }
        if at.elapsed() >= STAT_TTL {
            return None;
        }
        if file
            == (StatResult::File {
                device: exe.device,
                inode: exe.inode,
                changed: exe.changed,
            })
        {
            return Some(true);
        }
        // Another file was there, and this one was not given that name since then: it would have been changed by that.
        let changed =
            UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(exe.changed.0).ok()?));
        let is_other = !file.is(exe);
        let is_old = changed.is_some_and(|changed| changed + CLOCK_TICK < wall);
        (is_other && is_old).then_some(false)
    }

    fn seen(&self) -> Option<CachedStat> {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PartialEq for ExeMatcher {
    fn eq(&self, other: &Self) -> bool {
        self.path == other.path
    }
}

impl Eq for ExeMatcher {}

impl Hash for ExeMatcher {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.path.hash(state);
    }
}

#[cfg(test)]
mod tests;

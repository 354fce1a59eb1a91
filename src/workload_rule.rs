//! The `[[workload]]` rules: they map callers on this node to SPIFFE IDs, if the node's
//! configuration has any.

use std::hash::{Hash, Hasher};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use crate::caller::{CallerFacts, Executable, GroupDetail, ListenerKind, ProcessFacts};
use crate::clock::Clock;
use crate::file_threads::FileThreads;
use crate::identity::SpiffeId;

mod account_rule;

pub use account_rule::{AccountName, AccountState, MissingNames, NamedRule, ResolvedRules};

/// The kernel's placeholder for an id without a mapping in the reader's user namespace. It
/// identifies no user, so it matches no rule (T14).
pub const OVERFLOW_ID: u32 = 65534;

/// The options for globs in `cgroup`.
pub const CGROUP_GLOB: glob::MatchOptions = glob::MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: false,
};

/// One rule. It matches if every key in it matches.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WorkloadRule {
    /// The SPIFFE ID of a caller that matches.
    pub spiffe_id: SpiffeId,
    pub uid: Option<u32>,
    /// The primary group id.
    pub gid: Option<u32>,
    /// The id of one of the supplementary groups.
    pub supplementary_group: Option<u32>,
    pub exe: Option<ExeMatcher>,
    pub systemd_unit: Option<String>,
    /// The cgroup, as a glob: `*` stays within one segment, `**` does not. Only this key can match
    /// a container.
    pub cgroup: Option<glob::Pattern>,
}

/// The file of a program, by its path in the daemon's own mount namespace.
#[derive(Debug, Clone)]
pub struct ExeMatcher {
    path: PathBuf,
    cached: Arc<Mutex<Option<CachedStat>>>,
    /// Only one thread waits for a file server that does not respond.
    threads: FileThreads,
}

/// The result of a stat, and the time of it.
#[derive(Debug, Clone, Copy)]
struct CachedStat {
    file: StatResult,
    at: Instant,
    /// The same time by the wall clock, which file systems use.
    wall: SystemTime,
}

/// The file at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StatResult {
    /// A file with this device and inode, and its last change time.
    File {
        device: u64,
        inode: u64,
        changed: (i64, i64),
    },
    /// No file exists there.
    Nothing,
    /// The file cannot be read: a file server is unavailable, or a directory is closed to the
    /// daemon.
    Unreadable,
}

impl StatResult {
    fn of(result: &io::Result<std::fs::Metadata>) -> Self {
        match result {
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

    /// Returns whether it is this file, whatever its change time.
    fn is(self, exe: &Executable) -> bool {
        matches!(self, Self::File { device, inode, .. } if (device, inode) == (exe.device, exe.inode))
    }
}

/// The time for which a cached stat is used. A file that was at its path then and has not changed
/// since is assumed to be there still: removing, renaming or replacing it would have changed it.
/// This misses a directory on the path that was replaced by another.
const STAT_TTL: Duration = Duration::from_millis(100);

/// The granularity of change times. File systems use whole ticks, and some whole seconds.
const CLOCK_TICK: Duration = Duration::from_secs(2);

/// The decision of the rules about a caller.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision<'a> {
    /// The first rule that matches.
    Matched(&'a WorkloadRule),
    /// No rule matches the caller.
    NoMatch,
    /// The decision depends on the process, or on its program, which was not read yet.
    NeedsProcess,
    /// The decision depends on the current file at this path.
    NeedsFile(&'a ExeMatcher),
}

/// The fact that is missing for a decision.
enum UndecidedFact<'a> {
    Process,
    File(&'a ExeMatcher),
}

/// Returns the first rule that matches. Stops at the first rule that cannot be decided by the known
/// facts. Uses only stats of rules' files since `since`, or slightly older ones that prove the
/// result. Otherwise returns the file that has to be read.
pub fn decide<'a>(
    rules: &'a [WorkloadRule],
    caller: CallerFacts<'_>,
    since: Instant,
) -> Decision<'a> {
    for rule in rules {
        match rule.matches(caller, since) {
            Ok(true) => return Decision::Matched(rule),
            Ok(false) => {}
            Err(UndecidedFact::Process) => return Decision::NeedsProcess,
            Err(UndecidedFact::File(file)) => return Decision::NeedsFile(file),
        }
    }
    Decision::NoMatch
}

/// Returns the facts of the caller's process that have to be read, or `None` if the known facts
/// decide. It covers all rules that could match a socket of this user in this cgroup. So it is the
/// same for all processes that may hold the socket.
pub fn facts_needed(rules: &[WorkloadRule], caller: CallerFacts<'_>) -> Option<ProcessFacts> {
    if decide(rules, caller, Instant::now()) != Decision::NeedsProcess {
        return None;
    }
    let of_socket = |rule: &&WorkloadRule| rule.matches_socket_of(caller);
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
    /// Returns whether the rule matches.
    ///
    /// The socket is compared first, so that a rule for another user never causes a search. The
    /// file is compared last.
    ///
    /// On the host's TCP listeners the socket alone decides only if the rule has the location of
    /// the socket's maker, and the maker is not root. Otherwise a process has to hold the socket
    /// and match, too. A program that got a socket from root is not root (T24). A container without
    /// a name in its cgroup is not its user on the host (T31).
    fn matches(&self, caller: CallerFacts<'_>, since: Instant) -> Result<bool, UndecidedFact<'_>> {
        if !self.matches_socket_of(caller) {
            return Ok(false);
        }
        // A uid or a unit's name means the host's. Only a rule with the container's own cgroup
        // matches it (T6).
        if self.cgroup.is_none() && caller.in_container().ok_or(UndecidedFact::Process)? {
            return Ok(false);
        }
        if caller.listener == ListenerKind::Tcp
            && caller.process.is_none()
            && (caller.peer.uid == 0 || !self.has_location())
        {
            return Err(UndecidedFact::Process);
        }
        if self.gid.is_none() && self.supplementary_group.is_none() && self.exe.is_none() {
            return Ok(true);
        }
        let process = caller.process.ok_or(UndecidedFact::Process)?;
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
        file.is(exe, since).ok_or(UndecidedFact::File(file))
    }

    /// Returns whether a caller on the host's TCP listeners can match it by its socket alone.
    pub fn socket_decides(&self) -> bool {
        let needs_facts =
            self.gid.is_some() || self.supplementary_group.is_some() || self.exe.is_some();
        self.has_location() && self.uid != Some(0) && !needs_facts
    }

    /// Returns whether it restricts the location of its callers' sockets.
    fn has_location(&self) -> bool {
        self.cgroup.is_some() || self.systemd_unit.is_some()
    }

    /// Returns whether it matches the user and the location of this caller's socket.
    fn matches_socket_of(&self, caller: CallerFacts<'_>) -> bool {
        caller.peer.uid != OVERFLOW_ID
            && self.uid.is_none_or(|uid| uid == caller.peer.uid)
            && self.cgroup_matches(caller)
    }

    fn cgroup_matches(&self, caller: CallerFacts<'_>) -> bool {
        let glob = self.cgroup.as_ref().is_none_or(|pattern| {
            caller
                .peer
                .cgroup
                .as_ref()
                .is_some_and(|path| pattern.matches_with(path.as_str(), CGROUP_GLOB))
        });
        let unit = self.systemd_unit.as_ref().is_none_or(|unit| {
            caller
                .peer
                .cgroup
                .as_ref()
                .and_then(|path| path.systemd_unit())
                == Some(unit)
        });
        glob && unit
    }
}

impl ExeMatcher {
    /// Creates a matcher for the file at this path, whichever file that is at the time.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            cached: Arc::default(),
            threads: FileThreads::default(),
        }
    }

    /// Makes it share the thread of its path with other rules, also with those of earlier and later
    /// configurations.
    pub fn with_threads(self, threads: FileThreads) -> Self {
        Self { threads, ..self }
    }

    /// Returns the path as it is in the configuration.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the file at the path now, and returns whether that succeeded. An upgrade replaces the
    /// file by another inode, so the file is read repeatedly. The read runs on a blocking thread,
    /// since its file system may not respond.
    pub async fn refresh_stat(&self) -> bool {
        let start = Instant::now();
        let thread = self.threads.acquire(&self.path).await;
        let is_readable = |cached: CachedStat| cached.file != StatResult::Unreadable;
        if let Some(cached) = self.cached().filter(|cached| cached.at >= start) {
            return is_readable(cached);
        }
        let (path, cached) = (self.path.clone(), self.cached.clone());
        let read = move || {
            let (at, wall) = (Instant::now(), Clock::system().now());
            let result = std::fs::metadata(&path);
            let file = StatResult::of(&result);
            let before = cached
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .replace(CachedStat { file, at, wall });
            let is_first_failure = before.is_none_or(is_readable);
            if let Some(error) = result
                .err()
                .filter(|_| is_first_failure && file == StatResult::Unreadable)
            {
                tracing::warn!(
                    %error,
                    exe = %path.display(),
                    "cannot read a rule's program; rejecting callers that the rule may match"
                );
            }
        };
        let _ = thread.run(read).await;
        self.cached().is_some_and(is_readable)
    }

    /// Returns whether `exe` is the file at the path. `None` if the file has to be read first.
    fn is(&self, exe: &Executable, since: Instant) -> Option<bool> {
        let CachedStat { file, at, wall } = self.cached()?;
        if file == StatResult::Unreadable {
            return None;
        }
        if at >= since {
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
        // Another file was there. If this one had been moved to the path since, its change time
        // would be later.
        let changed =
            UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(exe.changed.0).ok()?));
        let is_other = !file.is(exe);
        let is_old = changed.is_some_and(|changed| changed + CLOCK_TICK < wall);
        (is_other && is_old).then_some(false)
    }

    fn cached(&self) -> Option<CachedStat> {
        *self.cached.lock().unwrap_or_else(PoisonError::into_inner)
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

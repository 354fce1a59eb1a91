//! cgroups of the tests' own.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::counterparts::process::await_some;

/// How long processes that were killed may take to end.
const PATIENCE: Duration = Duration::from_secs(60);
/// Begins the names of those in which a whole system lives; the test process's id and a name follow.
const PREFIX: &str = "awsvid-test-";

/// A rule's key for callers of the test's own process, by which the socket alone decides: over TCP, and in the root cgroup,
/// the daemon would otherwise search all processes of the machine for the socket, as far as its budget goes.
pub(crate) fn own_rule() -> String {
    let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap();
    let path = cgroups
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .expect("a cgroup v2 path");
    format!("cgroup = {path:?}\n")
}

/// A cgroup of the test's own, as systemd would name a unit's, removed at the end.
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes it, in a slice of this test program's.
    pub(crate) fn new(name: &str) -> Self {
        let path = root()
            .join(format!("awsvid-test-{}.slice", std::process::id()))
            .join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// One of a person's sessions, as the login manager makes it.
    pub(crate) fn of_session(uid: u32, number: usize) -> Self {
        let session = format!("session-{}-{number}.scope", std::process::id());
        let path = root()
            .join("user.slice")
            .join(format!("user-{uid}.slice"))
            .join(session);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// That of a container in a pod of its own, as kubelet and a runtime make it.
    pub(crate) fn of_pod(number: u16) -> Self {
        let uid = format!("pod{:08x}-0000-4000-8000-{number:012x}", std::process::id());
        let container = format!("{:032x}{number:032x}", std::process::id());
        let path = root().join("kubepods/besteffort").join(uid).join(container);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// One below it.
    pub(crate) fn below(&self, name: &str) -> Self {
        let path = self.0.join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// Words behind which a command of root's runs in it.
    pub(crate) fn enter(&self) -> [&str; 4] {
        [
            "sh",
            "-c",
            r#"echo 0 >"$0/cgroup.procs" && exec "$@""#,
            self.0.to_str().expect("a path in UTF-8"),
        ]
    }

    /// Its directory.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

/// Where the cgroup v2 tree is mounted.
fn root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let cgroup2 = mounts
        .lines()
        .find(|line| line.contains(" - cgroup2 "))
        .expect("a cgroup v2 tree is mounted");
    cgroup2.split(' ').nth(4).unwrap().into()
}

/// Removes a cgroup and those that were made below it, as far as they have no processes.
fn remove(cgroup: &Path) {
    for entry in fs::read_dir(cgroup)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
    {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    let _ = fs::remove_dir(cgroup);
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // The parent goes with the last of the tests that share it.
        remove(&self.0);
        let _ = fs::remove_dir(self.0.parent().unwrap());
    }
}

/// A cgroup in which a whole system makes its own, removed with all below it once nobody is in it any more.
pub(crate) struct CgroupTree(PathBuf);

impl CgroupTree {
    /// Makes it below `parent`. `name` is another one for each of this test process's.
    pub(crate) fn create(parent: &Path, name: &str) -> io::Result<Self> {
        remove_abandoned(parent);
        let path = parent.join(format!("{PREFIX}{}-{name}", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    /// Its directory.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for CgroupTree {
    fn drop(&mut self) {
        // The processes were killed, but may be ending still.
        let removed = std::panic::catch_unwind(|| {
            await_some("the cgroup is empty", PATIENCE, || {
                remove_tree(&self.0).ok()
            });
        });
        if removed.is_err() {
            eprintln!("{} is left behind", self.0.display());
        }
    }
}

/// Removes what test processes left that were killed. Their systems were killed with them.
fn remove_abandoned(parent: &Path) {
    for entry in fs::read_dir(parent)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
    {
        let name = entry.file_name().into_string().unwrap_or_default();
        let owner = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split_once('-')?.0.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            // Another test may be doing the same; one that is not empty after all is left alone.
            let _ = remove_tree(&entry.path());
        }
    }
}

/// Removes a cgroup and those below it, none of which has a process.
fn remove_tree(cgroup: &Path) -> io::Result<()> {
    for entry in fs::read_dir(cgroup)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(cgroup)
}

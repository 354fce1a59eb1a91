//! cgroups that a test creates for itself.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::counterparts::process::await_some;

/// Bounds how long killed processes may take to end.
const TIMEOUT: Duration = Duration::from_secs(60);
/// The prefix of the cgroup names of whole systems. The test process's id and a name follow.
const PREFIX: &str = "awsvid-test-";

/// Returns a rule's key that matches callers in the test's own process, so that the socket alone
/// decides. Without it, over TCP and in the root cgroup, the daemon would search all processes of
/// the machine for the socket, up to its budget.
pub(crate) fn own_rule() -> String {
    let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap();
    let path = cgroups
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .expect("a cgroup v2 path");
    format!("cgroup = {path:?}\n")
}

/// A cgroup of the test, named as systemd names that of a unit, and removed at the end.
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    /// Creates it in a slice of this test program.
    pub(crate) fn new(name: &str) -> Self {
        let path = root()
            .join(format!("awsvid-test-{}.slice", std::process::id()))
            .join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// Creates that of a login session, as the login manager does.
    pub(crate) fn of_session(uid: u32, number: usize) -> Self {
        let session = format!("session-{}-{number}.scope", std::process::id());
        let path = root()
            .join("user.slice")
            .join(format!("user-{uid}.slice"))
            .join(session);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// Creates that of a kubelet. It stays, because tests share it.
    pub(crate) fn create_kubelets() {
        fs::create_dir_all(root().join("kubepods/besteffort")).unwrap();
    }

    /// Creates that of a container in a new pod, as kubelet and a runtime do.
    pub(crate) fn of_pod(number: u16) -> Self {
        let uid = format!("pod{:08x}-0000-4000-8000-{number:012x}", std::process::id());
        let container = format!("{:032x}{number:032x}", std::process::id());
        let path = root().join("kubepods/besteffort").join(uid).join(container);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// Creates a cgroup below this one.
    pub(crate) fn below(&self, name: &str) -> Self {
        let path = self.0.join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// Returns the words in front of a command of root that make it run in this cgroup.
    pub(crate) fn enter(&self) -> [&str; 4] {
        [
            "sh",
            "-c",
            r#"echo 0 >"$0/cgroup.procs" && exec "$@""#,
            self.0.to_str().expect("a path in UTF-8"),
        ]
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

/// Returns the mount point of the cgroup v2 tree.
fn root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let cgroup2 = mounts
        .lines()
        .find(|line| line.contains(" - cgroup2 "))
        .expect("a cgroup v2 tree is mounted");
    cgroup2.split(' ').nth(4).unwrap().into()
}

/// Removes a cgroup and those below it, as far as they have no processes.
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
        // The last of the tests that share the parent removes it.
        remove(&self.0);
        let _ = fs::remove_dir(self.0.parent().unwrap());
    }
}

/// A cgroup in which a whole system creates its own. It is removed with all cgroups below it once
/// no process is left in it.
pub(crate) struct CgroupTree(PathBuf);

impl CgroupTree {
    /// Creates it below `parent`. `name` must be unique within this test process.
    pub(crate) fn create(parent: &Path, name: &str) -> io::Result<Self> {
        remove_abandoned(parent);
        let path = parent.join(format!("{PREFIX}{}-{name}", std::process::id()));
        // An earlier test process with the same id may have left one behind.
        let _ = remove_tree(&path);
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for CgroupTree {
    fn drop(&mut self) {
        // The processes were killed, but may not have ended yet.
        let removed = std::panic::catch_unwind(|| {
            await_some("the cgroup is empty", TIMEOUT, || remove_tree(&self.0).ok());
        });
        if removed.is_err() {
            eprintln!("{} is left behind", self.0.display());
        }
    }
}

/// Removes the cgroups of test processes that were killed. Their systems were killed with them.
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
            // Another test may be removing it at the same time. One that is not empty is left as it
            // is.
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

//! cgroups of the tests' own.

use std::fs;
use std::path::{Path, PathBuf};

/// A rule's key for callers of the test's own process, by which the socket alone decides: over TCP, and in the root cgroup,
/// the daemon would otherwise search all processes of the machine for the socket, as far as its budget goes.
pub(crate) fn own_rule() -> String {
    let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap();
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::")).expect("a cgroup v2 path");
    format!("cgroup = {path:?}\n")
}

/// A cgroup of the test's own, as systemd would name a unit's, removed at the end.
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes it, in a slice of this test program's.
    pub(crate) fn new(name: &str) -> Self {
        let path = root().join(format!("awsvid-test-{}.slice", std::process::id())).join(name);
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
        ["sh", "-c", r#"echo 0 >"$0/cgroup.procs" && exec "$@""#, self.0.to_str().expect("a path in UTF-8")]
    }

    /// Its directory.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

/// Where the cgroup v2 tree is mounted.
fn root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let cgroup2 = mounts.lines().find(|line| line.contains(" - cgroup2 ")).expect("a cgroup v2 tree is mounted");
    cgroup2.split(' ').nth(4).unwrap().into()
}

/// Removes a cgroup and those that were made below it, as far as they have no processes.
fn remove(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().filter_map(Result::ok) {
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

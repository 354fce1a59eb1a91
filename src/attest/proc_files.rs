//! The files of a process in `/proc`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{self, OFlag};
use nix::sys::stat::Mode;

use crate::attest::cgroup_mounts::CgroupMounts;
use crate::attest::host::Host;
use crate::attest::process_cache::ProcessHandle;
use crate::attest::status::{self, StatusError};
use crate::attest::sys;
use crate::caller::{AttestError, GroupDetail, Groups};
use crate::cgroup::{self, CgroupPath};

/// The line with the process's pid in each of its pid namespaces, from that of the `/proc` mount
/// on. The kernel nests at most 32.
const NAMESPACE_PIDS: (&str, usize) = ("NSpid", 33);

/// Returns the path on the line of the v2 hierarchy.
pub(crate) fn v2(cgroups: &str) -> Option<&str> {
    cgroups.lines().find_map(|line| line.strip_prefix("0::"))
}

/// Returns whether any of its cgroups names a container. On a host that also has cgroup v1, a
/// container may be in the root of the v2 hierarchy, and only v1 names it.
pub(crate) fn names_container<'d>(
    hierarchies: &CgroupMounts,
    cgroup: Option<&CgroupPath>,
    directory: impl FnOnce() -> Result<&'d OwnedFd, AttestError>,
) -> Result<bool, AttestError> {
    if let Some(path) = cgroup.filter(|path| !path.is_root()) {
        return Ok(path.names_container());
    }
    let text = read(directory()?, "cgroup")?;
    let mut paths = cgroup::lines(&text).map(|(names, path)| hierarchies.path(names, path));
    Ok(paths.any(|path| path.is_none_or(|path| path.names_container())))
}

/// Returns whether the process lives in another user or pid namespace than the daemon.
///
/// It does not read the links to its namespaces, for which the kernel takes a lock of the process.
/// It does not read its `status` either, which is as long as the list of its groups.
pub(crate) fn in_other_namespaces(
    host: &Host,
    handle: &ProcessHandle,
) -> Result<bool, AttestError> {
    // A user namespace that maps every id to itself equals the host's (systemd's
    // PrivateUsers=identity).
    let other_user = !is_identity_map(&read(handle.directory(&host.proc_root)?, "uid_map")?);
    // The daemon's own pidfd shows the other process: pidfd_open(2), "NSpid" from Linux 5.5 on.
    let own = host
        .proc_root
        .join("self/fdinfo")
        .join(handle.pidfd().as_raw_fd().to_string());
    let info = std::fs::File::open(own)
        .map_err(|error| AttestError::kernel("self/fdinfo", os_error(&error)))?;
    let pids = match status::numbers(info, [NAMESPACE_PIDS]) {
        Ok([pids]) => pids,
        Err(_) => {
            let [pids] = status_numbers(handle.directory(&host.proc_root)?, [NAMESPACE_PIDS])?;
            pids
        }
    };
    match pids[..] {
        // The process has exited, or is not visible from here.
        [] | [0, ..] => Err(AttestError::CallerGone),
        _ => Ok(other_user || pids.len() > 1),
    }
}

/// Returns whether the process with this pid, which is visible here, lives in this process's pid
/// namespace: then it has one pid only. Like [`in_other_namespaces`], this does not read the link
/// to its namespace.
pub(crate) fn shares_pid_namespace(proc_root: &Path, pid: i32) -> bool {
    let status = std::fs::File::open(proc_root.join(pid.to_string()).join("status"));
    status.is_ok_and(|file| {
        status::numbers(file, [NAMESPACE_PIDS]).is_ok_and(|[pids]| pids.len() == 1)
    })
}

/// Reads the executable's file. Without `CAP_SYS_PTRACE` another user's executable is not visible;
/// then no rule with `exe` matches.
pub(crate) fn executable_file(directory: &OwnedFd) -> Result<Option<sys::FileFacts>, AttestError> {
    match sys::file_facts(directory.as_fd(), c"exe") {
        Ok(facts) => Ok(Some(facts)),
        Err(Errno::EACCES | Errno::EPERM | Errno::ENOENT) => Ok(None),
        Err(_) => Err(AttestError::CallerGone),
    }
}

pub(crate) fn read_groups(directory: &OwnedFd, detail: GroupDetail) -> Result<Groups, AttestError> {
    let [groups] = status_numbers(directory, [("Groups", Groups::MAX_GROUPS)])?;
    Groups::new(groups, detail)
}

pub(crate) fn status_numbers<const N: usize>(
    directory: &OwnedFd,
    lines: [(&str, usize); N],
) -> Result<[Vec<u32>; N], AttestError> {
    status::numbers(open(directory, "status")?, lines).map_err(|error| match error {
        StatusError::Io(error) => read_error("status", error),
        StatusError::Malformed => AttestError::kernel("status", None),
        // A process always has four ids of each kind, so only its groups can be too many.
        StatusError::TooMany => AttestError::TooManyGroups,
    })
}

pub(crate) fn read(directory: &OwnedFd, name: &'static str) -> Result<String, AttestError> {
    sys::read_whole(&open(directory, name)?, usize::MAX).map_err(|error| read_error(name, error))
}

fn open(directory: &OwnedFd, name: &'static str) -> Result<OwnedFd, AttestError> {
    let file = fcntl::openat(
        directory,
        name,
        OFlag::O_RDONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    );
    file.map_err(|error| read_error(name, error))
}

fn read_error(name: &'static str, error: Errno) -> AttestError {
    match error {
        Errno::ESRCH | Errno::ENOENT => AttestError::CallerGone,
        error => AttestError::kernel(name, error),
    }
}

/// Returns the error's number, if the kernel has returned the error.
pub(crate) fn os_error(error: &io::Error) -> Option<Errno> {
    error.raw_os_error().map(Errno::from_raw)
}

/// Parses field 22 of `stat`. It counts from the *last* `)`, since the process chooses the name in
/// field 2.
pub(crate) fn start_time(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Returns whether a `uid_map` maps every id to itself, as in the initial user namespace.
pub(crate) fn is_identity_map(text: &str) -> bool {
    let mut numbers = text.split_ascii_whitespace();
    (
        numbers.next(),
        numbers.next(),
        numbers.next(),
        numbers.next(),
    ) == (Some("0"), Some("0"), Some("4294967295"), None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_survives_hostile_names() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 424242 20 21";
        for name in ["cat", "a b", "a) R 1 (b", "x)\n1 (y", ")", ""] {
            let stat = format!("77 ({name}) {tail}");
            assert_eq!(start_time(&stat), Some(424_242), "{name:?}");
        }
        for broken in ["", "77", "77 (cat", "77 (cat) S 1 2"] {
            assert_eq!(start_time(broken), None, "{broken:?}");
        }
    }

    #[test]
    fn identity_map_is_recognized_exactly() {
        assert!(is_identity_map("         0          0 4294967295\n"));
        for map in [
            "",
            "         0       1001          1\n",
            "0 0 65536\n",
            "0 0 4294967294\n1 1 1\n",
            "0 0 4294967295\n0 0 1\n",
        ] {
            assert!(!is_identity_map(map), "{map:?}");
        }
    }
}

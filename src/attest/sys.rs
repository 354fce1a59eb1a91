//! System calls and socket options of attestation.
//!
//! rustix and nix make the calls that they wrap safely. Each unsafe block that is left
//! has the reason why it is sound.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt::PeerPidfd};
use nix::time::{ClockId, clock_gettime};
use rustix::fs::{AtFlags, StatxFlags};
use rustix::process::{Pid, PidfdFlags};

/// Calls `pidfd_open(2)`: returns a descriptor of the process that has this pid now.
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// Returns the CPU time that this thread has used.
#[expect(clippy::disallowed_methods, reason = "no other clock shows CPU time")]
pub(crate) fn thread_time() -> nix::Result<Duration> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from)
}

/// The size of the first buffer. Most files of `/proc` and cgroups fit, and are read in one call.
const SMALL_FILE: usize = 4096;

/// Reads a file of `/proc` or of a cgroup from its beginning, whatever its position. Stops at its
/// end, or after more than `most` bytes.
///
/// `read_to_end` is slower: it queries the file's size, which such files do not have, and begins
/// with small buffers.
pub(crate) fn read_whole(file: impl std::os::fd::AsFd, most: usize) -> nix::Result<String> {
    let (mut bytes, mut filled) = (vec![0; SMALL_FILE], 0);
    loop {
        let at = filled.try_into().map_err(|_| Errno::EOVERFLOW)?;
        match nix::sys::uio::pread(&file, &mut bytes[filled..], at)? {
            0 => break,
            more => filled += more,
        }
        if filled > most {
            break;
        }
        if filled == bytes.len() {
            bytes.resize(filled * 2, 0);
        }
    }
    bytes.truncate(filled);
    // A process may have any bytes in its name. All fields that are parsed are ASCII.
    Ok(String::from_utf8(bytes)
        .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
}

/// Calls `readlinkat(2)` with `room` as the buffer, and cuts off what does not fit. Other wrappers
/// allocate for the longest path.
pub(crate) fn read_link<'r>(
    directory: BorrowedFd<'_>,
    name: &CStr,
    room: &'r mut [u8],
) -> io::Result<&'r [u8]> {
    let length = rustix::fs::readlinkat_raw(directory, name, &mut *room)?;
    Ok(&room[..length])
}

/// The facts about a file that its file system returns without a query to its server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileFacts {
    pub(crate) device: u64,
    pub(crate) inode: u64,
    /// The change time in seconds and nanoseconds.
    pub(crate) changed: (i64, i64),
}

/// Calls `statx(2)` for facts that the kernel has cached. A program may be on a network's or a
/// user's file system. A query to a server that does not reply would hang the daemon.
pub(crate) fn file_facts(directory: BorrowedFd<'_>, name: &CStr) -> nix::Result<FileFacts> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let fields = StatxFlags::INO | StatxFlags::CTIME;
    let found = rustix::fs::statx(directory, name, flags, fields)
        .map_err(|errno| Errno::from_raw(errno.raw_os_error()))?;
    let (seconds, nanoseconds) = (found.stx_ctime.tv_sec, found.stx_ctime.tv_nsec);
    Ok(FileFacts {
        device: rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor),
        inode: found.stx_ino,
        changed: (seconds, nanoseconds.into()),
    })
}

/// Reads `SO_PEERPIDFD`: a descriptor of the process that connected. `None` on kernels before 6.5.
///
/// If that process has exited, some kernels return an error, and others a pidfd that reads as
/// exited.
pub(crate) fn peer_pidfd(socket: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    match getsockopt(&socket, PeerPidfd) {
        Ok(pidfd) => Ok(Some(pidfd)),
        Err(Errno::ENOPROTOOPT) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// The facts that `PIDFD_GET_INFO` returns: ids in the order real, effective, saved, file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PidfdInfo {
    pub(crate) uids: [u32; 4],
    pub(crate) gids: [u32; 4],
    /// The id of its cgroup v2. `None` on a kernel without cgroups.
    pub(crate) cgroup_id: Option<u64>,
}

/// `struct pidfd_info` of linux/pidfd.h in its first version, 64 bytes.
#[repr(C)]
#[derive(Default)]
struct RawPidfdInfo {
    mask: u64,
    cgroup_id: u64,
    pid: u32,
    tgid: u32,
    ppid: u32,
    ruid: u32,
    rgid: u32,
    euid: u32,
    egid: u32,
    suid: u32,
    sgid: u32,
    fsuid: u32,
    fsgid: u32,
    exit_code: i32,
}

nix::ioctl_readwrite!(get_pidfd_info, 0xFF, 11, RawPidfdInfo);

/// Calls `ioctl_pidfd(2)`: returns the ids and the cgroup of a process in one call. `None` before
/// Linux 6.13.
#[expect(
    unsafe_code,
    reason = "the ioctl functions of rustix and nix are unsafe, since they take any request"
)]
pub(crate) fn pidfd_info(pidfd: BorrowedFd<'_>) -> io::Result<Option<PidfdInfo>> {
    const CREDENTIALS: u64 = 1 << 1;
    const CGROUP_ID: u64 = 1 << 2;
    let mut raw = RawPidfdInfo {
        mask: CREDENTIALS | CGROUP_ID,
        ..RawPidfdInfo::default()
    };
    // SAFETY: the request's number holds the size of `raw`, and the kernel writes at most that.
    match unsafe { get_pidfd_info(pidfd.as_raw_fd(), &raw mut raw) } {
        Ok(_) if raw.mask & CREDENTIALS == 0 => Ok(None),
        Ok(_) => Ok(Some(PidfdInfo {
            uids: [raw.ruid, raw.euid, raw.suid, raw.fsuid],
            gids: [raw.rgid, raw.egid, raw.sgid, raw.fsgid],
            cgroup_id: (raw.mask & CGROUP_ID != 0).then_some(raw.cgroup_id),
        })),
        Err(Errno::ENOTTY | Errno::EINVAL | Errno::ENOSYS) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// `struct file_handle` for kernfs, with the inode number of a directory.
#[repr(C)]
struct KernfsHandle {
    bytes: libc::c_uint,
    kind: libc::c_int,
    id: [u8; 8],
}

/// `FILEID_KERNFS` of linux/exportfs.h.
const FILEID_KERNFS: libc::c_int = 0xfe;

/// Calls `open_by_handle_at(2)`: opens the directory with this inode number in the kernfs that
/// `mount` is on (cgroup2, here). It takes CAP_DAC_READ_SEARCH. The descriptor only names the
/// directory (`O_PATH`).
#[expect(unsafe_code, reason = "neither rustix nor nix has this call")]
pub(crate) fn open_kernfs(mount: BorrowedFd<'_>, id: u64) -> io::Result<OwnedFd> {
    let mut handle = KernfsHandle {
        bytes: 8,
        kind: FILEID_KERNFS,
        id: id.to_ne_bytes(),
    };
    // SAFETY: `handle` has the layout of a file_handle with 8 bytes after its header, and lives
    // through the call.
    let fd = unsafe {
        libc::open_by_handle_at(
            mount.as_raw_fd(),
            (&raw mut handle).cast(),
            libc::O_PATH | libc::O_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so this is a new descriptor without another owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Reads `SO_PEERGROUPS`: the supplementary groups of the process at connect(2). Fails with ERANGE,
/// without a copy, if there are more than `most`.
#[expect(unsafe_code, reason = "neither rustix nor nix has this option")]
pub(crate) fn peer_groups(socket: BorrowedFd<'_>, most: usize) -> nix::Result<Vec<u32>> {
    let mut groups: Vec<libc::gid_t> = vec![0; most];
    let mut length =
        libc::socklen_t::try_from(size_of_val(&groups[..])).map_err(|_| Errno::EINVAL)?;
    // SAFETY: `groups` has room for `length` bytes, and the kernel writes at most that many.
    let status = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    Errno::result(status)?;
    groups.truncate(length as usize / size_of::<libc::gid_t>());
    Ok(groups)
}

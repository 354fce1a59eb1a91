//! The few system calls and socket options that no safe wrapper has.
#![allow(
    unsafe_code,
    reason = "raw system calls are this module's whole purpose; nothing else is in it"
)]

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// Linux 6.5.
const SO_PEERPIDFD: libc::c_int = 77;

/// `pidfd_open(2)`: a descriptor for the process that has this number now.
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers and no memory; the result is checked below.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so this is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Room for most files of `/proc` and cgroups, so that they are read at once.
const SMALL_FILE: usize = 4096;

/// Reads a file of `/proc` or of a cgroup from its beginning, wherever it stands, to its end, or until more than `most` bytes
/// have come. Not by `read_to_end`, which
/// asks for sizes that such files don't have, and tries with small buffers first.
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
    // A process may have named itself in any bytes; everything that is read of such files is ASCII.
    Ok(String::from_utf8(bytes)
        .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
}

/// `readlinkat(2)` into `room`; what does not fit into it is cut off. Without room for the longest of paths, as others would.
pub(crate) fn read_link<'r>(
    directory: BorrowedFd<'_>,
    name: &CStr,
    room: &'r mut [u8],
) -> nix::Result<&'r [u8]> {
    // SAFETY: `name` ends with a zero, and the kernel writes at most `room.len()` bytes into `room`.
    let length = unsafe {
        libc::readlinkat(
            directory.as_raw_fd(),
            name.as_ptr(),
            room.as_mut_ptr().cast(),
            room.len(),
        )
    };
    let length = usize::try_from(length).map_err(|_| Errno::last())?;
    Ok(&room[..length])
}

/// A file, as far as its file system tells without asking anybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileFacts {
    pub(crate) device: u64,
    pub(crate) inode: u64,
    /// Seconds and nanoseconds.
    pub(crate) changed: (i64, i64),
}

/// `statx(2)` by what the kernel has at hand: a program may lie on a network's or a user's file system whose server does not
/// answer, and asking it would hang the daemon.
pub(crate) fn file_facts(directory: BorrowedFd<'_>, name: &CStr) -> nix::Result<FileFacts> {
    let mut found = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT;
    let wanted = libc::STATX_INO | libc::STATX_CTIME;
    // SAFETY: `name` ends with a zero, and `found` has room for what the kernel writes.
    let status = unsafe {
        libc::statx(
            directory.as_raw_fd(),
            name.as_ptr(),
            flags,
            wanted,
            found.as_mut_ptr(),
        )
    };
    Errno::result(status)?;
    // SAFETY: all of its bytes are zero or written by the kernel, and any bytes are a valid value.
    let found = unsafe { found.assume_init() };
    let (seconds, nanoseconds) = (found.stx_ctime.tv_sec, found.stx_ctime.tv_nsec);
    Ok(FileFacts {
        device: libc::makedev(found.stx_dev_major, found.stx_dev_minor),
        inode: found.stx_ino,
        changed: (seconds, nanoseconds.into()),
    })
}

/// `SO_PEERPIDFD`: a descriptor for the process that connected. `None` on kernels before 6.5.
///
/// A connector that is gone is an error on some kernels, and a pidfd that reads as exited on others.
pub(crate) fn peer_pidfd(socket: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let mut fd: RawFd = -1;
    let mut length = libc::socklen_t::try_from(size_of::<RawFd>()).map_err(io::Error::other)?;
    // SAFETY: `fd` is a valid place for the `length` bytes that the kernel may write.
    let status = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut length,
        )
    };
    if status < 0 {
        return match Errno::last() {
            Errno::ENOPROTOOPT => Ok(None),
            errno => Err(errno.into()),
        };
    }
    // SAFETY: the call succeeded, so the kernel has put a new descriptor here that nobody else owns.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// What `PIDFD_GET_INFO` tells of a process: ids in the order real, effective, saved, filesystem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PidfdInfo {
    pub(crate) uids: [u32; 4],
    pub(crate) gids: [u32; 4],
    /// Of its cgroup v2; `None` on a kernel without cgroups.
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

/// `ioctl_pidfd(2)`: the ids and the cgroup of a process in one call. `None` before Linux 6.13.
pub(crate) fn pidfd_info(pidfd: BorrowedFd<'_>) -> io::Result<Option<PidfdInfo>> {
    const CREDENTIALS: u64 = 1 << 1;
    const CGROUP_ID: u64 = 1 << 2;
    let mut raw = RawPidfdInfo {
        mask: CREDENTIALS | CGROUP_ID,
        ..RawPidfdInfo::default()
    };
    // SAFETY: the request's number holds the size of `raw`, and the kernel writes no more than that.
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

/// `struct file_handle` for kernfs: the inode number of a directory.
#[repr(C)]
struct KernfsHandle {
    bytes: libc::c_uint,
    kind: libc::c_int,
    id: [u8; 8],
}

/// `FILEID_KERNFS` of linux/exportfs.h.
const FILEID_KERNFS: libc::c_int = 0xfe;

/// `open_by_handle_at(2)`: the directory with this inode number in the kernfs (cgroup2, here) that `mount` is on. It takes
/// CAP_DAC_READ_SEARCH. The descriptor only names the directory (`O_PATH`).
pub(crate) fn open_kernfs(mount: BorrowedFd<'_>, id: u64) -> io::Result<OwnedFd> {
    let mut handle = KernfsHandle {
        bytes: 8,
        kind: FILEID_KERNFS,
        id: id.to_ne_bytes(),
    };
    // SAFETY: `handle` has the layout of a file_handle whose 8 bytes follow its header, and lives through the call.
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
    // SAFETY: the call succeeded, so this is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Reads `SO_PEERGROUPS`: the connector's supplementary groups at connect(2). ERANGE if there are more than `most`, without a
/// copy of them.
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

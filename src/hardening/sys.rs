//! Harmless system calls, to detect a filter that forbids them.

use std::fs::File;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use rustix::fs::{AtFlags, CWD, StatxFlags};
use rustix::process::PidfdFlags;

/// Tries `open_by_handle_at(2)` with a handle that does not exist: EFAULT, or EPERM where the call
/// is forbidden.
#[expect(unsafe_code, reason = "neither rustix nor nix has this call")]
pub(super) fn open_by_handle_at() -> Result<(), Errno> {
    // SAFETY: the kernel reads the handle through a pointer that it checks, and writes nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            libc::AT_FDCWD,
            std::ptr::null::<u8>(),
            0,
        )
    };
    Errno::result(result).map(drop)
}

/// Tries `setns(2)` with the network namespace that the thread is in already.
pub(super) fn setns_net() -> Result<(), Errno> {
    match File::open("/proc/thread-self/ns/net") {
        Ok(own) => setns(own, CloneFlags::CLONE_NEWNET),
        Err(_) => Ok(()),
    }
}

/// Tries `pidfd_open(2)` with this process.
pub(super) fn pidfd_open() -> Result<(), Errno> {
    let opened = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty());
    opened.map(drop).map_err(errno)
}

/// Tries `statx(2)` with this process's executable. The feature `linux_4_11` of rustix has it make
/// this one call: without that, rustix tries again after an error, and hides EPERM.
pub(super) fn statx() -> Result<(), Errno> {
    let (flags, mask) = (AtFlags::STATX_DONT_SYNC, StatxFlags::INO);
    let found = rustix::fs::statx(CWD, c"/proc/self/exe", flags, mask);
    found.map(drop).map_err(errno)
}

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

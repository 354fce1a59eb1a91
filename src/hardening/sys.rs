//! Harmless system calls, to detect a filter that forbids them.
#![allow(
    unsafe_code,
    reason = "raw system calls are this module's whole purpose; nothing else is in it"
)]

use std::fs::File;
use std::mem::MaybeUninit;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};

/// Tries `open_by_handle_at(2)` with a handle that does not exist: EFAULT, or EPERM where the call
/// is forbidden.
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
    // SAFETY: takes two integers and no memory.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) };
    let fd = Errno::result(fd)?;
    // SAFETY: the descriptor is new and used nowhere else.
    unsafe { libc::syscall(libc::SYS_close, fd) };
    Ok(())
}

/// Tries `statx(2)` with this process's executable.
pub(super) fn statx() -> Result<(), Errno> {
    let mut found = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path ends with a zero, and `found` has room for what the kernel writes.
    let result = unsafe {
        libc::statx(
            libc::AT_FDCWD,
            c"/proc/self/exe".as_ptr(),
            libc::AT_STATX_DONT_SYNC,
            libc::STATX_INO,
            found.as_mut_ptr(),
        )
    };
    Errno::result(result).map(drop)
}

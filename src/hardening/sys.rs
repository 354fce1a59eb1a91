//! System calls that fail harmlessly, to detect a filter that forbids them.
#![allow(
    unsafe_code,
    reason = "raw system calls are this module's whole purpose; nothing else is in it"
)]

use std::fs::File;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};

/// Returns the error of `open_by_handle_at(2)` for a handle that does not exist: EFAULT, or EPERM
/// where the call is forbidden.
pub(super) fn open_by_handle_at() -> Errno {
    // SAFETY: the kernel reads the handle through a pointer that it checks, and writes nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            libc::AT_FDCWD,
            std::ptr::null::<u8>(),
            0,
        )
    };
    Errno::result(result).err().unwrap_or(Errno::from_raw(0))
}

/// Returns the error of `setns(2)` for the network namespace that the thread is in already.
pub(super) fn setns_net() -> Errno {
    let entered =
        File::open("/proc/thread-self/ns/net").map(|own| setns(own, CloneFlags::CLONE_NEWNET));
    entered
        .ok()
        .and_then(Result::err)
        .unwrap_or(Errno::from_raw(0))
}

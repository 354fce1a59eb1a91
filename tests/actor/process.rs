//! Children: as another user, waited for or not, with a certain pid.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, waitid, waitpid};
use nix::unistd::{ForkResult, Gid, Pid, Uid, fork, pipe, setgroups, setresgid, setresuid};

/// Becomes this user, with the group of the same number and no others.
pub(crate) fn become_user(uid: u32) {
    become_of(uid, uid);
}

/// Becomes this user, with this group and no others.
pub(crate) fn become_of(uid: u32, gid: u32) {
    setgroups(&[]).unwrap();
    setresgid(Gid::from_raw(gid), Gid::from_raw(gid), Gid::from_raw(gid)).unwrap();
    setresuid(Uid::from_raw(uid), Uid::from_raw(uid), Uid::from_raw(uid)).unwrap();
    // A change of user clears it.
    set_pdeathsig(Signal::SIGKILL).unwrap();
}

/// Becomes this user with this number of supplementary groups, from 100,000 on.
pub(crate) fn become_with_groups(uid: u32, count: usize) {
    let groups: Vec<Gid> = (100_000..).take(count).map(Gid::from_raw).collect();
    setgroups(&groups).unwrap();
    setresgid(Gid::from_raw(uid), Gid::from_raw(uid), Gid::from_raw(uid)).unwrap();
    setresuid(Uid::from_raw(uid), Uid::from_raw(uid), Uid::from_raw(uid)).unwrap();
    // As above.
    set_pdeathsig(Signal::SIGKILL).unwrap();
}

/// A child, which ends at its cue or with its parent.
pub(crate) struct Child {
    pub(crate) pid: Pid,
    output_pipe: File,
    cue_pipe: Option<File>,
}

/// The child's end of the pipe for its cue.
pub(crate) struct Cue(File);

impl Cue {
    /// Waits for the parent's cue, or its end.
    pub(crate) fn wait(&mut self) {
        let _ = self.0.read(&mut [0]);
    }
}

/// Starts a child that does `act` and then ends. The result of `act` is kept for [`Child::output`].
pub(crate) fn child(act: impl FnOnce(&mut Cue) -> String) -> Child {
    let (output_pipe, mut output_end) = pair();
    let (cue_end, cue_pipe) = pair();
    // SAFETY: this program has one thread.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => Child {
            pid: child,
            output_pipe,
            cue_pipe: Some(cue_pipe),
        },
        ForkResult::Child => {
            drop((output_pipe, cue_pipe));
            set_pdeathsig(Signal::SIGKILL).unwrap();
            let text = act(&mut Cue(cue_end));
            let _ = output_end.write_all(text.as_bytes());
            drop(output_end);
            // SAFETY: ends this process without running the parent's exit code in it.
            unsafe { libc::_exit(0) }
        }
    }
}

fn pair() -> (File, File) {
    let (read, write): (OwnedFd, OwnedFd) = pipe().unwrap();
    (read.into(), write.into())
}

impl Child {
    /// Lets a waiting child go on.
    pub(crate) fn cue(&mut self) {
        if let Some(mut cue_pipe) = self.cue_pipe.take() {
            let _ = cue_pipe.write_all(b"x");
        }
    }

    /// Returns the child's whole output, and waits until it has ended. It stays a zombie.
    pub(crate) fn output(&mut self) -> String {
        let mut text = String::new();
        let _ = self.output_pipe.read_to_string(&mut text);
        // Its end of the pipe is closed a moment before it has ended.
        waitid(
            Id::Pid(self.pid),
            WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT,
        )
        .unwrap();
        text
    }

    pub(crate) fn reap(self) {
        drop(self.cue_pipe);
        waitpid(self.pid, None).unwrap();
    }
}

/// `struct clone_args` up to `set_tid_size` (clone3(2)).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Starts a process of `uid` with the number `pid`, which does `act` and ends, at the latest with
/// this one. Returns `None` if the number is in use.
pub(crate) fn reuse(pid: Pid, uid: u32, act: impl FnOnce()) -> Option<Pid> {
    let (mut is_there, mut there) = pair();
    let number = pid.as_raw();
    let arguments = CloneArgs {
        exit_signal: u64::try_from(libc::SIGCHLD).unwrap(),
        set_tid: std::ptr::from_ref(&number) as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    // SAFETY: as fork(2): no memory is shared, and this program has one thread.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            size_of::<CloneArgs>(),
        )
    };
    match result {
        0 => {
            set_pdeathsig(Signal::SIGKILL).unwrap();
            become_user(uid);
            there.write_all(b"x").unwrap();
            act();
            // SAFETY: as in `child`.
            unsafe { libc::_exit(0) }
        }
        child if child > 0 => {
            is_there.read_exact(&mut [0]).unwrap();
            Some(Pid::from_raw(i32::try_from(child).unwrap()))
        }
        _ => None,
    }
}

/// Starts a process that shares this one's memory, and does `act`: system calls alone, since other
/// effects would also be effects on this process.
pub(crate) fn share_memory(
    act: extern "C" fn(*mut libc::c_void) -> libc::c_int,
    argument: *mut libc::c_void,
) -> Pid {
    // Never freed: it is in use as long as the process lives.
    let stack = Box::leak(vec![0_u128; 4096].into_boxed_slice());
    let flags = libc::CLONE_VM | libc::SIGCHLD;
    // SAFETY: the stack is that of the new process alone, which makes nothing but system calls.
    let pid = unsafe { libc::clone(act, stack.as_mut_ptr_range().end.cast(), flags, argument) };
    assert!(pid > 0, "{}", std::io::Error::last_os_error());
    Pid::from_raw(pid)
}

/// Does nothing until it is killed.
pub(crate) fn stay() -> ! {
    loop {
        nix::unistd::pause();
    }
}

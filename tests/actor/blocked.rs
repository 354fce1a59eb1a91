//! Callers that keep whoever looks at them waiting (attack 25).

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, execv};

use crate::ALICE;
use crate::daemon;
use crate::fuse::{HangingFiles, Hangs, is_stuck};
use crate::process::{Child, become_user, child, share_memory};
use crate::wire::{self, Address};

/// So many processes of Alice's in each of these cgroups have each sent a request, and then execute a program. That takes, and keeps, the lock of the
/// process under which its memory is changed (`exec_update_lock`), and waits for the lock of its memory, which a helper
/// that shares the memory holds: it maps a file whose server does not answer.
///
/// Says so when all of them are stuck, and ends when its input does.
pub(crate) fn callers(count: usize, cgroups: &[&str], to: &Address) {
    let files = HangingFiles::mount_privately(Hangs::Read);
    // Its pages are locked until the server answers.
    let mut reader = child(|_| {
        let _ = File::open(files.file()).unwrap().read(&mut [0]);
        String::new()
    });
    files.await_asked();
    let held = daemon::hold();
    let each = cgroups.iter().flat_map(|cgroup| (0..count).map(move |_| cgroup));
    let callers: Vec<(Child, Pid)> = each.map(|cgroup| caller(&files, cgroup, to)).collect();
    drop(held);
    println!("begun");
    std::io::stdout().flush().unwrap();
    let _ = std::io::stdin().read(&mut [0]);
    for (caller, helper) in &callers {
        let _ = kill(*helper, Signal::SIGKILL);
        let _ = kill(caller.pid, Signal::SIGKILL);
    }
    // They end when the server does.
    drop(files);
    reader.cue();
    reader.reap();
    for (caller, _) in callers {
        caller.reap();
    }
}

/// One of them, and its helper.
fn caller(files: &HangingFiles, cgroup: &str, to: &Address) -> (Child, Pid) {
    let path = CString::new(files.file().to_str().unwrap()).unwrap();
    let (tell, told) = UnixStream::pair().unwrap();
    let mut caller = child(|cue| {
        std::fs::write(format!("{cgroup}/cgroup.procs"), "0").unwrap();
        become_user(ALICE);
        let fd = to.connect();
        wire::send(&fd);
        let program = [c"true"];
        let helper = share_memory(map, path.as_ptr().cast_mut().cast());
        // From here on nothing may take memory: that would wait for the helper, too.
        let _ = nix::unistd::write(&tell, &helper.as_raw().to_ne_bytes());
        cue.wait();
        let _ = execv(c"/bin/true", &program);
        String::new()
    });
    let mut helper = [0; 4];
    (&told).read_exact(&mut helper).unwrap();
    let helper = Pid::from_raw(i32::from_ne_bytes(helper));
    await_stuck(helper);
    caller.cue();
    await_stuck(caller.pid);
    (caller, helper)
}

fn await_stuck(pid: Pid) {
    while !is_stuck(pid) {
        thread::yield_now();
    }
}

/// Maps the file with this name.
extern "C" fn map(path: *mut libc::c_void) -> libc::c_int {
    // SAFETY: the path is a string of the caller's, whose memory this is too.
    unsafe {
        let path = CStr::from_ptr(path.cast());
        let file = libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
        libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_PRIVATE, file, 0);
        libc::_exit(0)
    }
}

//! Callers that block each process which reads their `/proc` files (T25).

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::IntoRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, dup2_stdout, execv};

use crate::cgroup_moves::{Cgroup, own_cgroup};
use crate::daemon::{self, Connection};
use crate::fuse::{HangingFiles, Hangs, is_stuck};
use crate::process::{Child, become_user, child, share_memory};
use crate::raw_http::{self, Address};
use crate::{ALICE, BOB};

/// Processes that are stuck until this value is dropped.
struct StuckProcesses {
    files: HangingFiles,
    reader: Child,
    processes: Vec<(Child, Pid)>,
}

impl StuckProcesses {
    fn new() -> Self {
        let files = HangingFiles::mount_privately(Hangs::Read);
        // Its pages are locked until the server responds.
        let reader = child(|_| {
            let _ = File::open(files.file()).unwrap().read(&mut [0]);
            String::new()
        });
        files.await_hanging_request();
        Self {
            files,
            reader,
            processes: Vec::new(),
        }
    }

    /// Adds one: see [`caller`].
    fn add(&mut self, begin: impl FnOnce() -> Vec<CString>) {
        self.processes.push(caller(&self.files, begin));
    }

    /// Prints a line, waits for the end of the input, and ends the processes.
    fn keep(mut self) {
        println!("begun");
        std::io::stdout().flush().unwrap();
        let _ = std::io::stdin().read(&mut [0]);
        for (process, helper) in &self.processes {
            let _ = kill(*helper, Signal::SIGKILL);
            let _ = kill(process.pid, Signal::SIGKILL);
        }
        // They end when the server does.
        drop(self.files);
        self.reader.cue();
        self.reader.reap();
        for (process, _) in self.processes {
            process.reap();
        }
    }
}

/// Starts this number of processes of Alice in each of these cgroups. Each sends a request and then
/// executes a program. That locks the process against changes of its memory (`exec_update_lock`),
/// and waits for the lock of its memory. A helper that shares the memory holds that lock: it maps a
/// file of a server that does not respond.
///
/// Prints a line when all of them are stuck, and ends when its input does.
pub(crate) fn callers(count: usize, cgroups: &[&str], to: &Address) {
    let mut stuck = StuckProcesses::new();
    let stopped = daemon::hold();
    let each = cgroups
        .iter()
        .flat_map(|cgroup| (0..count).map(move |_| cgroup));
    for cgroup in each {
        stuck.add(|| {
            std::fs::write(format!("{cgroup}/cgroup.procs"), "0").unwrap();
            become_user(ALICE);
            let fd = to.connect();
            raw_http::send(&fd);
            // Until it executes that.
            let _ = fd.into_raw_fd();
            vec![c"/bin/true".to_owned()]
        });
    }
    drop(stopped);
    stuck.keep();
}

/// Does the same for one process, which listens at this path instead of an agent.
pub(crate) fn agent(socket: &str) {
    let mut stuck = StuckProcesses::new();
    stuck.add(|| {
        let _ = UnixListener::bind(socket).unwrap().into_raw_fd();
        vec![c"/bin/true".to_owned()]
    });
    stuck.keep();
}

/// Plays a blocked caller of Alice, which goes on when a thread of the daemon waits for it, or has
/// attested it. Bob sends a request before that. If Bob's outcome is not credentials, it counts
/// instead of Alice's.
pub(crate) fn stuck(to: &Address) -> String {
    let files = HangingFiles::mount_privately(Hangs::Read);
    let mut reader = child(|_| {
        let _ = File::open(files.file()).unwrap().read(&mut [0]);
        String::new()
    });
    files.await_hanging_request();
    let (over, from) = UnixStream::pair().unwrap();
    let (mut response_pipe, output_end) = UnixStream::pair().unwrap();
    let stopped = daemon::hold();
    let (caller, _) = caller(&files, || {
        become_user(ALICE);
        let fd = to.connect();
        raw_http::send_part(&fd);
        raw_http::pass(&over, &fd);
        dup2_stdout(&output_end).unwrap();
        let program = std::env::current_exe().unwrap();
        let words = [
            program.to_str().unwrap(),
            "conclude",
            &raw_http::inheritable(fd).to_string(),
        ];
        words.map(|word| CString::new(word).unwrap()).to_vec()
    });
    drop(output_end);
    let connection = Connection::of(to, &raw_http::receive(&from));
    drop(stopped);
    while !daemon::has_stuck_thread() && !daemon::is_read(&connection) {
        thread::yield_now();
    }
    // A search for a process covers all of its cgroup.
    let bobs_cgroup = Cgroup::new(&own_cgroup(), "bob-", "");
    let mut bob = child(|_| {
        bobs_cgroup.write("cgroup.procs", "0");
        become_user(BOB);
        raw_http::fetch(&to.connect())
    });
    let bobs = bob.output();
    bob.reap();
    drop(files);
    let mut alices = String::new();
    response_pipe.read_to_string(&mut alices).unwrap();
    caller.reap();
    reader.cue();
    reader.reap();
    if bobs.contains("AccessKeyId") {
        alices
    } else {
        bobs
    }
}

/// Starts one of them, and its helper. `begin` returns the program to execute and its words.
fn caller(files: &HangingFiles, begin: impl FnOnce() -> Vec<CString>) -> (Child, Pid) {
    let path = CString::new(files.file().to_str().unwrap()).unwrap();
    let (pid_pipe, pid_pipe_end) = UnixStream::pair().unwrap();
    let mut caller = child(|cue| {
        let program = begin();
        let helper = share_memory(map, path.as_ptr().cast_mut().cast());
        // From here on nothing may allocate memory: that would wait for the helper, too.
        let _ = nix::unistd::write(&pid_pipe, &helper.as_raw().to_ne_bytes());
        cue.wait();
        let _ = execv(&program[0], &program);
        String::new()
    });
    let mut helper = [0; 4];
    (&pid_pipe_end).read_exact(&mut helper).unwrap();
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
    // SAFETY: the path is a string of the caller's, and this process shares that memory.
    unsafe {
        let path = CStr::from_ptr(path.cast());
        let file = libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ,
            libc::MAP_PRIVATE,
            file,
            0,
        );
        libc::_exit(0)
    }
}

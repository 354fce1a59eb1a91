//! Child processes that never outlive the test.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::prctl;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Pid, getppid};

use super::super::machine;

/// The time between two calls of a condition. Under emulation it is a second,
/// because such a call is often a program that needs seconds.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// The number of a log's last lines that a failed test shows.
const SHOWN_LINES: usize = 40;

/// Calls `ready` until it returns a value. Panics with `what` after `within`, a bound for a machine
/// that hangs, so choose it generously.
pub(crate) fn await_some<T>(
    what: &str,
    within: Duration,
    mut ready: impl FnMut() -> Option<T>,
) -> T {
    let within = within * patience();
    let deadline = Instant::now() + within;
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what}: not within {within:?}");
        thread::sleep(POLL_INTERVAL * patience().pow(2));
    }
}

/// Returns how many times as long a step may take here. Under emulation a program needs about ten
/// times its usual time.
pub(crate) fn patience() -> u32 {
    if machine::is_inside() { 10 } else { 1 }
}

/// Returns a command that starts `program` behind these words, such as `unshare --pid`, or directly
/// if there are none.
pub(crate) fn behind(words: &[&str], program: &Path) -> Command {
    let mut words = words.iter().map(OsStr::new).chain([program.as_os_str()]);
    let mut command = Command::new(words.next().expect("the program at least"));
    command.args(words);
    command
}

/// Time within which the kernel ends a killed process. One that waits for a file system that hangs
/// does not end before the file system does.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// A child process. Dropping it ends it and all that it has started: SIGKILL to its process group,
/// then wait, for [`KILL_TIMEOUT`] at most.
pub(crate) struct OwnedProcess {
    child: Child,
    status: Option<ExitStatus>,
}

impl OwnedProcess {
    /// Returns its process id. The kernel does not reuse it until this is dropped or `wait` has
    /// returned a status.
    pub(crate) fn id(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("the kernel's pids are below 2^22"))
    }

    /// Takes its standard input, if the command made a pipe of it.
    pub(crate) fn stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// Takes its standard output, if the command made a pipe of it.
    pub(crate) fn stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Returns false once it has ended.
    pub(crate) fn is_running(&self) -> bool {
        // WNOWAIT leaves the zombie: until `end` reaps it, its id names its group and nothing else.
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        self.status.is_none()
            && waitid(Id::Pid(self.id()), flags).expect("an own child") == WaitStatus::StillAlive
    }

    /// Waits for its exit status, with what is left of its group killed. Returns `None` if it still
    /// runs after `within`.
    pub(crate) fn wait(&mut self, within: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + within;
        while self.is_running() {
            if Instant::now() >= deadline {
                return None;
            }
            thread::sleep(Duration::from_millis(5));
        }
        Some(self.end())
    }

    /// Kills it and returns its exit status.
    pub(crate) fn end(&mut self) -> ExitStatus {
        if let Some(status) = self.status {
            return status;
        }
        self.kill();
        let status = self.child.wait().expect("an own child");
        self.status = Some(status);
        status
    }

    fn kill(&self) {
        // An error means that no process is left to kill.
        let _ = killpg(self.id(), Signal::SIGKILL);
    }

    /// Kills it. A test that panics drops its values in another order than one that passes. So the
    /// file system that the process waits for may end only after this.
    fn end_or_leave(&mut self) {
        if self.status.is_some() {
            return;
        }
        self.kill();
        if self.wait(KILL_TIMEOUT).is_none() {
            eprintln!("process {} is killed, but does not end", self.id());
        }
    }
}

impl Drop for OwnedProcess {
    fn drop(&mut self) {
        self.end_or_leave();
    }
}

/// Starts a child that the kernel kills when this test process ends, in whichever way it ends, also
/// by SIGKILL.
///
/// PR_SET_PDEATHSIG fires when the *thread* that forked ends. Each test runs in a thread of its
/// own, which ends before other tests do. So one thread that lives as long as the process starts
/// all children.
pub(crate) fn spawn(mut command: Command) -> io::Result<OwnedProcess> {
    type Job = (Command, Sender<io::Result<OwnedProcess>>);
    static SPAWNER: OnceLock<Sender<Job>> = OnceLock::new();

    // A group of its own, so that ending it also ends what it has started.
    command.process_group(0);
    let parent = Pid::this();
    // SAFETY: the closure runs between fork and exec and makes two system calls. It neither
    // allocates nor takes a lock.
    #[allow(unsafe_code)]
    unsafe {
        // After std's setuid, which would clear the signal again.
        command.pre_exec(move || {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            // If the parent ended before the call above, the kernel would not kill this child.
            if getppid() == parent {
                Ok(())
            } else {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        });
    }
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, jobs): (_, Receiver<Job>) = channel();
        let run = move || {
            for (mut command, reply) in jobs {
                // If the test has ended, dropping the reply ends the child.
                let _ = reply.send(command.spawn().map(|child| OwnedProcess {
                    child,
                    status: None,
                }));
            }
        };
        thread::Builder::new()
            .name("spawner".to_owned())
            .spawn(run)
            .expect("a thread");
        sender
    });
    let (reply, answer) = channel();
    spawner
        .send((command, reply))
        .expect("the spawner never ends");
    answer.recv().expect("the spawner never ends")
}

/// A long-running program, with both outputs in a log file. A failed test shows the end of it.
pub(crate) struct Process {
    name: String,
    owned: OwnedProcess,
    log: PathBuf,
}

impl Process {
    /// Starts `command`, with its outputs appended to the file `log`. Failures call it `name`.
    pub(crate) fn start(name: &str, mut command: Command, log: &Path) -> Process {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .expect("the log file");
        command
            .stdin(Stdio::null())
            .stdout(duplicate(&file))
            .stderr(file);
        let owned =
            spawn(command).unwrap_or_else(|error| panic!("{name} could not be started: {error}"));
        Process {
            name: name.to_owned(),
            owned,
            log: log.to_owned(),
        }
    }

    /// Returns its name in failures.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Returns its process id, as [`OwnedProcess::id`] does.
    pub(crate) fn id(&self) -> Pid {
        self.owned.id()
    }

    pub(crate) fn owned(&mut self) -> &mut OwnedProcess {
        &mut self.owned
    }

    /// Returns its output so far, that of earlier starts included if they had the same log file.
    pub(crate) fn log(&self) -> String {
        super::read(&self.log)
    }

    /// Waits like `await_some`, but panics at once if the program has ended, with or without
    /// success.
    pub(crate) fn await_some<T>(
        &self,
        what: &str,
        within: Duration,
        mut ready: impl FnMut() -> Option<T>,
    ) -> T {
        await_some(what, within, || {
            let running = self.owned.is_running();
            let value = ready();
            assert!(
                running || value.is_some(),
                "{what}: {} has ended",
                self.name
            );
            value
        })
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.owned.id(), signal)
            .unwrap_or_else(|error| panic!("{signal} to {}: {error}", self.name));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.owned.end_or_leave();
        if thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            let from = lines.len().saturating_sub(SHOWN_LINES);
            eprintln!(
                "--- {}: the last {} of {} lines\n{}",
                self.name,
                lines.len() - from,
                lines.len(),
                lines[from..].join("\n")
            );
        }
    }
}

/// The result of a program that has ended.
#[derive(Debug)]
pub(crate) struct Output {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// Returns the standard output of a program that must have succeeded, else panics with all that
    /// is known. `what` describes its task.
    pub(crate) fn success(self, what: &str) -> String {
        assert!(
            self.status.success(),
            "{what}: {}\n{}{}",
            self.status,
            self.stdout,
            self.stderr
        );
        self.stdout
    }
}

/// Runs `command` to its end, with `input` as its standard input. After `within` it is killed,
/// which its status shows.
pub(crate) fn run(mut command: Command, input: &[u8], within: Duration) -> Output {
    let name = command.get_program().to_owned();
    // Files, not pipes: a grandchild that keeps an output open can't delay this, and a full pipe
    // can't block the program.
    let [mut stdin, mut stdout, mut stderr] =
        [(); 3].map(|()| tempfile::tempfile().expect("a temporary file"));
    stdin
        .write_all(input)
        .and_then(|()| stdin.rewind())
        .expect("write a temporary file");
    command
        .stdin(stdin)
        .stdout(duplicate(&stdout))
        .stderr(duplicate(&stderr));
    let mut owned = spawn(command)
        .unwrap_or_else(|error| panic!("{} could not be started: {error}", name.display()));
    let status = owned.wait(within * patience());
    let status = status.unwrap_or_else(|| owned.end());
    let [stdout, stderr] = [&mut stdout, &mut stderr].map(|file| {
        let mut bytes = Vec::new();
        file.rewind()
            .and_then(|()| file.read_to_end(&mut bytes))
            .expect("read a temporary file");
        String::from_utf8_lossy(&bytes).into_owned()
    });
    Output {
        status,
        stdout,
        stderr,
    }
}

fn duplicate(file: &File) -> Stdio {
    file.try_clone().expect("a second handle").into()
}

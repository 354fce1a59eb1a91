//! Drives the program `tests/actor`, which plays scenes with processes of several users.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::Pid;

use super::cgroup::Cgroup;
use super::counterparts::process::{OwnedProcess, behind, run, spawn};

/// Copies the program into `folder`, and makes the copy `length` bytes long. The hole at its end
/// takes no space, and an agent hashes it like zeros.
pub(crate) fn large_program(folder: &Path, length: u64) -> PathBuf {
    let large = folder.join("large");
    fs::copy(program(), &large).expect("a copy of the program");
    // Closed before the program is executed, which the kernel rejects for a file that is written.
    let file = File::options().write(true).open(&large).expect("the copy");
    file.set_len(length).expect("a longer copy");
    large
}

/// Returns the path of the program. Cargo puts it into the folder next to that of the test
/// programs. Cargo builds examples only when all of a project's tests are run. For a run of some of
/// them, this builds it.
pub(crate) fn program() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let build = || {
        let test = std::env::current_exe().expect("the test program");
        let folder = test
            .parent()
            .and_then(|deps| deps.parent())
            .expect("target/<profile>/deps");
        let profile = match folder
            .file_name()
            .and_then(|name| name.to_str())
            .expect("a profile")
        {
            "debug" => "dev",
            other => other,
        };
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
        cargo.args([
            "build",
            "--quiet",
            "--locked",
            "--example",
            "actor",
            "--profile",
            profile,
        ]);
        run(cargo, b"", Duration::from_secs(600)).success("cargo build --example actor");
        folder.join("examples/actor")
    };
    BUILT.get_or_init(build).clone()
}

/// Plays a scene against a listener of the process `daemon`, in this cgroup. Returns the daemon's
/// response on the connection.
pub(crate) fn play(
    scene: &str,
    listener: &str,
    address: &str,
    daemon: Pid,
    cgroup: &Path,
) -> String {
    run_in(cgroup, daemon, &program(), &[scene, listener, address])
}

/// Plays a scene by a copy of the program. The processes of the scene then run that copy.
pub(crate) fn play_by(
    program: &Path,
    scene: &str,
    listener: &str,
    address: &str,
    daemon: Pid,
    cgroup: &Path,
) -> String {
    run_in(cgroup, daemon, program, &[scene, listener, address])
}

/// Plays a scene about the program that a caller runs: `program` is the file that a rule names.
pub(crate) fn play_program(
    scene: &str,
    listener: &str,
    address: &str,
    daemon: Pid,
    cgroup: &Path,
    program: &Path,
) -> String {
    run_in(
        cgroup,
        daemon,
        &self::program(),
        &[
            scene,
            listener,
            address,
            program.to_str().expect("a path in UTF-8"),
        ],
    )
}

fn run_in(cgroup: &Path, daemon: Pid, program: &Path, words: &[&str]) -> String {
    let mut command = in_cgroup(
        cgroup,
        &format!("{} {}", program.display(), words.join(" ")),
    );
    command.env("DAEMON", daemon.to_string());
    run(command, b"", Duration::from_secs(60)).success(&format!("scene {words:?}"))
}

/// A user's process that opens connections for the test. The test itself then speaks on them.
pub(crate) struct Connector {
    owned: OwnedProcess,
    socket: UnixStream,
}

impl Connector {
    /// Starts a process that connects to this listener as this user and from this cgroup.
    pub(crate) fn start(uid: u32, listener: &str, address: &str, cgroup: &Path) -> Self {
        Self::start_by(&program(), uid, listener, address, cgroup)
    }

    /// Starts a connector that runs a copy of the program.
    pub(crate) fn start_by(
        program: &Path,
        uid: u32,
        listener: &str,
        address: &str,
        cgroup: &Path,
    ) -> Self {
        Self::start_behind(&[], program, uid, listener, address, cgroup)
    }

    /// Starts a connector with these words in front of its command.
    pub(crate) fn start_behind(
        words: &[String],
        program: &Path,
        uid: u32,
        listener: &str,
        address: &str,
        cgroup: &Path,
    ) -> Self {
        let (socket, theirs) = UnixStream::pair().expect("a pair of sockets");
        let actor = format!(
            "{} {} connect {uid} {listener} {address}",
            words.join(" "),
            program.display()
        );
        let mut command = in_cgroup(cgroup, &actor);
        command.stdin(OwnedFd::from(theirs));
        Self {
            owned: spawn(command).expect("the actor"),
            socket,
        }
    }

    pub(crate) fn id(&self) -> Pid {
        self.owned.id()
    }

    /// Opens a connection that only the test holds.
    pub(crate) fn connect(&self) -> OwnedFd {
        self.connect_by(b"x")
    }

    /// Opens a connection that the user's process also keeps until it ends. Over TCP the daemon can
    /// then find that process as the socket's owner.
    pub(crate) fn connect_and_keep(&self) -> OwnedFd {
        self.connect_by(b"k")
    }

    #[allow(unsafe_code, reason = "a received descriptor is a number")]
    fn connect_by(&self, word: &[u8]) -> OwnedFd {
        (&self.socket).write_all(word).expect("the actor lives");
        let mut space = nix::cmsg_space!(RawFd);
        let mut byte = [0];
        let mut into = [IoSliceMut::new(&mut byte)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(self.socket.as_raw_fd(), &mut into, Some(&mut space), flags)
            .expect("a message");
        let mut received = message
            .cmsgs()
            .expect("whole")
            .filter_map(|message| match message {
                ControlMessageOwned::ScmRights(fds) => fds.into_iter().next(),
                _ => None,
            });
        // SAFETY: the kernel has just made this descriptor for this process.
        unsafe { OwnedFd::from_raw_fd(received.next().expect("a descriptor")) }
    }
}

fn in_cgroup(cgroup: &Path, actor: &str) -> Command {
    let script = format!("echo 0 > {}/cgroup.procs && exec {actor}", cgroup.display());
    let mut command = Command::new("sh");
    command
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .args(["-c", &script]);
    command
}

/// One user's process that repeats an action at a high rate until the test stops it.
pub(crate) struct Repeater {
    owned: OwnedProcess,
    output: BufReader<ChildStdout>,
}

/// Counts of responses by their status code, or of connections by the way they ended.
pub(crate) type Counts = BTreeMap<String, usize>;

impl Repeater {
    /// Starts `act` (see `tests/actor/floods.rs`) in this cgroup, as the user with the first id of
    /// `numbers`.
    pub(crate) fn start(
        act: &str,
        listener: &str,
        address: &str,
        numbers: &[usize],
        cgroup: &Path,
    ) -> Self {
        let numbers: Vec<String> = numbers.iter().map(usize::to_string).collect();
        let actor = format!(
            "{} in-numbers {act} {listener} {address} {}",
            program().display(),
            numbers.join(" ")
        );
        Self::of(in_cgroup(cgroup, &actor))
    }

    /// Starts this many processes of Alice in each of these cgroups. They send requests to the
    /// process `daemon`, and make reads of their own `/proc` files hang.
    pub(crate) fn block(
        count: usize,
        listener: &str,
        address: &str,
        daemon: Pid,
        cgroups: &[&Path],
    ) -> Self {
        Self::block_behind(&[], count, (listener, address), daemon, cgroups)
    }

    /// Does the same with these words in front of the command.
    pub(crate) fn block_behind(
        words: &[&str],
        count: usize,
        (listener, address): (&str, &str),
        daemon: Pid,
        cgroups: &[&Path],
    ) -> Self {
        let mut command = behind(words, &program());
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("DAEMON", daemon.to_string());
        command
            .args(["blocked", &count.to_string(), listener, address])
            .args(cgroups);
        Self::of(command)
    }

    /// Starts a process that listens at this path, and makes reads of its own `/proc` files hang.
    /// It runs in this cgroup, so that no other test waits for it.
    pub(crate) fn block_agent(socket: &Path, cgroup: &Cgroup) -> Self {
        let mut command = behind(&cgroup.enter(), &program());
        command.env_clear().env("PATH", "/usr/bin:/bin");
        command.arg("blocked-agent").arg(socket);
        Self::of(command)
    }

    /// Starts a process of root that sends requests repeatedly, with these words in front of its
    /// command.
    pub(crate) fn start_behind(words: &[&str], listener: &str, address: &str) -> Self {
        let mut command = behind(words, &program());
        command.env_clear().env("PATH", "/usr/bin:/bin");
        command.args(["in-numbers", "storm", listener, address, "0", "1", "0"]);
        Self::of(command)
    }

    fn of(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut owned = spawn(command).expect("the actor");
        let output = BufReader::new(owned.stdout().expect("a pipe"));
        Self { owned, output }
    }

    /// Waits until all connections are open, or the first response has arrived.
    pub(crate) fn wait_started(mut self) -> Self {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("the actor's word");
        assert_eq!(line, "begun\n");
        self
    }

    /// Stops the process and returns what it counted.
    pub(crate) fn stop(mut self) -> Counts {
        drop(self.owned.stdin());
        let mut text = String::new();
        self.output
            .read_to_string(&mut text)
            .expect("what was counted");
        let status = self
            .owned
            .wait(Duration::from_secs(60))
            .expect("the actor ends");
        assert!(status.success(), "{status}");
        let count = |line: &str| {
            line.split_once(' ')
                .map(|(code, count)| (code.to_owned(), count.parse().unwrap()))
        };
        text.lines().filter_map(count).collect()
    }
}

/// Sends this number of requests as this user, one after another, and returns the counts.
pub(crate) fn fetch(
    listener: &str,
    address: &str,
    uid: u32,
    count: usize,
    cgroup: &Path,
) -> Counts {
    Repeater::start(
        "fetch",
        listener,
        address,
        &[usize::try_from(uid).unwrap(), count],
        cgroup,
    )
    .stop()
}

/// A scene that the test advances step by step: see `tests/actor/requests.rs`.
pub(crate) struct Steps {
    _owned: OwnedProcess,
    /// Is `None` once the scene has been ended.
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    caller: i32,
}

impl Steps {
    /// Starts the scene with the program in a folder of its copies, in this cgroup. No process has
    /// connected yet.
    pub(crate) fn start(
        program: &Path,
        scene: &str,
        listener: &str,
        address: &str,
        cgroup: &Path,
    ) -> Self {
        let mut command = in_cgroup(
            cgroup,
            &format!(
                "{} requests {scene} {listener} {address}",
                program.display()
            ),
        );
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut owned = spawn(command).expect("the actor");
        let input = owned.stdin();
        let output = BufReader::new(owned.stdout().expect("a pipe"));
        let mut steps = Self {
            _owned: owned,
            input,
            output,
            caller: 0,
        };
        steps.caller = steps.line().parse().expect("the caller's pid");
        steps
    }

    /// Returns the pid of the process that is going to send the request.
    pub(crate) fn caller(&self) -> i32 {
        self.caller
    }

    /// Sends a word and returns the reply. For words that cause a request, the reply is the
    /// daemon's response.
    pub(crate) fn step(&mut self, word: &str) -> String {
        writeln!(self.input.as_ref().expect("a pipe"), "{word}").expect("the actor lives");
        self.line()
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("the actor's word");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        drop(self.input.take());
        // Until the scene has cleaned up and ended.
        let _ = self.output.read_to_end(&mut Vec::new());
    }
}

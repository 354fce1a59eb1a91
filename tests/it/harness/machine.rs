//! A stock Debian machine in QEMU, with its own kernel and systemd, on emulated hardware.
//! `tests/machines/get` makes its image and saves its state when it has booted, which a test
//! resumes in about two seconds.
//!
//! Machines run one at a time on this computer, because each needs a whole CPU. All of it ends with
//! the value, or with the test process in whichever way that ends.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use nix::fcntl::{Flock, FlockArg};
use serde_json::Value;

use super::counterparts::process::{Output, Process, run};
use super::counterparts::{cached, root, skip};

/// Bounds a boot, and one command. A program takes ten times as long as on this computer.
const TIMEOUT: Duration = Duration::from_secs(600);
/// Bounds the first command of a resumed machine, which takes ten seconds on a busy computer.
const RESUME_TIMEOUT: Duration = Duration::from_secs(120);
/// The directory of the test's files inside.
pub(crate) const FILES: &str = "/machine";
/// The number of the journal's last lines that a failed test shows.
const SHOWN_LINES: usize = 60;
const QEMU: &str = "qemu-system-x86_64";
/// The memory of a large machine, in MiB.
const LARGE_MEMORY: &str = "3072";

/// Returns whether this test program is one of the files of a machine, and so runs inside.
pub(crate) fn is_inside() -> bool {
    std::env::current_exe().is_ok_and(|program| program.starts_with(FILES))
}

/// The beginning of a machine's run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MachineStart<'a> {
    /// It continues where the image's state was saved: systemd is up.
    Resumed,
    /// It boots, with these words in addition on the kernel's command line.
    Booted(&'a str),
    /// It boots, with the memory that a Kubernetes node needs. Its clock counts instructions, so
    /// that no timeout of its programs depends on the load of this computer.
    BootedLarge,
}

/// A running machine, of one of Debian's suites.
pub(crate) struct Machine {
    suite: String,
    folder: PathBuf,
    commands: BufReader<UnixStream>,
    _process: Process,
    _lock: Arc<Flock<File>>,
}

impl Machine {
    /// Starts a machine of the suite with a copy of the directory `files` at [`FILES`], and with
    /// its own data below `folder`.
    ///
    /// Returns `None` after a printed skip if this computer has no image of it. In CI that is a
    /// panic.
    pub(crate) fn start(
        suite: &str,
        start: MachineStart<'_>,
        folder: &Path,
        files: &Path,
    ) -> Option<Self> {
        if !root() {
            return None;
        }
        let (image, lock) = (image(suite, QEMU)?, Arc::new(lock()));
        let launch = |start: MachineStart<'_>, name: &str| {
            let folder = folder.join(name);
            Self::launch(suite, &image, start, folder, files, lock.clone())
        };
        let mut machine = launch(start, "emulated");
        if start == MachineStart::Resumed && !machine.responds() {
            // Seen twice, on busy computers. Its cause is not known.
            eprintln!("{suite} does not respond after it was resumed, and is booted instead");
            machine = launch(MachineStart::Booted(""), "emulated-again");
        }
        machine.prepare();
        Some(machine)
    }

    /// Starts QEMU, until the machine can run commands. Its data are in this new folder.
    fn launch(
        suite: &str,
        image: &Path,
        start: MachineStart<'_>,
        folder: PathBuf,
        files: &Path,
        lock: Arc<Flock<File>>,
    ) -> Self {
        fs::create_dir(&folder).expect("a directory for the machine");
        let [disk, files_disk] = ["root.qcow2", "files.ext4"].map(|name| folder.join(name));
        let (base, format) = match start {
            MachineStart::Resumed => ("up.qcow2", "qcow2"),
            MachineStart::Booted(_) | MachineStart::BootedLarge => ("root.ext4", "raw"),
        };
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", format, "-b"]);
        create.arg(image.join(base)).arg(&disk);
        run(create, b"", TIMEOUT).success("qemu-img create");
        pack(files, &files_disk, &text(image, "files-size"));

        let process = Process::start(
            &format!("QEMU with {suite}"),
            qemu(image, start, &folder, [&disk, &files_disk]),
            &folder.join("qemu.log"),
        );
        // QEMU does not go on before these connections.
        let [commands, monitor] = ["command", "monitor"].map(|name| {
            let connected = process.await_some("QEMU listens", TIMEOUT, || {
                UnixStream::connect(folder.join(name)).ok()
            });
            limit_reads(&connected, TIMEOUT);
            BufReader::new(connected)
        });
        let mut machine = Self {
            suite: suite.to_owned(),
            folder,
            commands,
            _process: process,
            _lock: lock,
        };
        match start {
            MachineStart::Resumed => await_running(monitor),
            MachineStart::Booted(_) | MachineStart::BootedLarge => machine.await_up(),
        }
        machine
    }

    /// Returns whether a resumed machine runs a command.
    fn responds(&mut self) -> bool {
        let line = format!("{}\n", BASE64.encode("true"));
        let sent = self.commands.get_mut().write_all(line.as_bytes());
        sent.expect("QEMU reads the command");
        limit_reads(self.commands.get_ref(), RESUME_TIMEOUT);
        let response = self.commands.read_line(&mut String::new());
        limit_reads(self.commands.get_ref(), TIMEOUT);
        response.is_ok_and(|length| length > 0)
    }

    /// Runs a bash script as root in a service of its own, to its end. The first command that fails
    /// ends it.
    pub(crate) fn run(&mut self, script: &str) -> Output {
        self.run_within(script, TIMEOUT)
    }

    /// The same for a script that may take so long.
    pub(crate) fn run_within(&mut self, script: &str, timeout: Duration) -> Output {
        limit_reads(self.commands.get_ref(), timeout);
        let line = format!("{}\n", BASE64.encode(script));
        let sent = self.commands.get_mut().write_all(line.as_bytes());
        sent.expect("QEMU reads the command");
        loop {
            let line = self.line();
            // An old line of a boot may come first.
            let Some(rest) = line.strip_prefix("done ") else {
                continue;
            };
            let mut fields = rest.split(' ');
            let status = fields.next().and_then(|status| status.parse().ok());
            let status: i32 = status.unwrap_or_else(|| panic!("no status in {line:?}"));
            let mut output = || {
                let bytes = BASE64.decode(fields.next().unwrap_or_default());
                String::from_utf8_lossy(&bytes.expect("base64")).into_owned()
            };
            return Output {
                status: ExitStatus::from_raw(status << 8),
                stdout: output(),
                stderr: output(),
            };
        }
    }

    /// Shuts the machine down as its administrator would, and boots it again from its disk.
    pub(crate) fn reboot(&mut self) {
        let line = format!("{}\n", BASE64.encode("systemctl reboot"));
        let sent = self.commands.get_mut().write_all(line.as_bytes());
        sent.expect("QEMU reads the command");
        self.await_up();
        self.prepare();
    }

    /// Returns all that the kernel, systemd and its services have logged since the boot.
    pub(crate) fn journal(&mut self) -> String {
        self.run("journalctl --sync; journalctl --no-pager --boot")
            .success("the journal")
    }

    /// Sets the clock, and mounts the test's files.
    fn prepare(&mut self) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.expect("a time after 1970").as_secs_f64();
        self.run(&format!(
            "date --set @{now} >/dev/null; mount -t ext4 /dev/vdb {FILES}"
        ))
        .success("mount the files");
    }

    fn await_up(&mut self) {
        while !self.line().starts_with("up ") {}
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        match self.commands.read_line(&mut line) {
            Ok(length) if length > 0 => line.trim_end().to_owned(),
            result => panic!(
                "the machine {} ended, or did not answer within {TIMEOUT:?}: {result:?}",
                self.suite
            ),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let console = fs::read(self.folder.join("console")).unwrap_or_default();
        eprintln!(
            "--- the console of {}\n{}",
            self.suite,
            last_lines(&String::from_utf8_lossy(&console))
        );
        // Without an answer this panics as well, which must not end the test program.
        let journal = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.journal()));
        if let Ok(journal) = journal {
            let journal_file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!(
                "{}-{}.journal",
                self.suite,
                std::process::id()
            ));
            let written = fs::write(&journal_file, &journal).map(|()| journal_file);
            eprintln!(
                "--- the journal of {}, which is in {written:?}\n{}",
                self.suite,
                last_lines(&journal)
            );
        }
    }
}

/// Waits until QEMU has loaded the machine's saved state and lets it run.
///
/// QEMU would write an earlier command into the machine's memory and then load the state of its
/// interrupts from before the command. The machine would never see it.
fn await_running(mut monitor: BufReader<UnixStream>) {
    for command in ["qmp_capabilities", "query-status"] {
        let line = format!("{{\"execute\": \"{command}\"}}\n");
        let sent = monitor.get_mut().write_all(line.as_bytes());
        sent.expect("QEMU reads from its monitor");
    }
    loop {
        let mut line = String::new();
        let length = monitor.read_line(&mut line);
        assert!(length.is_ok_and(|length| length > 0), "no line from QEMU");
        let message: Value = serde_json::from_str(&line).expect("a line of JSON");
        if message["return"]["running"] == true || message["event"] == "RESUME" {
            return;
        }
    }
}

fn limit_reads(stream: &UnixStream, timeout: Duration) {
    let limited = stream.set_read_timeout(Some(timeout));
    limited.expect("a time limit");
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n")
}

fn text(image: &Path, name: &str) -> String {
    let path = image.join(name);
    let text = fs::read_to_string(&path);
    text.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        .trim_end()
        .to_owned()
}

/// Returns the folder of the image with this name, if it is complete and was made with this QEMU.
/// Else it returns `None` after a printed skip. In CI that is a panic.
pub(crate) fn image(name: &str, qemu: &str) -> Option<PathBuf> {
    let image = cached(&format!("machine-{name}"));
    let builder = fs::read_to_string(image.join("qemu")).unwrap_or_default();
    let mut version = Command::new(qemu);
    version.arg("--version");
    let is_same = !builder.is_empty()
        && run(version, b"", TIMEOUT)
            .stdout
            .starts_with(builder.trim_end());
    if !is_same {
        skip(&format!(
            "{} is missing, or another QEMU has made it: run tests/machines/get",
            image.display()
        ));
    }
    // An image that is replaced meanwhile stays as it is.
    is_same.then(|| fs::canonicalize(image).expect("the image's folder"))
}

/// Waits until no other machine runs on this computer, and keeps others from running.
pub(crate) fn lock() -> Flock<File> {
    let file = File::create(cached(".lock-machines")).expect("the lock's file");
    Flock::lock(file, FlockArg::LockExclusive).expect("the lock")
}

/// Makes a file system with a copy of the directory.
fn pack(directory: &Path, disk: &Path, size: &str) {
    let mut allocate = Command::new("truncate");
    allocate.args(["--size", size]).arg(disk);
    run(allocate, b"", TIMEOUT).success("truncate");
    let mut format = Command::new("mkfs.ext4");
    format.args(["-q", "-O", "^has_journal", "-E"]);
    format.args(["lazy_itable_init=1,nodiscard", "-d"]);
    format.arg(directory).arg(disk);
    run(format, b"", TIMEOUT).success("mkfs.ext4");
}

fn qemu(
    image: &Path,
    start: MachineStart<'_>,
    folder: &Path,
    [disk, files]: [&Path; 2],
) -> Command {
    let mut command = Command::new("nice");
    command.args(["-n", "10", QEMU]);
    command.args(text(image, "arguments").lines());
    let more = match start {
        MachineStart::Resumed => "",
        MachineStart::Booted(more) => more,
        MachineStart::BootedLarge => {
            // A billion instructions a second.
            command.args(["-m", LARGE_MEMORY, "-icount", "shift=0"]);
            ""
        }
    };
    let option = |begin: &str, path: &Path, end: &str| format!("{begin}{}{end}", path.display());
    command
        .arg("-kernel")
        .arg(image.join("vmlinuz"))
        .arg("-initrd")
        .arg(image.join("initrd.gz"))
        .arg("-append")
        .arg(format!("{} {more}", text(image, "command-line")).trim_end())
        .arg("-drive")
        .arg(option("file=", disk, ",if=none,id=root,cache=unsafe"))
        .arg("-drive")
        .arg(option(
            "file=",
            files,
            ",format=raw,if=none,id=files,cache=unsafe",
        ))
        .arg("-chardev")
        .arg(option("file,id=console,path=", &folder.join("console"), ""))
        .arg("-chardev")
        .arg(option(
            "socket,id=command,path=",
            &folder.join("command"),
            ",server=on,wait=on",
        ))
        .arg("-chardev")
        .arg(option(
            "socket,id=monitor,path=",
            &folder.join("monitor"),
            ",server=on,wait=on",
        ))
        .args(["-mon", "chardev=monitor,mode=control"]);
    if start == MachineStart::Resumed {
        command
            .arg("-incoming")
            .arg(option("exec:cat ", &image.join("state"), ""));
    }
    command
}

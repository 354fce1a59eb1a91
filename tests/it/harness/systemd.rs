//! A machine with a real systemd as its pid 1, in namespaces of its own on this computer's kernel:
//! its own files, network, processes and cgroup tree. It boots in about half a second.
//!
//! Its programs are this computer's `/usr`, with changes that only the machine sees. Its
//! configuration is its own: no unit, user or mount of this computer is in it. All of it ends with
//! the value, or with the test process in whichever way that ends.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::unistd::Pid;

use super::cgroup::CgroupTree;
use super::counterparts::process::{Output, Process, await_some, run};
use super::counterparts::{root, skip};
use super::forward::{Forward, Network};

/// The program of pid 1.
const SYSTEMD: &str = "/usr/lib/systemd/systemd";
/// The path of `systemctl`, `unshare` and the like, inside and outside.
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Bounds steps that take less than a second on an idle machine.
const TIMEOUT: Duration = Duration::from_secs(60);
const NAMESPACES: [&str; 7] = [
    "--pid", "--mount", "--uts", "--ipc", "--net", "--cgroup", "--fork",
];

/// The content of a file that the machine has before it boots.
#[derive(Clone, Copy)]
pub(crate) enum Content<'a> {
    /// A file with this text.
    Text(&'a str),
    /// A copy of this file, with its mode.
    Copy(&'a Path),
    /// This directory itself, with files that appear in it later.
    Mount(&'a Path),
}

/// A running machine. Its root can do what root can, except for what would change this computer.
pub(crate) struct SystemdMachine {
    init: Pid,
    // Dropped in this order: a cgroup can be removed when no process is in it.
    _process: Process,
    _cgroup: CgroupTree,
}

impl SystemdMachine {
    /// Boots it up to `basic.target`, with its files below `directory` and with `files` (paths
    /// inside, and their content).
    ///
    /// Returns `None` after a printed skip if this computer has no systemd or does not let the test
    /// create namespaces. In CI that is a panic.
    pub(crate) fn boot(directory: &Path, files: &[(&str, Content<'_>)]) -> Option<Self> {
        if !root() {
            return None;
        }
        if !Path::new(SYSTEMD).exists() {
            skip(&format!("{SYSTEMD} is missing: install systemd"));
            return None;
        }
        let Some(tree) = cgroup_tree() else {
            skip("no cgroup v2 tree is mounted");
            return None;
        };
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("machine-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let cgroup = match CgroupTree::create(&tree, &name) {
            Ok(cgroup) => cgroup,
            Err(error) => {
                skip(&format!(
                    "no cgroup can be made in {}: {error}",
                    tree.display()
                ));
                return None;
            }
        };
        let probe = run(
            outside("unshare", NAMESPACES.iter().copied().chain(["true"])),
            b"",
            TIMEOUT,
        );
        if !probe.status.success() {
            skip(&format!("no namespaces can be made here: {}", probe.stderr));
            return None;
        }
        let home = directory.join("machine");
        stage(&home, files);
        // The shell enters the cgroup before it creates a cgroup namespace, so that the cgroup
        // becomes the namespace's root. No process is needed to end the machine: pid 1 is killed
        // with `unshare`, and the rest with pid 1.
        let enter = r#"echo $$ >"$1/cgroup.procs" && shift && exec unshare --kill-child "$@""#;
        let mut command = outside("sh", ["-c", enter, "enter"]);
        command
            .arg(cgroup.path())
            .args(NAMESPACES)
            .args(["sh", "-c", include_str!("systemd/boot.sh"), "boot"])
            .arg(&home);
        let process = Process::start("the machine", command, &directory.join("machine.log"));
        let init = process.await_some("the machine's pid 1", TIMEOUT, || {
            fs::read_to_string(home.join("init.pid"))
                .ok()?
                .trim()
                .parse()
                .ok()
        });
        let machine = Self {
            init: Pid::from_raw(init),
            _process: process,
            _cgroup: cgroup,
        };
        machine
            ._process
            .await_some("systemd has booted", TIMEOUT, || {
                let state = machine.run(&["systemctl", "is-system-running"]).stdout;
                // "degraded": a unit of this computer's distribution does not work in here. No test
                // is about those.
                matches!(state.trim(), "running" | "degraded").then_some(())
            });
        Some(machine)
    }

    /// Returns a command that runs inside as root, but outside of every unit: for systemd's own
    /// tools. Its environment is empty.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let namespaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"];
        let words = self.enter(&namespaces);
        let mut command = outside(&words[0], words[1..].iter().map(String::as_str));
        command.args(arguments);
        command
    }

    /// Returns the words before a command that runs in these namespaces of the machine, as options
    /// of nsenter(1).
    pub(crate) fn enter(&self, namespaces: &[&str]) -> Vec<String> {
        let init = self.init.to_string();
        let target = ["nsenter", "--target", &init];
        let words = target.iter().chain(namespaces).chain(&["--"]);
        words.map(ToString::to_string).collect()
    }

    /// Runs such a command to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        run(self.command(arguments), b"", TIMEOUT)
    }

    /// Returns a command that runs inside as the service `unit`, as the user with this name or
    /// number.
    pub(crate) fn command_as(&self, unit: &str, user: &str, arguments: &[&str]) -> Command {
        let unit = format!("--unit={unit}");
        let user = format!("--uid={user}");
        self.command(
            &[
                &[
                    "systemd-run",
                    "--quiet",
                    "--collect",
                    "--wait",
                    "--pipe",
                    &unit,
                    &user,
                    "--",
                ],
                arguments,
            ]
            .concat(),
        )
    }

    /// Runs such a command to its end.
    pub(crate) fn run_as(&self, unit: &str, user: &str, arguments: &[&str]) -> Output {
        run(self.command_as(unit, user, arguments), b"", TIMEOUT)
    }

    /// Returns a property of a unit, as `systemctl show` prints it.
    pub(crate) fn property(&self, unit: &str, name: &str) -> String {
        let shown = self.run(&["systemctl", "show", "--value", "--property", name, unit]);
        shown
            .success(&format!("{name} of {unit}"))
            .trim_end()
            .to_owned()
    }

    /// Waits until a property of a unit is `value`.
    pub(crate) fn await_property(&self, unit: &str, name: &str, value: &str) {
        let what = format!("{name} of {unit} is {value}");
        await_some(&what, TIMEOUT, || {
            (self.property(unit, name) == value).then_some(())
        });
    }

    /// Returns all that systemd and its services have logged so far.
    pub(crate) fn journal(&self) -> String {
        // After this, all earlier output of services is in the file.
        self.run(&["journalctl", "--sync"])
            .success("journalctl --sync");
        self.run(&["journalctl", "--no-pager"])
            .success("the journal")
    }

    /// Returns a path of the machine as this process sees it.
    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.init))
    }

    /// Forwards a loopback port of the machine to a loopback address of this computer.
    pub(crate) fn forward(&self, to: std::net::SocketAddr) -> Forward {
        Forward::start(
            Network::Of(self.init),
            (Ipv4Addr::LOCALHOST, 0).into(),
            Network::Own,
            to,
        )
    }
}

impl Drop for SystemdMachine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let journal = self.run(&["journalctl", "--no-pager", "--lines=60"]);
            eprintln!(
                "--- the machine's journal\n{}{}",
                journal.stdout, journal.stderr
            );
        }
    }
}

/// Returns a command on this computer with an empty environment.
fn outside<'a>(program: &str, arguments: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", SEARCH_PATH)
        .env("LC_ALL", "C.UTF-8")
        .args(arguments);
    command
}

/// Lays out the machine's files for `boot.sh`.
fn stage(home: &Path, files: &[(&str, Content<'_>)]) {
    let mut mounts = String::new();
    fs::create_dir_all(home.join("files")).expect("a directory for the machine");
    for (path, content) in files {
        let staged = home.join("files").join(path.trim_start_matches('/'));
        fs::create_dir_all(staged.parent().expect("a path below the root")).expect("a directory");
        match content {
            Content::Text(text) => fs::write(&staged, text).expect("a file"),
            Content::Copy(source) => drop(fs::copy(source, &staged).expect("a copy of a file")),
            Content::Mount(source) => mounts.push_str(&format!("{} {path}\n", source.display())),
        }
    }
    fs::write(home.join("mounts"), mounts).expect("a file");
}

/// Returns the mount point of the cgroup v2 tree.
fn cgroup_tree() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("/proc");
    let line = mounts.lines().find(|line| line.contains(" - cgroup2 "))?;
    line.split(' ').nth(4).map(PathBuf::from)
}

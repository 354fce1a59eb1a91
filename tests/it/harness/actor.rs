//! The program `tests/actor`, which plays scenes with processes of several users.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::unistd::Pid;

use super::counterparts::process::run;

/// Where cargo puts it: beside the folder of the test programs.
pub(crate) fn program() -> PathBuf {
    let test = std::env::current_exe().expect("the test program");
    test.parent().and_then(|deps| deps.parent()).expect("target/<profile>/deps").join("examples/actor")
}

/// Plays a scene against a listener of the process `daemon`, in this cgroup; what it answered on the connection.
pub(crate) fn play(scene: &str, listener: &str, address: &str, daemon: Pid, cgroup: &Path) -> String {
    run_in(cgroup, daemon, &[scene, listener, address])
}

/// The same for a scene about what a caller runs: `program` is the file that a rule names.
pub(crate) fn play_program(
    scene: &str,
    listener: &str,
    address: &str,
    daemon: Pid,
    cgroup: &Path,
    program: &Path,
) -> String {
    run_in(cgroup, daemon, &[scene, listener, address, program.to_str().expect("a path in UTF-8")])
}

fn run_in(cgroup: &Path, daemon: Pid, words: &[&str]) -> String {
    let script =
        format!("echo 0 > {}/cgroup.procs && exec {} {}", cgroup.display(), program().display(), words.join(" "));
    let mut command = Command::new("sh");
    command.env_clear().env("PATH", "/usr/bin:/bin").env("DAEMON", daemon.to_string()).args(["-c", &script]);
    run(command, b"", Duration::from_secs(60)).success(&format!("scene {words:?}"))
}

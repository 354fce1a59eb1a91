//! The program `tests/actor`, which plays scenes with processes of several users.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::counterparts::process::run;

/// Where cargo puts it: beside the folder of the test programs.
pub(crate) fn program() -> PathBuf {
    let test = std::env::current_exe().expect("the test program");
    test.parent().and_then(|deps| deps.parent()).expect("target/<profile>/deps").join("examples/actor")
}

/// Plays a scene against a listener, in a cgroup if one is given; what the daemon answered on the connection.
pub(crate) fn play(scene: &str, listener: &str, address: &str, cgroup: Option<&Path>) -> String {
    run_in(cgroup, &[scene, listener, address])
}

/// The same for a scene about what a caller runs: `program` is the file that a rule names.
pub(crate) fn play_program(scene: &str, listener: &str, address: &str, program: &Path, cgroup: &Path) -> String {
    run_in(Some(cgroup), &[scene, listener, address, program.to_str().expect("a path in UTF-8")])
}

fn run_in(cgroup: Option<&Path>, words: &[&str]) -> String {
    let enter = cgroup.map_or(String::new(), |cgroup| format!("echo 0 > {}/cgroup.procs && ", cgroup.display()));
    let script = format!("{enter}exec {} {}", program().display(), words.join(" "));
    let mut command = Command::new("sh");
    command.env_clear().env("PATH", "/usr/bin:/bin").args(["-c", &script]);
    run(command, b"", Duration::from_secs(60)).success(&format!("scene {words:?}"))
}

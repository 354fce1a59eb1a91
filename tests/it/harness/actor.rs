//! The program `tests/actor`, which plays scenes with processes of several users.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use super::counterparts::process::run;

/// Where cargo puts it: beside the folder of the test programs.
pub(crate) fn program() -> PathBuf {
    let test = std::env::current_exe().expect("the test program");
    test.parent().and_then(|deps| deps.parent()).expect("target/<profile>/deps").join("examples/actor")
}

/// Plays a scene against a listener, in a cgroup if one is given; what the daemon answered on the connection.
pub(crate) fn play(scene: &str, listener: &str, address: &str, cgroup: Option<&std::path::Path>) -> String {
    let enter = cgroup.map_or(String::new(), |cgroup| format!("echo 0 > {}/cgroup.procs && ", cgroup.display()));
    let script = format!("{enter}exec {} {scene} {listener} {address}", program().display());
    let mut command = Command::new("sh");
    command.env_clear().env("PATH", "/usr/bin:/bin").args(["-c", &script]);
    run(command, b"", Duration::from_secs(60)).success(&format!("scene {scene} over {listener}"))
}

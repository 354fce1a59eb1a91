//! The program `tests/actor`, which plays scenes with processes of several users.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use super::counterparts::process::run;

/// Where cargo puts it: beside the folder of the test programs. Cargo builds examples only when all of a project's tests
/// are run, so for a run of some of them this does it.
pub(crate) fn program() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let build = || {
        let test = std::env::current_exe().expect("the test program");
        let folder = test.parent().and_then(|deps| deps.parent()).expect("target/<profile>/deps");
        let profile = match folder.file_name().and_then(|name| name.to_str()).expect("a profile") {
            "debug" => "dev",
            other => other,
        };
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
        cargo.args(["build", "--quiet", "--locked", "--example", "actor", "--profile", profile]);
        run(cargo, b"", Duration::from_secs(600)).success("cargo build --example actor");
        folder.join("examples/actor")
    };
    BUILT.get_or_init(build).clone()
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

//! Tests of this program that run inside a stock machine, on its kernel and its cgroups.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::TIMEOUT;
use super::tried_machines::Distribution;
use crate::harness::actor;
use crate::harness::counterparts::process::run;
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::PROGRAM;
use crate::harness::machine::{FILES, Machine, MachineStart};

/// The counterparts among the machine's files, which may be missing.
pub(super) const CACHE: &str = "cache";
/// The path of cargo, which has nothing to build inside.
const CARGO: &str = env!("CARGO");

/// Runs the tests with this name inside, one after another, and asserts that they pass.
pub(super) fn assert_passes(distribution: &Distribution, filters: &[&str]) {
    if !root() {
        return;
    }
    let folder = folder();
    let files = folder.path().join("files");
    let machine = start(distribution.suite, distribution.start(), &files);
    if let Some(mut machine) = machine {
        run_tests(&mut machine, &filters.join(" "), 2 * TIMEOUT);
    }
}

/// Starts a machine of the suite with this test program. Its other files are in `files` already,
/// which may be missing. Its own data are in the same folder as those.
pub(super) fn start(suite: &str, start: MachineStart<'_>, files: &Path) -> Option<Machine> {
    let target = files.join("target");
    for directory in ["deps", "examples"] {
        fs::create_dir_all(target.join(directory)).unwrap();
    }
    let own = std::env::current_exe().unwrap();
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (from, to) in [
        (own, target.join("deps/it")),
        (actor::program(), target.join("examples/actor")),
        (PathBuf::from(PROGRAM), target.join("awsvid")),
        (checkout.join("deploy"), files.join("deploy")),
    ] {
        copy(&from, &to);
    }
    let mut machine = Machine::start(suite, start, files.parent().unwrap(), files)?;
    // The test program has the paths of this computer.
    let link = |to: &Path, from: &str| {
        let parent = to.parent().unwrap().display();
        format!("mkdir -p {parent}; ln -s {FILES}/{from} {}\n", to.display())
    };
    let script = link(Path::new(PROGRAM), "target/awsvid")
        + &link(&checkout.join("deploy"), "deploy")
        + &format!(
            "mkdir -p {}; printf '#!/bin/sh\\n' >{CARGO}; chmod +x {CARGO}\n",
            Path::new(CARGO).parent().unwrap().display()
        );
    machine.run(&script).success("the paths of this computer");
    Some(machine)
}

/// Copies a file or a directory.
pub(super) fn copy(from: &Path, to: &Path) {
    let mut copy = Command::new("cp");
    copy.arg("--recursive").args([from, to]);
    run(copy, b"", TIMEOUT).success("cp");
}

/// Runs tests inside, one after another, with these arguments of the test program. Asserts that
/// they pass.
pub(super) fn run_tests(machine: &mut Machine, arguments: &str, timeout: Duration) {
    // The console shows the progress of a long run. On Debian 13 /tmp is in memory.
    let script = format!(
        "export AWSVID_TEST_CACHE={FILES}/{CACHE} TMPDIR=/var/tmp
         {FILES}/target/deps/it --test-threads=1 {arguments} 2>&1 | tee /dev/ttyS0"
    );
    let tests = machine.run_within(&script, timeout);
    assert!(
        tests.status.success() && !tests.stdout.contains(" 0 passed"),
        "{arguments}: {}\n{}",
        tests.status,
        tests.stdout
    );
}

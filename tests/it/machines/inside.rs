//! Tests of this program that run inside a stock machine, on its kernel and its cgroups.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::TIMEOUT;
use super::tried_machines::Distribution;
use crate::harness::actor;
use crate::harness::counterparts::process::run;
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::PROGRAM;
use crate::harness::machine::{FILES, Machine};

/// The path of cargo, which has nothing to build inside.
const CARGO: &str = env!("CARGO");

/// Runs the tests with this name inside, one after another, and asserts that they pass.
pub(super) fn assert_passes(distribution: &Distribution, filters: &[&str]) {
    if !root() {
        return;
    }
    let folder = folder();
    let files = folder.path().join("files");
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
        let mut copy = Command::new("cp");
        copy.arg("--recursive").args([from, to]);
        run(copy, b"", TIMEOUT).success("cp");
    }
    let start = distribution.start();
    let Some(mut machine) = Machine::start(distribution.suite, start, folder.path(), &files) else {
        return;
    };
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
        )
        + &format!(
            "{FILES}/target/deps/it --test-threads=1 {} 2>&1",
            filters.join(" ")
        );
    let tests = machine.run(&script);
    assert!(
        tests.status.success() && !tests.stdout.contains(" 0 passed"),
        "{distribution:?}: {tests:?}"
    );
}

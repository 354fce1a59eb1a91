//! The unit tests on aarch64: built for the C library that a release needs, and run on Debian's
//! kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::harness::counterparts::process::run;
use crate::harness::counterparts::{cached, folder, root, skip, tool};
use crate::harness::machine::{image, lock};
use crate::harness::slow_only;

const TARGET: &str = "aarch64-unknown-linux-gnu";
const QEMU: &str = "qemu-system-aarch64";
/// A processor without the instructions that take long to emulate.
const CPU: &str = "cortex-a72";
/// Bounds a build of all crates, and a run of all unit tests under emulation.
const TIMEOUT: Duration = Duration::from_secs(3600);
/// Runs the program and the tests. The machine's own initrd has the kernel's modules and a shell.
const RUN: &str = "\
cd /test
CI=true ./awsvid --version && CI=true ./unit
";

#[test]
fn unit_tests_pass_on_aarch64() {
    if !slow_only() || !root() {
        return;
    }
    let Some(image) = image("aarch64", QEMU) else {
        return;
    };
    let folder = folder();
    let initrd = folder.path().join("initrd");
    let files = initrd.join("test");
    fs::create_dir_all(&files).unwrap();
    for (name, build) in [
        ("unit", ["test", "--no-run", "--lib"]),
        ("awsvid", ["build", "--bin", "awsvid"]),
    ] {
        let Some(program) = built(&build) else {
            return;
        };
        fs::copy(program, files.join(name)).unwrap();
    }
    fs::write(files.join("run"), RUN).unwrap();
    // Tests read files of the checkout by its path here.
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR"));
    let copy = initrd.join(checkout.strip_prefix("/").unwrap());
    fs::create_dir_all(&copy).unwrap();
    let mut tracked = Command::new("sh");
    tracked.current_dir(checkout);
    tracked.args(["-c", "git ls-files -z | cpio --quiet -0 -pdm \"$0\""]);
    tracked.arg(&copy);
    run(tracked, b"", TIMEOUT).success("a copy of the checkout");

    let both = folder.path().join("both.gz");
    let mut pack = Command::new("sh");
    pack.current_dir(&initrd);
    pack.args([
        "-c",
        "{ cat \"$0\" && find . | cpio --quiet -o -H newc | gzip -1; } >\"$1\"",
    ]);
    pack.arg(image.join("initrd.gz")).arg(&both);
    run(pack, b"", TIMEOUT).success("the initrd");

    let _lock = lock();
    let mut qemu = Command::new("nice");
    qemu.args(["-n", "10", QEMU, "-M", "virt", "-cpu", CPU, "-accel", "tcg"]);
    qemu.args(["-smp", "1", "-m", "2048", "-nodefaults", "-no-user-config"]);
    qemu.args(["-display", "none", "-serial", "stdio", "-no-reboot"]);
    qemu.arg("-kernel").arg(image.join("vmlinuz"));
    qemu.arg("-initrd").arg(both);
    qemu.args(["-append", "console=ttyAMA0 panic=-1 quiet"]);
    let printed = run(qemu, b"", TIMEOUT).success("QEMU");
    assert!(printed.contains("target:   aarch64-linux-gnu"), "{printed}");
    assert!(printed.contains("test result: ok."), "{printed}");
    assert!(printed.contains("\nstatus 0"), "{printed}");
}

/// Builds the program of awsvid's that these arguments of cargo's name, and returns its path.
/// Returns `None` after a printed skip if Rust's library for the target is missing. In CI that is a
/// panic.
fn built(arguments: &[&str]) -> Option<PathBuf> {
    let mut paths = cached("bin").into_os_string();
    paths.push(":");
    paths.push(std::env::var_os("PATH").unwrap_or_default());
    let mut command = Command::new(tool("cargo-zigbuild")?);
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command.args(arguments).arg("--locked");
    command.args(["--target", &format!("{TARGET}.2.28")]);
    command.args(["--message-format", "json-render-diagnostics"]);
    // The machine has its programs in memory.
    command.env("CARGO_PROFILE_DEV_DEBUG", "false");
    command.env("CARGO_PROFILE_DEV_STRIP", "symbols");
    command.env("PATH", paths);
    let output = run(command, b"", TIMEOUT);
    if output.stderr.contains("target may not be installed") {
        skip("Rust's library for aarch64 is missing: run tests/counterparts/get rust-aarch64");
        return None;
    }
    let messages = output.success("the build for aarch64");
    let executable = |line: &str| {
        let message: Value = serde_json::from_str(line).ok()?;
        message["executable"].as_str().map(PathBuf::from)
    };
    Some(
        messages
            .lines()
            .filter_map(executable)
            .next_back()
            .expect("a program"),
    )
}

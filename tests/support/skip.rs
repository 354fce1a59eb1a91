//! Records of tests that do not run here. The unit tests and the integration tests include this
//! file. `tests/skipped.rs` counts the records at the end of `cargo test`.

use std::fs::{OpenOptions, create_dir_all};
use std::io::Write;
use std::path::PathBuf;

/// Returns the file with the records of this `cargo test`, one `test<TAB>reason` a line.
///
/// Cargo is the parent process of all test programs of one run. Their path is
/// `<target>/<profile>/deps/<program>`.
pub(crate) fn records() -> PathBuf {
    let program = std::env::current_exe().expect("the path of this test program");
    let target = program.ancestors().nth(3).expect("cargo's target folder");
    let run = nix::unistd::getppid();
    target.join("tmp/skipped").join(run.to_string())
}

/// Prints and records why the calling test does not run here, or only in part. In CI (`CI` set and
/// not empty) nothing may be skipped, so there it panics.
pub(crate) fn skip(reason: &str) {
    assert!(
        std::env::var_os("CI").is_none_or(|value| value.is_empty()),
        "in CI nothing is skipped: {reason}"
    );
    record(reason);
}

/// Prints and records that the calling test does not run here, in CI too.
pub(crate) fn record(reason: &str) {
    eprintln!("skipped: {reason}");
    let records = records();
    let thread = std::thread::current();
    let line = format!("{}\t{reason}\n", thread.name().unwrap_or("a thread"));
    let written = create_dir_all(records.parent().expect("a folder")).and_then(|()| {
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&records)?;
        // One write, because other test threads and programs append too.
        file.write_all(line.as_bytes())
    });
    written.unwrap_or_else(|error| panic!("record of a skip in {}: {error}", records.display()));
}

/// Returns whether this process is root, as most tests with other users' processes need. If not, it
/// records a skip.
pub(crate) fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        skip("only root can run processes of other users: run the tests as root");
    }
    root
}

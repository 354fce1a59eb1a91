//! The bench runs as its page shows. Its figures are not compared: they need a quiet machine.

use std::process::Command;
use std::time::Duration;

use crate::harness::counterparts::process::run;
use crate::harness::counterparts::root;
use crate::harness::documents::block;

/// Covers the build of the bench, which the tests' own profile shares.
const TIMEOUT: Duration = Duration::from_secs(600);

/// Runs the rows that the page names, in the short form.
#[test]
fn documented_commands_run_the_bench() {
    if !root() {
        return;
    }
    let page = block("tests/bench/README.md", "Speed and size", "cargo bench");
    let options = page.lines().map(|line| {
        let command = line.split(" #").next().unwrap().trim_end();
        let words = command.strip_prefix("cargo bench").expect(line);
        words.trim_start().trim_start_matches("-- ")
    });
    let options: Vec<&str> = options.collect();
    let ["", rows, quick] = options[..] else {
        panic!("{options:?}")
    };
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    cargo.args([
        "bench",
        "--quiet",
        "--locked",
        "--profile",
        "dev",
        "--",
        quick,
    ]);
    cargo.args(rows.split(' '));
    let table = run(cargo, b"", TIMEOUT).success("cargo bench");
    for row in rows.split(' ') {
        assert!(table.contains(&format!("| {row}")), "{row}: {table}");
    }
}

//! Counts the tests that `cargo test` has skipped, by reason. Cargo runs test programs in the order
//! of their names, so this one is the last.

#![allow(
    clippy::expect_used,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "in a test a panic is the report"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::Path;

#[allow(dead_code, reason = "this program only reads the records")]
#[path = "support/skip.rs"]
mod skip;

fn main() {
    // Tools that list tests expect a list of names.
    if std::env::args().any(|argument| argument == "--list") {
        return;
    }
    let records = skip::records();
    let text = match std::fs::read_to_string(&records) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        Err(error) => panic!("{}: {error}", records.display()),
    };
    print!("\n{}", summary(&text));
    remove_records(&records);
}

/// Returns the number of tests in the records, and a line for each reason.
fn summary(records: &str) -> String {
    let mut by_reason = BTreeMap::<&str, BTreeSet<&str>>::new();
    for (test, reason) in records.lines().filter_map(|line| line.split_once('\t')) {
        by_reason.entry(reason).or_default().insert(test);
    }
    let tests: BTreeSet<_> = by_reason.values().flatten().collect();
    let mut text = format!("skipped: {} tests, whole or in part\n", tests.len());
    let mut rows: Vec<_> = by_reason.iter().collect();
    rows.sort_by_key(|(_, tests)| std::cmp::Reverse(tests.len()));
    for (reason, tests) in rows {
        text.push_str(&format!("{:>5}  {reason}\n", tests.len()));
    }
    text
}

/// Removes the records of this run, and those of runs that have ended without a summary.
fn remove_records(records: &Path) {
    let folder = records.parent().expect("a folder");
    let Ok(runs) = std::fs::read_dir(folder) else {
        return;
    };
    for run in runs.filter_map(Result::ok) {
        let is_running = Path::new("/proc").join(run.file_name()).exists();
        if run.path() == records || !is_running {
            // Another run may have removed it.
            let _ = std::fs::remove_file(run.path());
        }
    }
}

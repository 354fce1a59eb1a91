//! Measures the speed and size of awsvid: `cargo bench`, `cargo bench -- ROW...`, with `--quick`
//! for a short form that shows only that each row runs. tests/bench/README.md explains each row. A
//! slow figure does not fail.
#![allow(
    clippy::disallowed_methods,
    reason = "it measures and waits in real time"
)]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the table is what this program is for"
)]

mod background_load;
mod caller;
mod cases;
mod daemon;
mod direct;
mod entries;
mod load;
mod machine;
mod process;
mod table;
mod upstream;

use std::cell::Cell;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use cases::{ROWS, Row};
use machine::Cgroups;
use tempfile::TempDir;

/// The reason why a row did not run.
type BenchError = Box<dyn std::error::Error>;

/// The state that all rows share.
struct Bench {
    /// The short form, with figures that mean nothing.
    quick: bool,
    cgroups: Cgroups,
    folder: TempDir,
    folders: Cell<u32>,
    others: Cell<Others>,
}

/// CPU time in the measured runs: all of it, and that of processes that had no part in them.
#[derive(Debug, Clone, Copy, Default)]
struct Others {
    elapsed: Duration,
    theirs: Duration,
}

impl Bench {
    fn new(quick: bool) -> Result<Self, BenchError> {
        if !nix::unistd::geteuid().is_root() {
            return Err("the bench runs processes of several users in cgroups of its own: it has to be root".into());
        }
        let folder = tempfile::Builder::new().prefix("awsvid-bench.").tempdir()?;
        // The load runs as another user and has to reach the sockets.
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755))?;
        Ok(Self {
            quick,
            cgroups: Cgroups::new()?,
            folder,
            folders: Cell::default(),
            others: Cell::default(),
        })
    }

    fn folder(&self) -> Result<PathBuf, BenchError> {
        self.folders.set(self.folders.get() + 1);
        let folder = self.folder.path().join(self.folders.get().to_string());
        fs::create_dir(&folder)?;
        fs::set_permissions(&folder, Permissions::from_mode(0o755))?;
        Ok(folder)
    }

    /// Returns `whole`, or with `--quick` `short`.
    fn count(&self, whole: usize, short: usize) -> usize {
        if self.quick { short } else { whole }
    }

    /// Returns how often each measurement is repeated.
    fn rounds(&self) -> usize {
        self.count(5, 1)
    }
}

fn main() -> ExitCode {
    // cargo adds `--bench`.
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        // Parts of the bench that it starts as processes.
        ["direct", address] => direct::run(address),
        ["load", plan] => serde_json::from_str(plan)
            .map_err(Into::into)
            .and_then(load::run),
        ["caller", plan] => serde_json::from_str(plan)
            .map_err(Into::into)
            .and_then(|plan| load::caller(&plan)),
        ["callers", plan] => serde_json::from_str(plan)
            .map_err(Into::into)
            .and_then(|plan| load::callers(&plan)),
        ["background", processes, connections, cgroup] => {
            numbers(processes, connections).and_then(|(processes, connections)| {
                background_load::run(processes, connections, Path::new(cgroup))
            })
        }
        ["entries", count] => count.parse().map_err(Into::into).and_then(entries::run),
        _ => bench(&words),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench {}: {error}", words.first().unwrap_or(&""));
            ExitCode::FAILURE
        }
    }
}

fn numbers(one: &str, other: &str) -> Result<(usize, usize), BenchError> {
    Ok((one.parse()?, other.parse()?))
}

fn bench(words: &[&str]) -> Result<(), BenchError> {
    let (options, names): (Vec<&str>, Vec<&str>) =
        words.iter().partition(|word| word.starts_with("--"));
    let valid = ROWS.map(|row| row.name);
    let unknown = names.iter().find(|name| !valid.contains(name));
    let unknown = unknown.or(options.iter().find(|option| **option != "--quick"));
    if let Some(word) = unknown {
        return Err(format!(
            "{word}: no such row or option. The rows: {}",
            valid.join(", ")
        )
        .into());
    }
    let bench = Bench::new(!options.is_empty())?;
    let rows: Vec<&Row> = ROWS
        .iter()
        .filter(|row| names.is_empty() || names.contains(&row.name))
        .collect();
    let before = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let (mut lines, mut failed) = (Vec::new(), Vec::new());
    for row in &rows {
        eprintln!("{} ...", row.name);
        match (row.run)(&bench) {
            Ok(measured) => lines.extend(measured),
            Err(error) => failed.push(format!("{}: {error}", row.name)),
        }
    }
    println!("\n{}\n", machine::description());
    if bench.quick {
        println!(
            "--quick: this shows that the rows run. The figures are of too few requests to mean anything.\n"
        );
    }
    println!("{}", table::render(&lines));
    for row in rows {
        println!("{}: {}", row.name, row.meaning);
    }
    println!("\n{}", disturbance(bench.others.get(), &before));
    if failed.is_empty() {
        Ok(())
    } else {
        Err(format!("these rows did not run:\n{}", failed.join("\n")).into())
    }
}

/// Describes the load of other processes: figures that were taken during a build are worth little.
fn disturbance(Others { elapsed, theirs }: Others, loadavg: &str) -> String {
    let all = elapsed.as_secs_f64() * f64::from(machine::processors());
    let share = if all > 0.0 {
        theirs.as_secs_f64() / all * 100.0
    } else {
        0.0
    };
    format!(
        "Load average before: {}. In the measured runs {share:.0} % of the machine's CPU time went to processes other than \
         server and load (0 to 3 is a quiet machine).",
        loadavg.split(' ').next().unwrap_or("?"),
    )
}

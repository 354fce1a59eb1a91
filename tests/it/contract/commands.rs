//! The commands, options, exit statuses and fields of `/status` in cli.md are those of the program.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use awsvid::exit_status::ExitStatus;
use serde_json::Value;

use super::lists::{code, issued};
use crate::chains;
use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::{await_some, run};
use crate::harness::daemon::{Daemon, PROGRAM};

const CLI: &str = include_str!("../../../deploy/docs/cli.md");

fn awsvid(arguments: &[&str]) -> String {
    let mut command = Command::new(PROGRAM);
    command.env_clear().args(arguments);
    run(command, b"", Duration::from_secs(20)).success("awsvid")
}

/// Returns the commands of cli.md, each with its section.
fn sections() -> Vec<(&'static str, &'static str)> {
    let sections = CLI.split("\n## `awsvid ").skip(1);
    sections
        .map(|section| section.split_once("`\n").expect("a heading"))
        .collect()
}

/// Returns the names of the manual pages of commands, as in `config validate`.
fn commands() -> BTreeSet<String> {
    let folder = folder();
    let directory = folder.path().join("man1");
    awsvid(&["man", "--directory", directory.to_str().unwrap()]);
    let files = std::fs::read_dir(&directory).unwrap();
    let pages = files.map(|file| file.unwrap().file_name().into_string().unwrap());
    let names = pages.filter_map(|page| Some(page.strip_suffix(".1")?.to_owned()));
    let nested = |name: &str| name.replace("config-", "config ");
    names
        .filter_map(|name| Some(nested(name.strip_prefix("awsvid-")?)))
        .collect()
}

/// Splits a synopsis into its words and bracketed groups.
fn parts(synopsis: &str) -> BTreeSet<String> {
    let mut depth = 0;
    let mut found = vec![String::new()];
    for c in synopsis.chars() {
        match c {
            '[' => depth += 1,
            ']' => depth -= 1,
            _ => {}
        }
        if c.is_whitespace() && depth == 0 {
            found.push(String::new());
        } else {
            found.last_mut().unwrap().push(c);
        }
    }
    // Options that exclude each other: `[--pid PID|--pod UID]`.
    let alternatives = |part: String| -> Vec<String> {
        let inner = part
            .strip_prefix('[')
            .and_then(|part| part.strip_suffix(']'));
        match inner {
            Some(inner) if inner.contains("|--") => {
                inner.split('|').map(|one| format!("[{one}]")).collect()
            }
            _ => vec![part],
        }
    };
    found
        .into_iter()
        .filter(|part| !part.is_empty())
        .flat_map(alternatives)
        .collect()
}

/// Returns the parts of the SYNOPSIS of a manual page, after the command.
fn synopsis_of_page(command: &str) -> BTreeSet<String> {
    let words: Vec<&str> = ["man"].into_iter().chain(command.split(' ')).collect();
    let page = awsvid(&words);
    let (_, rest) = page.split_once(".SH SYNOPSIS\n").expect(&page);
    let (synopsis, _) = rest.split_once(".SH ").expect(&page);
    let text = ["\\fB", "\\fI", "\\fR"]
        .iter()
        .fold(synopsis.replace("\\-", "-"), |text, mark| {
            text.replace(mark, "")
        });
    let rest = text.strip_prefix(&format!("awsvid {command}"));
    parts(rest.expect(&text))
}

/// Returns the parts of the synopsis of a command in its section: the first block there.
fn documented_synopsis(command: &str, section: &str) -> BTreeSet<String> {
    let block = section.split("```").nth(1).expect("a synopsis");
    // A line that begins with a space continues the one before.
    let lines = block.replace("\n ", " ");
    let line_of = |line: &str| {
        let rest = line.strip_prefix(&format!("awsvid {command}"))?;
        rest.is_empty()
            .then_some("")
            .or_else(|| rest.strip_prefix(' '))
            .map(parts)
    };
    lines.lines().filter_map(line_of).flatten().collect()
}

#[test]
fn synopses_are_those_of_the_manual_pages() {
    let commands = commands();
    let headings: BTreeSet<String> = sections()
        .iter()
        .map(|(command, _)| (*command).to_owned())
        .collect();
    let top: BTreeSet<String> = commands
        .iter()
        .filter(|command| !command.contains(' '))
        .cloned()
        .collect();
    assert_eq!(headings, top);
    for command in commands.iter().filter(|command| *command != "config") {
        let (_, section) = *sections()
            .iter()
            .find(|(heading, _)| command.split(' ').next() == Some(heading))
            .expect(command);
        assert_eq!(
            documented_synopsis(command, section),
            synopsis_of_page(command),
            "awsvid {command}"
        );
    }
}

/// Returns the numbers in a text.
fn numbers(text: &str) -> BTreeSet<u8> {
    text.split(|c: char| !c.is_ascii_digit())
        .filter_map(|word| word.parse().ok())
        .collect()
}

/// The program itself asserts in a debug build that it ends only with a status of its list.
#[test]
fn exit_statuses_are_those_of_the_code() {
    for (command, section) in sections() {
        let statuses = ExitStatus::of_command(command).iter();
        let in_code: BTreeSet<u8> = statuses
            // The page names those of another command in words.
            .filter(|status| !matches!(status, ExitStatus::Command(_)))
            .map(|status| status.code())
            .collect();
        assert!(!in_code.is_empty(), "awsvid {command}");
        let help = awsvid(&[command, "--help"]);
        let (_, in_help) = help.split_once("Exit status: ").expect(command);
        let paragraph = in_help.split("\n\n").next().unwrap_or(in_help);
        assert_eq!(numbers(paragraph), in_code, "awsvid {command} --help");
        let (_, rows) = section
            .split_once("| exit status | meaning |\n")
            .expect(command);
        let rows = rows.lines().take_while(|line| line.starts_with('|'));
        let cells = rows.skip(1).filter_map(|row| row.split('|').nth(1));
        let documented: BTreeSet<u8> = cells.flat_map(numbers).collect();
        assert_eq!(documented, in_code, "awsvid {command}");
    }
}

/// Returns the daemon's status as JSON.
fn status(folder: &Path) -> Value {
    let config = folder.join("awsvid.toml");
    let config = config.to_str().unwrap();
    serde_json::from_str(&awsvid(&["status", "-o", "json", "--config", config])).unwrap()
}

fn keys(value: &Value) -> BTreeSet<String> {
    value
        .as_object()
        .expect("an object")
        .keys()
        .cloned()
        .collect()
}

/// Returns the rows of each table of fields in a command's section: the fields, and their meaning.
fn field_tables(command: &str) -> Vec<Vec<(BTreeSet<String>, &'static str)>> {
    let (_, section) = *sections()
        .iter()
        .find(|(heading, _)| *heading == command)
        .expect("the section");
    let tables = section.split("| field | meaning |\n").skip(1);
    let cells = |row: &'static str| {
        let mut cells = row.split('|').skip(1);
        Some((code(cells.next()?), cells.next()?))
    };
    tables
        .map(|table| {
            let rows = table.lines().take_while(|line| line.starts_with('|'));
            rows.skip(1).filter_map(cells).collect()
        })
        .collect()
}

/// Returns the values that a table lists for a field.
fn documented_values(table: &[(BTreeSet<String>, &str)], field: &str) -> BTreeSet<String> {
    let row = table.iter().find(|(names, _)| names.contains(field));
    code(row.expect(field).1)
}

/// Returns the names of the steps in the sources of `awsvid check`.
fn steps_in_code() -> BTreeSet<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/commands");
    let files = std::fs::read_dir(folder.join("check")).unwrap();
    let mut paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    paths.push(folder.join("check.rs"));
    let mut found = BTreeSet::new();
    for path in paths.iter().filter(|path| path.is_file()) {
        let source = std::fs::read_to_string(path).unwrap();
        let names = source.split(": &str = \"").skip(1);
        let calls = ["ok(", "info(", "failed(", "unchecked("]
            .into_iter()
            .flat_map(|call| {
                source
                    .split(&format!("report.{call}")[..])
                    .skip(1)
                    .collect::<Vec<_>>()
            })
            .filter_map(|rest| rest.trim_start().strip_prefix('"'));
        let is_step = |text: &&str| text.chars().all(|c| c.is_ascii_lowercase());
        let steps = names.chain(calls).filter_map(|rest| rest.split('"').next());
        found.extend(steps.filter(is_step).map(str::to_owned));
    }
    found
}

/// Returns the verdicts in the code, as JSON has them.
fn verdicts_in_code() -> BTreeSet<String> {
    let source = include_str!("../../../src/commands/check/report.rs");
    let (_, rest) = source.split_once("enum Verdict {").expect("the verdicts");
    let lines = rest.lines().take_while(|line| *line != "}");
    let names = lines.filter_map(|line| line.trim().strip_suffix(','));
    names
        .filter(|name| name.chars().all(char::is_alphanumeric))
        .map(str::to_lowercase)
        .collect()
}

#[test]
fn findings_of_check_are_those_of_the_document() {
    let tables = field_tables("check");
    let [document, finding] = &tables[..] else {
        panic!("{tables:?}")
    };
    let names = |table: &[(BTreeSet<String>, &str)]| -> BTreeSet<String> {
        table.iter().flat_map(|(names, _)| names.clone()).collect()
    };
    let (ready_folder, _daemon, _upstream) = issued();
    let failing_folder = folder();
    let failing = failing_folder.path().join("awsvid.toml");
    // No agent listens at its socket.
    std::fs::write(&failing, super::CONFIGURATION).unwrap();
    let mut found = BTreeSet::new();
    for config in [ready_folder.path().join("awsvid.toml"), failing] {
        let mut command = Command::new(PROGRAM);
        command
            .env_clear()
            .args(["check", "-o", "json", "--config"]);
        command.arg(config);
        let output = run(command, b"", Duration::from_secs(60));
        let report: Value = serde_json::from_str(&output.stdout).expect(&output.stdout);
        assert_eq!(keys(&report), names(document));
        let findings = report["findings"].as_array().unwrap();
        found.extend(findings.iter().flat_map(keys));
    }
    assert_eq!(found, names(finding));
    assert_eq!(documented_values(finding, "verdict"), verdicts_in_code());
    let results = ["failed", "pass", "unchecked"].map(str::to_owned);
    assert_eq!(documented_values(document, "result"), results.into());
    let mut steps = documented_values(finding, "step");
    assert!(steps.remove("--workload"));
    assert_eq!(steps, steps_in_code());
}

#[test]
fn status_fields_are_those_of_the_document() {
    let tables = field_tables("status");
    let states = documented_values(&tables[1], "state");
    let fields: Vec<BTreeSet<String>> = tables
        .iter()
        .map(|table| table.iter().flat_map(|(names, _)| names.clone()).collect())
        .collect();
    let [report, upstream, entry] = &fields[..] else {
        panic!("{fields:?}")
    };
    let (ready_folder, _daemon, _upstream) = issued();
    let ready = status(ready_folder.path());
    let waiting_folder = folder();
    let _waiting = Daemon::start(waiting_folder.path(), "", super::CONFIGURATION);
    let waiting = status(waiting_folder.path());
    // A ready daemon has no reason not to be.
    let found = keys(&ready).union(&keys(&waiting)).cloned().collect();
    assert_eq!(*report, found);
    assert_eq!(*upstream, keys(&ready["source"]));
    assert_eq!(*upstream, keys(&ready["sts"][0]));
    let chain_folder = folder();
    let (_chain_upstream, chained) = chains::start(chain_folder.path());
    chains::await_credentials(&chained);
    let chained = status(chain_folder.path());
    let entries = [&ready, &chained].map(|report| report["credentials"].as_array().unwrap());
    let found = entries.into_iter().flatten().flat_map(keys).collect();
    assert_eq!(*entry, found);
    let failing = await_some("a query that failed", Duration::from_secs(60), || {
        let state = &status(waiting_folder.path())["source"]["state"];
        state.as_str().map(str::to_owned)
    });
    let ok = ready["source"]["state"].as_str().unwrap().to_owned();
    assert_eq!(states, [ok, failing].into());
}

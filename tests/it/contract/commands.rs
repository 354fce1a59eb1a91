//! The commands, options, exit statuses and fields of `/status` in cli.md are those of the program.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::lists::{code, issued};
use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::run;
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

#[test]
fn exit_statuses_are_those_of_the_help() {
    let mut count = 0;
    for (command, section) in sections() {
        let help = awsvid(&[command, "--help"]);
        let in_help = help.split_once("Exit status: ").map(|(_, rest)| {
            let paragraph = rest.split("\n\n").next().unwrap_or(rest);
            numbers(paragraph)
        });
        let documented = section
            .split_once("| exit status | meaning |\n")
            .map(|(_, rest)| {
                let rows = rest.lines().take_while(|line| line.starts_with('|'));
                let cells = rows.skip(1).filter_map(|row| row.split('|').nth(1));
                cells.flat_map(numbers).collect::<BTreeSet<u8>>()
            });
        assert_eq!(documented, in_help, "awsvid {command}");
        count += usize::from(documented.is_some());
    }
    assert!(count >= 7, "{count} commands");
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

#[test]
fn status_fields_are_those_of_the_document() {
    let (_, section) = *sections()
        .iter()
        .find(|(command, _)| *command == "status")
        .expect("the section");
    let tables = section.split("| field | meaning |\n").skip(1);
    let fields = tables.map(|table| {
        let rows = table.lines().take_while(|line| line.starts_with('|'));
        let cells = rows.skip(1).filter_map(|row| row.split('|').nth(1));
        cells.flat_map(code).collect::<BTreeSet<String>>()
    });
    let fields: Vec<_> = fields.collect();
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
    assert_eq!(*entry, keys(&ready["credentials"][0]));
}

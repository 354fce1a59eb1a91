//! Help, version, completions and manual pages of `awsvid`.

#[path = "../../proto/revision.rs"]
mod revision;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::harness::counterparts::process::{Output, run};
use crate::harness::counterparts::{folder, skip};
use crate::harness::daemon::PROGRAM;
use crate::harness::terminal::on_a_terminal;

const COMMANDS: [&str; 11] = [
    "serve",
    "config",
    "status",
    "probe",
    "check",
    "trust-policy",
    "exec",
    "credential-process",
    "dev",
    "completions",
    "man",
];
/// Those that scripts run, and have to know how they end.
const IN_SCRIPTS: [&str; 7] = [
    "serve",
    "config",
    "status",
    "probe",
    "check",
    "trust-policy",
    "exec",
];

fn awsvid(arguments: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command.env_clear().args(arguments);
    run(command, b"", Duration::from_secs(20))
}

fn shell(program: &str, arguments: &[&str], input: &str) -> Output {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .args(arguments);
    run(command, input.as_bytes(), Duration::from_secs(20))
}

#[test]
fn command_has_summary_help_and_manual_page() {
    let all = awsvid(&["--help"]).success("--help");
    let page = awsvid(&["man"]).success("man");
    let listed = all
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty());
    // The rest of a long one stands further in.
    let begin = listed.filter(|line| !line.starts_with("   "));
    let names: Vec<&str> = begin
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert_eq!(names, [&COMMANDS[..], &["help"]].concat(), "{all}");
    assert!(page.contains(".TH awsvid 1"), "{page}");
    let readme = include_str!("../../README.md");
    for command in COMMANDS {
        let words = format!("awsvid {command}");
        assert!(
            readme
                .match_indices(&words)
                .any(|(at, _)| readme[at + words.len()..].starts_with([' ', '`', '\n'])),
            "{words} in README.md"
        );
        let line = all
            .lines()
            .find(|line| line.trim_start().split(' ').next() == Some(command));
        assert!(
            line.is_some_and(|line| line.trim().len() > command.len() + 20),
            "{command}: {all}"
        );
        assert!(
            page.contains(&format!("awsvid\\-{}(1)", command.replace('-', "\\-"))),
            "{command}: {page}"
        );
        let help = awsvid(&[command, "--help"]).success(command);
        assert!(
            help.contains("Usage: awsvid ") && !help.contains('\x1b'),
            "{help}"
        );
        let page = awsvid(&["man", command]).success(command);
        assert!(page.contains(&format!(".TH awsvid-{command} 1")), "{page}");
    }
    for command in IN_SCRIPTS {
        let help = awsvid(&[command, "--help"]).success(command);
        assert!(help.contains("Exit status: "), "{help}");
        assert!(
            matches!(command, "serve" | "status") || help.contains("Examples:\n  "),
            "{help}"
        );
    }
    assert_eq!(awsvid(&["man", "nonsense"]).status.code(), Some(2));
    assert_eq!(
        awsvid(&["man", "config", "nonsense"]).status.code(),
        Some(2)
    );
    let help = awsvid(&["credential-process", "--help"]).success("--help");
    assert!(help.contains("Rules by `exe` never match"), "{help}");
}

#[test]
fn synopsis_has_the_values_of_options() {
    let table: [(&[&str], &str); 4] = [
        (
            &["man", "status"],
            "[\\fB\\-o\\fR \\fBtable|json\\fR] [\\fB\\-\\-watch\\fR [\\fISECONDS\\fR]]",
        ),
        (
            &["man", "config", "validate"],
            "\\fBawsvid config validate\\fR [\\fB\\-\\-config\\fR \\fIFILE\\fR] [\\fB\\-\\-offline\\fR] [\\fIFILE|\\-\\fR]",
        ),
        (&["man", "probe"], " \\fBlive|ready\\fR\n"),
        (&["man", "exec"], "\\fICMD\\fR...\n"),
    ];
    for (arguments, words) in table {
        let page = awsvid(arguments).success("man");
        let (_, rest) = page.split_once(".SH SYNOPSIS\n").expect(&page);
        let (synopsis, _) = rest.split_once(".SH ").expect(&page);
        assert!(synopsis.contains(words), "{words} in {synopsis}");
        assert!(!page.contains(".SH EXTRA"), "{page}");
    }
}

/// Returns the words of every command with a help, those of nested commands too.
fn commands_with_help() -> Vec<Vec<&'static str>> {
    let mut commands: Vec<Vec<&str>> = COMMANDS.iter().map(|command| vec![*command]).collect();
    commands.extend([vec![], vec!["config", "validate"], vec!["config", "show"]]);
    commands
}

fn help_at(columns: usize, words: &[&str]) -> String {
    let mut command = Command::new(PROGRAM);
    command
        .env_clear()
        .env("COLUMNS", columns.to_string())
        .args(words)
        .arg("--help");
    run(command, b"", Duration::from_secs(20)).success("--help")
}

#[test]
fn help_fits_terminals_of_80_and_100_columns() {
    for words in commands_with_help() {
        for columns in [80, 100] {
            let help = help_at(columns, &words);
            for line in help.lines() {
                let length = line.chars().count();
                assert!(length <= columns, "{words:?} at {columns}: {line}");
            }
        }
    }
}

/// An example with its comment would be hard to read if the terminal wrapped it.
#[test]
fn help_examples_fit_80_columns() {
    for words in commands_with_help() {
        let help = help_at(300, &words);
        let is_fixed = |line: &&str| line.starts_with("  awsvid ") || line.starts_with("  sudo ");
        for line in help.lines().filter(is_fixed) {
            assert!(line.chars().count() <= 80, "{words:?}: {line}");
        }
    }
}

/// A default is part of the sentence, as `[default: table]`, in every command alike.
#[test]
fn help_has_one_layout_of_defaults() {
    for words in commands_with_help() {
        let help = help_at(100, &words);
        let lone = help
            .lines()
            .find(|line| line.trim_start().starts_with("[default: "));
        assert_eq!(lone, None, "{words:?}");
    }
}

#[test]
fn summaries_end_without_full_stop() {
    for words in commands_with_help() {
        let help = help_at(100, &words);
        let summary = help.split("\n\n").next().unwrap();
        assert!(!summary.ends_with('.'), "{words:?}: {summary}");
    }
}

#[test]
fn configuration_has_a_manual_page() {
    let page = awsvid(&["man", "awsvid.toml"]).success("man awsvid.toml");
    assert!(page.contains(".TH awsvid.toml 5 "), "{page}");
    for words in [".SH \"[pods]\"", "\\fBhandover_socket\\fR = path"] {
        assert!(page.contains(words), "{words} in {page}");
    }
}

#[test]
fn help_is_coloured_only_on_a_terminal_without_no_color() {
    let help = |variables: &[(&str, &str)]| {
        let mut command = Command::new(PROGRAM);
        command
            .env_clear()
            .env("TERM", "xterm")
            .envs(variables.iter().copied())
            .arg("--help");
        on_a_terminal(command)
    };
    assert!(help(&[]).contains("\x1b["));
    assert!(!help(&[("NO_COLOR", "1")]).contains('\x1b'));
}

#[test]
fn version_names_revision_and_features() {
    let short = awsvid(&["-V"]).success("-V");
    assert_eq!(short, format!("awsvid {}\n", env!("CARGO_PKG_VERSION")));
    let long = awsvid(&["--version"]).success("--version");
    for fact in [
        "revision:",
        std::env::consts::ARCH,
        "profile:",
        "spiffe-broker",
    ] {
        assert!(
            long.starts_with(short.trim()) && long.contains(fact),
            "{fact}: {long}"
        );
    }
}

/// Typed text, and its last word as a shell completes it.
const TYPED: [(&str, &str); 3] = [
    ("awsvid cred", "credential-process"),
    ("awsvid credential-process --sa", "--same-user"),
    ("awsvid trust-policy --format terr", "terraform"),
];

/// Whether the shell is here: `tests/counterparts/get shells`.
fn has(name: &str) -> bool {
    let there = Path::new("/usr/bin").join(name).exists();
    if !there {
        skip(&format!(
            "{name} is missing: run tests/counterparts/get shells"
        ));
    }
    there
}

#[test]
fn bash_completes() {
    let script = awsvid(&["completions", "bash"]).success("completions bash");
    for (typed, completed) in TYPED {
        let words: Vec<&str> = typed.split(' ').collect();
        let [.., before, last] = words[..] else {
            panic!("{typed}")
        };
        let index = words.len() - 1;
        let script_input = format!(
            "{script}\nCOMP_WORDS=({typed}); COMP_CWORD={index}\n\
             _awsvid awsvid {last} {before}; echo \"${{COMPREPLY[@]}}\"\n"
        );
        assert_eq!(
            shell("bash", &["-s"], &script_input).success("bash").trim(),
            completed
        );
    }
    assert_eq!(awsvid(&["completions", "cmd"]).status.code(), Some(2));
}

/// Runs at zsh's own prompt, which it has on a terminal only. The tab key completes the word, and
/// the line is then run.
#[test]
fn zsh_completes() {
    if !has("zsh") {
        return;
    }
    let folder = folder();
    let script = awsvid(&["completions", "zsh"]).success("completions zsh");
    fs::write(folder.path().join("_awsvid"), script).unwrap();
    let begin = "zmodload zsh/zpty\nzpty line zsh -f -i\n\
        zpty -w line 'PS1=; fpath=($DIR $fpath); autoload -Uz compinit; compinit -u -D; awsvid() { print \"last\": $@[-1]; }; print re\"ady\"'\n\
        zpty -r line shown $'*ready*'\n";
    for (typed, completed) in TYPED {
        let script_input = format!(
            "{begin}zpty -n -w line $'{typed}\\t\\n'\nzpty -r line shown $'*last: *\\n'\nprint -r -- $shown\n"
        );
        let mut command = Command::new("/usr/bin/zsh");
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("TERM", "xterm")
            .env("DIR", folder.path())
            .args(["-f", "-s"]);
        let shown = run(command, script_input.as_bytes(), Duration::from_secs(60)).success("zsh");
        let found = shown.lines().find_map(|line| line.split_once("last: "));
        assert_eq!(
            found.map(|(_, word)| word.trim()),
            Some(completed),
            "{typed}: {shown:?}"
        );
    }
}

#[test]
fn fish_completes() {
    if !has("fish") {
        return;
    }
    let folder = folder();
    let script = awsvid(&["completions", "fish"]).success("completions fish");
    let completions = folder.path().join(".config/fish/completions");
    fs::create_dir_all(&completions).unwrap();
    fs::write(completions.join("awsvid.fish"), script).unwrap();
    for (typed, completed) in TYPED {
        let mut command = Command::new("/usr/bin/fish");
        // It has no use for completions of what is not there.
        let path = format!(
            "/usr/bin:/bin:{}",
            Path::new(PROGRAM).parent().unwrap().display()
        );
        command
            .env_clear()
            .env("PATH", path)
            .env("HOME", folder.path());
        command.args(["-c", &format!("complete --do-complete '{typed}'")]);
        let offered = run(command, b"", Duration::from_secs(60)).success("fish");
        let words: Vec<&str> = offered
            .lines()
            .filter_map(|line| line.split('\t').next())
            .collect();
        assert_eq!(words, [completed], "{typed}: {offered:?}");
    }
}

#[test]
fn man_writes_all_pages_to_a_directory() {
    let folder = folder();
    let directory = folder.path().join("man/man1");
    let written = awsvid(&["man", "--directory", directory.to_str().unwrap()]);
    assert_eq!(written.success("man --directory"), "");
    let files = fs::read_dir(&directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut files: Vec<String> = files.collect();
    files.sort();
    let mut expected: Vec<String> = COMMANDS
        .iter()
        .map(|command| format!("awsvid-{command}.1"))
        .collect();
    expected.extend(
        [
            "awsvid.1",
            "awsvid-config-validate.1",
            "awsvid-config-show.1",
        ]
        .map(str::to_owned),
    );
    expected.sort();
    assert_eq!(files, expected);
    for command in COMMANDS {
        let page = fs::read_to_string(directory.join(format!("awsvid-{command}.1"))).unwrap();
        assert_eq!(page, awsvid(&["man", command]).success("man"), "{command}");
    }
    let configuration = awsvid(&["man", "awsvid.toml"]).success("man awsvid.toml");
    let page = folder.path().join("man/man5/awsvid.toml.5");
    assert_eq!(fs::read_to_string(page).unwrap(), configuration);
    // A directory of another name gets all pages.
    let flat = folder.path().join("flat");
    awsvid(&["man", "--directory", flat.to_str().unwrap()]).success("man --directory");
    let page = fs::read_to_string(flat.join("awsvid.toml.5")).unwrap();
    assert_eq!(page, configuration);
    assert_eq!(fs::read_dir(&flat).unwrap().count(), expected.len() + 1);
    let rejected = awsvid(&["man", "--directory", "/dev/null/man1"]);
    assert_eq!(
        (rejected.status.code(), rejected.stdout.as_str()),
        (Some(1), "")
    );
    assert!(rejected.stderr.contains("/dev/null/man1: "), "{rejected:?}");
}

/// Compares the revision that proto/build.rs records.
#[test]
fn revision_follows_the_working_copy() {
    let folder = folder();
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        command
            .current_dir(folder.path())
            .env("HOME", folder.path());
        command
            .args(["-c", "user.name=a", "-c", "user.email=a@example.org"])
            .args(arguments);
        run(command, b"", Duration::from_secs(60)).success("git")
    };
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    fs::create_dir(folder.path().join("src")).unwrap();
    write("src/main.rs", "one");
    write("README.md", "one");
    assert_eq!(
        revision::revision(folder.path()),
        None,
        "a tarball has none"
    );
    git(&["init", "--quiet"]);
    assert_eq!(
        revision::revision(folder.path()),
        None,
        "nothing is committed"
    );
    git(&["add", "."]);
    git(&["commit", "--quiet", "--message", "one"]);
    let first = revision::revision(folder.path()).unwrap();
    assert!(
        first.len() == 12 && git(&["rev-parse", "HEAD"]).starts_with(&first),
        "{first}"
    );
    write("README.md", "two");
    assert_eq!(
        revision::revision(folder.path()),
        Some(first.clone()),
        "that is in no program"
    );
    write("src/main.rs", "two");
    assert_eq!(
        revision::revision(folder.path()),
        Some(format!("{first}+changes"))
    );
    assert_eq!(
        revision::revision(&folder.path().join("src")),
        None,
        "of another project's repository"
    );

    // An archive names its commit, as .gitattributes has it.
    fs::create_dir(folder.path().join("proto")).unwrap();
    write(
        "proto/archived_commit",
        include_str!("../../proto/archived_commit"),
    );
    write(".gitattributes", include_str!("../../.gitattributes"));
    git(&["add", "."]);
    git(&["commit", "--quiet", "--message", "archive"]);
    let read = |path: &str| fs::read_to_string(folder.path().join(path)).unwrap();
    assert_eq!(revision::archived(&read("proto/archived_commit")), None);
    git(&["archive", "--output", "archive.tar", "HEAD", "proto"]);
    let mut tar = Command::new("tar");
    tar.current_dir(folder.path())
        .args(["--extract", "--file", "archive.tar"]);
    run(tar, b"", Duration::from_secs(60)).success("tar");
    assert_eq!(
        revision::archived(&read("proto/archived_commit")),
        revision::revision(folder.path()).map(|revision| revision.replace("+changes", ""))
    );

    // What cargo watches changes with each commit.
    let moves = || {
        revision::moves(folder.path())
            .iter()
            .map(|path| fs::read(folder.path().join(path)).unwrap())
            .collect()
    };
    let before: Vec<Vec<u8>> = moves();
    git(&["commit", "--quiet", "--all", "--message", "two"]);
    assert_ne!(before, moves());
    assert_ne!(revision::revision(folder.path()), Some(first));
}

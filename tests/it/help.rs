//! What `awsvid` says about itself: help, version, completions, manual pages.

use std::process::Command;
use std::time::Duration;

use crate::harness::counterparts::process::{Output, run};
use crate::harness::daemon::PROGRAM;
use crate::harness::terminal::on_a_terminal;

const COMMANDS: [&str; 10] =
    ["serve", "config", "status", "check", "trust-policy", "exec", "credential-process", "dev", "completions", "man"];
/// Those that scripts run, and have to know how they end.
const IN_SCRIPTS: [&str; 6] = ["serve", "config", "status", "check", "trust-policy", "exec"];

fn awsvid(arguments: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command.env_clear().args(arguments);
    run(command, b"", Duration::from_secs(20))
}

fn shell(program: &str, arguments: &[&str], input: &str) -> Output {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", "/usr/bin:/bin").args(arguments);
    run(command, input.as_bytes(), Duration::from_secs(20))
}

#[test]
fn each_command_has_a_line_a_help_and_a_manual_page() {
    let all = awsvid(&["--help"]).success("--help");
    let page = awsvid(&["man"]).success("man");
    let listed = all.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // The rest of a long one stands further in.
    let begin = listed.filter(|line| !line.starts_with("   "));
    let names: Vec<&str> = begin.filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(names, [&COMMANDS[..], &["help"]].concat(), "{all}");
    assert!(page.contains(".TH awsvid 1"), "{page}");
    let readme = include_str!("../../README.md");
    for command in COMMANDS {
        let words = format!("awsvid {command}");
        assert!(
            readme.match_indices(&words).any(|(at, _)| readme[at + words.len()..].starts_with([' ', '`', '\n'])),
            "{words} in README.md"
        );
        let line = all.lines().find(|line| line.trim_start().split(' ').next() == Some(command));
        assert!(line.is_some_and(|line| line.trim().len() > command.len() + 20), "{command}: {all}");
        assert!(page.contains(&format!("awsvid\\-{}(1)", command.replace('-', "\\-"))), "{command}: {page}");
        let help = awsvid(&[command, "--help"]).success(command);
        assert!(help.contains("Usage: awsvid ") && !help.contains('\x1b'), "{help}");
        let page = awsvid(&["man", command]).success(command);
        assert!(page.contains(&format!(".TH awsvid-{command} 1")), "{page}");
    }
    for command in IN_SCRIPTS {
        let help = awsvid(&[command, "--help"]).success(command);
        assert!(help.contains("Exit status: "), "{help}");
        assert!(matches!(command, "serve" | "status") || help.contains("Examples:\n  "), "{help}");
    }
    assert_eq!(awsvid(&["man", "nonsense"]).status.code(), Some(2));
    let help = awsvid(&["credential-process", "--help"]).success("--help");
    assert!(help.contains("Rules by `exe` never match"), "{help}");
}

#[test]
fn colours_are_for_terminals_and_who_wants_them() {
    let help = |variables: &[(&str, &str)]| {
        let mut command = Command::new(PROGRAM);
        command.env_clear().env("TERM", "xterm").envs(variables.iter().copied()).arg("--help");
        on_a_terminal(command)
    };
    assert!(help(&[]).contains("\x1b["));
    assert!(!help(&[("NO_COLOR", "1")]).contains('\x1b'));
}

#[test]
fn the_version_has_the_builds_facts() {
    let short = awsvid(&["-V"]).success("-V");
    assert_eq!(short, format!("awsvid {}\n", env!("CARGO_PKG_VERSION")));
    let long = awsvid(&["--version"]).success("--version");
    for fact in ["revision:", std::env::consts::ARCH, "profile:", "spiffe-broker"] {
        assert!(long.starts_with(short.trim()) && long.contains(fact), "{fact}: {long}");
    }
}

#[test]
fn completions_are_scripts_of_their_shells() {
    let script = awsvid(&["completions", "bash"]).success("completions bash");
    let asked = format!(
        "{script}\nCOMP_WORDS=(awsvid credential-process --sa); COMP_CWORD=2\n\
         _awsvid awsvid --sa credential-process; echo \"${{COMPREPLY[@]}}\"\n"
    );
    assert_eq!(shell("bash", &["-s"], &asked).success("bash").trim(), "--same-user");
    for shell in ["zsh", "fish"] {
        assert!(awsvid(&["completions", shell]).success(shell).contains("credential-process"), "{shell}");
    }
    assert_eq!(awsvid(&["completions", "cmd"]).status.code(), Some(2));
}

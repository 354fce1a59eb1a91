//! What `awsvid` says about itself: help, version, completions, manual pages.

use std::process::Command;
use std::time::Duration;

use crate::harness::counterparts::process::{Output, run};
use crate::harness::daemon::PROGRAM;
use crate::harness::terminal::on_a_terminal;

const COMMANDS: [&str; 8] = ["serve", "config", "status", "exec", "credential-process", "dev", "completions", "man"];

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
    assert!(page.contains(".TH awsvid 1"), "{page}");
    for command in COMMANDS {
        let line = all.lines().find(|line| line.trim_start().split(' ').next() == Some(command));
        assert!(line.is_some_and(|line| line.trim().len() > command.len() + 20), "{command}: {all}");
        assert!(page.contains(&format!("awsvid\\-{}(1)", command.replace('-', "\\-"))), "{command}: {page}");
        let help = awsvid(&[command, "--help"]).success(command);
        assert!(help.contains("Usage: awsvid ") && !help.contains('\x1b'), "{help}");
        let page = awsvid(&["man", command]).success(command);
        assert!(page.contains(&format!(".TH awsvid-{command} 1")), "{page}");
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

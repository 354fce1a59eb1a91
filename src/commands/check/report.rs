//! What the walk has seen, said as it is seen.

use std::cell::Cell;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use serde::Serialize;

use crate::commands::style::{GREEN, RED, Style, YELLOW};

/// How a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::commands) enum Verdict {
    Pass,
    /// It works, and somebody should know.
    Note,
    Failed,
    /// Something before it failed, or it can't be looked at from here.
    Unchecked,
}

/// One thing that was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(in crate::commands) struct CheckFinding {
    pub(in crate::commands) step: &'static str,
    pub(in crate::commands) verdict: Verdict,
    /// What and where. Never a secret.
    pub(in crate::commands) saw: String,
    /// The command or setting that mends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::commands) fix: Option<String>,
}

/// All of it.
#[derive(Debug)]
pub(in crate::commands) struct CheckReport {
    json: bool,
    style: Style,
    /// Whether what is waited for is a line that the next one takes the place of: on a terminal.
    transient: bool,
    /// Whether there is such a line now.
    waiting: Cell<bool>,
    findings: Vec<CheckFinding>,
}

/// Goes to the begin of a terminal's line and empties it.
const ERASE_LINE: &str = "\r\x1b[2K";
/// Of the text after the dots, on a terminal.
const WAITING_MAX: usize = 70;

/// Some step has failed.
const FAILED: u8 = 1;
/// None has, but not everything could be looked at.
const UNCHECKED: u8 = 2;

impl CheckReport {
    /// With `json` all is written at the end, else each line when it is known.
    pub(in crate::commands) fn new(json: bool) -> Self {
        let env = |name: &str| std::env::var(name).ok();
        let style = Style::new(io::stdout().is_terminal(), env);
        let transient = io::stderr().is_terminal() && env("TERM").as_deref() != Some("dumb");
        Self {
            json,
            style,
            transient,
            waiting: Cell::new(false),
            findings: Vec::new(),
        }
    }

    pub(in crate::commands) fn ok(&mut self, step: &'static str, saw: impl Into<String>) {
        self.add(CheckFinding {
            step,
            verdict: Verdict::Pass,
            saw: saw.into(),
            fix: None,
        });
    }

    pub(in crate::commands) fn info(
        &mut self,
        step: &'static str,
        saw: impl Into<String>,
        fix: impl Into<String>,
    ) {
        self.add(CheckFinding {
            step,
            verdict: Verdict::Note,
            saw: saw.into(),
            fix: Some(fix.into()),
        });
    }

    pub(in crate::commands) fn failed(
        &mut self,
        step: &'static str,
        saw: impl Into<String>,
        fix: impl Into<String>,
    ) {
        self.add(CheckFinding {
            step,
            verdict: Verdict::Failed,
            saw: saw.into(),
            fix: Some(fix.into()),
        });
    }

    pub(in crate::commands) fn unchecked(&mut self, step: &'static str, saw: impl Into<String>) {
        self.add(CheckFinding {
            step,
            verdict: Verdict::Unchecked,
            saw: saw.into(),
            fix: None,
        });
    }

    /// Says on standard error what is waited for, where a person looks.
    #[expect(clippy::print_stderr, reason = "a command that a person runs")]
    pub(in crate::commands) fn show_progress(&self, what: &str) {
        if self.json {
            return;
        }
        if !self.transient {
            return eprintln!("  ...  {what}");
        }
        self.clear_progress();
        // A line that is broken in two could not be taken back.
        let what: String = what.chars().take(WAITING_MAX).collect();
        eprint!("  ...  {what}");
        self.waiting.set(true);
    }

    #[expect(clippy::print_stderr, reason = "a command that a person runs")]
    fn clear_progress(&self) {
        if self.waiting.take() {
            eprint!("{ERASE_LINE}");
        }
    }

    fn add(&mut self, finding: CheckFinding) {
        if !self.json {
            self.clear_progress();
            let (word, colour) = match finding.verdict {
                Verdict::Pass => ("  ok ", GREEN),
                Verdict::Note => (" note", YELLOW),
                Verdict::Failed => (" FAIL", RED),
                Verdict::Unchecked => ("  ?  ", YELLOW),
            };
            let word = self.style.paint(colour, word);
            let fix = finding.fix.as_ref().map_or(String::new(), |fix| {
                format!("\n         {:<10} -> {fix}", "")
            });
            // Whoever closes the pipe wants to see no more; the exit status still tells.
            let _ = writeln!(
                io::stdout(),
                "{word}  {:<11} {}{fix}",
                finding.step,
                finding.saw
            );
        }
        self.findings.push(finding);
    }

    /// The last words and the exit status.
    pub(in crate::commands) fn end(self) -> ExitCode {
        let count = |verdict| {
            self.findings
                .iter()
                .filter(|finding| finding.verdict == verdict)
                .count()
        };
        let (failed, unchecked) = (count(Verdict::Failed), count(Verdict::Unchecked));
        let (result, colour, status) = match (failed, unchecked) {
            (1.., _) => ("failed", RED, ExitCode::from(FAILED)),
            (0, 1..) => ("unchecked", YELLOW, ExitCode::from(UNCHECKED)),
            (0, 0) => ("pass", GREEN, ExitCode::SUCCESS),
        };
        self.clear_progress();
        let _ = match self.json {
            true => writeln!(
                io::stdout(),
                "{:#}",
                serde_json::json!({ "result": result, "findings": self.findings })
            ),
            false => writeln!(
                io::stdout(),
                "{}",
                self.style.paint(colour, &words(failed, unchecked))
            ),
        };
        status
    }

    #[cfg(test)]
    pub(in crate::commands) fn findings(&self) -> &[CheckFinding] {
        &self.findings
    }
}

/// How it ended, for people.
fn words(failed: usize, unchecked: usize) -> String {
    let steps = |count: usize| {
        if count == 1 {
            "1 step".to_owned()
        } else {
            format!("{count} steps")
        }
    };
    match (failed, unchecked) {
        (0, 0) => "pass".to_owned(),
        (0, _) => format!(
            "unchecked: nothing failed, but {} could not be looked at",
            steps(unchecked)
        ),
        (_, 0) => format!("failed: {}", steps(failed)),
        _ => format!(
            "failed: {}; {} could not be looked at",
            steps(failed),
            steps(unchecked)
        ),
    }
}

//! Report of the findings, printed as they arrive.

use std::cell::Cell;
use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::commands::terminal_style::{GREEN, RED, TerminalStyle, YELLOW};
use crate::exit_status::ExitStatus;

/// Result of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::commands) enum Verdict {
    Pass,
    /// It works, but an operator should know about it.
    Note,
    Failed,
    /// An earlier step failed, or it cannot be checked from here.
    Unchecked,
}

/// One finding of a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(in crate::commands) struct CheckFinding {
    pub(in crate::commands) step: &'static str,
    pub(in crate::commands) verdict: Verdict,
    /// The observed fact and its subject. Never a secret.
    pub(in crate::commands) saw: String,
    /// Command or setting that fixes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::commands) fix: Option<String>,
}

/// All findings of one run.
#[derive(Debug)]
pub(in crate::commands) struct CheckReport {
    json: bool,
    style: TerminalStyle,
    /// Set on a terminal, where the progress line is replaced by the next line.
    transient: bool,
    /// Set while a progress line is shown.
    waiting: Cell<bool>,
    findings: Vec<CheckFinding>,
}

/// Moves to the start of a terminal's line and clears it.
const ERASE_LINE: &str = "\r\x1b[2K";
/// Maximum length of a progress text on a terminal, in characters.
const MAX_PROGRESS_LENGTH: usize = 70;

impl CheckReport {
    /// Creates the report. With `json` all of it is written at the end, else each line at once.
    pub(in crate::commands) fn new(json: bool) -> Self {
        let env = |name: &str| std::env::var(name).ok();
        let style = TerminalStyle::new(io::stdout().is_terminal(), env);
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

    /// Prints the step that the check waits for on standard error.
    #[expect(clippy::print_stderr, reason = "a command that a person runs")]
    pub(in crate::commands) fn show_progress(&self, what: &str) {
        if self.json {
            return;
        }
        if !self.transient {
            return eprintln!("  ...  {what}");
        }
        self.clear_progress();
        // A line that wraps could not be erased.
        let what: String = what.chars().take(MAX_PROGRESS_LENGTH).collect();
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
            // A closed pipe is not an error. The exit status still reports the result.
            let _ = writeln!(
                io::stdout(),
                "{word}  {:<11} {}{fix}",
                finding.step,
                finding.saw
            );
        }
        self.findings.push(finding);
    }

    /// Prints the summary, and returns the exit status.
    pub(in crate::commands) fn end(self) -> ExitStatus {
        let count = |verdict| {
            self.findings
                .iter()
                .filter(|finding| finding.verdict == verdict)
                .count()
        };
        let (failed, unchecked) = (count(Verdict::Failed), count(Verdict::Unchecked));
        let (result, colour, status) = match (failed, unchecked) {
            (1.., _) => ("failed", RED, ExitStatus::Failure),
            (0, 1..) => ("unchecked", YELLOW, ExitStatus::Unchecked),
            (0, 0) => ("pass", GREEN, ExitStatus::Success),
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

    #[cfg(any(test, fuzzing))]
    pub(in crate::commands) fn findings(&self) -> &[CheckFinding] {
        &self.findings
    }
}

/// Returns the summary for people.
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
            "unchecked: nothing failed, but {} could not be checked",
            steps(unchecked)
        ),
        (_, 0) => format!("failed: {}", steps(failed)),
        _ => format!(
            "failed: {}; {} could not be checked",
            steps(failed),
            steps(unchecked)
        ),
    }
}

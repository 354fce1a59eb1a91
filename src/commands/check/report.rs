//! What the walk has seen, said as it is seen.

use std::io::{self, Write};
use std::process::ExitCode;

use serde::Serialize;

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
pub(in crate::commands) struct Finding {
    pub(in crate::commands) step: &'static str,
    pub(in crate::commands) verdict: Verdict,
    /// What and where. Never a secret.
    pub(in crate::commands) saw: String,
    /// The command or setting that mends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::commands) fix: Option<String>,
}

/// All of it.
#[derive(Debug, Default)]
pub(in crate::commands) struct Report {
    json: bool,
    findings: Vec<Finding>,
}

/// Some step has failed.
const FAILED: u8 = 1;
/// None has, but not everything could be looked at.
const UNCHECKED: u8 = 2;

impl Report {
    /// With `json` all is written at the end, else each line when it is known.
    pub(in crate::commands) fn new(json: bool) -> Self {
        Self { json, findings: Vec::new() }
    }

    pub(in crate::commands) fn pass(&mut self, step: &'static str, saw: impl Into<String>) {
        self.add(Finding { step, verdict: Verdict::Pass, saw: saw.into(), fix: None });
    }

    pub(in crate::commands) fn note(&mut self, step: &'static str, saw: impl Into<String>, fix: impl Into<String>) {
        self.add(Finding { step, verdict: Verdict::Note, saw: saw.into(), fix: Some(fix.into()) });
    }

    pub(in crate::commands) fn failed(&mut self, step: &'static str, saw: impl Into<String>, fix: impl Into<String>) {
        self.add(Finding { step, verdict: Verdict::Failed, saw: saw.into(), fix: Some(fix.into()) });
    }

    pub(in crate::commands) fn unchecked(&mut self, step: &'static str, saw: impl Into<String>) {
        self.add(Finding { step, verdict: Verdict::Unchecked, saw: saw.into(), fix: None });
    }

    /// Says on standard error what is waited for, where a person looks.
    #[expect(clippy::print_stderr, reason = "a command that a person runs")]
    pub(in crate::commands) fn waiting(&self, what: &str) {
        if !self.json {
            eprintln!("  ...  {what}");
        }
    }

    fn add(&mut self, finding: Finding) {
        if !self.json {
            let word = match finding.verdict {
                Verdict::Pass => "  ok ",
                Verdict::Note => " note",
                Verdict::Failed => " FAIL",
                Verdict::Unchecked => "  ?  ",
            };
            let fix = finding.fix.as_ref().map_or(String::new(), |fix| format!("\n         {:<10} -> {fix}", ""));
            // Whoever closes the pipe wants to see no more; the exit status still tells.
            let _ = writeln!(io::stdout(), "{word}  {:<11} {}{fix}", finding.step, finding.saw);
        }
        self.findings.push(finding);
    }

    /// The last words and the exit status.
    pub(in crate::commands) fn end(self) -> ExitCode {
        let has = |verdict| self.findings.iter().any(|finding| finding.verdict == verdict);
        let (result, status) = match (has(Verdict::Failed), has(Verdict::Unchecked)) {
            (true, _) => ("failed", ExitCode::from(FAILED)),
            (false, true) => ("unchecked", ExitCode::from(UNCHECKED)),
            (false, false) => ("pass", ExitCode::SUCCESS),
        };
        let _ = match self.json {
            true => writeln!(io::stdout(), "{:#}", serde_json::json!({ "result": result, "findings": self.findings })),
            false => writeln!(io::stdout(), "{result}"),
        };
        status
    }

    #[cfg(test)]
    pub(in crate::commands) fn findings(&self) -> &[Finding] {
        &self.findings
    }
}

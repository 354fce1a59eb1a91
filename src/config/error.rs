//! Errors and warnings about a configuration, for the person that wrote it.

use std::fmt;
use std::path::PathBuf;

use thiserror::Error;

/// An error, or a warning about a risky setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line in the file, from 1. `None` for a missing table and for the environment.
    pub line: Option<usize>,
    /// Path of the key, such as `listen.tcp`, or the environment variable. Empty if the problem is
    /// the file itself.
    pub key: String,
    /// Failure and its cause, in words.
    pub what: String,
    /// Fix as an imperative, in words.
    pub fix: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        write!(f, "{}; {}", self.what, self.fix)
    }
}

/// All errors of a configuration, by line. Each prints as one line: `file:line: key: what; fix`.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub struct ConfigErrors {
    /// Path of the file as it was named.
    pub path: PathBuf,
    /// At least one problem, by line.
    pub problems: Vec<Problem>,
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{}:", self.path.display())?;
            if let Some(line) = problem.line {
                write!(f, "{line}:")?;
            }
            write!(f, " {problem}")?;
        }
        Ok(())
    }
}

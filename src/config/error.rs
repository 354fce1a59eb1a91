//! Errors and warnings about a configuration, for the person that wrote it.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::fmt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::config_line::ConfigLine;

/// An error, or a warning about a risky setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line of a file. `None` for a missing table and for the environment.
    pub line: Option<ConfigLine>,
    /// Path of the key, such as `listen.tcp`, or the environment variable. Empty if the problem is
    /// the file itself.
    pub key: String,
    /// Failure and its cause, in words.
    pub what: String,
    /// Fix as an imperative, in words.
    pub fix: String,
}

impl Problem {
    /// Returns where the problem is, as `file` or `file:line`. `path` is that of the main file.
    pub fn location(&self, path: &Path) -> String {
        let Some(line) = &self.line else {
            return path.display().to_string();
        };
        let file = line.file().unwrap_or(path);
        format!("{}:{}", file.display(), line.number())
    }

    /// Returns the problem as that of this key.
    pub(crate) fn with_key(self, key: &str) -> Self {
        Self {
            key: key.to_owned(),
            ..self
        }
    }

    /// Returns the key with the failure and its cause, without the fix.
    pub fn cause(&self) -> String {
        match self.key.as_str() {
            "" => self.what.clone(),
            key => format!("{key}: {}", self.what),
        }
    }

    /// Compares by line. Problems without a line are last.
    pub fn by_line(&self, other: &Self) -> Ordering {
        let key = |problem: &Self| (problem.line.is_none(), problem.line.clone());
        key(self).cmp(&key(other))
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.cause(), self.fix)
    }
}

/// Reason why a value is invalid. The text follows the value in a [`Problem`].
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub(super) struct InvalidValue(Cow<'static, str>);

impl From<&'static str> for InvalidValue {
    fn from(text: &'static str) -> Self {
        Self(text.into())
    }
}

impl From<String> for InvalidValue {
    fn from(text: String) -> Self {
        Self(text.into())
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
            write!(f, "{}: {problem}", problem.location(&self.path))?;
        }
        Ok(())
    }
}

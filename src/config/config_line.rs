//! Lines of the configuration's files, for problems and the log.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// A line of a configuration file, from 1. The lines of the main file sort first.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConfigLine {
    /// Path of an included file. `None` is the main file.
    file: Option<Arc<Path>>,
    number: usize,
}

impl ConfigLine {
    pub(super) fn new(file: Option<Arc<Path>>, number: usize) -> Self {
        Self { file, number }
    }

    /// Returns the path of the included file, or `None` for the main file.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// Returns the number in its file, from 1.
    pub fn number(&self) -> usize {
        self.number
    }
}

impl From<usize> for ConfigLine {
    /// Returns the line with this number in the main file.
    fn from(number: usize) -> Self {
        Self::new(None, number)
    }
}

/// As in a sentence: `12`, or `12 of /etc/awsvid/conf.d/shop.toml`.
impl fmt::Display for ConfigLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.number)?;
        self.file
            .iter()
            .try_for_each(|file| write!(f, " of {}", file.display()))
    }
}

/// As in a list of the log: `12`, or `/etc/awsvid/conf.d/shop.toml:12`.
impl fmt::Debug for ConfigLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file
            .iter()
            .try_for_each(|file| write!(f, "{}:", file.display()))?;
        write!(f, "{}", self.number)
    }
}

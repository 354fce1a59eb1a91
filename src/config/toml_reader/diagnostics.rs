//! Errors and warnings of a file, with their locations.

use std::cell::RefCell;
use std::ops::Range;

use toml::de::{DeTable, DeValue};

use super::Table;
use crate::config::error::Problem;
use crate::config::keys;

/// A key or table, with its line if the file has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::config) struct Location {
    pub(in crate::config) line: Option<usize>,
    pub(in crate::config) key: String,
}

/// Collects the errors and warnings of a file.
pub(in crate::config) struct Diagnostics<'t> {
    text: &'t str,
    pub(super) errors: RefCell<Vec<Problem>>,
    warnings: RefCell<Vec<Problem>>,
}

impl<'t> Diagnostics<'t> {
    pub(in crate::config) fn new(text: &'t str) -> Self {
        let (errors, warnings) = (RefCell::default(), RefCell::default());
        Self {
            text,
            errors,
            warnings,
        }
    }

    /// Returns the table at the top of the file.
    pub(in crate::config) fn root<'r>(&'r self, entries: &'r DeTable<'r>) -> Table<'r> {
        Table {
            report: self,
            location: Location {
                line: None,
                key: String::new(),
            },
            entries: Some(entries),
        }
    }

    pub(in crate::config) fn error(
        &self,
        at: &Location,
        what: impl Into<String>,
        fix: impl Into<String>,
    ) {
        self.errors.borrow_mut().push(problem(at, what, fix));
    }

    pub(in crate::config) fn warn(
        &self,
        at: &Location,
        what: impl Into<String>,
        fix: impl Into<String>,
    ) {
        self.warnings.borrow_mut().push(problem(at, what, fix));
    }

    /// Returns the errors if there are any, else the warnings, both by line. Unknown keys are
    /// errors.
    pub(in crate::config) fn finish(
        self,
        entries: &DeTable<'_>,
    ) -> Result<Vec<Problem>, Vec<Problem>> {
        self.unknown_keys("", entries);
        self.sorted()
    }

    /// Returns the same for a file of which only this table was read.
    pub(in crate::config) fn finish_table(
        self,
        table: &str,
        entries: &DeTable<'_>,
    ) -> Result<Vec<Problem>, Vec<Problem>> {
        if let Some(inner) = entries
            .get(table)
            .and_then(|value| value.get_ref().as_table())
        {
            self.unknown_keys(table, inner);
        }
        self.sorted()
    }

    fn sorted(self) -> Result<Vec<Problem>, Vec<Problem>> {
        let by_line = |problem: &Problem| problem.line.unwrap_or(usize::MAX);
        let mut errors = self.errors.into_inner();
        let mut warnings = self.warnings.into_inner();
        errors.sort_by_key(by_line);
        warnings.sort_by_key(by_line);
        if errors.is_empty() {
            Ok(warnings)
        } else {
            Err(errors)
        }
    }

    fn unknown_keys(&self, table: &str, entries: &DeTable<'_>) {
        for (key, value) in entries {
            let name = key.get_ref().as_ref();
            let path = join(table, name);
            if !keys::is_known(table, name) {
                let at = Location {
                    line: Some(self.line(key.span())),
                    key: path,
                };
                // With the version, because the file may be of a newer one.
                self.error(
                    &at,
                    concat!("awsvid ", env!("CARGO_PKG_VERSION"), " has no such key"),
                    keys::suggestion(table, name),
                );
                continue;
            }
            // A table instead of another value has been reported as a wrong type.
            if keys::table(&path).is_none() {
                continue;
            }
            match value.get_ref() {
                DeValue::Table(inner) => self.unknown_keys(&path, inner),
                DeValue::Array(elements) => {
                    elements
                        .iter()
                        .filter_map(|e| e.get_ref().as_table())
                        .for_each(|e| self.unknown_keys(&path, e));
                }
                _ => {}
            }
        }
    }

    pub(super) fn line(&self, span: Range<usize>) -> usize {
        line_at(self.text, span.start)
    }
}

fn problem(at: &Location, what: impl Into<String>, fix: impl Into<String>) -> Problem {
    Problem {
        line: at.line,
        key: at.key.clone(),
        what: what.into(),
        fix: fix.into(),
    }
}

pub(super) fn join(table: &str, key: &str) -> String {
    if table.is_empty() {
        key.to_owned()
    } else {
        format!("{table}.{key}")
    }
}

/// Returns the line, from 1, of this byte of the text.
pub(in crate::config) fn line_at(text: &str, byte: usize) -> usize {
    text.bytes().take(byte).filter(|b| *b == b'\n').count() + 1
}

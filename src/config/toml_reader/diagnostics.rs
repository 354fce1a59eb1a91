//! Errors and warnings of a configuration's files, with their locations.

use std::cell::RefCell;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use toml::de::{DeTable, DeValue};

use super::Table;
use crate::config::config_line::ConfigLine;
use crate::config::error::Problem;
use crate::config::keys;

/// The tables that an included file may have.
const INCLUDABLE: [&str; 2] = ["workload", "role"];

/// The text of a file.
#[derive(Debug, Clone)]
pub(in crate::config) struct ConfigText {
    /// Path of an included file. `None` is the main file.
    pub(in crate::config) path: Option<Arc<Path>>,
    pub(in crate::config) text: String,
}

/// A key or table, with its line if a file has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::config) struct Location {
    pub(in crate::config) line: Option<ConfigLine>,
    pub(in crate::config) key: String,
}

/// Collects the errors and warnings of a configuration's files.
pub(in crate::config) struct Diagnostics<'t> {
    files: &'t [ConfigText],
    pub(super) errors: RefCell<Vec<Problem>>,
    warnings: RefCell<Vec<Problem>>,
}

impl<'t> Diagnostics<'t> {
    pub(in crate::config) fn new(files: &'t [ConfigText]) -> Self {
        let (errors, warnings) = (RefCell::default(), RefCell::default());
        Self {
            files,
            errors,
            warnings,
        }
    }

    /// Returns the table at the top of the main file, which is the first of `tables`. Its lists of
    /// tables continue in the others.
    pub(in crate::config) fn root<'r>(&'r self, tables: &'r [DeTable<'r>]) -> Table<'r> {
        let (entries, included) = match tables.split_first() {
            Some((main, included)) => (Some(main), included),
            None => (None, &[][..]),
        };
        Table {
            report: self,
            file: 0,
            location: Location {
                line: None,
                key: String::new(),
            },
            entries,
            included,
        }
    }

    /// Adds errors that were found before the texts were parsed.
    pub(in crate::config) fn extend(&self, errors: impl IntoIterator<Item = Problem>) {
        self.errors.borrow_mut().extend(errors);
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
        tables: &[DeTable<'_>],
    ) -> Result<Vec<Problem>, Vec<Problem>> {
        for (file, entries) in tables.iter().enumerate() {
            self.unknown_keys(file, ("", None), entries);
        }
        self.sorted()
    }

    /// Returns the same where only this table of the main file was read.
    pub(in crate::config) fn finish_table(
        self,
        table: &str,
        tables: &[DeTable<'_>],
    ) -> Result<Vec<Problem>, Vec<Problem>> {
        let value = tables.first().and_then(|entries| entries.get(table));
        if let Some(value) = value
            && let Some(inner) = value.get_ref().as_table()
        {
            let line = self.line(0, value.span());
            self.unknown_keys(0, (table, Some(line)), inner);
        }
        self.sorted()
    }

    fn sorted(self) -> Result<Vec<Problem>, Vec<Problem>> {
        let mut errors = self.errors.into_inner();
        let mut warnings = self.warnings.into_inner();
        errors.sort_by(Problem::by_line);
        warnings.sort_by(Problem::by_line);
        if errors.is_empty() {
            Ok(warnings)
        } else {
            Err(errors)
        }
    }

    /// Reports the unknown keys of a table, whose path and line are given, and of those in it.
    fn unknown_keys(
        &self,
        file: usize,
        (table, header): (&str, Option<ConfigLine>),
        entries: &DeTable<'_>,
    ) {
        for (key, value) in entries {
            let name = key.get_ref().as_ref();
            let path = join(table, name);
            let at = Location {
                line: Some(self.line(file, key.span())),
                key: path.clone(),
            };
            if file > 0 && table.is_empty() && !INCLUDABLE.contains(&name) {
                self.error(
                    &at,
                    "an included file has only [[workload]] and [[role]]",
                    "move it to the file with `include`",
                );
                continue;
            }
            if !keys::is_known(table, name) {
                let meant = keys::mistyped(table, name).filter(|key| !entries.contains_key(*key));
                if let Some(meant) = meant {
                    self.forget_missing(&join(table, meant), header.as_ref());
                }
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
                DeValue::Table(inner) => {
                    let line = self.line(file, value.span());
                    self.unknown_keys(file, (&path, Some(line)), inner);
                }
                DeValue::Array(elements) => {
                    for element in elements.iter() {
                        let line = self.line(file, element.span());
                        if let Some(inner) = element.get_ref().as_table() {
                            self.unknown_keys(file, (&path, Some(line)), inner);
                        }
                    }
                }
                _ => {}
            }
        }
    }

    /// Removes the errors about a key that its table lacks. They are reported at the table's line.
    fn forget_missing(&self, key: &str, header: Option<&ConfigLine>) {
        let mut errors = self.errors.borrow_mut();
        errors.retain(|error| error.key != key || error.line.as_ref() != header);
    }

    /// Returns the line of a span in the file with this index.
    pub(super) fn line(&self, file: usize, span: Range<usize>) -> ConfigLine {
        let (path, text) = self
            .files
            .get(file)
            .map_or((None, ""), |file| (file.path.clone(), &*file.text));
        ConfigLine::new(path, line_at(text, span.start))
    }
}

fn problem(at: &Location, what: impl Into<String>, fix: impl Into<String>) -> Problem {
    Problem {
        line: at.line.clone(),
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

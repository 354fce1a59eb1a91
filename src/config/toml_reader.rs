//! Reads a TOML tree key by key, and goes on after an error. serde would stop at the first wrong
//! type.
//!
//! [`keys`] has the names that exist. A key that is read and not listed there would be reported as
//! unknown.

use std::fmt::Display;
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::{DeTable, DeValue};

use super::config_line::ConfigLine;
use super::keys;

mod diagnostics;
mod free_names;

use diagnostics::join;
pub(super) use diagnostics::{ConfigText, Diagnostics, Location, line_at};

/// A table of a file. A missing table reads as empty.
pub(super) struct Table<'r> {
    pub(super) report: &'r Diagnostics<'r>,
    /// Index of its file.
    file: usize,
    location: Location,
    entries: Option<&'r DeTable<'r>>,
    /// The tables of the included files, for the table at the top of the main file.
    included: &'r [DeTable<'r>],
}

impl<'r> Table<'r> {
    /// Returns the location of the table's header.
    pub(super) fn at(&self) -> Location {
        self.location.clone()
    }

    /// Returns the location of the key, or of its table if the key is missing.
    pub(super) fn location(&self, key: &str) -> Location {
        let found = self.entries.and_then(|entries| entries.get_key_value(key));
        let line = found
            .map(|(_, value)| self.line(value.span()))
            .or_else(|| self.location.line.clone());
        Location {
            line,
            key: join(&self.location.key, key),
        }
    }

    pub(super) fn contains(&self, key: &str) -> bool {
        self.entries
            .is_some_and(|entries| entries.contains_key(key))
    }

    /// Returns whether the key is missing or an empty list, in included files too.
    pub(super) fn missing(&self, key: &str) -> bool {
        self.entries
            .into_iter()
            .chain(self.included)
            .filter_map(|entries| entries.get(key))
            .all(|value| {
                value
                    .get_ref()
                    .as_array()
                    .is_some_and(|elements| elements.is_empty())
            })
    }

    fn line(&self, span: Range<usize>) -> ConfigLine {
        self.report.line(self.file, span)
    }

    /// Returns whether this key has an error, so that its stand-in means nothing.
    pub(super) fn is_wrong(&self, key: &str) -> bool {
        let at = self.location(key);
        self.contains(key)
            && self
                .report
                .errors
                .borrow()
                .iter()
                .any(|error| error.line == at.line && error.key == at.key)
    }

    pub(super) fn value(&self, key: &'static str) -> Option<&'r DeValue<'r>> {
        debug_assert!(
            keys::is_known(&self.location.key, key),
            "{key} is not listed"
        );
        self.entries
            .and_then(|entries| entries.get(key))
            .map(|value| value.get_ref())
    }

    pub(super) fn error(&self, key: &str, what: impl Into<String>, fix: impl Into<String>) {
        self.report.error(&self.location(key), what, fix);
    }

    pub(super) fn warn(&self, key: &str, what: impl Into<String>, fix: impl Into<String>) {
        self.report.warn(&self.location(key), what, fix);
    }

    /// Reports a required key that is missing.
    pub(super) fn require(&self, key: &'static str, fix: &str) {
        if !self.contains(key) {
            self.report.error(&self.location(key), "it is missing", fix);
        }
    }

    fn wrong_type(&self, at: &Location, expected: &str, found: &DeValue<'_>, fix: &str) {
        let found = found.type_str();
        let article = if found.starts_with(['a', 'i']) {
            "an"
        } else {
            "a"
        };
        self.report.error(
            at,
            format!("this is {article} {found}, where {expected} is wanted"),
            fix,
        );
    }

    pub(super) fn string(&self, key: &'static str) -> Option<&'r str> {
        let value = self.value(key)?;
        if value.as_str().is_none() {
            self.wrong_type(
                &self.location(key),
                "a string",
                value,
                "write a string in quotes",
            );
        }
        value.as_str()
    }

    /// Reads a string by `parse`, and reports its error.
    pub(super) fn parse<T, E: Display>(
        &self,
        key: &'static str,
        fix: &str,
        parse: impl FnOnce(&'r str) -> Result<T, E>,
    ) -> Option<T> {
        let text = self.string(key)?;
        parse(text)
            .map_err(|error| self.error(key, format!("{text:?}: {error}"), fix))
            .ok()
    }

    pub(super) fn flag(&self, key: &'static str) -> Option<bool> {
        let value = self.value(key)?;
        if value.as_bool().is_none() {
            self.wrong_type(
                &self.location(key),
                "true or false",
                value,
                "write true or false, without quotes",
            );
        }
        value.as_bool()
    }

    pub(super) fn number<T: TryFrom<i128> + Display + PartialOrd>(
        &self,
        key: &'static str,
        range: RangeInclusive<T>,
    ) -> Option<T> {
        let value = self.value(key)?;
        let fix = format!(
            "write a whole number from {} to {}, without quotes",
            range.start(),
            range.end()
        );
        let Some(integer) = value.as_integer() else {
            self.wrong_type(&self.location(key), "a number", value, &fix);
            return None;
        };
        let number = i128::from_str_radix(integer.as_str(), integer.radix())
            .ok()
            .and_then(|n| T::try_from(n).ok());
        let number = number.filter(|number| range.contains(number));
        if number.is_none() {
            self.error(key, format!("{integer} is out of range"), fix);
        }
        number
    }

    pub(super) fn duration(
        &self,
        key: &'static str,
        range: RangeInclusive<Duration>,
    ) -> Option<Duration> {
        let [least, most] =
            [range.start(), range.end()].map(|end| humantime::format_duration(*end));
        let fix = format!("write a number and a unit in quotes, from \"{least}\" to \"{most}\"");
        match self.value(key)? {
            DeValue::String(text) => match humantime::parse_duration(text) {
                Ok(duration) if range.contains(&duration) => return Some(duration),
                Ok(duration) => {
                    self.error(
                        key,
                        format!("{} is out of range", humantime::format_duration(duration)),
                        fix,
                    );
                }
                Err(error) => self.error(key, format!("{text:?} is not a duration: {error}"), fix),
            },
            other => self.wrong_type(&self.location(key), "a duration", other, &fix),
        }
        None
    }

    pub(super) fn path(&self, key: &'static str) -> Option<PathBuf> {
        self.parse(
            key,
            "write the whole path of a file, from the first `/`",
            absolute,
        )
    }

    /// Reads one of the words of `known`, and returns its meaning.
    pub(super) fn word<T: Copy>(&self, key: &'static str, known: &[(&str, T)]) -> Option<T> {
        let words: Vec<_> = known
            .iter()
            .map(|(word, _)| format!("\"{word}\""))
            .collect();
        self.parse(key, &format!("write {}", words.join(" or ")), |text| {
            known
                .iter()
                .find(|(word, _)| *word == text)
                .map(|(_, meaning)| *meaning)
                .ok_or("it is not known")
        })
    }

    /// Reads the strings of a list with their locations. `None` if the key is missing or not a
    /// list.
    pub(super) fn strings(&self, key: &'static str) -> Option<Vec<(Location, &'r str)>> {
        const FIX: &str = "write a list of strings: [\"...\", \"...\"]";
        let value = self.value(key)?;
        let Some(elements) = value.as_array() else {
            self.wrong_type(&self.location(key), "a list", value, FIX);
            return None;
        };
        let mut strings = Vec::with_capacity(elements.len());
        for element in elements.iter() {
            let at = Location {
                line: Some(self.line(element.span())),
                ..self.location(key)
            };
            match element.get_ref().as_str() {
                Some(text) => strings.push((at, text)),
                None => self.wrong_type(&at, "a string", element.get_ref(), FIX),
            }
        }
        Some(strings)
    }

    /// Returns the table `[key]`, which may be missing.
    pub(super) fn table(&self, key: &'static str) -> Table<'r> {
        let entries = self.value(key).and_then(|value| {
            if value.as_table().is_none() {
                let fix = format!("write it as [{key}], with its keys below");
                self.wrong_type(&self.location(key), "a table", value, &fix);
            }
            value.as_table()
        });
        let line = entries.and(self.location(key).line);
        Table {
            report: self.report,
            file: self.file,
            location: Location {
                line,
                key: join(&self.location.key, key),
            },
            entries,
            included: &[],
        }
    }

    /// Returns the tables `[[key]]` of this file and of those that it includes, without those of a
    /// wrong type.
    pub(super) fn tables(&self, key: &'static str) -> Vec<Table<'r>> {
        let included = self.included.iter().zip(1..).map(|(entries, file)| Table {
            report: self.report,
            file,
            location: self.location.clone(),
            entries: Some(entries),
            included: &[],
        });
        let mut tables = self.own_tables(key);
        tables.extend(included.flat_map(|file| file.own_tables(key)));
        tables
    }

    fn own_tables(&self, key: &'static str) -> Vec<Table<'r>> {
        let Some(value) = self.value(key) else {
            return Vec::new();
        };
        let fix = format!("write each as [[{key}]], with its keys below");
        let Some(elements) = value.as_array() else {
            self.wrong_type(&self.location(key), "a list of tables", value, &fix);
            return Vec::new();
        };
        let mut tables = Vec::with_capacity(elements.len());
        for element in elements.iter() {
            let location = Location {
                line: Some(self.line(element.span())),
                key: join(&self.location.key, key),
            };
            match element.get_ref().as_table() {
                Some(entries) => tables.push(Table {
                    report: self.report,
                    file: self.file,
                    location,
                    entries: Some(entries),
                    included: &[],
                }),
                None => self.wrong_type(&location, "a table", element.get_ref(), &fix),
            }
        }
        tables
    }

    /// Reports a key of a later version, unless its value requests nothing.
    pub(super) fn reserved_key(&self, key: &'static str) {
        let is_empty = |value: &DeValue<'_>| match value {
            DeValue::Boolean(on) => !on,
            DeValue::Array(elements) => elements.is_empty(),
            _ => false,
        };
        if self.value(key).is_some_and(|value| !is_empty(value)) {
            self.error(
                key,
                "this version of awsvid does not have it yet",
                "remove it",
            );
        }
    }
}

/// `sun_path` has 108 bytes, the last of which is NUL.
const UNIX_PATH_MAX: usize = 107;

/// Reads the path of a unix socket, which an empty string disables.
pub(super) fn socket(
    table: &Table<'_>,
    key: &'static str,
    default: Option<PathBuf>,
) -> Option<PathBuf> {
    let parse = |text: &str| match text {
        "" => Ok(None),
        _ if text.len() > UNIX_PATH_MAX => Err("the path of a socket has at most 107 bytes"),
        _ => absolute(text).map(Some),
    };
    table
        .parse(
            key,
            "write the whole path of a socket, or \"\" to switch it off",
            parse,
        )
        .unwrap_or(default)
}

/// Parses a path that does not depend on the daemon's working directory.
pub(super) fn absolute(text: &str) -> Result<PathBuf, &'static str> {
    match text {
        "" => Err("it is empty"),
        _ if !Path::new(text).is_absolute() => Err("it is relative"),
        _ if text.ends_with('/') => Err("it names a directory"),
        _ if text.contains('\0') => Err("it holds a NUL byte"),
        _ => Ok(PathBuf::from(text)),
    }
}

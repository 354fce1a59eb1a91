//! The files of a configuration: the main one, and those that its `include` names.
//!
//! An included file may have `[[workload]]` and `[[role]]` only. So its author can give roles to
//! identities, and cannot change the source of identities, the STS, or the audit log.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use glob::{MatchOptions, Pattern};
use toml::de::DeTable;

use super::config_line::ConfigLine;
use super::error::{InvalidValue, Problem};
use super::exposure::exposures;
use super::toml_reader::{ConfigText, Diagnostics, Location, Table};
use super::{Config, ConfigDigest, Exposure};

/// Maximum number of included files.
const MAX_INCLUDED_FILES: usize = 1000;
const WILDCARDS: [char; 3] = ['*', '?', '['];
const KEY: &str = "include";
const PATTERN_FIX: &str = "write a file, or a pattern for file names as in \"conf.d/*.toml\"";

/// The texts of a configuration, and what was found when they were read.
#[derive(Debug, Clone, Default)]
pub struct ConfigFiles {
    /// The main file, then the included ones in the order of `include` and of their names.
    pub(super) texts: Vec<ConfigText>,
    /// Whether files can be included. A text without a file has no directory for that.
    pub(super) has_directory: bool,
    /// Files that cannot be included.
    pub(super) problems: Vec<Problem>,
    /// Ways in which another user could change one of the files (T38).
    pub(super) exposures: Vec<Problem>,
}

/// Identifies a file on this machine by its device and inode.
type FileId = (u64, u64);

impl ConfigFiles {
    /// Returns a configuration without files.
    pub(super) fn of_text(text: String) -> Self {
        Self {
            texts: vec![ConfigText { path: None, text }],
            ..Self::default()
        }
    }

    /// Reads the file at `path`, and those that it includes. An included file that cannot be read
    /// is among the problems, so that all others are checked too.
    pub(super) fn read(path: &Path, exposure: Exposure) -> Result<Self, Problem> {
        let (bytes, metadata) = read_file(path).map_err(|error| Config::unreadable(&error))?;
        let text = utf8(bytes, None)?;
        let included = included_by(&text);
        let mut files = Self {
            has_directory: true,
            ..Self::of_text(text)
        };
        if exposure != Exposure::Ignored {
            files.exposures = exposures(path, &metadata, "configuration");
        }
        let directory = path.parent().unwrap_or(Path::new("/"));
        let mut seen = vec![(metadata.dev(), metadata.ino())];
        let mut paths = Vec::new();
        for (at, pattern) in included {
            match expand(directory, &pattern) {
                Ok(found) => paths.extend(found.into_iter().map(|path| (at.clone(), path))),
                Err(what) => files
                    .problems
                    .push(problem(&at, what.to_string(), PATTERN_FIX)),
            }
        }
        if let Some((at, _)) = paths.get(MAX_INCLUDED_FILES) {
            let what = format!("it names more than {MAX_INCLUDED_FILES} files");
            files
                .problems
                .push(problem(at, what, "put several roles in one file"));
        }
        for (at, path) in paths.iter().take(MAX_INCLUDED_FILES) {
            files.include(path, at, exposure, &mut seen);
        }
        Ok(files)
    }

    /// Adds the file at `path`, unless it was read before by another name. `at` is the location of
    /// the pattern that names it.
    fn include(&mut self, path: &Path, at: &Location, exposure: Exposure, seen: &mut Vec<FileId>) {
        let (bytes, metadata) = match read_regular_file(path) {
            Ok(read) => read,
            Err(error) => {
                let what = format!("{} cannot be read: {error}", path.display());
                let fix = "create the file, or correct its name";
                self.problems.push(problem(at, what, fix));
                return;
            }
        };
        let id = (metadata.dev(), metadata.ino());
        if seen.contains(&id) {
            return;
        }
        seen.push(id);
        if exposure != Exposure::Ignored {
            let exposed = exposures(path, &metadata, "configuration").into_iter();
            self.exposures.extend(exposed.map(|exposed| Problem {
                line: at.line.clone(),
                key: at.key.clone(),
                what: format!("{}: {}", path.display(), exposed.what),
                ..exposed
            }));
        }
        let path: Arc<Path> = path.into();
        match utf8(bytes, Some(&path)) {
            Ok(text) => self.texts.push(ConfigText {
                path: Some(path),
                text,
            }),
            Err(problem) => self.problems.push(problem),
        }
    }

    /// Returns the digest of the texts, one after the other.
    pub(super) fn digest(&self) -> ConfigDigest {
        ConfigDigest::of(self.texts.iter().map(|file| file.text.as_bytes()))
    }

    /// Returns a value that changes whenever the content of the files at `path` changes, or what
    /// prevents that they are read. Blocks while the file system does not answer.
    pub fn fingerprint(path: &Path) -> String {
        match Self::read(path, Exposure::Ignored) {
            Ok(files) => {
                let names: Vec<_> = files.texts.iter().map(|file| &file.path).collect();
                format!("{} {names:?} {:?}", files.digest(), files.problems)
            }
            Err(problem) => problem.to_string(),
        }
    }

    /// Returns the paths of the file at `path`, of the files that it includes by their names, and
    /// of the directories that it includes files of.
    pub fn watched_paths(path: &Path) -> Vec<PathBuf> {
        let text = fs::read_to_string(path).unwrap_or_default();
        let directory = path.parent().unwrap_or(Path::new("/"));
        let included = included_by(&text);
        let included = included.iter().map(|(_, pattern)| {
            let path = directory.join(pattern);
            match path.parent() {
                // A name below the directory stands for all that the pattern matches.
                Some(parent) if is_pattern(&path) => parent.join("*"),
                _ => path,
            }
        });
        std::iter::once(path.to_owned()).chain(included).collect()
    }
}

/// Returns the patterns of `include` in this text, without those that are not strings.
fn included_by(text: &str) -> Vec<(Location, String)> {
    // Errors of the text are reported when it is parsed.
    let Ok(entries) = DeTable::parse(text) else {
        return Vec::new();
    };
    let (texts, tables) = (
        ConfigFiles::of_text(text.to_owned()).texts,
        [entries.into_inner()],
    );
    let report = Diagnostics::new(&texts);
    let patterns = read(&report.root(&tables));
    let owned = |(at, pattern): (Location, &str)| (at, pattern.to_owned());
    patterns.into_iter().map(owned).collect()
}

/// Reads `include`: one pattern, or a list of them.
pub(super) fn read<'r>(root: &Table<'r>) -> Vec<(Location, &'r str)> {
    match root.value(KEY) {
        Some(value) if value.as_str().is_some() => {
            let pattern = root.string(KEY).into_iter();
            pattern.map(|text| (root.location(KEY), text)).collect()
        }
        Some(_) => root.strings(KEY).unwrap_or_default(),
        None => Vec::new(),
    }
}

/// Returns the files that a pattern names, sorted by their names. Without a wildcard this is one
/// file, whether it exists or not. A directory that does not exist has no files.
fn expand(directory: &Path, pattern: &str) -> Result<Vec<PathBuf>, InvalidValue> {
    let path = directory.join(pattern);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(format!("{pattern:?} does not name a file").into());
    };
    if parent.to_string_lossy().contains(WILDCARDS) {
        return Err(format!("{pattern:?} has a wildcard in a directory's name").into());
    }
    if !is_pattern(&path) {
        return Ok(vec![path]);
    }
    let matched = Pattern::new(&name.to_string_lossy())
        .map_err(|error| format!("{pattern:?} is not a pattern: {error}"))?;
    // As in a shell. Files that begin with a dot are those of a ConfigMap's volume, and of editors.
    let options = MatchOptions {
        require_literal_leading_dot: true,
        ..MatchOptions::new()
    };
    let unreadable =
        |error: &io::Error| format!("{} cannot be read: {error}", parent.display()).into();
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unreadable(&error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.map_err(|error| unreadable(&error))?.file_name();
        if matched.matches_with(&name.to_string_lossy(), options) {
            found.push(parent.join(name));
        }
    }
    found.sort();
    Ok(found)
}

fn is_pattern(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| name.to_string_lossy().contains(WILDCARDS))
}

fn problem(at: &Location, what: String, fix: &str) -> Problem {
    Problem {
        line: at.line.clone(),
        key: at.key.clone(),
        what,
        fix: fix.to_owned(),
    }
}

/// Returns the content of a file, and the metadata of the file that was opened.
pub(super) fn read_file(path: &Path) -> io::Result<(Vec<u8>, Metadata)> {
    let mut file = File::open(path)?;
    let (mut bytes, found) = (Vec::new(), file.metadata()?);
    file.read_to_end(&mut bytes)?;
    Ok((bytes, found))
}

/// Returns the same, and fails for what is not a regular file. A FIFO would block.
fn read_regular_file(path: &Path) -> io::Result<(Vec<u8>, Metadata)> {
    match fs::metadata(path)?.is_file() {
        true => read_file(path),
        false => Err(io::Error::other("it is not a regular file")),
    }
}

/// Returns the text of a file. `path` is that of an included file.
pub(super) fn utf8(bytes: Vec<u8>, path: Option<&Arc<Path>>) -> Result<String, Problem> {
    String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let number = valid.iter().filter(|byte| **byte == b'\n').count() + 1;
        Problem {
            line: Some(ConfigLine::new(path.cloned(), number)),
            key: String::new(),
            what: "this is not UTF-8".to_owned(),
            fix: "save the file as UTF-8".to_owned(),
        }
    })
}

#[cfg(test)]
mod tests;

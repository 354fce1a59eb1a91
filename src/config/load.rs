//! Loads a configuration: its files, their syntax, and the users that could change them.

use std::io;
use std::path::Path;

use toml::de::DeTable;

use super::config_line::ConfigLine;
use super::exposure::Exposure;
use super::files::{ConfigFiles, read_file, utf8};
use super::toml_reader::{ConfigText, Diagnostics, line_at};
use super::{
    Config, ConfigErrors, ListenConfig, NamePolicy, Problem, imds, listen, parse, pods, sts,
};

/// A configuration without errors.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "the type of the field is documented")]
pub struct LoadedConfig {
    pub config: Config,
    /// Warnings, by line: settings that are allowed and risky.
    pub warnings: Vec<Problem>,
    pub(super) files: ConfigFiles,
}

impl Config {
    /// Reads the file, and those that it includes. `env` returns environment variables. Users and
    /// groups are not resolved.
    ///
    /// Syntax errors are reported alone. All other errors are reported together.
    pub fn load(
        path: &Path,
        exposure: Exposure,
        env: impl Fn(&str) -> Option<String>,
    ) -> Result<LoadedConfig, ConfigErrors> {
        let failed = |problems| ConfigErrors {
            path: path.to_owned(),
            problems,
        };
        let files = ConfigFiles::read(path, exposure).map_err(|problem| failed(vec![problem]))?;
        let exposed = files.exposures.clone();
        match (parse(files, &env, NamePolicy::OfServe), exposure) {
            (Ok(mut loaded), Exposure::Warned) => {
                loaded.warnings.extend(exposed);
                Ok(loaded)
            }
            (Ok(loaded), _) if exposed.is_empty() => Ok(loaded),
            (Ok(_), _) => Err(failed(exposed)),
            (Err(mut problems), _) => {
                problems.extend(exposed);
                Err(failed(problems))
            }
        }
    }

    /// Parses the content of a file, as [`Config::parse`] does its text. Fails as that does, and
    /// for bytes that are not UTF-8.
    pub fn parse_bytes(
        bytes: Vec<u8>,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<LoadedConfig, Vec<Problem>> {
        Self::parse(&utf8(bytes, None).map_err(|problem| vec![problem])?, env)
    }

    /// Returns the problem for a file, or standard input, that cannot be read.
    pub fn unreadable(error: &io::Error) -> Problem {
        Problem {
            line: None,
            key: String::new(),
            what: format!("the file cannot be read: {error}"),
            fix: "name a file with --config or AWSVID_CONFIG".to_owned(),
        }
    }

    /// Reads the part of the file that a caller of the daemon needs: `[listen]`, the region if it
    /// is valid, and whether the daemon serves metadata.
    ///
    /// A caller cannot correct the rest of the file, and may know fewer users than the daemon. Each
    /// error in `[listen]` counts, because a default could be the address of another daemon.
    pub fn load_for_callers(
        path: &Path,
    ) -> Result<(ListenConfig, Option<String>, bool), ConfigErrors> {
        let failed = |problems| ConfigErrors {
            path: path.to_owned(),
            problems,
        };
        let (bytes, _) = read_file(path).map_err(|error| failed(vec![Self::unreadable(&error)]))?;
        let text = utf8(bytes, None).map_err(|problem| failed(vec![problem]))?;
        // Included files have no such table.
        let files = ConfigFiles::of_text(text).texts;
        let tables = parse_tables(&files).map_err(failed)?;
        let rest = Diagnostics::new(&files);
        let region = sts::read(&rest.root(&tables).table("sts")).region;
        let pods = pods::read(&rest.root(&tables).table("pods"));
        let report = Diagnostics::new(&files);
        let (listen, _) = listen::read(&report.root(&tables).table("listen"), &pods);
        report.finish_table("listen", &tables).map_err(failed)?;
        let imds = imds::read(&rest.root(&tables).table("imds"), &listen, &pods);
        Ok((listen, region, imds.is_on()))
    }
}

/// Parses the text of each file, and reports the syntax errors of all of them.
pub(super) fn parse_tables(files: &[ConfigText]) -> Result<Vec<DeTable<'_>>, Vec<Problem>> {
    let (mut tables, mut problems) = (Vec::new(), Vec::new());
    for file in files {
        match DeTable::parse(&file.text) {
            Ok(table) => tables.push(table.into_inner()),
            Err(error) => problems.push(syntax_error(file, &error)),
        }
    }
    match problems.is_empty() {
        true => Ok(tables),
        false => Err(problems),
    }
}

/// Describes a syntax error by its line and column.
fn syntax_error(file: &ConfigText, error: &toml::de::Error) -> Problem {
    let ConfigText { path, text } = file;
    let span = error.span().unwrap_or(text.len()..text.len());
    let before = text.get(..span.start).unwrap_or(text);
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    let found = text
        .get(span.clone())
        .filter(|found| (1..=40).contains(&found.len()) && !found.contains('\n'));
    let found = found
        .map(|found| format!(" at `{found}`"))
        .unwrap_or_default();
    Problem {
        line: Some(ConfigLine::new(path.clone(), line_at(text, span.start))),
        key: String::new(),
        what: format!(
            "this is not TOML: {}{found} (column {column})",
            error.message()
        ),
        fix: "correct it; the rest of the file is checked after that".to_owned(),
    }
}

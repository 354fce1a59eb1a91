//! The configuration's file: its content, its syntax, and the users that could change it.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::path::Path;

use toml::de::DeTable;

use super::exposure::{Exposure, exposures};
use super::toml_reader::{Diagnostics, line_at};
use super::{Config, ConfigErrors, Listen, Problem, listen, pods, sts};

/// A configuration without errors.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "the type of the field is documented")]
pub struct LoadedConfig {
    pub config: Config,
    /// Warnings, by line: settings that are allowed and risky.
    pub warnings: Vec<Problem>,
}

impl Config {
    /// Reads the file. `env` returns environment variables. Users and groups are not resolved.
    ///
    /// A syntax error is reported alone. All other errors are reported together.
    pub fn load(
        path: &Path,
        exposure: Exposure,
        env: impl Fn(&str) -> Option<String>,
    ) -> Result<LoadedConfig, ConfigErrors> {
        let failed = |problems| ConfigErrors {
            path: path.to_owned(),
            problems,
        };
        let (bytes, file) = read_file(path).map_err(|problem| failed(vec![problem]))?;
        let exposed = match exposure {
            Exposure::Ignored => Vec::new(),
            Exposure::Refused | Exposure::Warned => exposures(path, &file, "configuration"),
        };
        let loaded = Self::parse_bytes(bytes, &env);
        match (loaded, exposure) {
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

    /// Parses the content of a file, as [`Config::parse`] does its text.
    pub fn parse_bytes(
        bytes: Vec<u8>,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<LoadedConfig, Vec<Problem>> {
        Self::parse(&utf8(bytes).map_err(|problem| vec![problem])?, env)
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

    /// Reads the part of the file that a caller of the daemon needs: `[listen]`, and the region if
    /// it is valid.
    ///
    /// A caller cannot correct the rest of the file, and may know fewer users than the daemon. Each
    /// error in `[listen]` counts, because a default could be the address of another daemon.
    pub fn load_for_callers(path: &Path) -> Result<(Listen, Option<String>), ConfigErrors> {
        let failed = |problems| ConfigErrors {
            path: path.to_owned(),
            problems,
        };
        let (bytes, _) = read_file(path).map_err(|problem| failed(vec![problem]))?;
        let text = utf8(bytes).map_err(|problem| failed(vec![problem]))?;
        let entries = DeTable::parse(&text)
            .map_err(|error| failed(vec![syntax_error(&text, &error)]))?
            .into_inner();
        let rest = Diagnostics::new(&text);
        let region = sts::read(&rest.root(&entries).table("sts")).region;
        let pods = pods::read(&rest.root(&entries).table("pods"));
        let report = Diagnostics::new(&text);
        let (listen, _) = listen::read(&report.root(&entries).table("listen"), &pods);
        report.finish_table("listen", &entries).map_err(failed)?;
        Ok((listen, region))
    }
}

/// Describes a syntax error by its line and column.
pub(super) fn syntax_error(text: &str, error: &toml::de::Error) -> Problem {
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
        line: Some(line_at(text, span.start)),
        key: String::new(),
        what: format!(
            "this is not TOML: {}{found} (column {column})",
            error.message()
        ),
        fix: "correct it; the rest of the file is checked after that".to_owned(),
    }
}

/// Returns the content of the file, and the metadata of the file that was opened.
fn read_file(path: &Path) -> Result<(Vec<u8>, Metadata), Problem> {
    let read = || {
        let mut file = File::open(path)?;
        let (mut bytes, found) = (Vec::new(), file.metadata()?);
        file.read_to_end(&mut bytes)?;
        Ok((bytes, found))
    };
    read().map_err(|error: io::Error| Config::unreadable(&error))
}

fn utf8(bytes: Vec<u8>) -> Result<String, Problem> {
    String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        Problem {
            line: Some(valid.iter().filter(|byte| **byte == b'\n').count() + 1),
            key: String::new(),
            what: "this is not UTF-8".to_owned(),
            fix: "save the file as UTF-8".to_owned(),
        }
    })
}

//! `[audit]` and `[log]`: what awsvid writes, and where.

use std::path::PathBuf;

use super::toml_reader::{Location, Table, absolute};

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
/// Overrides `[log] level`.
const LEVEL_VARIABLE: &str = "AWSVID_LOG";
const LEVEL_FIX: &str =
    "write error, warn, info, debug or trace, or module=level pairs with commas between";

/// `[audit]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditConfig {
    /// Where the records go.
    pub file: AuditFile,
    /// Whether nothing is issued while records can't be written.
    pub required: bool,
}

/// Where audit records go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AuditFile {
    /// Standard output (in the file: `-`).
    Stdout,
    /// Appended to this file.
    Path(PathBuf),
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// A filter of tracing-subscriber's: `info`, or for instance `info,awsvid::sts=debug`. `AWSVID_LOG` overrides it.
    pub level: String,
    /// How lines look.
    pub format: LogFormat,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, else JSON.
    Auto,
    /// For people.
    Text,
    /// For machines.
    Json,
}

impl Default for AuditConfig {
    fn default() -> Self {
        Self {
            file: AuditFile::Stdout,
            required: false,
        }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
            format: LogFormat::Auto,
        }
    }
}

/// Reads `[audit]`.
pub(super) fn read_audit(table: &Table<'_>) -> AuditConfig {
    let default = AuditConfig::default();
    let file = |text: &str| match text {
        "-" => Ok(AuditFile::Stdout),
        path => absolute(path).map(AuditFile::Path),
    };
    AuditConfig {
        file: table
            .parse("file", "write the whole path of a file, or \"-\"", file)
            .unwrap_or(default.file),
        required: table.flag("required").unwrap_or(default.required),
    }
}

/// Reads `[log]`.
pub(super) fn read_log(table: &Table<'_>, env: &dyn Fn(&str) -> Option<String>) -> LogConfig {
    let default = LogConfig::default();
    let formats = [
        ("auto", LogFormat::Auto),
        ("text", LogFormat::Text),
        ("json", LogFormat::Json),
    ];
    let in_file = table.parse("level", LEVEL_FIX, level);
    let in_env = env(LEVEL_VARIABLE)
        .filter(|text| !text.is_empty())
        .and_then(|text| {
            let at = Location {
                line: None,
                key: LEVEL_VARIABLE.to_owned(),
            };
            level(&text)
                .map_err(|error| {
                    table
                        .report
                        .error(&at, format!("{text:?}: {error}"), LEVEL_FIX)
                })
                .ok()
        });
    LogConfig {
        level: in_env.or(in_file).unwrap_or(default.level),
        format: table.word("format", &formats).unwrap_or(default.format),
    }
}

/// tracing takes a mistyped level for the name of a module, of which it then shows everything; so look closer.
fn level(text: &str) -> Result<String, String> {
    for part in text.split(',') {
        let level = part
            .rsplit_once('=')
            .map_or(part, |(_, level)| level)
            .trim();
        if !LEVELS.iter().any(|known| known.eq_ignore_ascii_case(level)) {
            return Err(format!("`{level}` is no level"));
        }
    }
    tracing_subscriber::EnvFilter::try_new(text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

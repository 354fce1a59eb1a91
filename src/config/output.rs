//! `[audit]` and `[log]`: the destinations and forms of records and logs.

use std::path::PathBuf;

use super::toml_reader::{Location, Table, absolute};

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
/// The variable that overrides `[log] level`.
const LEVEL_VARIABLE: &str = "AWSVID_LOG";
const LEVEL_FIX: &str =
    "write error, warn, info, debug or trace, or module=level pairs with commas between";

/// The table `[audit]` of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditConfig {
    /// Destination of the records.
    pub file: AuditFile,
    /// Whether the daemon rejects a request if its record cannot be written.
    pub required: bool,
}

/// The destination of audit records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AuditFile {
    /// Standard output, which is `-` in the file.
    Stdout,
    /// A file to which records are appended.
    Path(PathBuf),
}

/// The table `[log]` of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// Filter of tracing-subscriber, such as `info` or `info,awsvid::sts=debug`. `AWSVID_LOG`
    /// overrides it.
    pub level: String,
    /// Form of the log's lines.
    pub format: LogFormat,
}

/// The form of the log's lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the variants are the words of the file")]
pub enum LogFormat {
    /// Text on a terminal, and JSON elsewhere.
    Auto,
    Text,
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

/// Reads the table `[audit]`.
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

/// Reads the table `[log]`, and the variable that overrides its level.
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

/// Parses a log filter. tracing reads a mistyped level as the name of a module, and then shows all
/// of that module.
fn level(text: &str) -> Result<String, String> {
    for part in text.split(',') {
        let level = part
            .rsplit_once('=')
            .map_or(part, |(_, level)| level)
            .trim();
        if !LEVELS.iter().any(|known| known.eq_ignore_ascii_case(level)) {
            return Err(format!("`{level}` is not a level"));
        }
    }
    tracing_subscriber::EnvFilter::try_new(text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

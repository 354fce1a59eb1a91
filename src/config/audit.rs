//! `[audit]`: the destination of audit records.

use std::path::PathBuf;

use super::toml_reader::{Table, absolute};

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

impl Default for AuditConfig {
    fn default() -> Self {
        Self {
            file: AuditFile::Stdout,
            required: false,
        }
    }
}

/// Reads the table `[audit]`.
pub(super) fn read(table: &Table<'_>) -> AuditConfig {
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

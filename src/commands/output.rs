//! The forms of output that commands have.

use clap::ValueEnum;

/// The form of a command's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum OutputFormat {
    /// A table, or lines of text
    Table,
    /// One JSON document for programs
    Json,
}

//! `[cache]`: the bounds of the credential cache.

use std::time::Duration;

use super::toml_reader::Table;

/// The table `[cache]` of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheConfig {
    /// Maximum number of entries at the same time.
    pub max_entries: usize,
    /// Time for which awsvid serves cached credentials after STS has rejected their refresh.
    pub revocation_grace: Duration,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            max_entries: 10_000,
            revocation_grace: Duration::from_secs(300),
        }
    }
}

/// Reads the table `[cache]`.
pub(super) fn read(table: &Table<'_>) -> CacheConfig {
    let default = CacheConfig::default();
    let grace = Duration::ZERO..=Duration::from_secs(12 * 3600);
    CacheConfig {
        max_entries: table
            .number("max_entries", 1..=1_000_000)
            .unwrap_or(default.max_entries),
        revocation_grace: table
            .duration("revocation_grace", grace)
            .unwrap_or(default.revocation_grace),
    }
}

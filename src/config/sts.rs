//! `[sts]`: where tokens are exchanged for credentials.

use std::path::PathBuf;
use std::time::Duration;

use super::aws;
use super::toml_reader::Table;

const TIMEOUT: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(60);
/// How to write a region.
pub(super) const REGION_FIX: &str = "write a region as in \"eu-central-1\"";
/// How to write an endpoint.
pub(super) const ENDPOINT_FIX: &str = "write a URL as in \"https://minio.internal:9000\"";

/// `[sts]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StsConfig {
    /// The AWS region of roles that have none of their own.
    pub region: Option<String>,
    /// An endpoint instead of AWS's, for roles that have none of their own: `scheme://host[:port][/path]` without a
    /// trailing slash.
    pub endpoint: Option<String>,
    /// PEM certificates of the authority that signed the endpoint's.
    pub ca_file: Option<PathBuf>,
    /// For one exchange, from the first byte to the last.
    pub timeout: Duration,
    /// Exchanges at one time.
    pub max_concurrent: usize,
}

impl Default for StsConfig {
    fn default() -> Self {
        Self {
            region: None,
            endpoint: None,
            ca_file: None,
            timeout: Duration::from_secs(5),
            max_concurrent: 16,
        }
    }
}

/// Reads `[sts]`.
pub(super) fn read(table: &Table<'_>) -> StsConfig {
    let default = StsConfig::default();
    let sts = StsConfig {
        region: table.parse("region", REGION_FIX, aws::region),
        endpoint: table.parse("endpoint", ENDPOINT_FIX, aws::sts_endpoint),
        ca_file: table.path("ca_file"),
        timeout: table
            .duration("timeout", TIMEOUT)
            .unwrap_or(default.timeout),
        max_concurrent: table
            .number("max_concurrent", 1..=1000)
            .unwrap_or(default.max_concurrent),
    };
    if !table.contains("endpoint")
        && sts
            .region
            .as_ref()
            .is_some_and(|region| !aws::is_aws_region(region))
    {
        table.error("region", "AWS has no region of such a name", REGION_FIX);
    }
    sts
}

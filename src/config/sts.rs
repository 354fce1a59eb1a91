//! `[sts]`: the STS that exchanges tokens for credentials.

use std::path::PathBuf;
use std::time::Duration;

use super::aws;
use super::toml_reader::Table;

const TIMEOUT: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(60);
/// The fix for a wrong region.
pub(super) const REGION_FIX: &str = "write a region as in \"eu-central-1\"";
/// The fix for a wrong endpoint.
pub(super) const ENDPOINT_FIX: &str = "write a URL as in \"https://minio.internal:9000\"";

/// The table `[sts]` of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StsConfig {
    /// AWS region of roles without one of their own.
    pub region: Option<String>,
    /// Endpoint instead of AWS's, for roles without one of their own:
    /// `scheme://host[:port][/path]` without a trailing slash.
    pub endpoint: Option<String>,
    /// PEM certificates of the authority that signed the endpoint's certificate.
    pub ca_file: Option<PathBuf>,
    /// Time limit of one exchange, from the first byte to the last.
    pub timeout: Duration,
    /// Maximum number of exchanges at the same time.
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

/// Reads the table `[sts]`.
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

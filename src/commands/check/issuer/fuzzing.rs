//! The fuzz target for the documents of an issuer, with arbitrary text.

use serde_json::Value;

use super::{belongs_to_issuer, contents, keys_url, verifies};
use crate::commands::check::report::{CheckReport, Verdict};

/// Checks an issuer, its discovery document and its keys, each on a line: a document passes only if
/// it names this issuer, and no key verifies a token that it did not sign.
pub(crate) fn documents(text: &str) -> bool {
    const UNSIGNED: &str = "eyJhbGciOiJFUzI1NiIsImtpZCI6ImsxIn0.e30.AAAA";
    let mut lines = text.splitn(3, '\n');
    let [issuer, discovery, keys] = [(); 3].map(|()| lines.next().unwrap_or_default());
    let [discovery, keys] =
        [discovery, keys].map(|text| serde_json::from_str::<Value>(text).unwrap_or_default());
    let mut report = CheckReport::new(true);
    belongs_to_issuer(&discovery, issuer, &mut report);
    let passes = report
        .findings()
        .iter()
        .all(|found| found.verdict == Verdict::Pass);
    assert_eq!(passes, discovery["issuer"] == issuer);
    let url = keys_url(&discovery, issuer, true, &mut report);
    let is_https = url
        .as_deref()
        .is_some_and(|url| url.starts_with("https://"));
    let mut report = CheckReport::new(true);
    contents(&keys, &mut report);
    let list = keys["keys"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    for key in list {
        for algorithm in ["ES256", "RS256", "PS512"] {
            assert_ne!(verifies(UNSIGNED, algorithm, key), Some(true), "{key}");
        }
    }
    passes && is_https && report.findings().is_empty() && !list.is_empty()
}

//! The fuzz target for `Accept`, with arbitrary bytes.

use hyper::header::{ACCEPT, HeaderMap, HeaderValue};

use super::{MetricsFormat, OPENMETRICS};

/// Checks headers, one a line: a client that does not name OpenMetrics does not get it, and neither
/// the order of the headers nor their number matters.
pub(crate) fn accept(bytes: &[u8]) -> bool {
    let values: Vec<_> = bytes
        .split(|byte| *byte == b'\n')
        .filter_map(|line| HeaderValue::from_bytes(line).ok())
        .collect();
    let negotiate = |values: &mut dyn Iterator<Item = HeaderValue>| {
        let headers: HeaderMap = values.map(|value| (ACCEPT, value)).collect();
        MetricsFormat::negotiate(&headers)
    };
    let format = negotiate(&mut values.iter().cloned());
    assert_eq!(format, negotiate(&mut values.iter().rev().cloned()));
    let texts: Vec<_> = values
        .iter()
        .filter_map(|value| value.to_str().ok())
        .collect();
    let joined = texts.join(",");
    let in_one = HeaderValue::from_str(&joined).into_iter();
    assert_eq!(format, negotiate(&mut in_one.into_iter()));
    let is_named = joined.to_ascii_lowercase().contains(OPENMETRICS);
    assert!(format == MetricsFormat::Text || is_named, "{joined}");
    format == MetricsFormat::OpenMetrics
}

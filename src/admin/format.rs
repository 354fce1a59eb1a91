//! The format of `/metrics`, by the request's `Accept` header.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ACCEPT, HeaderMap};
use hyper::{Response, StatusCode};

use super::reply;

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;

const OPENMETRICS: &str = "application/openmetrics-text";

/// The metrics in both formats, shared by all scrapes of a second.
#[derive(Debug, Clone)]
pub(super) struct RenderedMetrics {
    pub(super) openmetrics: Bytes,
    pub(super) text: Bytes,
}

/// A format in which metrics are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MetricsFormat {
    /// Version 1.0 of OpenMetrics.
    OpenMetrics,
    /// Version 0.0.4 of Prometheus's text format.
    Text,
}

impl MetricsFormat {
    /// Returns OpenMetrics where the client names it and prefers no other format (RFC 9110, section
    /// 12.5.1), else the text format, which any client can read.
    pub(super) fn negotiate(headers: &HeaderMap) -> Self {
        let (mut openmetrics, mut text) = (0.0_f32, 0.0_f32);
        let values = headers
            .get_all(ACCEPT)
            .iter()
            .filter_map(|value| value.to_str().ok());
        for range in values.flat_map(|value| value.split(',')) {
            let (kind, quality) = parse(range);
            match kind.as_str() {
                OPENMETRICS => openmetrics = openmetrics.max(quality),
                "text/plain" => text = text.max(quality),
                _ => {}
            }
        }
        if openmetrics > 0.0 && openmetrics >= text {
            Self::OpenMetrics
        } else {
            Self::Text
        }
    }

    pub(super) fn reply(self, rendered: &RenderedMetrics) -> Response<Full<Bytes>> {
        let (kind, body) = match self {
            Self::OpenMetrics => (
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                &rendered.openmetrics,
            ),
            Self::Text => ("text/plain; version=0.0.4; charset=utf-8", &rendered.text),
        };
        reply(StatusCode::OK, kind, body.clone())
    }
}

/// Returns the media type of a range in lower case, and its quality.
fn parse(range: &str) -> (String, f32) {
    let mut parts = range
        .split(';')
        .map(|part| part.trim().to_ascii_lowercase());
    let kind = parts.next().unwrap_or_default();
    let quality = parts.find_map(|part| part.strip_prefix("q=")?.trim().parse().ok());
    (kind, quality.unwrap_or(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderValue;

    #[test]
    fn openmetrics_is_served_only_where_it_is_named_and_preferred() {
        use MetricsFormat::{OpenMetrics, Text};
        let prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
                          application/openmetrics-text;version=0.0.1;q=0.5,\
                          text/plain;version=0.0.4;q=0.4,*/*;q=0.2";
        for (accept, expected) in [
            (None, Text),
            (Some("*/*"), Text),
            (Some("text/html, application/xml;q=0.9, */*;q=0.8"), Text),
            (Some("text/plain"), Text),
            (Some("application/json"), Text),
            (
                Some("application/openmetrics-text; version=1.0.0"),
                OpenMetrics,
            ),
            (Some("Application/OpenMetrics-Text"), OpenMetrics),
            (Some("application/openmetrics-text;q=0"), Text),
            (
                Some("text/plain;version=0.0.4;q=1, application/openmetrics-text;q=0.5"),
                Text,
            ),
            (Some(prometheus), OpenMetrics),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(accept) = accept {
                headers.insert(ACCEPT, HeaderValue::from_static(accept));
            }
            assert_eq!(MetricsFormat::negotiate(&headers), expected, "{accept:?}");
        }
    }
}

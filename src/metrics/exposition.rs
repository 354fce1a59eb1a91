//! The two text formats in which `/metrics` is read.

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

/// All metrics, rendered at one moment.
#[derive(Debug, Clone)]
pub struct Exposition {
    /// In the format of the OpenMetrics 1.0 specification.
    pub openmetrics: String,
    /// In version 0.0.4 of Prometheus's text format.
    pub text: String,
}

impl Exposition {
    pub(super) fn encode(registry: &Registry) -> Self {
        let mut openmetrics = String::new();
        // Writing to a string cannot fail.
        let _ = encode(&mut openmetrics, registry);
        let text = text_format(&openmetrics);
        Self { openmetrics, text }
    }
}

/// Converts OpenMetrics to version 0.0.4 of the text format.
///
/// Samples are the same in both. Version 0.0.4 names a counter by its sample, with `_total`, and
/// has neither units nor a line for the end.
fn text_format(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len());
    let mut help = None;
    for line in openmetrics.lines() {
        if line == "# EOF" || line.starts_with("# UNIT ") {
            continue;
        }
        if let Some(described) = line.strip_prefix("# HELP ") {
            // The suffix is known with the type, which is in the next line.
            help = described.split_once(' ');
            continue;
        }
        let typed = line
            .strip_prefix("# TYPE ")
            .and_then(|typed| typed.split_once(' '));
        match typed {
            Some((name, kind)) => {
                let suffix = if kind == "counter" { "_total" } else { "" };
                if let Some((_, words)) = help.take() {
                    text.extend(["# HELP ", name, suffix, " ", words, "\n"]);
                }
                text.extend(["# TYPE ", name, suffix, " ", kind, "\n"]);
            }
            None => text.extend([line, "\n"]),
        }
    }
    text
}

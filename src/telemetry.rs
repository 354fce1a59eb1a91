//! The daemon's log: standard error, text on a terminal, JSON elsewhere. Audit records go their own way (see `audit`).

use std::io::{IsTerminal, stderr};

use tracing::{Level, Metadata};
use tracing_subscriber::filter::{ParseError, filter_fn};
use tracing_subscriber::prelude::*;
use tracing_subscriber::{EnvFilter, fmt};

use crate::config::LogFormat;

/// Installs the process's log. `level` is a level or a filter directive of `tracing-subscriber`, for instance
/// `info,awsvid::cache=debug`.
pub fn init(level: &str, format: LogFormat) -> Result<(), ParseError> {
    let filter = EnvFilter::builder().parse(level)?;
    let text = match format {
        LogFormat::Text => true,
        LogFormat::Json => false,
        LogFormat::Auto => stderr().is_terminal(),
    };
    let lines = fmt::layer().with_writer(stderr);
    let lines = if text {
        lines.with_ansi(stderr().is_terminal()).with_target(false).boxed()
    } else {
        lines.json().flatten_event(true).boxed()
    };
    let subscriber = tracing_subscriber::registry().with(lines.with_filter(filter_fn(is_safe)).with_filter(filter));
    // An error means that a log is installed already, as in a test: that one stays.
    let _ = subscriber.try_init();
    Ok(())
}

/// Below `info` the libraries on the way to the source and to STS write out frames and headers, with tokens and secrets in
/// them. No setting lets that through.
fn is_safe(event: &Metadata<'_>) -> bool {
    event.target().split("::").next() == Some("awsvid") || *event.level() <= Level::INFO
}

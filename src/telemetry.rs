//! The daemon's log: standard error, text on a terminal, JSON elsewhere. Audit records go their own way (see `audit`).

use std::io::{IsTerminal, stderr};

use tracing::{Level, Metadata};
use tracing_subscriber::filter::{ParseError, filter_fn};
use tracing_subscriber::prelude::*;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use crate::config::LogFormat;

type Lines = Box<dyn Layer<Registry> + Send + Sync>;

/// The process's log, for changing it later.
pub struct Log(reload::Handle<Lines, Registry>);

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Log")
    }
}

/// Installs the process's log. `level` is a level or a filter directive of `tracing-subscriber`, for instance
/// `info,awsvid::cache=debug`.
pub fn init(level: &str, format: LogFormat) -> Result<Log, ParseError> {
    let (lines, handle) = reload::Layer::new(lines(level, format)?);
    // An error means that a log is installed already, as in a test: that one stays.
    let _ = tracing_subscriber::registry().with(lines).try_init();
    Ok(Log(handle))
}

impl Log {
    /// Goes on with another level and format.
    pub fn change(&self, level: &str, format: LogFormat) -> Result<(), ParseError> {
        // An error means that this log is not the one that is installed.
        let _ = self.0.reload(lines(level, format)?);
        Ok(())
    }
}

fn lines(level: &str, format: LogFormat) -> Result<Lines, ParseError> {
    let filter = EnvFilter::builder().parse(level)?;
    let text = match format {
        LogFormat::Text => true,
        LogFormat::Json => false,
        LogFormat::Auto => stderr().is_terminal(),
    };
    let lines = fmt::layer().with_writer(stderr);
    let lines: Lines = if text {
        lines.with_ansi(stderr().is_terminal()).with_target(false).boxed()
    } else {
        lines.json().flatten_event(true).boxed()
    };
    // As layers, not as filters of one layer: those can't be replaced while they are in use.
    Ok(lines.and_then(filter_fn(is_safe)).and_then(filter).boxed())
}

/// Below `info` the libraries on the way to the source and to STS write out frames and headers, with tokens and secrets in
/// them. No setting lets that through.
fn is_safe(event: &Metadata<'_>) -> bool {
    event.target().split("::").next() == Some("awsvid") || *event.level() <= Level::INFO
}

//! The daemon's log: standard error, text on a terminal, JSON elsewhere. Audit records go their own way (see `audit`).

use std::io::{IsTerminal, stderr};
use std::time::Duration;

use tokio::time::Instant;
use tracing::{Level, Metadata};
use tracing_subscriber::filter::{ParseError, filter_fn};
use tracing_subscriber::prelude::*;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use crate::config::LogFormat;

/// How many lines of one kind the log gets: some at once, and then one now and then, whatever happens how often.
#[derive(Debug)]
pub struct Quota {
    burst: u32,
    every: Duration,
    /// When all of them may be written at once again.
    full_again: Option<Instant>,
    missed: u64,
}

impl Quota {
    /// `burst` lines at once, of which one comes back each `every`.
    pub fn new(burst: u32, every: Duration) -> Self {
        Self { burst, every, full_again: None, missed: 0 }
    }

    /// Whether a line may be written now; if so, how many were left out since the last.
    pub fn take(&mut self) -> Option<u64> {
        let now = Instant::now();
        let full_again = self.full_again.map_or(now, |at| at.max(now)) + self.every;
        if full_again.duration_since(now) > self.every * self.burst {
            self.missed += 1;
            return None;
        }
        self.full_again = Some(full_again);
        Some(std::mem::take(&mut self.missed))
    }
}

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

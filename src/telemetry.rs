//! The daemon's log: standard error, text on a terminal, JSON elsewhere. Audit records have an
//! output of their own, see [`crate::audit`].
//!
//! A thread writes the lines ([`Writer`]), so a reader that stalls blocks no request. Lines that
//! find no room are counted.

use std::fs::File;
use std::io::{self, IsTerminal, Write, stderr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use tracing::{Level, Metadata};
use tracing_subscriber::filter::{ParseError, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::prelude::*;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use crate::config::LogFormat;
use crate::writer::{Line, LineLoss, LossObserver, Priority, Writer};

mod format;
mod request;
#[cfg(test)]
mod tests;

pub use request::{RequestId, RequestScope, in_current_request};

use format::{JsonLines, TextFields};

/// The longest time for which the end of the process waits for a slow reader of the log.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

type Lines = Box<dyn Layer<Registry> + Send + Sync>;

/// The process's log, for a reload that changes its level or format.
pub struct Log {
    handle: reload::Handle<Lines, Registry>,
    lines: LogDestination,
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Log")
    }
}

/// Installs the process's log. Lines wait in memory until the log is [started](Log::start).
///
/// `level` is a level or a filter directive of `tracing-subscriber`, for instance
/// `info,awsvid::cache=debug`. `lost` counts the lines that could not be written. Fails if `level`
/// is invalid.
pub fn init(level: &str, format: LogFormat, lost: Counter) -> Result<Log, ParseError> {
    let destination = LogDestination(Arc::new(Writer::new(Box::new(LostLines(lost)))));
    let (lines, handle) = reload::Layer::new(lines(level, format, destination.clone())?);
    // An error means that a log is installed already, as in a test. That one stays.
    let _ = tracing_subscriber::registry().with(lines).try_init();
    Ok(Log {
        handle,
        lines: destination,
    })
}

impl Log {
    /// Starts the thread that writes the log.
    ///
    /// Call it once, after the process has dropped the privileges that its threads must not have.
    /// Fails if no thread can be started.
    pub fn start(&self) -> io::Result<()> {
        self.lines.0.start(
            "awsvid-log",
            File::from(stderr().as_fd().try_clone_to_owned()?),
        )
    }

    /// Changes the level and the format of all later lines. Fails if `level` is invalid.
    pub fn change(&self, level: &str, format: LogFormat) -> Result<(), ParseError> {
        // An error means that this log is not the one that is installed.
        let _ = self
            .handle
            .reload(lines(level, format, self.lines.clone())?);
        Ok(())
    }

    /// Waits until all lines so far are written, at most one second. Call it before the
    /// process ends.
    pub fn flush(&self) {
        self.lines.0.flush(FLUSH_TIMEOUT);
    }
}

fn lines(level: &str, format: LogFormat, destination: LogDestination) -> Result<Lines, ParseError> {
    let filter = EnvFilter::builder().parse(level)?;
    let text = match format {
        LogFormat::Text => true,
        LogFormat::Json => false,
        LogFormat::Auto => stderr().is_terminal(),
    };
    let lines = fmt::layer().with_writer(destination);
    let lines: Lines = if text {
        lines
            .fmt_fields(TextFields)
            .with_ansi(stderr().is_terminal())
            .with_target(false)
            .boxed()
    } else {
        lines.event_format(JsonLines).boxed()
    };
    // These are layers, because filters of a layer cannot be replaced while they are in use.
    Ok(lines.and_then(filter_fn(is_safe)).and_then(filter).boxed())
}

/// Returns whether an event cannot contain a secret.
///
/// Below `info` the libraries for gRPC and HTTP log frames and headers, which contain tokens. No
/// setting enables those lines.
fn is_safe(event: &Metadata<'_>) -> bool {
    event.target().split("::").next() == Some("awsvid") || *event.level() <= Level::INFO
}

/// The writer of `tracing-subscriber`, which passes each formatted line to the thread.
#[derive(Clone)]
struct LogDestination(Arc<Writer>);

impl<'a> MakeWriter<'a> for LogDestination {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> &'a Self {
        self
    }
}

impl Write for &LogDestination {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let line = Line {
            bytes: bytes.to_vec(),
            stands_for: 1,
            owner: None,
            priority: Priority::High,
        };
        // The observer counts a line that finds no room.
        drop(self.0.push(line));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct LostLines(Counter);

impl LossObserver for LostLines {
    /// Counts the line and logs nothing, since that line would find no room either.
    fn lost(&self, _: &LineLoss) {
        self.0.inc();
    }

    fn over(&self, lines: u64) -> Vec<u8> {
        tracing::warn!(
            lines,
            "log lines were dropped: the reader of standard error stalled"
        );
        Vec::new()
    }
}

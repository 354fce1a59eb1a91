//! The daemon's log: standard error, text on a terminal, JSON elsewhere. Audit records go their own way (see `audit`).
//!
//! Lines are written by a thread ([`Writer`]): a reader that has stopped costs lines, which are counted, and stops nothing.

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
use crate::limits::TokenBucket;
use crate::writer::{Line, LineLoss, LossObserver, Priority, Writer};

/// How long the end of the process waits for a reader of the log that is slow.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// How many lines of one kind the log gets: some at once, and then one now and then, whatever happens how often.
#[derive(Debug)]
pub struct LogQuota {
    burst: u32,
    every: Duration,
    bucket: TokenBucket,
    missed: u64,
}

impl LogQuota {
    /// `burst` lines at once, of which one comes back each `every`.
    pub fn new(burst: u32, every: Duration) -> Self {
        Self {
            burst,
            every,
            bucket: TokenBucket::default(),
            missed: 0,
        }
    }

    /// Whether a line may be written now; if so, how many were left out since the last.
    pub fn take(&mut self) -> Option<u64> {
        if self.bucket.take(self.burst, self.every) {
            return Some(std::mem::take(&mut self.missed));
        }
        self.missed += 1;
        None
    }
}

type Lines = Box<dyn Layer<Registry> + Send + Sync>;

/// The process's log, for changing it later.
pub struct Log {
    handle: reload::Handle<Lines, Registry>,
    lines: LogDestination,
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Log")
    }
}

/// Installs the process's log, which is written once it is [started](Log::start). `level` is a level or a filter directive of
/// `tracing-subscriber`, for instance `info,awsvid::cache=debug`. `lost` counts the lines that could not be written.
pub fn init(level: &str, format: LogFormat, lost: Counter) -> Result<Log, ParseError> {
    let destination = LogDestination(Arc::new(Writer::new(Box::new(LostLines(lost)))));
    let (lines, handle) = reload::Layer::new(lines(level, format, destination.clone())?);
    // An error means that a log is installed already, as in a test: that one stays.
    let _ = tracing_subscriber::registry().with(lines).try_init();
    Ok(Log {
        handle,
        lines: destination,
    })
}

impl Log {
    /// Starts the thread that writes it; to be called once, when the process has given up the privileges that its threads are
    /// not to have.
    pub fn start(&self) -> io::Result<()> {
        self.lines
            .0
            .start("log", File::from(stderr().as_fd().try_clone_to_owned()?))
    }

    /// Goes on with another level and format.
    pub fn change(&self, level: &str, format: LogFormat) -> Result<(), ParseError> {
        // An error means that this log is not the one that is installed.
        let _ = self
            .handle
            .reload(lines(level, format, self.lines.clone())?);
        Ok(())
    }

    /// Waits until all lines so far are written, if the reader is not too slow: to be called before the process ends.
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
            .with_ansi(stderr().is_terminal())
            .with_target(false)
            .boxed()
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

/// Gives the writer each event as it is formatted, which is one line.
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
        // One that is lost is counted.
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
    /// Without a line, which would be lost, too.
    fn lost(&self, _: &LineLoss) {
        self.0.inc();
    }

    fn over(&self, lines: u64) -> Vec<u8> {
        tracing::warn!(
            lines,
            "lines of the log were lost: its reader was too slow, or had stopped"
        );
        Vec::new()
    }
}

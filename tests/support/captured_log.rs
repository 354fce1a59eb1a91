//! The log of a test, for assertions about it.

use std::io;
use std::sync::{Arc, Mutex};

/// Captures everything that any crate logs on this thread while it exists, at every level.
pub(crate) struct CapturedLog {
    lines: CapturedBytes,
    _until_dropped: tracing::subscriber::DefaultGuard,
}

#[derive(Clone, Default)]
struct CapturedBytes(Arc<Mutex<Vec<u8>>>);

impl io::Write for CapturedBytes {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl CapturedLog {
    pub(crate) fn start() -> Self {
        let lines = CapturedBytes::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_ansi(false);
        let subscriber = subscriber.with_writer(move || writer.clone()).finish();
        Self {
            lines,
            _until_dropped: tracing::subscriber::set_default(subscriber),
        }
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.lines.0.lock().unwrap()).into_owned()
    }
}

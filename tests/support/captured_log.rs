//! The log of a test, for assertions about it.

use std::io;
use std::sync::{Arc, Mutex, OnceLock};

use tracing::Dispatch;
use tracing::subscriber::NoSubscriber;

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
        count_all_logs();
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

/// Makes a line that any thread logs first count for the logs of all tests.
///
/// tracing decides once for each line whether any log wants it. While the process has one log, it
/// considers only the log of the thread that gets to the line first, which mostly has none. So two
/// logs that want nothing exist as long as the process. A test that captures lines calls this
/// before other tests can log them.
pub(crate) fn count_all_logs() {
    static OTHERS: OnceLock<[Dispatch; 2]> = OnceLock::new();
    OTHERS.get_or_init(|| [(); 2].map(|()| Dispatch::new(NoSubscriber::new())));
}

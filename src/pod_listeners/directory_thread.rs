//! A thread for calls that wait for the file system of the namespaces' directory (T25).
//!
//! Root can mount a file system there whose server does not reply, and so can a pod that may do
//! anything. The daemon then keeps the pods that it serves, and serves new ones once the file
//! system replies.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

/// The time for which the daemon waits for calls that take milliseconds.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// The thread. There is one at most, also while it is blocked.
#[derive(Debug)]
pub(super) struct DirectoryThread {
    free: Arc<Semaphore>,
}

impl DirectoryThread {
    pub(super) fn new() -> Self {
        Self {
            free: Arc::new(Semaphore::new(1)),
        }
    }

    /// Runs `calls` on the thread and returns their result.
    ///
    /// Fails with [`io::ErrorKind::TimedOut`] if they take longer than 5 s, and at once while the
    /// calls of an earlier failure are still blocked. The result of blocked calls is dropped.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        calls: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let permit = self.free.clone().try_acquire_owned();
        let permit = permit.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?;
        let (result, received) = oneshot::channel();
        thread::Builder::new()
            .name("awsvid-netnsdir".to_owned())
            .spawn(move || {
                let made = calls();
                drop(permit);
                let _ = result.send(made);
            })?;
        match timeout(CALL_TIMEOUT, received).await {
            Ok(received) => received.map_err(io::Error::other),
            Err(late) => Err(late.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn blocked_calls_stop_later_ones_until_they_return() {
        let thread = DirectoryThread::new();
        let (release, wait) = mpsc::channel::<()>();
        let kind = |result: io::Result<_>| result.map_err(|error| error.kind());
        tokio::time::pause();
        let blocked = thread.run(move || wait.recv().map_err(drop)).await;
        assert_eq!(kind(blocked), Err(io::ErrorKind::TimedOut));
        let rejected = thread.run(|| Ok(())).await;
        assert_eq!(kind(rejected), Err(io::ErrorKind::TimedOut));
        tokio::time::resume();
        release.send(()).unwrap();
        drop(thread.free.acquire().await.unwrap());
        assert_eq!(kind(thread.run(|| Ok(())).await), Ok(Ok(())));
    }
}
